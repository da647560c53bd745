"""Image-text pairs from any source, as plain examples streamed through `datasets`.

    webdataset shards, image folders, Hub datasets -> load_image_text_pairs -> {"key", "image", "captions"}

This module knows which files and columns belong to one picture; sources.py finds and reads files.
"""

import itertools
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import datasets
import fsspec
from datasets import Dataset, Features, IterableDataset, List, Value

from ..processing_vikdf import MAX_PICTURE_BYTES, read_file, read_picture
from .sources import (
    IMAGE_EXTENSIONS,
    ONCE_EACH,
    SkipReport,
    UnusedFiles,
    find_column,
    find_sources,
    hash_values,
    interleave,
    map_or_drop,
    name_files,
    read_records,
    read_tar,
    read_with_retries,
    replace_surrogates,
    require_example,
    stream_shards,
)


METADATA = "metadata.jsonl"
IMAGE_COLUMNS = ("image", "img", "picture", *IMAGE_EXTENSIONS)
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentence", "text", "txt", "raw", "json")
LINE_END = re.compile(r"\r\n|\r|\n")  # `splitlines` would also split at some characters within a caption

PAIRS = Features(key=Value("string"), image=Value("large_binary"), captions=List(Value("string")))
DECODED_PAIRS = Features({**PAIRS, "image": datasets.Image(mode="RGB")})


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
        ...). Consecutive files of the same name are one sample: `.jpg`, `.jpeg`, `.png` or `.webp`, and `.txt` (one
        caption per line) or, if that has none, `.json` (as a line of `metadata.jsonl`). Names may contain dots
        (`cat.v2.jpg`, `cat.v2.txt`); files that extend a sample's name (`cat.jpg`, `cat.txt`, `cat.mask.png`) must be
        consecutive, too;
      * a folder of images with `metadata.jsonl`, one object per line: `file_name`, the path of a file within the
        folder (links are followed), and its captions, a string or a list of strings, in the first non-empty one of
        `captions`, `caption`, `sentences`, `sentence`, `text`, `txt` and `raw`; other fields are ignored. Several
        lines about one file are merged;
      * a Hub dataset (`org/name`, `org/name:config`, `org/name@revision`), or an object of `datasets`.

    Keys are unique: `shard/KEY`, `folder/file_name`, or a hash of a Hub dataset's row. Unreadable data (an image, a
    caption, the rest of a truncated shard, a URL that failed four times) is skipped and reported. So are files that
    belong to no pair, one per extension: `shard/*.cls` stands for all that end in `.cls`. Images are decoded after the
    shuffle buffer, which holds their files.

    Streams are shuffled by `seed` and `set_epoch`, and `split_dataset_by_node` and DataLoader workers give each
    example to one worker of one process. Workers without a shard are idle, and if the number of shards is not a
    multiple of the processes, each process reads everything; `num_shards` = processes x workers avoids both.
    `state_dict` resumes exactly only without a buffer (`shuffle_buffer=0`).

    Args:
        sources: A source, or a list of sources.
        split: The split of Hub datasets.
        streaming: False reads all files now into a `Dataset` in memory, unshuffled, which decodes images on access.
        shuffle_buffer: Number of examples, from up to ten shards, to shuffle at a time; 0 keeps their order, although
            from epoch 1 on `datasets` still shuffles the shards.
        seed: Seed of shuffling and mixture.
        probabilities: Of each source in a mixture that ends when every example was seen; smaller sources repeat. By
            default sources alternate and every example comes once.
        num_shards: Files are split into parts until their number is a multiple of this (Hub datasets are not split).
            That is free for local files, but a URL is downloaded once per part.
        image_column: Image column of Hub datasets, if its name is unusual.
        captions_column: Caption column of Hub datasets, if its name is unusual.
        decode: False streams each image as the bytes of its file.
        report: Records what is skipped; by default one in a temporary folder.

    Raises:
        FileNotFoundError: If a file, folder or Hub dataset does not exist.
        ValueError: If nothing of a source is readable, a column is missing, or arguments do not fit together.
    """
    report = report or SkipReport()
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if probabilities is not None:
        if not streaming or len(probabilities) != len(sources) or min(probabilities) <= 0:
            raise ValueError(f"Pass streaming=True and a positive probability for each of the {len(sources)} sources.")
        probabilities = [probability / sum(probabilities) for probability in probabilities]
    # Without probabilities all files are one stream, which shuffles and splits best.
    groups = [find_sources(source, split) for source in (sources if probabilities else [sources])]
    names = name_files([path for paths, _ in groups for path in paths])
    columns = {"image_column": image_column, "captions_column": captions_column}
    mixed = [_stream_pairs(paths, hub, names, num_shards, report, **columns) for paths, hub in groups]
    pairs = interleave(mixed, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")
    if not streaming:
        rows = [row for row in pairs if decode_pair(row, report)]
        return Dataset.from_list(rows, features=PAIRS).with_transform(_decode_column)
    pairs = pairs.shuffle(seed, buffer_size=shuffle_buffer) if shuffle_buffer else pairs
    return _decode_images(pairs, report) if decode else pairs


def _stream_pairs(
    paths: list[str],
    hub: list[tuple[str, IterableDataset]],
    names: dict[str, str],
    num_shards: int,
    report: SkipReport,
    *,
    image_column: str | None,
    captions_column: str | None,
) -> IterableDataset:
    """The pairs, undecoded, of files and datasets that count as one source."""
    parts = max(1, num_shards // math.gcd(num_shards, len(paths)))
    shards = [(names[path], path, part, parts) for path in paths for part in range(parts)]
    streams = [stream_shards(_generate_pairs, shards, PAIRS, report)] if shards else []
    for name, dataset in hub:
        image = find_column(dataset, image_column, IMAGE_COLUMNS, name, "image_column")
        captions = find_column(dataset, captions_column, CAPTION_COLUMNS, name, "captions_column")
        dataset = dataset.select_columns([image, captions]).cast_column(image, datasets.Image(decode=False))
        columns = {"image": image, "captions": captions}
        streams.append(map_or_drop(dataset, _read_pair, PAIRS, name=name, report=report, **columns))
    for stream in streams:
        require_example(_decode_images(stream, report), paths + [name for name, _ in hub], report)
    return interleave(streams, stopping_strategy=ONCE_EACH)


def _decode_images(pairs: IterableDataset, report: SkipReport) -> IterableDataset:
    return map_or_drop(pairs, decode_pair, DECODED_PAIRS, report=report)


def decode_pair(row: dict[str, Any], report: SkipReport) -> dict[str, Any] | None:
    """The pair with its image decoded if that is the bytes of a file; `None`, reported, if it cannot be decoded."""
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
    """The non-blank captions of a string or record, or of a list of them (COCO's `[{"raw": ...}, ...]`)."""

    def unwrap(value: Any) -> Any:
        return next(filter(None, map(value.get, CAPTION_COLUMNS)), None) if isinstance(value, dict) else value

    captions = unwrap(captions)
    captions = map(unwrap, captions if isinstance(captions, list) else [captions])
    cleaned = [" ".join(replace_surrogates(caption).split()) for caption in captions if isinstance(caption, str)]
    return [caption for caption in cleaned if caption]


# ---- shards, folders and rows ----


def _read_webdataset(name: str, path: str, part: int, parts: int, report: SkipReport) -> Iterator[tuple]:
    """(key, image, captions, detail for the report if one is missing) of each sample in one part of a shard."""
    unused = UnusedFiles(name, report)
    members = read_with_retries(lambda: read_tar(path, part, parts, unused), name, path, report)
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


def _split_group(group: Iterable[tuple[int, str, bytes]], unused: UnusedFiles) -> dict[str, dict[str, bytes]]:
    """
    Splits files whose names are equal up to the first dot into samples: KEY -> extension -> content.

    There are several if names contain dots. Files that only extend a sample's name (`cat.mask.png`) are reported.
    """
    samples: dict[str, dict[str, bytes]] = {}
    for _, file_name, content in group:
        sample, extension = posixpath.splitext(file_name)
        files, extension = samples.setdefault(sample, {}), extension[1:].lower()
        if extension in files:
            unused.report.add("an earlier file of the same name", f"{unused.name}/{file_name}")
        files[extension] = content
    kinds = {sample: {extension in IMAGE_EXTENSIONS for extension in files} for sample, files in samples.items()}
    complete = tuple(f"{sample}." for sample in samples if len(kinds[sample]) == 2)  # with a picture and a text
    for sample in [name for name in samples if name.startswith(complete) and f"{name}." not in complete]:
        for extension in samples.pop(sample):
            unused.add(f"{sample}.{extension}", ", whose name adds to that of a sample")
    return samples


def _read_captions(files: dict[str, bytes]) -> tuple[list[str], str]:
    """The captions of a sample, and the extension of the file they come from."""
    if captions := _clean_captions(LINE_END.split(files.get("txt", b"").decode("utf-8-sig"))):
        return captions, "txt"
    return _clean_captions(json.loads(files.get("json", b"null"))), "json"


def _read_folder(name: str, path: str, part: int, parts: int, report: SkipReport) -> Iterator[tuple]:
    """(key, image, captions) of every `parts`-th file in an image folder's metadata."""
    metadata = os.path.join(path, METADATA)
    if not os.path.exists(metadata):
        raise FileNotFoundError(f"There is no {metadata}, which must hold the captions of the folder's pictures.")
    captions: dict[str, list[str]] = {}
    for _, record in read_records(f"{name}/{METADATA}", metadata, report, required="file_name"):
        file_name = str(PurePath(str(record["file_name"])))
        captions.setdefault(file_name, []).extend(_clean_captions(record))
    for file_name in itertools.islice(captions, part, None, parts):
        try:
            if PurePath(file_name).is_absolute() or ".." in PurePath(file_name).parts:
                raise ValueError("the path is outside the folder")
            image = read_file(os.path.join(path, file_name), MAX_PICTURE_BYTES)
        except (OSError, ValueError) as error:
            report.add("unreadable image", f"{name}/{file_name}", str(error))
        else:
            yield f"{name}/{file_name}", image, captions[file_name]
    if part == 0:
        unused = UnusedFiles(name, report)
        for folder, _, files in os.walk(path):
            for file_name in (os.path.relpath(os.path.join(folder, file), path) for file in files):
                if file_name not in captions and file_name != METADATA:
                    unused.add(file_name, f", not named in {METADATA}")


def _read_pair(row: dict[str, Any], name: str, image: str, captions: str, report: SkipReport) -> dict[str, Any] | None:
    file, texts = row[image] or {}, row[captions]
    key = f"{name}/{hash_values(file.get('bytes') or file.get('path'), texts)}"
    texts = LINE_END.split(texts) if captions == "txt" and texts else texts
    try:
        data = file.get("bytes")
        if data is None and file.get("path"):
            data = _read_path(file["path"])
    except Exception as error:  # of whatever file system the path is on
        return report.add("unreadable image", key, str(error))
    return _try_pair(key, data, texts, report)


def _read_path(path: str) -> bytes:
    """The bytes of a picture's file, on any file system."""
    if "://" not in path:
        return read_file(path, MAX_PICTURE_BYTES)
    with fsspec.open(path, "rb") as file:
        content = file.read(MAX_PICTURE_BYTES + 1)
    if len(content) > MAX_PICTURE_BYTES:
        raise ValueError(f"{path} has more than {MAX_PICTURE_BYTES} bytes")
    return content
