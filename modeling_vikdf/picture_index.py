"""A searchable index of pictures: thumbnails and matching embeddings, in one file.

    folder, shards or dataset -> load_pictures -> PictureIndex.build -> save     (`vikdf index`)
    load -> check_model -> nearest(model.get_text_embeddings(...))               (the Space)

Embeddings are only comparable with those of the same weights, so an index stores these weights' fingerprint. The file
is safetensors: numbers, titles and WebP thumbnails, no code to run on loading.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from .data.pairs import METADATA, load_image_text_pairs
from .data.sources import SkipReport
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import PICTURE_FORMATS, VikdfProcessor, read_picture


INDEX_NAME = "index.safetensors"
THUMBNAIL_SIZE = 128  # pixels of the longer side: shown at 64 on high-resolution screens


class Match(NamedTuple):
    """A picture of an index, and its embedding's cosine similarity with the query."""

    title: str
    thumbnail: bytes  # WebP
    score: float


class PictureIndex:
    """
    Pictures as thumbnails and as embeddings in a model's shared space of texts and pictures.

    Args:
        embeddings: unit vectors [N, d], float32.
        thumbnails: the bytes of N WebP files.
        titles: N descriptions to show.
        fingerprint: of the weights that computed the embeddings, see [`fingerprint`].

    Raises:
        ValueError: if their numbers differ, or are 0.
    """

    def __init__(self, embeddings: torch.Tensor, thumbnails: Sequence[bytes], titles: Sequence[str], fingerprint: str):
        if not len(embeddings) == len(thumbnails) == len(titles) > 0 or embeddings.dim() != 2:
            raise ValueError(
                "A picture index needs an embedding, a thumbnail and a title for each picture, got embeddings "
                f"{list(embeddings.shape)}, {len(thumbnails)} thumbnails and {len(titles)} titles."
            )
        self.embeddings, self.thumbnails, self.titles = embeddings, list(thumbnails), list(titles)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.titles)

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        model: VikdfForConditionalGeneration,
        processor: VikdfProcessor,
        pictures: Iterable[tuple[str, Image.Image]],
        batch_size: int = 32,
        total: int | None = None,
    ) -> "PictureIndex":
        """
        Embeds pictures with the model's matching head.

        Args:
            model: a model with a vision encoder, in evaluation mode.
            processor: its processor.
            pictures: pairs of a title and anything that [`read_picture`] reads.
            batch_size: pictures per batch.
            total: number of pictures if known, for the progress bar.

        Raises:
            OSError: if the vision encoder cannot be found.
            ValueError: if the model was built without one, or there are no pictures.
        """
        model.attach_vision_encoder()  # fails before the first picture is read
        device = model.iqformer.query_tokens.device
        titles, thumbnails, embeddings = [], [], []
        with tqdm(pictures, total=total, unit=" pictures", desc="Embedding") as stream:
            shrunk = _shrink(stream, processor)
            while batch := list(itertools.islice(shrunk, batch_size)):
                pixels = torch.cat([pixels for _, pixels, _ in batch])  # [B, 3, H, W]
                embeddings.append(model.get_image_embeddings(pixels.to(device)).float().cpu())  # [B, d]
                titles += [title for title, _, _ in batch]
                thumbnails += [thumbnail for _, _, thumbnail in batch]
        if not titles:
            raise ValueError("There are no pictures to embed.")
        return cls(torch.cat(embeddings), thumbnails, titles, fingerprint(model))

    def rebuild(self, model: VikdfForConditionalGeneration, processor: VikdfProcessor) -> "PictureIndex":
        """An index of the same thumbnails and titles, embedded by another model; errors as for `build`."""
        pictures = ((title, read_picture(data)) for title, data in zip(self.titles, self.thumbnails, strict=True))
        rebuilt = self.build(model, processor, pictures, total=len(self))
        rebuilt.thumbnails = self.thumbnails  # not compressed a second time
        return rebuilt

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes the index into a folder, atomically, and returns the file's path."""
        path = Path(folder, INDEX_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = list(itertools.accumulate(map(len, self.thumbnails), initial=0))
        tensors = {
            "embeddings": self.embeddings.contiguous(),  # [N, d]
            "thumbnails": torch.frombuffer(bytearray(b"".join(self.thumbnails)), dtype=torch.uint8),  # concatenated
            "thumbnail_offsets": torch.tensor(ends),  # [N + 1]
        }
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(save(tensors, {"titles": json.dumps(self.titles), "fingerprint": self.fingerprint}))
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "PictureIndex":
        """
        Reads an index written by `save`.

        Raises:
            FileNotFoundError: if there is no index in the folder.
            ValueError: if it is damaged, or another kind of file.
        """
        path = Path(folder, INDEX_NAME)
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: create it by `vikdf index PICTURES --output {folder}`.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                embeddings, data, offsets = map(file.get_tensor, ("embeddings", "thumbnails", "thumbnail_offsets"))
            titles, data, ends = json.loads(metadata["titles"]), data.numpy().tobytes(), offsets.tolist()
            thumbnails = [data[start:stop] for start, stop in itertools.pairwise(ends)]
            if not all(isinstance(title, str) for title in titles) or embeddings.dtype != torch.float32:
                raise ValueError("titles must be strings and embeddings float32")
            return cls(embeddings, thumbnails, titles, metadata["fingerprint"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a picture index, or is damaged: {error}. Create it again.") from error

    def check_model(self, model: VikdfForConditionalGeneration) -> None:
        """
        Checks that a model's embeddings are comparable with those of this index.

        Raises:
            ValueError: if other weights computed them.
        """
        if (own := fingerprint(model)) != self.fingerprint:
            raise ValueError(
                f"This picture index was embedded by other weights (fingerprint {self.fingerprint}) than this model's "
                f"({own}), so scores would be meaningless. Embed its thumbnails again with "
                "`vikdf index INDEX_FOLDER --output INDEX_FOLDER --model MODEL`."
            )

    def nearest(self, embeddings: torch.Tensor, k: int = 6) -> list[list[Match]]:
        """
        The k nearest pictures of each query.

        Args:
            embeddings: unit vectors [B, d].
            k: pictures per query; fewer if the index is smaller.

        Returns:
            B lists of matches, the largest cosine first.

        Raises:
            ValueError: if the embeddings have another width than those of the index.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"Expected embeddings [B, {self.embeddings.shape[1]}], got {list(embeddings.shape)}: do they "
                "come from the model that embedded the pictures?"
            )
        scores = embeddings.to(self.embeddings) @ self.embeddings.T  # [B, N]
        values, columns = scores.topk(min(k, len(self)), dim=1)  # [B, k]
        return [
            [Match(self.titles[column], self.thumbnails[column], score) for column, score in zip(*row, strict=True)]
            for row in zip(columns.tolist(), values.tolist(), strict=True)
        ]


def fingerprint(model: VikdfForConditionalGeneration) -> str:
    """16 hexadecimal digits that identify the weights of IQ-Former and matching head, and the encoders' names."""
    digest = hashlib.sha256()
    for role in ("context_encoder", "vision_encoder"):
        digest.update(json.dumps(model.config.backbones.get(role), sort_keys=True).encode())
    for part in (model.iqformer, model.matching_head):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def load_pictures(
    source: str | os.PathLike, report: SkipReport
) -> tuple[Iterator[tuple[str, Image.Image]], int | None]:
    """
    Reads the pictures of a folder or a dataset.

    Args:
        source: a folder, searched recursively, whose pictures are titled by their file names; or anything that
            `load_image_text_pairs` reads (webdataset shards, a folder with `metadata.jsonl`, a Hub dataset), titled by
            the first captions.
        report: records files that cannot be read.

    Returns:
        An iterator of (title, RGB picture), and the number of files, or `None` if unknown.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if nothing in it can be read.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / METADATA).exists():
        pairs = load_image_text_pairs(os.fspath(source), shuffle_buffer=0, report=report)
        return ((pair["captions"][0], pair["image"]) for pair in pairs), None
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())  # including what will be reported
    if not paths:
        raise ValueError(f"{folder} holds no files: expected pictures ({', '.join(PICTURE_FORMATS)}).")
    return _read_files(folder, paths, report), len(paths)


def _shrink(
    pictures: Iterable[tuple[str, Image.Image]], processor: VikdfProcessor
) -> Iterator[tuple[str, torch.Tensor, bytes]]:
    """Titles, pixel values [1, 3, H, W] and thumbnails: a batch of whole pictures could take gigabytes."""
    for title, picture in pictures:
        image = read_picture(picture)
        del picture
        yield title, processor.pixel_values([image]), _thumbnail(image)
        del image  # before the next one is read


def _read_files(folder: Path, paths: list[Path], report: SkipReport) -> Iterator[tuple[str, Image.Image]]:
    for path in paths:
        try:
            image = read_picture(path)
        except ValueError as error:
            report.add("unreadable picture", str(path.relative_to(folder)), str(error))
        else:
            yield path.stem.replace("-", " ").replace("_", " "), image


def _thumbnail(image: Image.Image) -> bytes:
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    image.save(file, "WEBP", quality=80, method=6)
    return file.getvalue()


__all__ = ["Match", "PictureIndex", "fingerprint", "load_pictures"]
