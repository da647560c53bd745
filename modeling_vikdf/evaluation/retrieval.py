"""Text-image retrieval: embeds both, ranks, and reports recall with confidence intervals.

Ties count against the model, so constant (or NaN) embeddings retrieve nothing.
"""

import itertools
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.features import FeatureDataset, tokenize_captions
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor, pad
from .reports import REPORT_VERSION


KS = (1, 5, 10)
TIE = 1e-6  # exceeds the rounding error between dot products of equal unit vectors
CHUNK = 256  # queries that are compared with all candidates at a time


def retrieval_recall(
    text_embeddings: torch.Tensor, image_embeddings: torch.Tensor, text_to_image: torch.Tensor, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """
    Recall at k in %: the share of queries with a correct answer among the k nearest candidates.

    Correct for a text is its picture, for a picture any of its texts; pictures without texts are candidates only.

    Args:
        text_embeddings: unit vectors [N_t, d].
        image_embeddings: unit vectors [N_i, d].
        text_to_image: index of each text's picture [N_t], int64.
        ks: the values of k.

    Returns:
        `{"text_to_image": {"recall_at_1": ...}, "image_to_text": {...}}`.

    Raises:
        ValueError: if `text_to_image` does not name a picture for each text.
    """
    ranks = _ranks(text_embeddings, image_embeddings, text_to_image)
    return {
        direction: {f"recall_at_{k}": 100 * (rank < k).double().mean().item() for k in ks}
        for direction, (rank, _) in ranks.items()
    }


def retrieval_intervals(
    text_embeddings: torch.Tensor,
    image_embeddings: torch.Tensor,
    text_to_image: torch.Tensor,
    ks: Sequence[int] = KS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """
    95 % bootstrap intervals of `retrieval_recall`, in the same layout.

    Queries are resampled by photograph, each with all its (dependent) texts; the candidates stay the same.
    """
    count = len(image_embeddings)
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, count, dtype=torch.double)  # how often each photograph was drawn
    times.scatter_add_(1, draws, torch.ones_like(times))
    intervals = {}
    for direction, (rank, picture) in _ranks(text_embeddings, image_embeddings, text_to_image).items():
        queries = times @ picture.bincount(minlength=count).double()  # [resamples]
        intervals[direction] = {}
        for k in ks:
            hits = times @ picture.bincount((rank < k).double(), minlength=count)  # [resamples]
            recall = 100 * hits / queries
            intervals[direction][f"recall_at_{k}"] = recall.quantile(recall.new_tensor([0.025, 0.975])).tolist()
    return intervals


def _ranks(
    text_embeddings: torch.Tensor, image_embeddings: torch.Tensor, text_to_image: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Direction -> each query's correct answer's rank, from 0 (ties count as nearer), and its picture's index."""
    texts, images, own = text_embeddings.float().cpu(), image_embeddings.float().cpu(), text_to_image.cpu()
    if own.shape != texts.shape[:1] or not ((own >= 0) & (own < len(images))).all():
        raise ValueError(f"text_to_image must name one of {len(images)} pictures for each of {len(texts)} texts.")
    pictures = own.unique()
    ranks = {"text_to_image": [], "image_to_text": []}
    for rows in torch.arange(len(texts)).split(CHUNK):
        scores = texts[rows] @ images.T  # [c, N_i]
        farther = scores < scores.gather(1, own[rows, None]) - TIE
        ranks["text_to_image"].append((~farther).sum(1) - 1)  # without the correct one itself
    for rows in pictures.split(CHUNK):
        scores = images[rows] @ texts.T  # [c, N_t]
        correct = own == rows[:, None]  # [c, N_t]
        farther = scores < scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True) - TIE
        ranks["image_to_text"].append((~farther & ~correct).sum(1))
    queries = {"text_to_image": own, "image_to_text": pictures}
    return {direction: (torch.cat(parts), queries[direction]) for direction, parts in ranks.items()}


@torch.no_grad()
def embed_pairs(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    pairs: Iterable[dict[str, Any]] | FeatureDataset,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Embeds every picture and every one of its captions with the model's matching head.

    Args:
        model: a model with a vision encoder.
        processor: its processor.
        pairs: `{"image": PIL.Image, "captions": [str, ...]}`; or cached features, which skip the encoders.
        batch_size: pictures, or captions, per batch.
        progress: whether to show a progress bar.

    Returns:
        Unit vectors of the captions [N_t, d] and of the pictures [N_i, d], and the index of each caption's picture
        [N_t]; on the CPU, in float32.

    Raises:
        ValueError: if there are no pairs.
    """
    device = model.iqformer.query_tokens.device  # the encoders', wherever a device map put the LLM
    texts, images, text_to_image, count = [], [], [], 0
    cached, total = isinstance(pairs, FeatureDataset), len(pairs) if isinstance(pairs, Sized) else None
    training = model.training
    model.eval()  # without dropout
    with tqdm(pairs, total=total, unit=" pictures", desc="Embedding", disable=not progress) as stream:
        stream = iter(stream)
        while batch := list(itertools.islice(stream, batch_size)):
            if cached:
                states = torch.stack([example["vision_states"] for example in batch])  # [B, S, d_vision]
                images.append(model.matching_head.image(model.iqformer.image_knowledge(states.to(device))))
                rows = [states for example in batch for states in example["context_states"]]
            else:
                pixel_values = processor.pixel_values(example["image"] for example in batch)
                images.append(model.get_image_embeddings(pixel_values.to(device)))
                rows = tokenize_captions(processor, [text for example in batch for text in example["captions"]])
            for start in range(0, len(rows), batch_size):
                value = 0 if cached else processor.context_tokenizer.pad_token_id
                padded, mask = (tensor.to(device) for tensor in pad(rows[start : start + batch_size], value))
                if cached:
                    texts.append(model.matching_head.text(model.iqformer.text_knowledge(padded, mask)))
                else:
                    texts.append(model.get_text_embeddings(padded, mask))
            for example in batch:
                text_to_image += [count] * len(example["captions"])
                count += 1
    model.train(training)
    if not texts:
        raise ValueError("There are no pairs to embed.")
    return torch.cat(texts).float().cpu(), torch.cat(images).float().cpu(), torch.tensor(text_to_image)


def evaluate_retrieval(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    pairs: Iterable[dict[str, Any]] | FeatureDataset,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Recall of the matching head over all pairs; arguments and errors as for [`embed_pairs`].

    Returns:
        A report: its `kind`, "retrieval", and `version`; the result of `retrieval_recall`; `confidence_95`, that of
        `retrieval_intervals`; `num_pictures`, `num_captions`.
    """
    embeddings = embed_pairs(model, processor, pairs, batch_size)
    texts, images, _ = embeddings
    return {
        "kind": "retrieval",
        "version": REPORT_VERSION,
        **retrieval_recall(*embeddings),
        "confidence_95": retrieval_intervals(*embeddings, seed=seed),
        "num_pictures": len(images),
        "num_captions": len(texts),
    }


__all__ = ["embed_pairs", "evaluate_retrieval", "retrieval_intervals", "retrieval_recall"]
