"""A disk cache for states of the frozen encoders: computed once, with random access for every later run.

A cache is a folder: `index.json` records what the states depend on, and each shard `features-NNNNN.safetensors` holds
the states of `shard_size` pictures and all their captions, in the order of the pairs. Rows of different lengths are
concatenated; `*_offsets` locate them, so an example is read without the others.

Everything is verified: a shard holds hashes of its settings and of each picture, so that changed data is encoded
again, and checksums of its content, so that damaged states are never returned. This module knows neither objectives
nor batches.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor, encode_truncated, pad, read_picture
from .pairs import decode_pair
from .sources import SkipReport


logger = logging.get_logger(__name__)

FORMAT = 2  # format 1 had neither hashes of its inputs nor checksums
INDEX_NAME = "index.json"
SHARD_NAME = "features-{:05d}.safetensors"


class FeatureDataset(Dataset):
    """
    A map-style dataset over a cache written by [`cache_features`].

    Shards are memory-mapped on first access, by each process (such as a DataLoader worker) for itself; pickling the
    dataset does not copy them.

    Args:
        folder: the cache.
        images: key -> bytes of the picture's file, for objectives that need the pictures themselves.

    Raises:
        FileNotFoundError: if the folder holds no cache.
        OSError: if its index is damaged.
        ValueError: if the cache is not complete yet, or of an earlier format.
    """

    def __init__(self, folder: str | os.PathLike, images: Mapping[str, bytes] | None = None):
        self.folder, self.images = Path(folder), images
        index = _read_index(self.folder)
        if index is None:
            raise FileNotFoundError(f"There are no cached features in {self.folder}: write them with cache_features.")
        if index["key"].get("format") != FORMAT:
            raise ValueError(
                f"The cache in {self.folder} has format {index['key'].get('format', 1)}, expected format {FORMAT}: "
                "call cache_features again to rebuild it."
            )
        if index["num_pictures"] is None:
            raise ValueError(f"The cache in {self.folder} is not complete: call cache_features again to continue.")
        self.num_pictures, self.shard_size = index["num_pictures"], index["key"]["shard_size"]
        self._settings = _hash_settings(index["key"])
        self._owner, self._files = os.getpid(), {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # mapped files cannot be pickled

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Reads one picture with its captions.

        Returns:
            `key`; `captions`, C strings; `vision_states` [S, d_vision] and `context_states`, C tensors [T, d_text],
            float16; `context_input_ids`, C tensors [T], int64, special tokens included; and with `images` the picture
            as `image`, undecoded.

        Raises:
            IndexError: if there is no such picture.
            OSError: if its shard is missing or of another cache, or the picture's data is damaged, by a checksum
                (which takes about 0.3 ms for 257 states of width 768).
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Picture {index} of {len(self)}.")
        shard, row = divmod(index % len(self), self.shard_size)
        if self._owner != os.getpid():
            self._owner, self._files = os.getpid(), {}
        if shard not in self._files:
            self._files[shard] = _Shard(self.folder / SHARD_NAME.format(shard), self._settings)
        example = self._files[shard].read_example(row)
        return example if self.images is None else {**example, "image": self.images[example["key"]]}


def cache_features(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    pairs: Iterable[dict[str, Any]],
    folder: str | os.PathLike,
    *,
    batch_size: int = 64,
    pool_grid: int | None = None,
    shard_size: int = 512,
    report: SkipReport | None = None,
) -> FeatureDataset:
    """
    Runs the frozen encoders once over each picture and each of its captions, and caches their states in float16.

    After an interruption a second call continues, with bitwise the same result. An existing cache is compared with
    the pairs, in order, and read once to find damage. Data that has changed or is damaged is encoded again, with a
    warning: the affected batches of pictures and the captions of their shards, or everything in a cache of an earlier
    format; surplus shards are deleted. The result equals that of a new cache. To open a complete cache without the
    pairs use [`FeatureDataset`]. Of several processes one works and the others wait.

    Args:
        model: a model with both encoders.
        processor: its processor.
        pairs: `{"key": str, "image": ..., "captions": [str, ...]}`; an image is the bytes of its file, decoded only if
            its states are not cached, or a PIL image, identified by its pixels (so the two count as different).
        folder: where to write; created if missing.
        batch_size: pictures, or captions, per batch.
        pool_grid: g averages the patch states to a g x g grid, and keeps the class and register states before them;
            `None` keeps all states.
        shard_size: pictures per file.
        report: records images that cannot be decoded, which are skipped.

    Raises:
        OSError: if an encoder cannot be found or the disk is full.
        ValueError: if the folder holds states of other encoders or settings, or states exceed the range of float16.
    """
    folder, report = Path(folder), report or SkipReport()
    folder.mkdir(parents=True, exist_ok=True)
    model.attach_vision_encoder()
    for encoder in (model.vision_encoder, model.context_encoder):
        encoder.eval()  # no dropout, even if the model was built and not loaded
    index = {
        "key": _cache_key(model, processor, pool_grid, shard_size),
        "backbones": model.config.backbones,
        "num_pictures": None,
    }
    settings, changed = _hash_settings(index["key"]), []
    total = len(pairs) if isinstance(pairs, Sized) else None
    with WeakFileLock(folder / ".lock"), tqdm(total=total, unit=" pictures", desc="Caching features") as progress:
        complete, stream = _begin(folder, index), iter(pairs)
        for number in itertools.count():
            path = folder / SHARD_NAME.format(number)
            old = _open_verified(path, settings)
            examples = itertools.islice(_identify(stream, old, report), shard_size)
            rows, tensors = _encode(model, processor, examples, old, batch_size, pool_grid, progress)
            if tensors:
                if complete:  # no longer so until everything is written
                    _write_index(folder, index)
                    complete = False
                changed += [path.name] if path.exists() else []
                _write_shard(path, {**tensors, "settings": _as_tensor(settings)})
            if len(rows) < shard_size:
                break
        index["num_pictures"] = number * shard_size + len(rows)
        changed += _delete_shards(folder, number + bool(rows))
        _write_index(folder, index)
    if changed:
        logger.warning(
            f"{folder}: pictures, captions or their order had changed, or shards were damaged. Encoded again: "
            f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''} ({len(changed)} shards)."
        )
    return FeatureDataset(folder)


def tokenize_captions(processor: VikdfProcessor, captions: list[str]) -> list[torch.Tensor]:
    """The text encoder's ids of each caption [T], int64, special tokens included, truncated to its maximum length."""
    tokenizer, limit = processor.context_text_tokenizer, _max_length(processor)
    rows = tokenizer(captions)["input_ids"]
    return [
        torch.tensor(row if len(row) <= limit else encode_truncated(tokenizer, caption, limit))
        for row, caption in zip(rows, captions, strict=True)
    ]


