"""What is built: all that the package needs without its checkout, and nothing of an earlier build."""

import ast
import graphlib
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

import pytest

import modeling_vikdf


ROOT = Path(__file__).parents[1]


def setup(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "setup.py", "--quiet", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what setup.py reads, but for the packaged checkpoint and its megabytes."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hub_cards", "configs", "modeling_vikdf", "vikdf_cli"):
        ignored = shutil.ignore_patterns("default_checkpoint", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


def built(checkout: Path) -> set[str]:
    library = checkout / "build" / "lib"
    return {path.relative_to(library).as_posix() for path in library.rglob("*") if path.is_file()}


def test_the_build_holds_the_recipes_the_command_and_the_mark_of_types(checkout):
    setup(checkout, "build_py")
    files = built(checkout)
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "study"}
    assert {f"modeling_vikdf/{path.as_posix()}" for path in configs} <= files
    assert {"vikdf_cli/commands.py", "modeling_vikdf/py.typed", "modeling_vikdf/__main__.py"} <= files
    assert not [name for name in files if "study" in name or "tests" in name]


def test_a_second_build_holds_nothing_of_the_first(checkout):
    setup(checkout, "build_py")
    gone = {"modeling_vikdf/benchmark.py", "modeling_vikdf/configs/smoke.yaml"}
    assert gone <= built(checkout)
    (checkout / "modeling_vikdf" / "benchmark.py").unlink()
    (checkout / "configs" / "smoke.yaml").unlink()
    setup(checkout, "build_py")
    assert not gone & built(checkout)


def test_a_build_elsewhere_removes_nothing_there(checkout):
    (checkout / "elsewhere").mkdir()
    (checkout / "elsewhere" / "notes").touch()
    setup(checkout, "build_py", "--build-lib", "elsewhere")
    assert (checkout / "elsewhere" / "notes").exists() and (checkout / "elsewhere" / "vikdf_cli").exists()


def test_the_metadata_say_who_what_and_where(checkout):
    setup(checkout, "egg_info", "--egg-base", ".")
    metadata = HeaderParser().parsestr((checkout / "modeling_vikdf.egg-info" / "PKG-INFO").read_text(encoding="utf-8"))
    assert metadata["Version"] == modeling_vikdf.__version__  # both are written by hand
    for name in ("Author", "Keywords", "Project-URL", "Summary"):
        assert metadata[name], name
    assert {"track", "completion"} <= set(metadata.get_all("Provides-Extra"))


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, at the top or within a function."""
    package = path.relative_to(ROOT).parts[:-1]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            imported |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    # the package's own __init__ registers the classes, and is imported before anything in it
    return imported & modules - {"modeling_vikdf"}


def test_imports_have_no_circle():
    paths = [path for folder in ("modeling_vikdf", "vikdf_cli") for path in (ROOT / folder).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    graph = {name: imports_of(path, {*names.values()}) - {name} for path, name in names.items()}
    assert sum(map(len, graph.values())) > 50
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle


FOLDERS = ("modeling_vikdf", "vikdf_cli", "spaces_demo", "eval")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_can_be_read_at_a_glance(path):
    """At most 600 lines a file, and 80 a function, its docstring among them."""
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 600
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    assert not {node.name: node.end_lineno - node.lineno + 1 for node in nodes if node.end_lineno - node.lineno >= 80}
