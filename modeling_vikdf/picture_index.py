"""A searchable index of pictures and their captions: thumbnails and matching embeddings, in one file.

    folder, shards or dataset -> load_pictures, load_notes -> PictureIndex.build -> save        (`vikdf index`)
    load -> check_model -> nearest, nearest_captions(model.get_text_embeddings(...))            (the Space)

Embeddings are only comparable with those of the same weights, so an index stores these weights' fingerprint. The file
is safetensors: numbers, texts and WebP thumbnails, no code to run on loading.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from .data.pairs import METADATA, load_image_text_pairs
from .data.sources import SkipReport, read_records
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import PICTURE_FORMATS, VikdfProcessor, read_picture


INDEX_NAME = "index.safetensors"
CREDITS_NAME = "CREDITS.md"
THUMBNAIL_SIZE = 128  # pixels of the longer side: shown at 64 on high-resolution screens


class Note(NamedTuple):
    """What is known about a picture besides its title."""

    captions: tuple[str, ...] = ()
    license: str = ""  # its name, such as "CC BY 2.0"
    source: str = ""  # its address

    @property
    def license_url(self) -> str:
        """The address of a Creative Commons licence's text; empty for another licence."""
        parts = re.fullmatch(r"CC (BY[-A-Z]*) (\d\.\d)", self.license)
        return f"https://creativecommons.org/licenses/{parts[1].lower()}/{parts[2]}/" if parts else ""


class Match(NamedTuple):
    """A picture of an index, and its score for the query."""

    title: str
    thumbnail: bytes  # WebP
    score: float
    note: Note = Note()


class Thresholds(NamedTuple):
    """The lowest scores that stand out, of a picture and of a caption."""

    picture: float
    caption: float


