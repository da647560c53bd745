"""How commands are declared, and how a command line is read: words close to a mistyped one are suggested.

Knows no command.
"""

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn


class Command(NamedTuple):
    """A command: its help text, its options, its function, and the extra of setup.py that it needs."""

    help: str
    options: tuple[Callable, ...]
    run: Callable[[argparse.Namespace], None]
    extra: str | None


COMMANDS: dict[str, Command] = {}


def command(help: str, *options: Callable, name: str | None = None, extra: str | None = None) -> Callable:
    """Declares the decorated function as a command, under its own name or `name`; declarations can be stacked."""

    def declare(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
        COMMANDS[name or run.__name__] = Command(help, options, run, extra)
        return run

    return declare


def option(*names: str, **settings: Any) -> Callable:
    """An option or positional argument, with the arguments of `ArgumentParser.add_argument`."""
    return lambda parser: parser.add_argument(*names, **settings)


def one_of(*options: Callable) -> Callable:
    """Mutually exclusive options."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for add_option in options:
            add_option(group)

    return add


def suggest(word: str, known: Iterable[str]) -> str:
    """An error message's ending that suggests the known word closest to a mistyped one; "" if none is close."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; for {word!r}, did you mean {nearest[0]!r}?" if nearest else ""


class Parser(argparse.ArgumentParser):
    """A parser that suggests the closest command, choice or option for a mistyped one."""

    words: Sequence[str] = ()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in the base class, but reports unknown arguments with the usage of the command, not of `vikdf`."""
        self.words = sys.argv[1:] if args is None else args
        namespace, unknown = super().parse_known_args(self.words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Exits with the usage, the error, and a suggestion if a word is close."""
        if choice := re.search(r"invalid choice: '(.+?)' \(choose from (.+?)\)", message):
            message += suggest(choice[1], re.findall(r"[\w-]+", choice[2]))
        options = re.findall(r"--[\w-]+", self.format_usage())
        for word in itertools.takewhile("--".__ne__, self.words):
            name = word.partition("=")[0]
            if re.match("--?[a-z]", name) and not any(known.startswith(name) for known in options):
                message += suggest(name, options)
        super().error(message)


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="vikdf",
        description="Visual common sense for a frozen chat LLM.",
        epilog='Tab completion in bash or zsh: pip install "modeling_vikdf[completion]", then '
        'eval "$(register-python-argcomplete vikdf)".',
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, declared in COMMANDS.items():
        sub = commands.add_parser(name, help=declared.help, description=declared.run.__doc__)
        for add in declared.options:
            add(sub)
    return parser