# ---- encoding ----


class _Row(NamedTuple):
    """The identity of a picture and its captions."""

    key: str
    captions: list[str]
    picture: str  # a hash of its content


def _identify(
    stream: Iterator[dict[str, Any]], old: "_Shard | None", report: SkipReport
) -> Iterator[tuple[_Row, dict[str, Any], bool]]:
    """(row, pair, whether the old shard has this picture at this position); undecodable pictures are skipped."""
    position = 0
    for example in stream:
        row = _Row(example["key"], list(example["captions"]), _hash_picture(example["image"]))
        kept = old is not None and position < len(old.rows) and old.rows[position].picture == row.picture
        decoded = example if kept else decode_pair(example, report)
        if decoded is not None:
            yield row, decoded, kept
            position += 1


def _hash_picture(picture: Any) -> str:
    if not isinstance(picture, bytes):
        image = read_picture(picture)
        picture = f"{image.size}".encode() + image.tobytes()
    return hashlib.sha256(picture).hexdigest()


def _encode(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: Iterator[tuple[_Row, dict[str, Any], bool]],
    old: "_Shard | None",
    batch_size: int,
    pool_grid: int | None,
    progress: tqdm,
) -> tuple[list[_Row], dict[str, torch.Tensor]]:
    """The rows and tensors of a shard; no tensors if they equal the old shard's, or there are no examples."""
    rows, vision_states = [], []
    while batch := list(itertools.islice(examples, batch_size)):
        place = slice(len(rows), len(rows) + batch_size)
        if all(kept for *_, kept in batch) and len(batch) == len(old.rows[place]):  # the same batch: same rounding
            vision_states.append(old.read("vision_states", place.start, place.stop))
        else:
            pictures = [pair["image"] for _, pair, _ in batch]
            vision_states.append(_encode_pictures(model, processor, pictures, pool_grid))
        rows += [row for row, *_ in batch]
        progress.update(len(batch))
    if not rows:
        return rows, {}
    captions = [row.captions for row in rows]
    ids = tokenize_captions(processor, list(itertools.chain.from_iterable(captions)))
    tokens = {
        "context_input_ids": torch.cat(ids).int(),  # [tokens]
        "token_offsets": _offsets(ids),  # [captions + 1]
        "caption_offsets": _offsets(captions),  # [pictures + 1]
    }
    same_tokens = old is not None and all(torch.equal(tensor, old.read(name)) for name, tensor in tokens.items())
    if same_tokens and rows == old.rows:
        return rows, {}
    states = old.read("context_states") if same_tokens else _encode_captions(model, processor, ids, batch_size)
    texts = [json.dumps(row).encode() for row in rows]
    tensors = {
        **tokens,
        "context_states": states,  # [tokens, d_text]
        "vision_states": torch.cat(vision_states),  # [pictures, S, d_vision]
        "texts": _as_tensor(b"".join(texts)),  # [bytes]: JSON of key, captions and hash of the picture
        "text_offsets": _offsets(texts),  # [pictures + 1]
    }

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return tensors[name][start:stop]

    checksums = [_checksum(_read_parts(read, row)) for row in range(len(rows))]
    return rows, {**tensors, "checksums": torch.tensor(checksums)}  # [pictures]


