"""Sources of examples and their file formats: globs, URLs, Hub datasets; tar archives and JSON Lines.

    find_sources -> paths and datasets -> read_tar, read_records -> members and records -> stream_shards -> a stream

Unreadable data is skipped and recorded in a `SkipReport`. This module knows files and how they can be damaged; it does
not know what a pair or a dialogue is (pairs.py, dialogues.py), nor any tokenizer, model or batch.
"""

import codecs
import contextlib
import copy
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import socket
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import torch
from datasets import Dataset, Features, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers.utils import logging

from ..backbones import may_be_on_hub
from ..processing_vikdf import MAX_PICTURE_BYTES


logger = logging.get_logger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")
MAX_TEXT_BYTES = 2**24  # of a caption file, and of a line of JSON
SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_PICTURE_BYTES) | dict.fromkeys(TEXT_EXTENSIONS, MAX_TEXT_BYTES)
HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")
FILE_SUFFIX = re.compile(r"(\.tar|\.tgz|\.jsonl?)?(\.gz|\.bz2|\.xz|\.zst)?$")
EXTENDED_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
# First bytes of a file -> its format; no text begins with them.
SIGNATURES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
HTTP_HEADERS = {"User-Agent": "modeling_vikdf"}  # some servers refuse urllib's own
HTTP_TIMEOUT = 30.0  # seconds without receiving a byte
RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds before each retry of a URL
ONCE_EACH = "all_exhausted_without_replacement"


class SkipReport:
    """Counts skipped data by reason, over all processes that share its folder: ranks and DataLoader workers.

    Each process appends to a file of its own, line by line, so that nothing is lost if it is killed. Data skipped
    repeatedly, in another epoch or on another rank, counts once. The first three of each reason are logged at once;
    logging `summary()` is up to the caller.

    Args:
        folder: Where to write, on a disk that the processes share; by default a temporary folder, created on demand.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder or Path(tempfile.gettempdir(), f"vikdf-skipped-{uuid.uuid4().hex}"))
        self._logged: dict[str, int] = {}
        self._file, self._owner = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": None}  # open files cannot be pickled

    def add(self, reason: str, key: str, detail: str = "") -> None:
        """Records that the example, file or shard `key` was skipped."""
        key = key.encode(errors="backslashreplace").decode()  # file names may contain any bytes
        self._logged[reason] = self._logged.get(reason, 0) + 1
        if self._logged[reason] <= 3:
            further = f"; further ones are only recorded in {self.folder}" if self._logged[reason] == 3 else ""
            logger.warning(f"Skipped {key}: {reason}{f' ({detail})' if detail else ''}{further}.")
        try:
            if self._owner != os.getpid():  # the first time, and in a fork
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
                self._file, self._owner = open(path, "a", encoding="utf-8", buffering=1), os.getpid()
                weakref.finalize(self, self._file.close)
            self._file.write(json.dumps({"reason": reason, "key": key, "detail": detail[:300]}) + "\n")
        except OSError as error:  # neither a full disk nor a damaged image may end the run
            logger.warning(f"Skipped {key}: {reason}, which cannot be recorded in {self.folder}: {error}")

    def skipped(self) -> dict[str, dict[str, str]]:
        """Reason -> key -> detail of everything skipped so far."""
        details: dict[str, dict[str, str]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    entry = json.loads(line)
                    details.setdefault(entry["reason"], {})[entry["key"]] = entry["detail"]
        return details

    def counts(self) -> dict[str, int]:
        """Reason -> number of distinct examples, lines or shards skipped for it."""
        return {reason: len(keys) for reason, keys in self.skipped().items()}

    def summary(self, num_examples: int = 3) -> str:
        """One line per reason, with its count and up to `num_examples` keys; or "Skipped nothing."."""
        lines = []
        for reason, keys in sorted(self.skipped().items()):
            examples = itertools.islice(keys.items(), num_examples)
            examples = [key + (f" ({detail})" if detail else "") for key, detail in examples]
            more = ", ..." if len(keys) > len(examples) else ""
            lines.append(f"  {len(keys)} x {reason}: {', '.join(examples)}{more}")
        return "\n".join(["Skipped:", *lines]) if lines else "Skipped nothing."


# ---- finding sources ----


def expand_braces(pattern: str) -> list[str]:
    """Expands `{00..12}` (leading zeros are kept, both ends included) and `{a,b}` as a shell does."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        values = choices.split(",")
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        values = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for value in values for path in expand_braces(before + value + after)]


