"""Atomic saving: a folder's files are replaced as a whole or not at all, even if the saving process is killed.

A save is many files, and no file system replaces many at once. So one of them, the head (`config.json` of a model,
`processor_config.json` of a processor), points to the others:

    1. the whole save is written into the sub-folder `.saving-<head>-<unique>` and flushed to disk;
    2. one rename replaces the head by a copy that names this sub-folder in `"saved_in"`: the new save now loads;
    3. its files are linked into the folder itself, and files of the earlier save without a successor are removed;
    4. one rename replaces the head by the plain one: the new save now loads from the folder itself;
    5. the sub-folder is removed.

A save of model and processor together has one head, `config.json`, which then points to both.

Killed before step 2, the old save loads; killed after it, the new one, from the sub-folder while the head names it.
Loading repairs nothing, so folders may be read-only. The next save finishes an interrupted one.

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


# head of a save -> files of an earlier save that the new one may not replace
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
    Yields an empty folder to write a save into, which then replaces the earlier save in `folder`.

    Other files in `folder` are kept. An exception leaves either the earlier save or the complete new one.

    Args:
        folder: where the save belongs; created if it does not exist.
        head: the required file of the save, one of `HEADS`. A save without it changes nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in HEADS:
        _finish(folder, name)
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
    The sub-folder that holds the save of `head` if that is unfinished; "" if it is in `folder` itself.

    Raises:
        FileNotFoundError: if that sub-folder is missing.
        ValueError: if a head names a folder that no save creates.
    """
    for pointing in ("config.json", head):  # the first may belong to a save of both
        if not (name := _pointer(folder, pointing)):
            continue
        if not Path(folder, name).is_dir():
            raise FileNotFoundError(
                f"{os.fspath(folder)} was saved by a process that was killed, and the sub-folder {name!r} that its "
                f"{pointing} names is missing. Was it copied without hidden files? Copy it whole, or save again."
            )
        if Path(folder, name, head).is_file():
            return name
    return ""


def _pointer(folder: str | os.PathLike, head: str) -> str:
    """The sub-folder that a head names, or ""."""
    try:
        fields = json.loads(Path(folder, head).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or unreadable for any loader
        return ""
    return check_saved_in(fields.get(SAVED_IN), head) if isinstance(fields, dict) else ""


def check_saved_in(name: str | None, head: str) -> str:
    """A head's entry "saved_in", or "" without one; raises a ValueError unless it names a save's own sub-folder."""
    if name is not None and (os.path.basename(name) != name or not name.startswith(f".saving-{head}-")):
        raise ValueError(f"{head} names {name!r} as the folder of an unfinished save, which is not beside it.")
    return name or ""


def _commit(aside: Path, head: str) -> None:
    """Steps 1 and 2: from now on the new save is loaded."""
    fields = json.loads((aside / head).read_text(encoding="utf-8"))
    pointer = _temporary(aside.parent, head)
    pointer.write_text(json.dumps({**fields, SAVED_IN: aside.name}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in (pointer, *aside.rglob("*"), aside):
        _flush(path)
    os.replace(pointer, aside.parent / head)
    _flush(aside.parent)


def _finish(folder: Path, head: str) -> None:
    """Steps 3 to 5, wherever they were interrupted; also removes uncommitted saves."""
    aside = folder / _pointer(folder, head)
    if aside != folder and aside.is_dir():
        names = {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()}
        for name in sorted(names - {head}):
            _link(aside, folder, name, head)
        for pattern in (pattern for saved_head in HEADS if saved_head in names for pattern in HEADS[saved_head]):
            for path in folder.glob(pattern):
                if path.is_file() and path.relative_to(folder).as_posix() not in names:
                    path.unlink()
        _flush(folder)
        _link(aside, folder, head, head)
        _flush(folder)
    for name in os.listdir(folder):
        # also those of earlier versions, which had other names
        if name.startswith(f".saving-{head}-") or fnmatch.fnmatch(name, ".saving-????????"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _link(aside: Path, folder: Path, name: str, head: str) -> None:
    """Moves a file of a save into the folder by one rename, as a hard link where these are supported, else a copy."""
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
    """Flushes a file's content, or a folder's names, to disk."""
    if os.name == "nt":  # can flush neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["HEADS", "check_saved_in", "replace_files", "saved_in"]