def _encode_pictures(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, pictures: list[Any], pool_grid: int | None
) -> torch.Tensor:
    """Vision states [B, S, d_vision], float16."""
    pixel_values = processor.pixel_values(pictures).to(model.iqformer.query_tokens.device)  # the encoders' device
    return _to_half(_pool(model.encode_images(pixel_values), pixel_values, model, pool_grid))


def _encode_captions(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, ids: list[torch.Tensor], batch_size: int
) -> torch.Tensor:
    """Text states [tokens, d_text] of the captions, concatenated, float16."""
    device = model.iqformer.query_tokens.device  # the encoders', wherever a device map put the LLM
    context_states = [None] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # minimises padding
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        batch_ids, mask = pad([ids[i] for i in rows], processor.context_tokenizer.pad_token_id)  # [B, T]
        states = _to_half(model.encode_context(batch_ids.to(device), mask.to(device)))  # [B, T, d_text]
        for i, row in zip(rows, states, strict=True):
            context_states[i] = row[: len(ids[i])]
    return torch.cat(context_states)


def _pool(
    states: torch.Tensor, pixel_values: torch.Tensor, model: VikdfForConditionalGeneration, pool_grid: int | None
) -> torch.Tensor:
    """Averages the patch states in [B, S, d] to a grid; class and register states before them are kept."""
    if pool_grid is None:
        return states
    patch = model.config.vision_config.patch_size
    height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    if not 0 < pool_grid <= min(height, width):
        raise ValueError(f"pool_grid must be between 1 and the patch grid's {height} x {width}, not {pool_grid}.")
    prefix, patches = states.tensor_split([states.shape[1] - height * width], dim=1)
    patches = patches.mT.unflatten(-1, (height, width))  # [B, d, H', W']
    patches = nn.functional.adaptive_avg_pool2d(patches, pool_grid).flatten(2).mT  # [B, g * g, d]
    return torch.cat([prefix, patches], dim=1)


