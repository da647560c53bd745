"""The identity of an evaluation, and a journal of its finished work. Knows neither dialogues nor metrics."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..environment import versions
from ..modeling_vikdf import VikdfForConditionalGeneration


class Journal:
    """
    Finished work of an evaluation, one line of JSON per dialogue, after a header that identifies the evaluation.

    Args:
        path: file to append to; by default the journal is in memory only.
        identity: everything that the results depend on.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if the file holds work of another identity.
    """

    def __init__(self, path: Path | None = None, identity: dict[str, Any] | None = None):
        self._done: dict[str, dict[str, Any]] = {}
        self._file = None
        if path is None:
            return
        self._file = open(path, "a+b")
        self._file.seek(0)
        # the last line is incomplete if the process was killed
        lines = [line for line in self._file if line.endswith(b"\n")]
        self._file.truncate(sum(map(len, lines)))
        identity = json.loads(json.dumps(identity))
        if lines:
            header = json.loads(lines[0])
            if changed := [name for name in identity if header.get(name) != identity[name]]:
                self._file.close()
                raise ValueError(
                    f"{path} holds the unfinished work of another evaluation, which differs in {', '.join(changed)}. "
                    "Run that one again to finish it, delete the file, or choose another output."
                )
        else:
            self._write([identity])
        for line in lines[1:]:
            entry = json.loads(line)
            self._done[entry["key"]] = entry["record"]

    def run(
        self,
        work: Callable[[list[list[int]]], Iterator[list[dict[str, Any]]]],
        batches: list[list[int]],
        keys: list[str],
    ) -> list[dict[str, Any]]:
        """
        The record of each key, computed if it is missing.

        Incomplete batches are repeated as a whole, because rounding depends on the batch.

        Args:
            work: takes batches of indices into `keys`, and yields the records of each batch.
            batches: all keys' indices, in batches.
            keys: the dialogues' keys.

        Returns:
            The records in the order of `keys`.
        """
        remaining = [batch for batch in batches if not all(keys[i] in self._done for i in batch)]
        done = len(keys) - sum(map(len, remaining))
        with tqdm(desc="Evaluating", unit=" dialogues", total=len(keys), initial=done) as bar:
            for batch, results in zip(remaining, work(remaining), strict=True):
                records = dict(zip([keys[i] for i in batch], results, strict=True))
                self._write([{"key": key, "record": record} for key, record in records.items()])
                self._done |= records
                bar.update(len(batch))
        return [self._done[key] for key in keys]

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._file.flush()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()
            if any(error) and not self._done:  # failed before there was anything to resume
                os.unlink(self._file.name)


def identify(
    model_source: str | Path,
    model: VikdfForConditionalGeneration,
    data: str | Path,
    data_hash: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """
    The identity of an evaluation: the model and its weights, the data, the settings and their files, `versions`.

    Raises:
        OSError: if a file that the settings name cannot be read.
    """
    files = {name: settings[name] for name in ("visual_words", "word_vectors") if settings[name] is not None}
    return {
        "model": "/".join(Path(model_source).parts[-2:]),  # a Hub id, or a folder without its location
        "weights_sha256": _hash_weights(model),
        "data": Path(data).name,
        "data_sha256": data_hash,
        **settings,
        **{name: Path(path).name for name, path in files.items()},
        **{f"{name}_sha256": hash_file(path) for name, path in files.items()},
        "versions": versions(),
    }


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_weights(model: VikdfForConditionalGeneration) -> str:
    """SHA-256 of the trained weights and the backbones' names."""
    digest = hashlib.sha256(json.dumps(model.config.backbones, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["Journal", "hash_file", "identify"]
