"""States of the frozen encoders on disk: computed once, read at random by every later run.

A cache is a folder: `index.json` says what the states depend on, each shard `features-NNNNN.safetensors` holds those
of `shard_size` pictures and of all their captions, in the order in which the pairs came. Rows of different lengths lie
one behind the other; `*_offsets` say where each begins and ends, so an example is found without reading the others.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .data import SkipReport, decode_pair
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import VikdfProcessor, encode_truncated


INDEX_NAME = "index.json"
SHARD_NAME = "features-{:05d}.safetensors"


class FeatureDataset(Dataset):
    """
    A cache that [`cache_features`] wrote, as a dataset. The shards are memory-mapped: nothing is read before it is
    asked for, each process (a DataLoader worker, say) maps them for itself, and pickling takes no file along.

    Args:
        folder: the cache.
        images: key -> content of the picture's file, for an objective that needs the pictures themselves.

    Raises:
        FileNotFoundError: if the folder holds no cache.
        ValueError: if the cache is not complete yet.
    """

    def __init__(self, folder: str | os.PathLike, images: Mapping[str, bytes] | None = None):
        self.folder, self.images = Path(folder), images
        index = _read_index(self.folder)
        if index is None:
            raise FileNotFoundError(f"There are no cached features in {self.folder}: write them with cache_features.")
        if index["num_pictures"] is None:
            raise ValueError(f"The cache in {self.folder} is not complete: call cache_features again to go on.")
        self.num_pictures, self.shard_size = index["num_pictures"], index["key"]["shard_size"]
        self._owner, self._files = os.getpid(), {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # mapped files do not travel

    def __len__(self) -> int:
        return self.num_pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Returns:
            `key`; `captions`, C strings; `vision_states` [S, d_vision] and `context_states`, C tensors [T, d_text],
            float16; `context_input_ids`, C tensors [T], special tokens included; `image`, undecoded, where there are
            `images`.

        Raises:
            IndexError: if there is no such picture.
            OSError: if its shard is missing or damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Picture {index} of {len(self)}.")
        shard, row = divmod(index % len(self), self.shard_size)
        if self._owner != os.getpid():
            self._owner, self._files = os.getpid(), {}
        if shard not in self._files:
            self._files[shard] = _open_shard(self.folder / SHARD_NAME.format(shard))
        file = self._files[shard]
        key, captions = _read_texts(file, row)
        first, last = _read(file, "caption_offsets", row, row + 2).tolist()
        offsets = _read(file, "token_offsets", first, last + 1)
        tokens, lengths = offsets[[0, -1]].tolist(), offsets.diff().tolist()
        example = {
            "key": key,
            "captions": captions,
            "vision_states": _read(file, "vision_states", row, row + 1)[0],  # [S, d_vision]
            "context_states": list(_read(file, "context_states", *tokens).split(lengths)),  # C x [T, d_text]
            "context_input_ids": list(_read(file, "context_input_ids", *tokens).long().split(lengths)),  # C x [T]
        }
        return example if self.images is None else {**example, "image": self.images[key]}


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
    Runs the frozen encoders once over each picture and each of its captions and keeps their states as float16.

    Interrupted, it goes on where it was when it is called again, and ends with the same bytes: finished shards are
    only compared with the keys and captions of the pairs, which must come in the same order. To open a complete cache
    without the pairs use [`FeatureDataset`]. Of several processes one works and the others wait.

    Args:
        pairs: `{"key": str, "image": PIL.Image, "captions": [str, ...]}`; an image may be the content of its file,
            which is decoded only if its states are not there yet.
        folder: where to write; made if need be.
        batch_size: pictures, or captions, that an encoder sees at a time.
        pool_grid: g averages the patch states to a grid of g x g, and keeps the class and register states before them
            as they are; `None` keeps all.
        shard_size: pictures in a file.
        report: gets to know which images cannot be decoded; they are left out.

    Raises:
        OSError: if an encoder cannot be found, a shard is damaged or the disk is full.
        ValueError: if the folder holds the states of other encoders, settings or pairs, or states do not fit float16.
    """
    folder, report = Path(folder), report or SkipReport()
    folder.mkdir(parents=True, exist_ok=True)
    model.attach_vision_encoder()
    for encoder in (model.vision_encoder, model.context_encoder):
        encoder.eval()  # no dropout, also where the model was built and not loaded
    index = {
        "key": _cache_key(model, processor, pool_grid, shard_size),
        "backbones": model.config.backbones,
        "num_pictures": None,
    }
    total = len(pairs) if isinstance(pairs, Sized) else None
    with WeakFileLock(folder / ".lock"), tqdm(total=total, unit=" pictures", desc="Caching features") as progress:
        found = _read_index(folder)
        if found is None:
            _write_index(folder, index)
        else:
            _check_key(found["key"], index["key"], folder)
        stream = iter(pairs)
        for number in itertools.count():
            path = folder / SHARD_NAME.format(number)
            if path.exists():
                size = _check_texts(path, stream, shard_size, report, progress)
            else:
                decoded = filter(None, (decode_pair(example, report) for example in stream))
                examples = itertools.islice(decoded, shard_size)
                tensors = _encode(model, processor, examples, batch_size, pool_grid, progress)
                size = len(tensors["vision_states"]) if tensors else 0
                if size:
                    _write_shard(path, tensors)
            if size < shard_size:
                break
        index["num_pictures"] = number * shard_size + size
        _write_index(folder, index)
    return FeatureDataset(folder)


