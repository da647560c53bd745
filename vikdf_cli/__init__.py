"""The command line `vikdf`: its commands are in commands.py, how they are declared and read in parsing.py.

It is beside the package and imports it only when a command runs: transformers' Auto classes can only register classes,
not names, so importing any part of the package imports PyTorch; help and completion would take seconds.

Knows how libraries are imported, and exit codes.
"""

import contextlib
import gc
import importlib
import sys

from . import commands  # noqa: F401, whose import declares them
from .parsing import COMMANDS, build_parser


def import_package() -> None:
    """
    Imports the package without the garbage collector.

    Imports make no garbage but a million objects that stay: looking through them again and again would take a fifth
    of the start, and as long once more at the end.
    """
    if "modeling_vikdf" in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module("modeling_vikdf")
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Hides progress bars of loading weights, but not of downloads, which take long."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    enabled = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # also huggingface_hub's
    if enabled:
        enable_progress_bars()


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script `vikdf`."""
    parser = build_parser()
    with contextlib.suppress(ImportError):  # completion needs the extra
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    extra = COMMANDS[args.command].extra
    try:
        if args.command != "version":  # which needs none of these libraries
            import_package()
            quiet_libraries()
        COMMANDS[args.command].run(args)
    except ModuleNotFoundError as error:
        if extra is None:
            raise  # not part of any extra
        sys.exit(
            f"vikdf: {args.command!r} needs {error.name!r}, which is not installed. It comes with: "
            f'pip install "modeling_vikdf[{extra}]"'
        )
    except RecursionError:
        sys.exit("vikdf: a file is nested too deeply to be read; expected flat JSON or YAML.")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"vikdf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
