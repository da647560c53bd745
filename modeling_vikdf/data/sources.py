"""Image-text pairs and dialogues from anywhere, as plain examples streamed through `datasets`.

    webdataset shards, image folders, Hub datasets -> load_image_text_pairs -> {"key", "image", "captions"}
    JSONL files, Hub datasets                      -> load_dialogues        -> {"key", "messages", "references"}

What cannot be read is skipped and told to a `SkipReport`. This module knows files and their faults; it knows no
tokenizer, no model and no batch.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import datasets
import fsspec
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from ..backbones import may_be_on_hub
from ..processing_vikdf import MAX_PICTURE_BYTES, read_file, read_picture


logger = logging.get_logger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("txt", "json")
MAX_TEXT_BYTES = 2**24  # of a caption file, and of a line of JSON: more would only fill the memory
SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_PICTURE_BYTES) | dict.fromkeys(TEXT_EXTENSIONS, MAX_TEXT_BYTES)
METADATA = "metadata.jsonl"
IMAGE_COLUMNS = ("image", "img", "picture", *IMAGE_EXTENSIONS)
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "txt", "raw", "json")
DIALOGUE_COLUMNS = ("messages", "turns", "dialogue", "dialog", "conversation")
HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[^@]+))?(@(?P<revision>.+))?")
FILE_SUFFIX = re.compile(r"(\.tar|\.tgz|\.jsonl?)?(\.gz|\.bz2|\.xz|\.zst)?$")
LINE_END = re.compile(r"\r\n|\r|\n")  # `splitlines` takes some characters within a caption for one, too
EXTENDED_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
# How files begin that no text begins like.
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
HTTP_TIMEOUT = 30.0  # seconds without a byte
RETRY_DELAYS = (1.0, 2.0, 4.0)  # seconds to wait before a URL is tried again

PAIRS = Features(key=Value("string"), image=Value("large_binary"), captions=List(Value("string")))
DECODED_PAIRS = Features({**PAIRS, "image": datasets.Image(mode="RGB")})
DIALOGUES = Features(
    key=Value("string"),
    messages=List({"role": Value("string"), "content": Value("string")}),
    references=List(Value("string")),
)
ONCE_EACH = "all_exhausted_without_replacement"


class SkipReport:
    """Counts what was skipped, by reason, over all processes that share its folder: ranks and DataLoader workers.

    Each process appends to a file of its own, line by line, so that a process that is killed has told what it skipped.
    What is met again, in another epoch or on another rank, counts once.
    The first of each reason are logged as they happen; when to log `summary()` is up to the caller.

    Args:
        folder: Where to write, on a disk that the processes share; by default a temporary folder, made when needed.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder or Path(tempfile.gettempdir(), f"vikdf-skipped-{uuid.uuid4().hex}"))
        self._logged: dict[str, int] = {}
        self._file, self._owner = None, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_owner": None}  # open files do not travel

    def add(self, reason: str, key: str, detail: str = "") -> None:
        """Records that the example, file or shard `key` was skipped."""
        key = key.encode(errors="backslashreplace").decode()  # names of files may hold anything
        self._logged[reason] = self._logged.get(reason, 0) + 1
        if self._logged[reason] <= 3:
            further = f"; any more of these only get into {self.folder}" if self._logged[reason] == 3 else ""
            logger.warning(f"Skipped {key}: {reason}{f' ({detail})' if detail else ''}{further}.")
        try:
            if self._owner != os.getpid():  # the first time, and in a fork
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
                self._file, self._owner = open(path, "a", encoding="utf-8", buffering=1), os.getpid()
                weakref.finalize(self, self._file.close)
            self._file.write(json.dumps({"reason": reason, "key": key, "detail": detail[:300]}) + "\n")
        except OSError as error:  # a full disk must not end what a damaged image may not
            logger.warning(f"Skipped {key}: {reason}, which cannot be recorded in {self.folder}: {error}")

    def skipped(self) -> dict[str, dict[str, str]]:
        """Reason -> key -> detail of everything skipped so far."""
        found: dict[str, dict[str, str]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last line of a process that was killed
                    entry = json.loads(line)
                    found.setdefault(entry["reason"], {})[entry["key"]] = entry["detail"]
        return found

    def counts(self) -> dict[str, int]:
        """Reason -> how many different examples, lines or shards were skipped for it."""
        return {reason: len(keys) for reason, keys in self.skipped().items()}

    def summary(self, num_examples: int = 3) -> str:
        """A line for each reason with its count and some of the keys, or "Skipped nothing."."""
        lines = []
        for reason, keys in sorted(self.skipped().items()):
            some = itertools.islice(keys.items(), num_examples)
            some = [key + (f" ({detail})" if detail else "") for key, detail in some]
            lines.append(f"  {len(keys)} x {reason}: {', '.join(some)}{', ...' if len(keys) > len(some) else ''}")
        return "\n".join(["Skipped:", *lines]) if lines else "Skipped nothing."


# ---- image-text pairs ----


def load_image_text_pairs(
    sources: Any,
    *,
    split: str = "train",
    streaming: bool = True,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    probabilities: list[float] | None = None,
    num_shards: int = 1,
    image_column: str | None = None,
    captions_column: str | None = None,
    decode: bool = True,
    report: SkipReport | None = None,
) -> IterableDataset | Dataset:
    """Streams image-text pairs, `{"key": str, "image": PIL.Image (RGB), "captions": [str, ...]}`.

    A source is one of these, or a list of them that counts as one:
      * webdataset shards: a path, a glob, a brace range (`train-{00000..00005}.tar`) or a URL (`https://`, `hf://`,
        ...). Files that follow each other and are called the same are one sample: `.jpg`, `.jpeg`, `.png` or `.webp`,
        and `.txt` (a caption a line) or, if that has none, `.json` (as a line of `metadata.jsonl`). Names may hold
        dots (`cat.v2.jpg`, `cat.v2.txt`), and files that add to the name of a sample (`cat.jpg`, `cat.txt`,
        `cat.mask.png`) must follow each other, too;
      * a folder of images with `metadata.jsonl`, an object a line: `file_name`, the path of a file within the folder
        (links are followed), and its captions, a string or a list of strings, in the first of `captions`, `caption`,
        `sentences`, `sentence`, `text`, `txt` and `raw` that is not empty; nothing else in a line is read. Several
        lines about one file are put together;
      * a Hub dataset (`org/name`, `org/name:config`, `org/name@revision`), or an object of `datasets`.

    Keys are unique: `shard/KEY`, `folder/file_name`, or a hash of a Hub dataset's row. What is unreadable (an image, a
    caption, the rest of a truncated shard, a URL that failed four times) is skipped and reported. So is every other
    file that is part of no pair, one of a kind: `shard/*.cls` stands for all that end in `.cls`. Images are decoded
    behind the shuffle buffer, which holds their files.

    Streams are shuffled by `seed` and `set_epoch`, and `split_dataset_by_node` and DataLoader workers give each
    example to one worker of one process. Workers without a shard are idle, and processes that can't have equally many
    shards all read everything; `num_shards` = processes x workers avoids both. `state_dict` resumes exactly only
    where nothing is buffered (`shuffle_buffer=0`).

    Args:
        sources: A source, or a list of sources.
        split: The split of Hub datasets.
        streaming: False reads all files now into a `Dataset` in memory, unshuffled, which decodes images on access.
        shuffle_buffer: How many examples, of up to ten shards, are shuffled at a time; 0 keeps their order, though
            from epoch 1 on `datasets` shuffles the shards all the same.
        seed: Of shuffling and mixture.
        probabilities: Of the sources, in a mixture that ends when all of each were seen; smaller ones start again. By
            default the sources take turns and every example comes once.
        num_shards: Files are cut into parts until their number is a multiple of this (Hub datasets are not). Local
            files are not read more for it, but a URL is downloaded for each of its parts.
        image_column, captions_column: Of Hub datasets, if the names are unusual.
        decode: False streams each image as the content of its file, for a reader that may not need it.
        report: Gets to know what is skipped; by default one that only logs.

    Raises:
        FileNotFoundError: If a file, folder or Hub dataset does not exist.
        ValueError: If nothing of a source is readable, a column is missing, or arguments do not fit together.
    """
    report = report or SkipReport()
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if probabilities is not None:
        if not streaming or len(probabilities) != len(sources) or min(probabilities) <= 0:
            raise ValueError(f"Give streaming=True and a positive probability for each of the {len(sources)} sources.")
        probabilities = [probability / sum(probabilities) for probability in probabilities]
    # Without probabilities all files are one stream, for that is shuffled and split best.
    groups = [_find_sources(source, split) for source in (sources if probabilities else [sources])]
    names = _name_files([path for paths, _ in groups for path in paths])
    mixed = []
    for paths, hub in groups:
        parts = max(1, num_shards // math.gcd(num_shards, len(paths)))
        shards = [(names[path], path, part, parts) for path in paths for part in range(parts)]
        streams = [_stream(_generate_pairs, shards, PAIRS, report)] if shards else []
        for name, dataset in hub:
            image = _find_column(dataset, image_column, IMAGE_COLUMNS, name, "image_column")
            captions = _find_column(dataset, captions_column, CAPTION_COLUMNS, name, "captions_column")
            dataset = dataset.select_columns([image, captions]).cast_column(image, datasets.Image(decode=False))
            columns = {"image": image, "captions": captions}
            streams.append(_map_or_drop(dataset, _read_pair, PAIRS, name=name, report=report, **columns))
        for stream in streams:
            _require_example(_decode_images(stream, report), paths + [name for name, _ in hub], report)
        mixed.append(_interleave(streams, stopping_strategy=ONCE_EACH))
    pairs = _interleave(mixed, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
    if not streaming:
        rows = [row for row in pairs if decode_pair(row, report)]
        return Dataset.from_list(rows, features=PAIRS).with_transform(_decode_column)
    pairs = pairs.shuffle(seed, buffer_size=shuffle_buffer) if shuffle_buffer else pairs
    return _decode_images(pairs, report) if decode else pairs


def _decode_images(pairs: IterableDataset, report: SkipReport) -> IterableDataset:
    return _map_or_drop(pairs, decode_pair, DECODED_PAIRS, report=report)


def decode_pair(row: dict[str, Any], report: SkipReport) -> dict[str, Any] | None:
    """The pair with its image decoded, if that is the content of a file; `None`, reported, if it can't be."""
    if not isinstance(row["image"], bytes):
        return row
    try:
        return {**row, "image": read_picture(row["image"])}
    except ValueError as error:
        return report.add("corrupt image", row["key"], str(error))


def _decode_column(rows: dict[str, list]) -> dict[str, list]:
    return {**rows, "image": [read_picture(data) for data in rows["image"]]} if "image" in rows else rows


def _generate_pairs(shards: list[tuple[str, str, int, int]], report: SkipReport) -> Iterator[dict[str, Any]]:
    """The pairs, undecoded, of shards given as (name, path, part, number of parts)."""
    for name, path, part, parts in shards:
        read = _read_folder if os.path.isdir(path) else _read_webdataset
        for key, image, captions, *detail in read(name, path, part, parts, report):
            if pair := _try_pair(key, image, captions, report, *detail):
                yield pair


def _try_pair(
    key: str, image: bytes | None, captions: Any, report: SkipReport, detail: str = ""
) -> dict[str, Any] | None:
    captions = _clean_captions(captions)
    if image and captions:
        return {"key": key.encode(errors="backslashreplace").decode(), "image": image, "captions": captions}
    return report.add("no caption" if image else "no image", key, detail)


def _clean_captions(captions: Any) -> list[str]:
    """The captions that are not blank in a string or record, or in a list of them (COCO's `[{"raw": ...}, ...]`)."""

    def unwrap(value: Any) -> Any:
        return next(filter(None, map(value.get, CAPTION_COLUMNS)), None) if isinstance(value, dict) else value

    captions = unwrap(captions)
    captions = map(unwrap, captions if isinstance(captions, list) else [captions])
    cleaned = [" ".join(_valid(caption).split()) for caption in captions if isinstance(caption, str)]
    return [caption for caption in cleaned if caption]


class _Unused:
    """Reports the files that are part of no pair, one of a kind, for there may be one beside every picture."""

    def __init__(self, name: str, report: SkipReport):
        self.name, self.report, self.kinds = name, report, set()

    def add(self, file_name: str, why: str = "") -> None:
        """Reports a file, unless another with its extension was reported."""
        kind = f"*{posixpath.splitext(file_name)[1].lower()}"
        if kind not in self.kinds:
            self.kinds.add(kind)
            self.report.add("part of no pair", f"{self.name}/{kind}", f"such as {file_name}{why}")


def _read_webdataset(name: str, path: str, part: int, parts: int, report: SkipReport) -> Iterator[tuple]:
    """(key, image, captions, what to know if one is missing) of the samples in one part of a shard."""
    unused = _Unused(name, report)
    members = _read_stubbornly(lambda: _read_tar(path, part, parts, unused), name, path, report)
    for _, group in itertools.groupby(members, key=lambda member: member[0]):
        samples = _split_group(group, unused)
        detail = f"{', '.join(samples)}: names must be equal up to the last dot" if len(samples) > 1 else ""
        for sample, files in samples.items():
            try:
                captions, source = _read_captions(files)
            except (ValueError, RecursionError) as error:
                report.add("unreadable caption", f"{name}/{sample}", str(error))
                continue
            image = next((extension for extension in IMAGE_EXTENSIONS if extension in files), None)
            if image and captions:
                for extension in sorted(files.keys() - {image, "txt", source}):
                    unused.add(f"{sample}.{extension}", f", beside .{image} and .{source}")
            yield f"{name}/{sample}", files.get(image), captions, detail


def _split_group(group: Iterable[tuple[int, str, bytes]], unused: _Unused) -> dict[str, dict[str, bytes]]:
    """
    KEY -> extension -> content of files whose names are equal up to the first dot: those of one sample, or of several
    with dots in their names. Pictures and texts that only add to the name of a sample (`cat.mask.png`) are no more.
    """
    samples: dict[str, dict[str, bytes]] = {}
    for _, file_name, content in group:
        sample, extension = posixpath.splitext(file_name)
        files, extension = samples.setdefault(sample, {}), extension[1:].lower()
        if extension in files:
            unused.report.add("an earlier file of the same name", f"{unused.name}/{file_name}")
        files[extension] = content
    kinds = {sample: {extension in IMAGE_EXTENSIONS for extension in files} for sample, files in samples.items()}
    whole = tuple(f"{sample}." for sample in samples if len(kinds[sample]) == 2)
    for sample in [each for each in samples if each.startswith(whole) and f"{each}." not in whole]:
        for extension in samples.pop(sample):
            unused.add(f"{sample}.{extension}", ", whose name adds to that of a sample")
    return samples


def _read_captions(files: dict[str, bytes]) -> tuple[list[str], str]:
    """The captions of a sample, and the extension of the file that they are from."""
    if captions := _clean_captions(LINE_END.split(files.get("txt", b"").decode("utf-8-sig"))):
        return captions, "txt"
    return _clean_captions(json.loads(files.get("json", b"null"))), "json"


def _read_tar(path: str, part: int, parts: int, unused: _Unused) -> Iterator[tuple[int, str, bytes]]:
    """(number of the group, name, content) of the pictures and texts of every `parts`-th group; see `_split_group`."""
    mode = "r|*" if "://" in path else "r:*"  # what comes over the network is read in one go
    with _open(path) as file:
        if mode == "r:*" and (found := _signature(file)) in ("zstd", "zip", "UTF-16"):
            raise ValueError(f"it is {found}; a shard is a tar archive, as it is or in gzip, bzip2 or xz")
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


def _is_readable(member: tarfile.TarInfo, file_name: str, unused: _Unused) -> bool:
    """Whether a file is a picture or text, and not too large to be read; reported if not."""
    limit = SIZE_LIMITS.get(posixpath.splitext(file_name)[1][1:].lower())
    if limit is None:
        unused.add(file_name)
    elif member.size > limit:
        unused.report.add("too large", f"{unused.name}/{file_name}", f"{member.size} bytes; at most {limit} are read")
    return limit is not None and member.size <= limit


def _report_odd_member(member: tarfile.TarInfo, file_name: str, unused: _Unused) -> None:
    if member.isfile():
        unused.add(file_name, ", a hidden file")
    else:
        what = f"a link to {member.linkname}" if member.islnk() or member.issym() else "a device or pipe"
        unused.report.add("no regular file", f"{unused.name}/{file_name}", what)


class _StrictTarInfo(tarfile.TarInfo):
    """Raises where `tarfile` would see the archive's end: at a damaged header, or where the file stops."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_StrictTarInfo":
        try:
            member = super().frombuf(buf, encoding, errors)
            if member.type in EXTENDED_HEADERS and member.size > MAX_TEXT_BYTES:  # which `tarfile` reads into memory
                raise tarfile.ReadError(f"holds a header of {member.size} bytes")
            return member
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the zeros that do end an archive
                raise
            raise tarfile.ReadError(f"ends in the middle or is damaged ({error})") from error


def _read_folder(name: str, path: str, part: int, parts: int, report: SkipReport) -> Iterator[tuple]:
    """(key, image, captions) of every `parts`-th file that an image folder's metadata names."""
    metadata = os.path.join(path, METADATA)
    if not os.path.exists(metadata):
        raise FileNotFoundError(f"There is no {metadata}, which says what the pictures of the folder show.")
    captions: dict[str, list[str]] = {}
    for _, record in _read_records(f"{name}/{METADATA}", metadata, report, required="file_name"):
        file_name = str(PurePath(str(record["file_name"])))
        captions.setdefault(file_name, []).extend(_clean_captions(record))
    for file_name in itertools.islice(captions, part, None, parts):
        try:
            if PurePath(file_name).is_absolute() or ".." in PurePath(file_name).parts:
                raise ValueError("the name leads out of the folder")
            image = read_file(os.path.join(path, file_name), MAX_PICTURE_BYTES)
        except (OSError, ValueError) as error:
            report.add("unreadable image", f"{name}/{file_name}", str(error))
        else:
            yield f"{name}/{file_name}", image, captions[file_name]
    if part == 0:
        unused = _Unused(name, report)
        for folder, _, files in os.walk(path):
            for file_name in (os.path.relpath(os.path.join(folder, file), path) for file in files):
                if file_name not in captions and file_name != METADATA:
                    unused.add(file_name, f", not named in {METADATA}")


def _read_pair(row: dict[str, Any], name: str, image: str, captions: str, report: SkipReport) -> dict[str, Any] | None:
    file, texts = row[image] or {}, row[captions]
    key = f"{name}/{_hash(file.get('bytes') or file.get('path'), texts)}"
    texts = LINE_END.split(texts) if captions == "txt" and texts else texts
    try:
        data = file.get("bytes")
        if data is None and file.get("path"):
            data = _read_path(file["path"])
    except Exception as error:  # of whatever file system the path is on
        return report.add("unreadable image", key, str(error))
    return _try_pair(key, data, texts, report)


def _read_path(path: str) -> bytes:
    """The content of a picture's file on whatever file system."""
    if "://" not in path:
        return read_file(path, MAX_PICTURE_BYTES)
    with fsspec.open(path, "rb") as file:
        content = file.read(MAX_PICTURE_BYTES + 1)
    if len(content) > MAX_PICTURE_BYTES:
        raise ValueError(f"{path} has more than {MAX_PICTURE_BYTES} bytes")
    return content


# ---- dialogues ----


def load_dialogues(
    sources: Any,
    *,
    split: str = "train",
    streaming: bool = False,
    column: str | None = None,
    report: SkipReport | None = None,
) -> Dataset | IterableDataset:
    """Loads dialogues, `{"key": str, "messages": [{"role": str, "content": str}, ...], "references": [str, ...]}`.

    A source is a JSONL file (a path, glob, brace range or URL; in gzip or not), a Hub dataset or an object of
    `datasets`, with
      * `turns`, a list of strings: the last is the assistant's reply, and before it the user and the assistant take
        turns, so that an odd number of turns begins with the assistant;
      * `turns` and `references`: several replies to the turns, the last of which is the user's;
      * `messages`, with roles of their own; if there are `references` too, they may end with the user's.
    The last of `messages` is a reply of the assistant, and the first of `references` is the same.

    Dialogues without a reply or a user's turn before it, with an empty turn or an unknown role, and malformed lines
    are skipped and reported. Keys are unique: `file:line`, or a hash of a Hub dataset's row.

    Args:
        sources: A source, or a list of sources.
        split: The split of Hub datasets.
        streaming: True reads while iterating, in order; False reads now, into memory.
        column: The one that holds turns or messages, if its name is unusual.
        report: Gets to know what is skipped; by default one that only logs.

    Raises:
        FileNotFoundError: If a file or Hub dataset does not exist.
        ValueError: If nothing of a source is readable, or the column is missing.
    """
    report = report or SkipReport()
    paths, hub = _find_sources(sources, split)
    names = _name_files(paths)
    shards = [(names[path], path, column) for path in paths]
    streams = [_stream(_generate_dialogues, shards, DIALOGUES, report)] if shards else []
    for name, dataset in hub:
        used = _find_column(dataset, column, DIALOGUE_COLUMNS, name, "column")
        dataset = dataset.select_columns([used, *{"references"}.intersection(dataset.column_names)])
        streams.append(_map_or_drop(dataset, _read_row, DIALOGUES, name=name, column=used, report=report))
    for stream in streams:
        _require_example(stream, paths + [name for name, _ in hub], report)
    dialogues = _interleave(streams, stopping_strategy=ONCE_EACH)
    return dialogues if streaming else Dataset.from_list(list(dialogues), features=DIALOGUES)


def _generate_dialogues(shards: list[tuple[str, str, str | None]], report: SkipReport) -> Iterator[dict[str, Any]]:
    """The dialogues of JSONL files given as (name, path, column)."""
    for name, path, column in shards:
        for key, record in _read_records(name, path, report):
            if dialogue := _try_dialogue(key, record, column, report):
                yield dialogue


def _read_row(row: dict[str, Any], name: str, column: str, report: SkipReport) -> dict[str, Any] | None:
    return _try_dialogue(f"{name}/{_hash(row)}", row, column, report)


def _try_dialogue(key: str, record: dict, column: str | None, report: SkipReport) -> dict[str, Any] | None:
    try:
        messages, references = _read_dialogue(record, column)
    except ValueError as error:
        return report.add(str(error), key)
    return {"key": key, "messages": messages, "references": references}


def _read_dialogue(record: dict[str, Any], column: str | None) -> tuple[list[dict[str, str]], list[str]]:
    """Messages and references; a ValueError says why a dialogue is none."""
    turns = next((record[each] for each in ([column] if column else DIALOGUE_COLUMNS) if record.get(each)), None)
    if not isinstance(turns, list):
        raise ValueError("no turns")
    references = record.get("references") or []
    if not isinstance(references, list):
        raise ValueError("references that are no list")
    references = [_read_text(reference) for reference in references]
    if all(isinstance(turn, dict) for turn in turns):
        messages = [{"role": turn.get("role"), "content": _read_text(turn.get("content"))} for turn in turns]
    else:
        count = len(turns) + bool(references)  # of turns, the reply included
        roles = ["user" if (count - index) % 2 == 0 else "assistant" for index in range(len(turns))]
        messages = [{"role": role, "content": _read_text(turn)} for role, turn in zip(roles, turns, strict=True)]
    if references and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": references[0]})
    roles = [message["role"] for message in messages]
    if not all(role in ("user", "assistant") for role in roles[roles[0] == "system" :]):
        raise ValueError("unknown role or misplaced system message")
    if roles[-1] != "assistant" or "user" not in roles:
        raise ValueError("no reply to a user's turn")
    reply = messages[-1]["content"]
    return messages, references if reply in references[:1] else [reply, *references]


def _read_text(content: Any) -> str:
    """A content, or the text parts that make it up, without spaces around."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise ValueError("a turn that is no text")
    if not content.strip():
        raise ValueError("empty turn")
    return _valid(content.strip())


# ---- sources ----


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of `{00..12}` (zeros in front are kept, both ends included) and `{a,b}`."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        chosen = choices.split(",")
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        chosen = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in chosen for path in expand_braces(before + choice + after)]


def _find_sources(source: Any, split: str) -> tuple[list[str], list[tuple[str, IterableDataset]]]:
    """The paths of files, image folders and URLs, and the (name, dataset) of datasets, that a source consists of."""
    paths: list[str] = []
    hub: list[tuple[str, IterableDataset]] = []
    for each in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(each, (list, tuple)):
            nested_paths, nested_hub = _find_sources(each, split)
            paths += nested_paths
            hub += nested_hub
        elif isinstance(each, IterableDataset):
            hub.append((each.info.dataset_name or "dataset", each))
        elif isinstance(each, Dataset):
            hub.append((each.info.dataset_name or "dataset", each.to_iterable_dataset()))
        else:
            each = os.path.expanduser(os.fspath(each))
            is_id = HUB_ID.fullmatch(each) and "://" not in each and not FILE_SUFFIX.search(each)[0]
            if is_id and not os.path.exists(each):
                hub.append((each, _open_hub(each, split)))
            else:
                paths += _find_files(each)
    return list(dict.fromkeys(paths)), hub


def _find_files(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    paths = []
    for path in expand_braces(pattern):
        found = [path] if "://" in path or os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise FileNotFoundError(f"There is no file {path!r}, looked for because of {pattern!r}.")
        paths += found
    return paths


def _open_hub(source: str, split: str) -> IterableDataset:
    dataset = HUB_ID.fullmatch(source).groupdict()
    # only what is on the Hub has configurations and revisions
    if not (dataset["name"] or dataset["revision"] or may_be_on_hub(dataset["path"])):
        raise FileNotFoundError(f"There is no file or folder {source!r}, and a Hub dataset is called ORG/NAME.")
    try:
        return datasets.load_dataset(**dataset, split=split, streaming=True)
    except OSError as error:
        raise FileNotFoundError(f"{source!r} is no file or folder here, and as a Hub dataset: {error}") from error


def _name_files(paths: list[str]) -> dict[str, str]:
    """A short unique name for every path, for keys: the file's without suffix, or if two are called so the path."""
    stems = [FILE_SUFFIX.sub("", os.path.basename(path.split("?")[0].rstrip("/"))) for path in paths]
    return dict(zip(paths, stems if len(set(stems)) == len(set(paths)) else paths, strict=True))


def _find_column(
    dataset: IterableDataset, wanted: str | None, usual: tuple[str, ...], name: str, argument: str
) -> str:
    columns = dataset.column_names or []
    found = [column for column in ([wanted] if wanted else usual) if column in columns]
    if not found:
        raise ValueError(
            f"{name} has the columns {columns}, and none of them is called {wanted or ' or '.join(usual)}. "
            f"Name the right one by {argument}=."
        )
    return found[0]


def _stream(generate: Callable, shards: list[tuple], features: Features, report: SkipReport) -> IterableDataset:
    gen_kwargs = {"shards": shards, "report": report}  # a list is what `datasets` shuffles and splits
    return IterableDataset.from_generator(generate, features=features, gen_kwargs=gen_kwargs)


def _map_or_drop(
    dataset: IterableDataset, function: Callable, features: Features, **fn_kwargs: Any
) -> IterableDataset:
    """What `function` makes of the rows, without those of which it makes None."""
    fn_kwargs = {"function": function, **fn_kwargs}
    columns = dataset.column_names
    settings = {"batched": True, "batch_size": 1, "remove_columns": columns, "features": features}
    return dataset.map(_apply_or_drop, fn_kwargs=fn_kwargs, **settings)


def _apply_or_drop(rows: dict[str, list], function: Callable, **kwargs: Any) -> dict[str, list]:
    row = function({column: values[0] for column, values in rows.items()}, **kwargs)
    return {column: [value] for column, value in row.items()} if row else {}


def _interleave(streams: list[IterableDataset], **settings: Any) -> IterableDataset:
    if not streams:
        raise ValueError("No sources were given.")
    return datasets.interleave_datasets(streams, **settings) if len(streams) > 1 else streams[0]


def _require_example(stream: IterableDataset, sources: list[str], report: SkipReport) -> None:
    if next(iter(stream), None) is None:
        named = ", ".join(sources[:5]) + (", ..." if len(sources) > 5 else "")
        raise ValueError(f"Nothing is readable in at least one of: {named}. {report.summary()}")


# ---- reading ----


def _open(path: str) -> Any:
    """A regular file or a URL, opened for reading bytes."""
    if path.startswith(("http://", "https://")):
        return urllib.request.urlopen(urllib.request.Request(path, headers=HTTP_HEADERS), timeout=HTTP_TIMEOUT)
    if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")
    return fsspec.open(path, "rb") if "://" in path else open(path, "rb")


def _signature(file: Any) -> str:
    """What a file is by its first bytes, or nothing where they say nothing."""
    head = file.read(max(map(len, SIGNATURES)))
    file.seek(0)
    return next((name for signature, name in SIGNATURES.items() if head.startswith(signature)), "")


def _read_records(
    name: str, path: str, report: SkipReport, required: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(NAME:line, JSON object) of the lines of a JSON Lines file."""
    for number, line in _read_stubbornly(lambda: _read_lines(path), name, path, report):
        if record := _parse(line, f"{name}:{number}", report, required):
            yield f"{name}:{number}", record


def _read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1, of a JSON Lines file, in gzip or not."""
    with _open(path) as file:
        # Reading all at once fails if the connection breaks; reading line by line takes that for the end.
        file = io.BytesIO(file.read()) if "://" in path else file
        file = gzip.open(file) if _signature(file) == "gzip" else file
        if found := _signature(file):
            raise ValueError(f"it is {found}; JSON Lines are read in UTF-8, as they are or in gzip, once")
        lines = _number_lines(file)
        first = list(itertools.islice(lines, 2))
        if not first:
            raise ValueError("it is empty")
        if _begins_document([line for _, line in first]):
            raise ValueError("it is one JSON document; JSON Lines, an object a line, are read: jq -c '.[]' makes them")
        yield from itertools.chain(first, lines)


def _number_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank; of one that is too long as much as shows it."""
    for number in itertools.count(1):
        rest = line = file.readline(MAX_TEXT_BYTES + 1)
        while len(line) > MAX_TEXT_BYTES and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_TEXT_BYTES)
        if not line:
            return
        if line.strip():
            yield number, line


def _begins_document(lines: list[bytes]) -> bool:
    """Whether the first lines, one or two, are those of a JSON array, or of an object over several lines."""
    start = lines[0].removeprefix(codecs.BOM_UTF8).strip()
    if not start.startswith(b"["):
        return start == b"{"
    try:
        json.loads(start)
    except (ValueError, RecursionError):
        return True
    return len(lines) == 1


def _read_stubbornly(read: Callable[[], Iterator[tuple]], name: str, path: str, report: SkipReport) -> Iterator[tuple]:
    """What `read()` yields. After an error a URL is read again, from there on; what stays lost is reported."""
    done, delays = 0, iter(RETRY_DELAYS)
    while True:
        before = done
        try:
            for item in itertools.islice(read(), done, None):
                done += 1
                yield item
            return
        except Exception as error:  # damaged archives and broken connections make readers raise nearly anything
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404, 410)
            gone |= type(error) is ValueError  # ours, about what the file is
            delays = iter(RETRY_DELAYS) if done > before else delays  # it broke at another place
            delay = next(delays, None)
            if "://" not in path or gone or delay is None:
                return report.add("truncated shard" if done else "unreadable shard", name, f"{path}: {error}")
            logger.warning(f"Reading {path} again in {delay} seconds, after: {error}")
        time.sleep(delay)


def _parse(line: bytes, where: str, report: SkipReport, required: str | None = None) -> dict[str, Any] | None:
    """The JSON object in a line."""
    if len(line) > MAX_TEXT_BYTES:
        return report.add("malformed JSON", where, f"more than {MAX_TEXT_BYTES} bytes")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return report.add("malformed JSON", where, str(error))
    if not isinstance(record, dict) or (required and not record.get(required)):
        return report.add("malformed JSON", where, f"no object{f' with {required}' if required else ''}")
    return record


def _valid(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and neither Arrow nor tokenizers take."""
    return text.encode(errors="replace").decode()


def _hash(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()[:20]
