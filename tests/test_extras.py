"""With each extra of setup.py alone a chat is answered, and a command that needs another one names it.

The environments are exact: folders of links to the packages that pip would install, and to none besides.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build_from
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import modeling_vikdf


ROOT = Path(modeling_vikdf.__file__).parents[1]
# What each command needs besides a model; the paths do not exist, which a command finds out behind its imports.
COMMANDS = {
    "train": [[stage, "--config", "{recipe}"] for stage in ("distill", "integrate", "tune", "prefer")],
    "eval": [
        ["shrink", "--data", "none.jsonl", "--validation", "none.jsonl", "--output", "out", "--model", "{model}"],
        ["evaluate", "--data", "none.jsonl", "--output", "out.json", "--model", "{model}"],
        ["retrieve", "--data", "none.tar", "--model", "{model}"],
        ["compare", "none.json", "nothing.json"],
        ["probe", "--data", "none.jsonl", "--output", "out.json"],
    ],
    "demo": [["index", "none", "--output", "out", "--model", "{model}"]],
    "serve": [["serve", "--model", "none/nothing"]],
}
SCRIPT = """
import json, sys
from modeling_vikdf.cli import main
ends = []
for command in json.loads(sys.argv[1]):
    try:
        main(command)
        ends.append("")
    except SystemExit as end:
        ends.append(str(end.code))
    except BaseException as error:
        ends.append(f"{type(error).__name__}: {error}")
print(json.dumps(ends))
"""


def requirements(extra: str | None) -> set[str]:
    """The packages that `pip install modeling_vikdf[extra]` brings, by their canonical names."""
    found, todo = set(), [("modeling_vikdf", {extra or ""})]
    while todo:
        name, extras = todo.pop()
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": each}) for each in extras | {""}
            )
            key = canonicalize_name(requirement.name), *sorted(requirement.extras)
            if wanted and key not in found:
                found.add(key)
                todo.append((requirement.name, set(requirement.extras)))
    return {name for name, *_ in found}


@pytest.fixture(scope="module")
def model(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in build_from(backbones, "qwen", "separate"):
        part.save_pretrained(folder)
    return folder


def environment(folder: Path, extra: str | None) -> Path:
    """A folder of links to what pip would install, and to this package."""
    for name in requirements(extra):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or CUDA's
        for top in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    for name in ("modeling_vikdf", "hub_cards", "vikdf_cli"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(packages: Path, folder: Path, *commands: list[str]) -> subprocess.CompletedProcess:
    """Runs commands one after the other in a process that has these packages alone; its last line is how they end."""
    return subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_what_needs_no_extra_needs_none(model, tmp_path):
    (tmp_path / "packages").mkdir()
    packages = environment(tmp_path / "packages", None)
    benchmark = ["benchmark", "generation", "--model", str(model), "--repeats", "1"]
    result = run(packages, tmp_path, benchmark, ["env"], ["benchmark", "training"])
    assert result.returncode == 0, result.stderr
    measured, told, trained = json.loads(result.stdout.splitlines()[-1])
    assert measured == told == ""
    assert trained.startswith("vikdf: 'benchmark' needs") and "modeling_vikdf[train]" in trained


@pytest.mark.parametrize("extra", [None, "default", "train", "eval", "demo", "serve"])
def test_an_extra_alone(extra, model, tmp_path):
    (tmp_path / "packages").mkdir()
    packages = environment(tmp_path / "packages", extra)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": {"checkpoint": str(model)}, "data": {"train": str(tmp_path / "none")}}))
    commands = [(each, command) for each, some in COMMANDS.items() for command in some]
    filled = [[word.format(model=model, recipe=recipe) for word in command] for _, command in commands]
    chat = ["chat", "--model", str(model), "--message", "I was at the beach.", "--max-new-tokens", "4"]
    result = run(packages, tmp_path, chat, *filled)
    assert result.returncode == 0, result.stderr
    answered, *ends = json.loads(result.stdout.splitlines()[-1])
    assert answered == "" and len(result.stdout.splitlines()) == 2  # the reply, and what is above

    for (needed, command), end in zip(commands, ends, strict=True):
        assert not end.startswith("ModuleNotFoundError"), (command, end)
        if needed == extra:  # its data is missing, no package
            assert end and "not installed" not in end and "No module" not in end, (command, end)
        elif "not installed" in end:
            assert end.startswith(f"vikdf: {command[0]!r} needs") and f"modeling_vikdf[{needed}]" in end
        else:
            assert "No module" not in end, (command, end)
    if extra is None:  # of these only what reads reports or items gets as far as its files without an extra
        told = {command[0] for (_, command), end in zip(commands, ends, strict=True) if "not installed" in end}
        assert told == {command[0] for _, command in commands} - {"compare", "probe"}