def find_sources(source: Any, split: str) -> tuple[list[str], list[tuple[str, IterableDataset]]]:
    """Resolves a source, or nested lists of sources.

    Args:
        source: A path, glob, brace range, URL, Hub dataset or an object of `datasets`.
        split: The split of Hub datasets.

    Returns:
        The paths of files, image folders and URLs without duplicates, and (name, dataset) of each dataset.

    Raises:
        FileNotFoundError: If a file, folder or Hub dataset does not exist.
    """
    paths: list[str] = []
    hub: list[tuple[str, IterableDataset]] = []
    for item in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(item, (list, tuple)):
            nested_paths, nested_hub = find_sources(item, split)
            paths += nested_paths
            hub += nested_hub
        elif isinstance(item, IterableDataset):
            hub.append((item.info.dataset_name or "dataset", item))
        elif isinstance(item, Dataset):
            hub.append((item.info.dataset_name or "dataset", item.to_iterable_dataset()))
        else:
            item = os.path.expanduser(os.fspath(item))
            is_id = HUB_ID.fullmatch(item) and "://" not in item and not FILE_SUFFIX.search(item)[0]
            if is_id and not os.path.exists(item):
                hub.append((item, _open_hub(item, split)))
            else:
                paths += _find_files(item)
    return list(dict.fromkeys(paths)), hub


def _find_files(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    paths = []
    for path in expand_braces(pattern):
        matches = [path] if "://" in path or os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileNotFoundError(f"There is no file {path!r}, as required by {pattern!r}.")
        paths += matches
    return paths


def _open_hub(source: str, split: str) -> IterableDataset:
    dataset = HUB_ID.fullmatch(source).groupdict()
    # only Hub datasets have configurations and revisions
    if not (dataset["name"] or dataset["revision"] or may_be_on_hub(dataset["path"])):
        raise FileNotFoundError(f"There is no file or folder {source!r}, and Hub datasets are named ORG/NAME.")
    try:
        return datasets.load_dataset(**dataset, split=split, streaming=True)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no file or folder {source!r}, and it cannot be loaded as a Hub dataset: {error}"
        ) from error


def name_files(paths: list[str]) -> dict[str, str]:
    """A short unique name for every path, for keys: the file's without suffix, or the path if these collide."""
    stems = [FILE_SUFFIX.sub("", os.path.basename(path.split("?")[0].rstrip("/"))) for path in paths]
    return dict(zip(paths, stems if len(set(stems)) == len(set(paths)) else paths, strict=True))


def find_column(dataset: IterableDataset, wanted: str | None, usual: tuple[str, ...], name: str, argument: str) -> str:
    """The column `wanted`, or by default the first of the `usual` ones that the dataset has.

    Args:
        dataset: The dataset.
        wanted: A column's name, or None.
        usual: Usual names, in order of preference.
        name: The dataset's name in errors.
        argument: The argument by which the caller chooses a column, for errors.

    Raises:
        ValueError: If there is no such column.
    """
    columns = dataset.column_names or []
    column = next((column for column in ([wanted] if wanted else usual) if column in columns), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {columns}, and none of them is named {wanted or ' or '.join(usual)}. "
            f"Choose one by {argument}=."
        )
    return column


def stream_shards(generate: Callable, shards: list[tuple], features: Features, report: SkipReport) -> IterableDataset:
    """The rows that `generate(shards, report)` yields, as a stream that can be split by shards."""
    gen_kwargs = {"shards": shards, "report": report}  # a list is what `datasets` shuffles and splits
    return IterableDataset.from_generator(generate, features=features, gen_kwargs=gen_kwargs)


def map_or_drop(dataset: IterableDataset, function: Callable, features: Features, **fn_kwargs: Any) -> IterableDataset:
    """Maps the rows by `function`, and drops those for which it returns None."""
    fn_kwargs = {"function": function, **fn_kwargs}
    columns = dataset.column_names
    settings = {"batched": True, "batch_size": 1, "remove_columns": columns, "features": features}
    return dataset.map(_apply_or_drop, fn_kwargs=fn_kwargs, **settings)


def _apply_or_drop(rows: dict[str, list], function: Callable, **kwargs: Any) -> dict[str, list]:
    row = function({column: values[0] for column, values in rows.items()}, **kwargs)
    return {column: [value] for column, value in row.items()} if row else {}


def interleave(streams: list[IterableDataset], **settings: Any) -> IterableDataset:
    """Mixes streams by `datasets.interleave_datasets` with these settings; a ValueError for none."""
    if not streams:
        raise ValueError("No sources were given.")
    return datasets.interleave_datasets(streams, **settings) if len(streams) > 1 else streams[0]