def _to_half(states: torch.Tensor) -> torch.Tensor:
    half = states.to("cpu", torch.float16)
    if not half.isfinite().all():
        raise ValueError(
            f"An encoder's states (largest magnitude {states.abs().max().item():.3g}) exceed the range of float16 and "
            "cannot be cached: train without a cache."
        )
    return half


def _offsets(rows: list) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(map(len, rows))])


# ---- files ----


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside)
        os.replace(aside, path)
    except SafetensorError as error:
        raise OSError(
            f"{path} cannot be written ({error}). Free disk space and call cache_features again: it continues."
        ) from error
    finally:
        aside.unlink(missing_ok=True)


class _Shard:
    """
    A shard's memory-mapped file. A picture's data is verified by its checksum, at several gigabytes per second.

    Raises:
        OSError: if the file is missing or damaged, or was written with other settings.
    """

    def __init__(self, path: Path, settings: bytes):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            written_with = self.read("settings").numpy().tobytes()
            self._checksums = self.read("checksums").tolist()
        except (SafetensorError, FileNotFoundError) as error:
            raise self._error(str(error)) from error
        if written_with != settings:
            raise self._error("it is damaged, or was written with other settings than the index")

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor, unverified."""
        # a copy: sending a view to another process would send the whole file
        return self._file.get_slice(name)[start:stop].clone()

    def read_example(self, row: int) -> dict[str, Any]:
        """A picture as [`FeatureDataset`] returns it."""
        parts = self._read_verified(row)
        lengths = parts["lengths"].tolist()
        key, captions, _ = json.loads(parts["texts"].numpy().tobytes())
        return {
            "key": key,
            "captions": captions,
            "vision_states": parts["vision_states"][0],  # [S, d_vision]
            "context_states": list(parts["context_states"].split(lengths)),  # C x [T, d_text]
            "context_input_ids": list(parts["context_input_ids"].long().split(lengths)),  # C x [T]
        }

    @cached_property
    def rows(self) -> list[_Row]:
        """The identities of the pictures; reads and verifies the whole shard."""
        parts = (self._read_verified(row) for row in range(len(self._checksums)))
        return [_Row(*json.loads(part["texts"].numpy().tobytes())) for part in parts]

    def _read_verified(self, row: int) -> dict[str, torch.Tensor]:
        try:
            parts = _read_parts(self.read, row)
            if _checksum(parts) == self._checksums[row]:
                return parts
        except (SafetensorError, RuntimeError, ValueError, IndexError) as error:  # damaged offsets
            raise self._error(f"its row {row} is damaged: {error}") from error
        raise self._error(f"its row {row} is damaged")

    def _error(self, what: str) -> OSError:
        return OSError(
            f"{self.path} cannot be read ({what}). Call cache_features again with the same pairs: it rebuilds damaged "
            "shards."
        )


def _open_verified(path: Path, settings: bytes) -> _Shard | None:
    """The shard if it is undamaged and was written with these settings, otherwise `None`."""
    try:
        shard = _Shard(path, settings)
        return shard if shard.rows else None
    except OSError:
        return None


def _read_parts(read: Callable[[str, int, int], torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A shard's data of a picture and its C captions; `lengths` [C] are the captions' in tokens."""
    first, last = read("caption_offsets", row, row + 2).tolist()
    offsets = read("token_offsets", first, last + 1)
    start, stop = offsets[[0, -1]].tolist()
    return {
        "texts": read("texts", *read("text_offsets", row, row + 2).tolist()),
        "vision_states": read("vision_states", row, row + 1),  # [1, S, d_vision]
        "context_states": read("context_states", start, stop),  # [tokens, d_text]
        "context_input_ids": read("context_input_ids", start, stop),  # [tokens]
        "lengths": offsets.diff(),
    }