def tokenize_captions(processor: VikdfProcessor, captions: list[str]) -> list[torch.Tensor]:
    """The text encoder's ids of each caption [T], special tokens included, cut to the most that it reads."""
    tokenizer, limit = processor.context_text_tokenizer, _max_length(processor)
    rows = tokenizer(captions)["input_ids"]
    return [
        torch.tensor(row if len(row) <= limit else encode_truncated(tokenizer, caption, limit))
        for row, caption in zip(rows, captions, strict=True)
    ]


def pad(rows: list[torch.Tensor], value: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths [T, ...] as [B, longest, ...], padded on the right, and their mask [B, longest]."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=value), mask


# ---- encoding ----


def _encode(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    examples: Iterable[dict[str, Any]],
    batch_size: int,
    pool_grid: int | None,
    progress: tqdm,
) -> dict[str, torch.Tensor]:
    """The tensors of a shard; none if there are no examples."""
    device = model.iqformer.query_tokens.device  # the encoders', wherever a device map put the LLM
    texts, captions, vision_states = [], [], []
    while batch := list(itertools.islice(examples, batch_size)):
        images = [example["image"] for example in batch]
        pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        states = _pool(model.encode_images(pixel_values), pixel_values, model, pool_grid)  # [B, S, d_vision]
        vision_states.append(_to_half(states))
        captions += [list(example["captions"]) for example in batch]
        texts += [json.dumps([example["key"], list(example["captions"])]).encode() for example in batch]
        progress.update(len(batch))
    if not texts:
        return {}
    ids = tokenize_captions(processor, list(itertools.chain.from_iterable(captions)))
    context_states = [None] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that little is padding
    for start in range(0, len(ids), batch_size):
        rows = by_length[start : start + batch_size]
        batch_ids, mask = pad([ids[i] for i in rows], processor.context_tokenizer.pad_token_id)  # [B, T]
        states = _to_half(model.encode_context(batch_ids.to(device), mask.to(device)))  # [B, T, d_text]
        for i, row in zip(rows, states, strict=True):
            context_states[i] = row[: len(ids[i])]
    return {
        "vision_states": torch.cat(vision_states),  # [pictures, S, d_vision]
        "context_states": torch.cat(context_states),  # [tokens, d_text]
        "context_input_ids": torch.cat(ids).int(),  # [tokens]
        "token_offsets": _offsets(ids),  # [captions + 1]
        "caption_offsets": _offsets(captions),  # [pictures + 1]
        "texts": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),  # [bytes]: JSON of key and captions
        "text_offsets": _offsets(texts),  # [pictures + 1]
    }


def _pool(
    states: torch.Tensor, pixel_values: torch.Tensor, model: VikdfForConditionalGeneration, pool_grid: int | None
) -> torch.Tensor:
    """The patch states of [B, S, d] averaged to a grid, those before them (class, registers) as they are."""
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
            f"States of an encoder (largest magnitude {states.abs().max().item():.3g}) do not fit float16 and cannot "
            "be cached: train without a cache."
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
        raise OSError(f"{path} cannot be written ({error}). With room on the disk cache_features goes on.") from error
    finally:
        aside.unlink(missing_ok=True)


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(
            f"{path} cannot be read ({error}). Delete it and call cache_features again with the same pairs."
        ) from error


def _read(file: Any, name: str, start: int, stop: int) -> torch.Tensor:
    # a copy: on its way to another process a view would take the whole file along
    return file.get_slice(name)[start:stop].clone()


def _read_texts(file: Any, row: int) -> tuple[str, list[str]]:
    """Key and captions of a picture."""
    start, stop = _read(file, "text_offsets", row, row + 2).tolist()
    key, captions = json.loads(_read(file, "texts", start, stop).numpy().tobytes())
    return key, captions


def _check_texts(
    path: Path, stream: Iterator[dict[str, Any]], shard_size: int, report: SkipReport, progress: tqdm
) -> int:
    """Compares a finished shard with the pairs of the stream that should be in it; -> how many these are."""
    file = _open_shard(path)
    size = file.get_slice("vision_states").get_shape()[0]
    stored = [_read_texts(file, row) for row in range(size)]
    for ours in stored if size == shard_size else [*stored, None]:  # behind an unfilled shard nothing may come
        theirs = None
        for example in stream:
            theirs = (example["key"], list(example["captions"]))
            if theirs == ours or decode_pair(example, report) is not None:
                break
            theirs = None  # left out when the shard was written, too
        if ours != theirs:
            raise ValueError(
                f"{path} was written for other pairs: it has {ours} where now {theirs} comes. Give the pairs in their "
                "old order, or choose another folder."
            )
        progress.update(ours is not None)
    return size


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    aside = folder / f"{INDEX_NAME}.tmp"
    aside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder / INDEX_NAME)


# ---- what the states depend on ----


def _cache_key(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, pool_grid: int | None, shard_size: int
) -> dict[str, Any]:
    return {
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
    A hash of an encoder's weights, for what its name and revision point to may change or move. Of their values, for
    float16 weights loaded as float32 are the same encoder.
    """
    digests = sorted(  # the parts' names and order are the library's, and a pooler that was not saved is random
        hashlib.sha256(weight.float().cpu().numpy().tobytes()).hexdigest()
        for name, weight in encoder.state_dict().items()
        if "pooler" not in name
    )
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _check_key(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differs = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differs:
        what = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} now" for name in differs)
        raise ValueError(f"{folder} holds features of other encoders or settings ({what}). Choose another folder.")


def _max_length(processor: VikdfProcessor) -> int:
    return processor.max_context_length or processor.context_tokenizer.model_max_length


__all__ = ["FeatureDataset", "cache_features", "pad", "tokenize_captions"]