def require_example(stream: IterableDataset, sources: list[str], report: SkipReport) -> None:
    """Raises a ValueError that names the sources if the stream has no example."""
    if next(iter(stream), None) is None:
        names = ", ".join(sources[:5]) + (", ..." if len(sources) > 5 else "")
        raise ValueError(f"Nothing is readable in at least one of: {names}. {report.summary()}")


# ---- reading files ----


def _open(path: str) -> Any:
    """A regular file or a URL, opened for reading bytes."""
    if path.startswith(("http://", "https://")):
        return urllib.request.urlopen(urllib.request.Request(path, headers=HTTP_HEADERS), timeout=HTTP_TIMEOUT)
    if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    return fsspec.open(path, "rb") if "://" in path else open(path, "rb")


def _signature(file: Any) -> str:
    """A file's format by its first bytes, or "" if these are not in `SIGNATURES`."""
    head = file.read(max(map(len, SIGNATURES)))
    file.seek(0)
    return next((name for signature, name in SIGNATURES.items() if head.startswith(signature)), "")


# ---- tar archives ----


class UnusedFiles:
    """Reports files that belong to no pair, one per extension, because there may be one beside every picture."""

    def __init__(self, name: str, report: SkipReport):
        self.name, self.report, self.kinds = name, report, set()

    def add(self, file_name: str, why: str = "") -> None:
        """Reports a file, unless another with its extension has been reported."""
        kind = f"*{posixpath.splitext(file_name)[1].lower()}"
        if kind not in self.kinds:
            self.kinds.add(kind)
            self.report.add("part of no pair", f"{self.name}/{kind}", f"such as {file_name}{why}")


def read_tar(path: str, part: int, parts: int, unused: UnusedFiles) -> Iterator[tuple[int, str, bytes]]:
    """The pictures and texts in one part of a tar archive.

    Args:
        path: A file or URL.
        part: Which part, from 0.
        parts: Number of parts; consecutive files of one name up to the first dot are a group, and every `parts`-th
            group belongs to one part.
        unused: Reports the other files.

    Yields:
        (number of the group, file name, content).

    Raises:
        OSError, ValueError, tarfile.TarError: If the archive is damaged, truncated or of another format.
    """
    mode = "r|*" if "://" in path else "r:*"  # URLs are read sequentially
    with _open(path) as file:
        if mode == "r:*" and (kind := _signature(file)) in ("zstd", "zip", "UTF-16"):
            raise ValueError(f"it is {kind}; a shard must be a tar archive, plain or in gzip, bzip2 or xz")
        with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictTarInfo) as tar:
            number, previous, member = -1, None, None
            for member in itertools.filterfalse(tarfile.TarInfo.isdir, tar):
                file_name = member.name.removeprefix("./")
                folder, _, base = file_name.rpartition("/")
                if member.isfile() and (stem := base.partition(".")[0]):
                    number += (folder, stem) != previous
                    previous = folder, stem
                    if number % parts == part and _is_readable(member, file_name, unused):
                        yield number, file_name, tar.extractfile(member).read()
                elif part == 0:
                    _report_odd_member(member, file_name, unused)
            if member is None and part == 0:
                raise ValueError("it holds no files")


def _is_readable(member: tarfile.TarInfo, file_name: str, unused: UnusedFiles) -> bool:
    """Whether a file is a picture or text, and not too large; reported otherwise."""
    limit = SIZE_LIMITS.get(posixpath.splitext(file_name)[1][1:].lower())
    if limit is None:
        unused.add(file_name)
    elif member.size > limit:
        unused.report.add("too large", f"{unused.name}/{file_name}", f"{member.size} bytes; at most {limit} are read")
    return limit is not None and member.size <= limit


def _report_odd_member(member: tarfile.TarInfo, file_name: str, unused: UnusedFiles) -> None:
    if member.isfile():
        unused.add(file_name, ", a hidden file")
    else:
        what = f"a link to {member.linkname}" if member.islnk() or member.issym() else "a device or pipe"
        unused.report.add("no regular file", f"{unused.name}/{file_name}", what)


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where `tarfile` would assume the archive's end: at a damaged header, or where the file ends early."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            member = super().frombuf(buf, encoding, errors)
            if member.type in EXTENDED_HEADERS and member.size > MAX_TEXT_BYTES:  # `tarfile` reads these into memory
                raise tarfile.ReadError(f"has a header of {member.size} bytes")
            return member
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the zeros that mark the end
                raise
            raise tarfile.ReadError(f"is truncated or damaged ({error})") from error


# ---- JSON Lines ----