class PictureIndex:
    """
    Pictures as thumbnails and as embeddings in a model's shared space of texts and pictures.

    Args:
        embeddings: unit vectors [N, d], float32.
        thumbnails: the bytes of N WebP files.
        titles: N descriptions to show.
        fingerprint: of the weights that computed the embeddings, see [`fingerprint`].
        notes: N notes, or `None` for empty ones.
        caption_embeddings: unit vectors [M, d], float32, of all M captions in the order of the pictures.
        thresholds: of what to show; `None` shows the nearest, however far.

    Raises:
        ValueError: if their numbers differ, or are 0.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        thumbnails: Sequence[bytes],
        titles: Sequence[str],
        fingerprint: str,
        notes: Sequence[Note] | None = None,
        caption_embeddings: torch.Tensor | None = None,
        thresholds: Thresholds | None = None,
    ):
        if not len(embeddings) == len(thumbnails) == len(titles) > 0 or embeddings.dim() != 2:
            raise ValueError(
                "A picture index needs an embedding, a thumbnail and a title for each picture, got embeddings "
                f"{list(embeddings.shape)}, {len(thumbnails)} thumbnails and {len(titles)} titles."
            )
        self.embeddings, self.thumbnails, self.titles = embeddings, list(thumbnails), list(titles)
        self.fingerprint, self.thresholds = fingerprint, thresholds
        self.notes = [Note()] * len(titles) if notes is None else list(notes)
        if caption_embeddings is None:
            caption_embeddings = embeddings.new_zeros(0, embeddings.shape[1])
        self.caption_embeddings = caption_embeddings
        self.captions = [caption for note in self.notes for caption in note.captions]
        if len(self.notes) != len(self) or caption_embeddings.shape != (len(self.captions), embeddings.shape[1]):
            raise ValueError(
                "A picture index needs a note for each picture and an embedding for each caption, got "
                f"{len(self.notes)} notes of {len(self)} pictures, and embeddings {list(caption_embeddings.shape)} "
                f"of {len(self.captions)} captions."
            )
        counts = torch.tensor([len(note.captions) for note in self.notes])
        self._captioned = torch.arange(len(self)).repeat_interleave(counts)  # [M]: the picture of each caption

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
        notes: Mapping[str, Note] | None = None,
    ) -> "PictureIndex":
        """
        Embeds pictures, and their captions, with the model's matching head.

        Args:
            model: a model with a vision encoder, in evaluation mode.
            processor: its processor.
            pictures: pairs of a title and anything that [`read_picture`] reads.
            batch_size: pictures per batch.
            total: number of pictures if known, for the progress bar.
            notes: by title, see [`load_notes`].

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
        known = [(notes or {}).get(title, Note()) for title in titles]
        texts = [caption for note in known for caption in note.captions]
        captions = embed_texts(model, processor, texts) if texts else None
        return cls(torch.cat(embeddings), thumbnails, titles, fingerprint(model), known, captions)

    def rebuild(self, model: VikdfForConditionalGeneration, processor: VikdfProcessor) -> "PictureIndex":
        """
        An index of the same thumbnails, titles and notes, embedded by another model; errors as for `build`.

        It has no thresholds, because those are of scores by the old embeddings.
        """
        pictures = ((title, read_picture(data)) for title, data in zip(self.titles, self.thumbnails, strict=True))
        rebuilt = self.build(model, processor, pictures, total=len(self))
        captions = embed_texts(model, processor, self.captions) if self.captions else None
        # the old thumbnails, not compressed a second time
        return type(self)(rebuilt.embeddings, self.thumbnails, self.titles, rebuilt.fingerprint, self.notes, captions)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes the index into a folder, atomically, with a list of known licences, and returns the index's path."""
        path = Path(folder, INDEX_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = list(itertools.accumulate(map(len, self.thumbnails), initial=0))
        tensors = {
            "embeddings": self.embeddings.contiguous(),  # [N, d]
            "caption_embeddings": self.caption_embeddings.contiguous(),  # [M, d]
            "thumbnails": torch.frombuffer(bytearray(b"".join(self.thumbnails)), dtype=torch.uint8),  # concatenated
            "thumbnail_offsets": torch.tensor(ends),  # [N + 1]
        }
        metadata = {
            "titles": json.dumps(self.titles),
            "fingerprint": self.fingerprint,
            "notes": json.dumps(self.notes),
            "thresholds": json.dumps(self.thresholds),
        }
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(save(tensors, metadata))
        os.replace(partial, path)
        if any(note.license for note in self.notes):
            path.with_name(CREDITS_NAME).write_text(self.credits(), encoding="utf-8")
        return path

    def credits(self) -> str:
        """A Markdown table of titles, licences and sources."""
        licenses = {note.license: note.license_url for note in self.notes if note.license_url}
        rows = zip(self.titles, self.notes, strict=True)
        lines = [
            "# Credits",
            "",
            *(f"* {name}: <{url}>" for name, url in sorted(licenses.items())),
            "",
            "| picture | licence | source |",
            "|---|---|---|",
            *(f"| {title.replace('|', '/')} | {note.license} | <{note.source}> |" for title, note in rows),
        ]
        return "\n".join(lines) + "\n"

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
                captions = file.get_tensor("caption_embeddings") if "caption_embeddings" in file.keys() else None
            titles, data, ends = json.loads(metadata["titles"]), data.numpy().tobytes(), offsets.tolist()
            thumbnails = [data[start:stop] for start, stop in itertools.pairwise(ends)]
            if not all(isinstance(title, str) for title in titles) or embeddings.dtype != torch.float32:
                raise ValueError("titles must be strings and embeddings float32")
            if captions is not None and captions.dtype != torch.float32:
                raise ValueError("caption embeddings must be float32")
            notes, thresholds = _read_notes(metadata), json.loads(metadata.get("thresholds", "null"))
            thresholds = thresholds and Thresholds(*map(float, thresholds))
            return cls(embeddings, thumbnails, titles, metadata["fingerprint"], notes, captions, thresholds)
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
        The k nearest pictures of each query, of those that stand out.

        A picture's score is its cosine, and if it has captions, the mean of that and of its nearest caption's.

        Args:
            embeddings: unit vectors [B, d].
            k: pictures per query; fewer if the index is smaller, or if fewer reach its threshold.

        Returns:
            B lists of matches, the largest score first.

        Raises:
            ValueError: if the embeddings have another width than those of the index.
        """
        lowest = -math.inf if self.thresholds is None else self.thresholds.picture
        return [
            [Match(self.titles[i], self.thumbnails[i], score, self.notes[i]) for i, score in row]
            for row in _best(self.scores(embeddings), k, lowest)
        ]

    def nearest_captions(self, embeddings: torch.Tensor, k: int = 3) -> list[list[tuple[str, float]]]:
        """B lists of the k captions nearest to the queries [B, d], of those that stand out, and their cosines."""
        lowest = -math.inf if self.thresholds is None else self.thresholds.caption
        cosines = self._cosines(embeddings, self.caption_embeddings)
        return [[(self.captions[i], score) for i, score in row] for row in _best(cosines, k, lowest)]

    def scores(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The scores [B, N] of all pictures for queries [B, d], see [`nearest`]."""
        pictures = self._cosines(embeddings, self.embeddings)  # [B, N]
        captions = self._cosines(embeddings, self.caption_embeddings)  # [B, M]
        owners = self._captioned.expand_as(captions)
        nearest = pictures.scatter_reduce(1, owners, captions, "amax", include_self=False)  # without captions: itself
        return (pictures + nearest) / 2

    def _cosines(self, embeddings: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        if embeddings.dim() != 2 or embeddings.shape[1] != others.shape[1]:
            raise ValueError(
                f"Expected embeddings [B, {others.shape[1]}], got {list(embeddings.shape)}: do they "
                "come from the model that embedded the pictures?"
            )
        return embeddings.to(others) @ others.T


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
            the shortest captions.
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
        return ((min(pair["captions"], key=len), pair["image"]) for pair in pairs), None
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


def load_notes(folder: str | os.PathLike, report: SkipReport) -> dict[str, Note]:
    """
    Reads captions, licences and sources from a folder's `metadata.jsonl`.

    Its fields are `captions` (or `text`), `license` and `source`.

    Args:
        folder: as for [`load_pictures`].
        report: records lines that cannot be read.

    Returns:
        A note for each title that [`load_pictures`] gives a picture; an empty dict without such a file.

    Raises:
        ValueError: if two pictures would have the same title but different notes.
    """
    path, notes = Path(folder, METADATA), {}
    for _, record in read_records(METADATA, os.fspath(path), report, required="file_name") if path.exists() else ():
        captions = record.get("captions") or record.get("text") or []
        captions = [captions] if isinstance(captions, str) else captions
        captions = tuple(filter(None, (" ".join(caption.split()) for caption in captions)))
        title = min(captions, key=len, default="")
        note = Note(captions, *(str(record.get(field) or "") for field in ("license", "source")))
        if notes.setdefault(title, note) != note:
            raise ValueError(f"Two pictures in {path} have the shortest caption {title!r}: reword one of them.")
    return notes


@torch.no_grad()
def embed_texts(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, texts: Sequence[str], batch_size: int = 32
) -> torch.Tensor:
    """The embeddings [B, d] of texts, at least one, each as a chat's only message: float32, on the CPU."""
    embeddings = []
    for start in range(0, len(texts), batch_size):
        chats = [[{"role": "user", "content": text}] for text in texts[start : start + batch_size]]
        inputs = processor(chats).to(model.iqformer.query_tokens.device)
        context = inputs["context_input_ids"], inputs["context_attention_mask"]
        embeddings.append(model.get_text_embeddings(*context).float().cpu())
    return torch.cat(embeddings)


def _best(scores: torch.Tensor, k: int, lowest: float) -> list[list[tuple[int, float]]]:
    """Columns and values of the k largest scores [B, N] of each row that are not below `lowest`."""
    values, columns = scores.topk(min(k, scores.shape[1]), dim=1)  # [B, k]
    rows = zip(columns.tolist(), values.tolist(), strict=True)
    return [[(i, score) for i, score in zip(*row, strict=True) if not score < lowest] for row in rows]


def _read_notes(metadata: Mapping[str, str]) -> list[Note] | None:
    rows = json.loads(metadata.get("notes", "null"))
    notes = rows and [Note(tuple(captions), license, source) for captions, license, source in rows]
    for note in notes or []:
        if not all(isinstance(text, str) for text in (*note.captions, note.license, note.source)):
            raise ValueError("captions, licences and sources must be strings")
    return notes


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


__all__ = ["Match", "Note", "PictureIndex", "Thresholds", "embed_texts", "fingerprint", "load_notes", "load_pictures"]
