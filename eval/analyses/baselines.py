"""A baseline for the IQ-Former: a plain two-layer head on the same frozen states, with the same loss and negatives.

Example run:
    python eval/analyses/baselines.py --train CACHE --validation CACHE --output plain_head.json \
        --steps 300 600 --seeds 0 1 2
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_vikdf.data.features import FeatureDataset
from modeling_vikdf.evaluation.retrieval import retrieval_intervals, retrieval_recall
from modeling_vikdf.modeling_distillation import matching_loss
from modeling_vikdf.modeling_iqformer import CLIP_LOGIT_SCALE


WARMUP = 0.1  # share of the steps


class PlainMatchingHead(nn.Module):
    """
    Mean states -> unit vectors by LayerNorm-Linear-GELU-Linear, without attention or queries.

    Args:
        text_width, image_width: widths of what [`pool_features`] returns.
        hidden_size: width between the two layers.
        matching_dim: width of the unit vectors.
    """

    def __init__(self, text_width: int, image_width: int, hidden_size: int = 512, matching_dim: int = 256):
        super().__init__()
        self.text, self.image = (
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, matching_dim)
            )
            for width in (text_width, image_width)
        )
        self.logit_scale = nn.Parameter(torch.tensor(CLIP_LOGIT_SCALE))

    def forward(self, texts: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means [B, d_text] and [C, 2 d_vision] -> unit vectors [B, matching_dim] and [C, matching_dim]."""
        return nn.functional.normalize(self.text(texts), dim=-1), nn.functional.normalize(self.image(images), dim=-1)


def pool_features(features: FeatureDataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What the head sees of a cache, computed once because none of it is trained.

    Returns:
        The means of the captions' token states [N_t, d_text]; the pictures' class states, each beside the mean of the
        picture's other states [N_i, 2 d_vision]; the index of the picture of each caption [N_t].
    """
    texts, images, text_to_image = [], [], []
    for index in tqdm(range(len(features)), desc="Pooling", unit=" pictures"):
        example = features[index]
        states = example["vision_states"].float()  # [S, d_vision]
        images.append(torch.cat([states[0], states[1:].mean(0)]))
        texts += [states.float().mean(0) for states in example["context_states"]]
        text_to_image += [index] * len(example["captions"])
    return torch.stack(texts), torch.stack(images), torch.tensor(text_to_image)


def train_plain_head(
    pooled: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    batch_size: int = 512,
    steps: int = 300,
    learning_rate: float = 1e-3,
    weight_decay: float = 1.0,
    seed: int = 0,
) -> PlainMatchingHead:
    """
    Trains the head by `matching_loss`, with the other pairs of the batch as negatives.

    The optimiser is AdamW with linear warm-up and cosine decay. An epoch shows every picture once, with one of its
    captions drawn at random.

    Args:
        pooled: what `pool_features` returns.
        batch_size: pairs in a batch.
        steps: updates of the weights.
        learning_rate: after the warm-up.
        weight_decay: strong, because with AdamW's usual 0.01 the head overfits a few thousand pictures.
        seed: of the weights, the order of the pictures and the choice of captions.

    Raises:
        ValueError: if there are fewer pictures than `batch_size`.
    """
    texts, images, text_to_image = pooled
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} pictures are too few for batches of {batch_size}.")
    torch.manual_seed(seed)
    head = PlainMatchingHead(texts.shape[1], images.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    warmup = max(1, round(WARMUP * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup))) / 2),
    )
    captions = text_to_image.bincount(minlength=len(images))  # [N_i] their number for each picture
    first = captions.cumsum(0) - captions  # [N_i] where they begin: captions come picture by picture
    order = torch.empty(0, dtype=torch.long)
    progress = tqdm(range(steps), desc=f"Plain head, rate {learning_rate:g}, seed {seed}", unit=" steps")
    for _ in progress:
        if len(order) < batch_size:
            order = torch.randperm(len(images))
        rows, order = order[:batch_size], order[batch_size:]
        chosen = first[rows] + (torch.rand(batch_size) * captions[rows]).long()
        loss = matching_loss(*head(texts[chosen], images[rows]), head.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return head.eval()


def main(argv: list[str] | None = None) -> None:
    """Trains a head for every number of steps, learning rate and seed, and writes the figures of all."""
    parser = argparse.ArgumentParser(description="Recall of a plain two-layer head on cached features.")
    parser.add_argument("--train", required=True, help="folder of cached features")
    parser.add_argument("--validation", required=True, help="folder of cached features")
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[300])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-4])
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)

    start = time.perf_counter()
    train, validation = (pool_features(FeatureDataset(folder)) for folder in (args.train, args.validation))
    pooling_s = time.perf_counter() - start
    texts, images, text_to_image = validation
    runs = []  # for each number of steps and learning rate a list of runs, one a seed
    for steps, learning_rate in itertools.product(args.steps, args.learning_rates):
        runs.append([])
        for seed in args.seeds:
            settings = {
                "batch_size": args.batch_size,
                "steps": steps,
                "learning_rate": learning_rate,
                "weight_decay": args.weight_decay,
                "seed": seed,
            }
            start = time.perf_counter()
            head = train_plain_head(train, **settings)
            seconds = time.perf_counter() - start
            with torch.no_grad():
                embeddings = (*head(texts, images), text_to_image)
            intervals = retrieval_intervals(*embeddings)
            runs[-1].append(
                {**settings, "seconds": seconds, **retrieval_recall(*embeddings), "confidence_95": intervals}
            )
    best = max(runs, key=lambda seeds: sum(sum(recalls.values()) for recalls in _mean(seeds).values()))
    report = {
        "best": {key: best[0][key] for key in ("steps", "learning_rate")},
        "mean_over_seeds": _mean(best),
        "note": "Steps and learning rate have the highest sum of recalls on the very pictures that are reported here, "
        "for there is no other validation set: the figures are slightly too good.",
        "training_pictures": len(train[1]),
        "validation_pictures": len(images),
        "validation_captions": len(texts),
        "pooling_seconds": pooling_s,
        "runs": list(itertools.chain.from_iterable(runs)),
    }
    Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("best", "mean_over_seeds")}, indent=2))


def _mean(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        direction: {key: statistics.fmean(run[direction][key] for run in runs) for key in runs[0][direction]}
        for direction in ("text_to_image", "image_to_text")
    }


if __name__ == "__main__":
    main()