def read_records(
    name: str, path: str, report: SkipReport, required: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(NAME:line, JSON object) of each line of a JSON Lines file; invalid lines are reported.

    Args:
        name: The file's name in keys.
        path: A file or URL, plain or in gzip.
        report: Records lines and files that cannot be read.
        required: A field that every object must have.
    """
    for number, line in read_with_retries(lambda: _read_lines(path), name, path, report):
        if record := _parse(line, f"{name}:{number}", report, required):
            yield f"{name}:{number}", record


def _read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines of a JSON Lines file, plain or in gzip, numbered from 1."""
    with _open(path) as file:
        # Reading all at once fails if the connection breaks; reading line by line would see the end of the file.
        file = io.BytesIO(file.read()) if "://" in path else file
        file = gzip.open(file) if _signature(file) == "gzip" else file
        if kind := _signature(file):
            raise ValueError(f"it is {kind}; expected JSON Lines in UTF-8, plain or in gzip once")
        lines = _number_lines(file)
        first = list(itertools.islice(lines, 2))
        if not first:
            raise ValueError("it is empty")
        if _begins_document([line for _, line in first]):
            raise ValueError("it is one JSON document, not one object per line (JSON Lines): jq -c '.[]' converts it")
        yield from itertools.chain(first, lines)


def _number_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """The non-blank lines, numbered from 1; lines that are too long are cut just beyond the limit."""
    for number in itertools.count(1):
        rest = line = file.readline(MAX_TEXT_BYTES + 1)
        while len(line) > MAX_TEXT_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_TEXT_BYTES)
        if not line:
            return
        if line.strip():
            yield number, line


def _begins_document(lines: list[bytes]) -> bool:
    """Whether the first one or two lines begin a JSON array, or an object that spans several lines."""
    start = lines[0].removeprefix(codecs.BOM_UTF8).strip()
    if not start.startswith(b"["):
        return start == b"{"
    try:
        json.loads(start)
    except (ValueError, RecursionError):
        return True
    return len(lines) == 1


def read_with_retries(
    read: Callable[[], Iterator[tuple]], name: str, path: str, report: SkipReport
) -> Iterator[tuple]:
    """Yields the items of `read()`, resuming a URL after errors; what remains unreadable is reported."""
    done, delays = 0, iter(RETRY_DELAYS)
    while True:
        before = done
        try:
            for item in itertools.islice(read(), done, None):
                done += 1
                yield item
            return
        except Exception as error:  # damaged archives and broken connections make readers raise nearly anything
            permanent = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404, 410)
            permanent |= type(error) is ValueError  # raised here, about the file's format
            delays = iter(RETRY_DELAYS) if done > before else delays  # it got further than before
            delay = next(delays, None)
            if "://" not in path or permanent or delay is None:
                return report.add("truncated shard" if done else "unreadable shard", name, f"{path}: {error}")
            logger.warning(f"Reading {path} again in {delay} seconds, after: {error}")
        time.sleep(delay)


def _parse(line: bytes, where: str, report: SkipReport, required: str | None = None) -> dict[str, Any] | None:
    """The JSON object in a line; None, reported, if there is none."""
    if len(line) > MAX_TEXT_BYTES:
        return report.add("malformed JSON", where, f"more than {MAX_TEXT_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return report.add("malformed JSON", where, str(error))
    if not isinstance(record, dict) or (required and not record.get(required)):
        return report.add("malformed JSON", where, f"no object{f' with {required}' if required else ''}")
    return record


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON may contain but neither Arrow nor tokenizers accept, by `?`."""
    return text.encode(errors="replace").decode()


def hash_values(*values: Any) -> str:
    """A hash, 20 hexadecimal digits, of values of any types."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()[:20]


class EndlessStream(torch.utils.data.IterableDataset):
    """
    A stream that begins again, reshuffled, where it ends.

    So a step is never short of a batch, processes whose shares differ never wait for one another, and a run that
    resumes in the third epoch skips to the third epoch. Each example has its epoch, on which the collator's random
    choices depend.
    """

    def __init__(self, dataset: Any, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        if world_size > 1 and isinstance(dataset, datasets.IterableDataset):
            dataset, self.rank, self.world_size = split_dataset_by_node(dataset, rank, world_size), 0, 1
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # a copy, for `datasets` keeps the epoch in memory that the workers share
        dataset = copy.deepcopy(self.dataset) if hasattr(self.dataset, "set_epoch") else self.dataset
        for epoch in itertools.count():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            example = None
            for example in itertools.islice(dataset, self.rank, None, self.world_size):
                yield {**example, "epoch": epoch}
            if example is None:
                return  # nothing to read, as for a worker without a shard
