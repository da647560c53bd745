"""transformers' own test suites for models, configurations and processors, of the version that is installed.

They are no part of the installed package. Its source distribution holds them, `python tests/common/suites.py` downloads
that into the environment, and `make test-common` runs them on this package's classes. The distribution holds the files
of the folder tests/ but none of its subfolders, so of these suites two are missing:

* generation (tests/generation/test_utils.py): runs where TRANSFORMERS_TESTS names the folder tests/ of a checkout;
* export (tests/exporters/test_export.py): likewise, and it is overridden as a whole, see overrides.py.
"""

import importlib
import os
import subprocess
import sys
import tarfile
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
    """Puts the suites of the installed transformers, and the packages they need, into `FOLDER`, unless they are there."""
    if (FOLDER / "tests").exists():
        return
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    requirements = Path(__file__).parents[2] / "requirements-common.txt"
    subprocess.run([*pip, "install", "--no-deps", "--target", FOLDER, "-r", requirements], check=True)
    with tempfile.TemporaryDirectory() as download:
        source = ["--no-deps", "--no-binary", "transformers", f"transformers=={version('transformers')}"]
        subprocess.run([*pip, "download", *source, "--dest", download], check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter="data")
        (tests,) = Path(download).glob("*/tests")
        (tests / "__init__.py").touch()
        tests.rename(FOLDER / "tests")


def suite(name: str) -> ModuleType:
    """A file of the suites, such as "test_modeling_common"; skips the tests that ask for it where there is none."""
    tests = os.environ.get("TRANSFORMERS_TESTS")
    if not tests or not (Path(tests) / "test_modeling_common.py").exists():
        pytest.skip(f"no test suites of transformers in TRANSFORMERS_TESTS={tests}", allow_module_level=True)
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
    download()
    print(FOLDER / "tests")
