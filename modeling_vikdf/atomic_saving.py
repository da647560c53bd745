"""Saves that replace a folder's files as a whole or not at all, wherever the process that saves is killed.

A save is many files, and no file system replaces many at once. So one of them, the head (`config.json` of a model,
`processor_config.json` of a processor), says where the others are:

    1. the whole save is written into the sub-folder `.saving-<head>-<unique>` and flushed to the disk;
    2. one rename replaces the head by a copy that names this sub-folder, `"saved_in"`: now the new save is what loads;
    3. its files are linked to their own places, and what an earlier save left there without a successor is removed;
    4. one rename replaces the head by the plain one: now the new save loads from its own places;
    5. the sub-folder is removed.

A save of model and processor together has one head, `config.json`; then that says where the processor is, too.

Killed before step 2, the old save loads; killed after it, the new one, from the sub-folder as long as that is named.
Nothing has to be repaired before loading, so folders may be read-only. The next save finishes what a killed one left.

This module knows files, not models.
"""

import contextlib
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


# head of a save -> what an earlier one may have left and the new one not replaced
HEADS = {
    "config.json": ("model*.safetensors*", "generation_config.json", "adapter/*"),
    "processor_config.json": (
        "tokenizer*",
        "vocab.*",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template*",
        "additional_chat_templates/*",
        "context_tokenizer/*",
    ),
}
SAVED_IN = "saved_in"


@contextlib.contextmanager
def replace_files(folder: str | os.PathLike, head: str) -> Iterator[str]:
    """
    For the time of a save gives an empty folder to write into; then `folder` holds what was written, and nothing of
    the earlier save. Files of others stay. An exception leaves the earlier save, or the complete new one.

    Args:
        folder: where the save belongs; created if it does not exist.
        head: one of `HEADS`, the file that the save cannot do without. A save without it changes nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for each in HEADS:
        _finish(folder, each)
    aside = folder / f".saving-{head}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield str(aside)
        if (aside / head).exists():
            _commit(aside, head)
        _finish(folder, head)
    except BaseException:
        _finish(folder, head)
        raise


def saved_in(folder: str | os.PathLike, head: str) -> str:
    """
    The sub-folder in which the current save of `head` is, where its own place does not hold it yet; else "".

    Raises:
        FileNotFoundError: if that sub-folder is missing.
        ValueError: if a head names another folder than a save makes.
    """
    for each in ("config.json", head):  # the first may be of a save of both
        if not (name := _pointer(folder, each)):
            continue
        if not Path(folder, name).is_dir():
            raise FileNotFoundError(
                f"{os.fspath(folder)} was saved by a process that was killed, and the sub-folder {name!r} that its "
                f"{each} names is missing. Was it copied without hidden files? Copy it whole, or save again."
            )
        if Path(folder, name, head).is_file():
            return name
    return ""


def _pointer(folder: str | os.PathLike, head: str) -> str:
    """The sub-folder that a head names, or ""."""
    try:
        fields = json.loads(Path(folder, head).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none that any loader reads
        return ""
    return check_saved_in(fields.get(SAVED_IN), head) if isinstance(fields, dict) else ""


def check_saved_in(name: str | None, head: str) -> str:
    """A head's entry "saved_in", or "" without one; raises `ValueError` if it leads elsewhere than a save's would."""
    if name is not None and (os.path.basename(name) != name or not name.startswith(f".saving-{head}-")):
        raise ValueError(f"{head} names {name!r} as the folder of an unfinished save, which is not beside it.")
    return name or ""


def _commit(aside: Path, head: str) -> None:
    """Steps 1 and 2: from now on the new save is what loads."""
    fields = json.loads((aside / head).read_text(encoding="utf-8"))
    pointer = _temporary(aside.parent, head)
    pointer.write_text(json.dumps({**fields, SAVED_IN: aside.name}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in (pointer, *aside.rglob("*"), aside):
        _flush(path)
    os.replace(pointer, aside.parent / head)
    _flush(aside.parent)


def _finish(folder: Path, head: str) -> None:
    """Steps 3 to 5, from wherever they were interrupted; and what was never committed is removed."""
    aside = folder / _pointer(folder, head)
    if aside != folder and aside.is_dir():
        names = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
        for name in sorted(names - {head}):
            _link(aside, folder, name, head)
        for pattern in (pattern for each in HEADS if each in names for pattern in HEADS[each]):
            for path in folder.glob(pattern):
                if path.is_file() and path.relative_to(folder).as_posix() not in names:
                    path.unlink()
        _flush(folder)
        _link(aside, folder, head, head)
        _flush(folder)
    for name in os.listdir(folder):
        # also what versions left that called it differently
        if name.startswith(f".saving-{head}-") or fnmatch.fnmatch(name, ".saving-????????"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _link(aside: Path, folder: Path, name: str, head: str) -> None:
    """Puts a file of a save into its own place, in one rename; its contents are not copied where links are known."""
    temporary = _temporary(folder, head)
    temporary.unlink(missing_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(aside / name, temporary)
    except OSError:
        shutil.copyfile(aside / name, temporary)
        _flush(temporary)
    os.replace(temporary, folder / name)


def _temporary(folder: Path, head: str) -> Path:
    return folder / f".saving-{head}-file"


def _flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, survives a power cut."""
    if os.name == "nt":  # knows neither folders nor files open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["HEADS", "check_saved_in", "replace_files", "saved_in"]
