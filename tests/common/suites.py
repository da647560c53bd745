"""transformers' own test suites for models, configurations and processors, of the version that is installed.

They are no part of the installed package. `python tests/common/suites.py` downloads its source distribution, which
holds them, into the environment, and `make test-common` runs them on this package's classes. It holds the files of
the folder tests/ and none of its subfolders, so two suites are missing: generation (tests/generation/test_utils.py)
and export (tests/exporters/test_export.py). They run where TRANSFORMERS_TESTS names the folder tests/ of a checkout.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest


PACKAGE = "transformers_suites"
FOLDER = Path(sys.prefix) / f"transformers-tests-{version('transformers')}"
# What the suites import and their source distribution lacks, and what stands for it.
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},  # for configurations without parts
}


def download() -> None:
    """Puts the suites and the packages that they need into `FOLDER`, unless they are there."""
    if (FOLDER / "tests").exists():
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    requirements = Path(__file__).parents[2] / "requirements-common.txt"
    subprocess.run([*pip, "install", "--no-deps", "--target", FOLDER, "-r", requirements], check=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as aside:
        source = ["--no-deps", "--no-binary", "transformers", f"transformers=={version('transformers')}"]
        subprocess.run([*pip, "download", *source, "--dest", aside], check=True)
        (archive,) = Path(aside).glob("*.tar.gz")
        shutil.unpack_archive(archive, aside)
        (tests,) = Path(aside).glob("*/tests")
        (tests / "__init__.py").touch()  # the suite for configurations asks for it
        tests.rename(FOLDER / "tests")


def suite(name: str) -> ModuleType:
    """A file of the suites, such as "test_modeling_common"; skips the tests that ask for it where there is none."""
    tests = os.environ.get("TRANSFORMERS_TESTS")
    if not tests:
        reason = "TRANSFORMERS_TESTS names no folder with transformers' test suites; `make test-common` downloads them"
        pytest.skip(reason, allow_module_level=True)
    if PACKAGE not in sys.modules:
        sys.path.append(str(Path(tests).parent))  # the packages that they need lie beside them
        _module(PACKAGE).__path__ = [tests]
        for missing, content in MISSING.items():
            if not (Path(tests) / missing.replace(".", "/")).with_suffix(".py").exists():
                _module(f"{PACKAGE}.{missing.partition('.')[0]}")
                vars(_module(f"{PACKAGE}.{missing}")).update(content)
        _module("fetch_hub_objects_for_ci").url_to_local_path = lambda url: url
    return importlib.import_module(f"{PACKAGE}.{name}")


def _module(name: str) -> ModuleType:
    return sys.modules.setdefault(name, ModuleType(name))


if __name__ == "__main__":
    try:
        download()
    except subprocess.CalledProcessError as error:
        sys.exit(f"transformers' test suites cannot be had here: {error}")
    print(FOLDER / "tests")