def _checksum(parts: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name, part in parts.items():
        checksum = zlib.crc32(f"{name} {part.dtype} {list(part.shape)}".encode(), checksum)
        checksum = zlib.crc32(part.contiguous().numpy(), checksum)
    return checksum


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _delete_shards(folder: Path, first: int) -> list[str]:
    """Deletes the shards from number `first` on, and returns their names."""
    names = []
    for number in itertools.count(first):
        path = folder / SHARD_NAME.format(number)
        if not path.exists():
            return names
        path.unlink()
        names.append(path.name)


def _begin(folder: Path, index: dict[str, Any]) -> bool:
    """Whether the folder holds a complete cache; starts a new one unless it holds one to continue."""
    try:
        existing = _read_index(folder)
    except OSError as error:
        logger.warning(str(error))
        existing = None  # each shard records its settings, too
    if existing is not None:
        earlier = existing["key"].get("format", 1) < FORMAT
        _check_key({**existing["key"], "format": FORMAT} if earlier else existing["key"], index["key"], folder)
        if not earlier:
            return existing["num_pictures"] is not None
        logger.warning(
            f"The cache in {folder} has an earlier format, which does not tell whether it is stale: it is rebuilt."
        )
    _write_index(folder, index)
    return False


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        checksum = index.pop("checksum", None)
        if checksum is None and "format" not in index["key"] or checksum == _hash_settings(index).hex():
            return index
        error = "its checksum differs"
    except (ValueError, LookupError, TypeError, AttributeError) as caught:
        error = caught
    raise OSError(f"{path} is damaged ({error}). Call cache_features again with the same pairs: it is rewritten.")


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    aside = folder / f"{INDEX_NAME}.tmp"
    index = {**index, "checksum": _hash_settings(index).hex()}
    aside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder / INDEX_NAME)


def _hash_settings(settings: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


# ---- identity of the states ----


def _cache_key(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, pool_grid: int | None, shard_size: int
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vision_encoder": _fingerprint(model.vision_encoder),
        "context_encoder": _fingerprint(model.context_encoder),
        "vision_post_layernorm": model.config.vision_post_layernorm,
        "image_processor": json.loads(processor.image_processor.to_json_string()),
        "vocabulary_size": len(processor.context_tokenizer),
        "max_length": _max_length(processor),
        "pool_grid": pool_grid,
        "shard_size": shard_size,
        "dtype": "float16",
    }


def _fingerprint(encoder: nn.Module) -> str:
    """
    A hash of an encoder's weights, because its name and revision may come to mean another.

    It hashes float32 values, so that float16 weights loaded as float32 count as the same encoder.
    """
    digests = sorted(  # names and order depend on the library's version, and a pooler that was not saved is random
        hashlib.sha256(weight.float().cpu().numpy().tobytes()).hexdigest()
        for name, weight in encoder.state_dict().items()
        if "pooler" not in name
    )
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_key(cached: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    differences = []
    for name in {**cached, **current}:
        old, new = cached.get(name), current.get(name)
        if isinstance(old, dict) and isinstance(new, dict):  # show only the fields that differ
            names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            old, new = ({key: value.get(key) for key in names} for value in (old, new))
        if old != new:
            differences.append(f"{name}: {old} cached, {new} now")
    if differences:
        raise ValueError(
            f"{folder} holds features of other encoders or settings ({'; '.join(differences)}). Choose another "
            "folder, restore these settings, or delete the folder to rebuild it."
        )


def _max_length(processor: VikdfProcessor) -> int:
    return processor.max_context_length or processor.context_tokenizer.model_max_length


__all__ = ["FeatureDataset", "cache_features", "tokenize_captions"]
