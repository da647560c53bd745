"""Shrinking: how much of a tuned model's knowledge remains beside its mean, chosen by the likelihood of replies.

Knows what `vikdf shrink` computes and saves. The model draws its own knowledge in (`shrink_knowledge`), and
evaluation/dialogues.py says how likely replies are.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.sources import SkipReport
from ..evaluation.arms import compute_knowledge
from ..evaluation.dialogues import LIKELIHOOD_ALONE, prepare, score_replies
from ..evaluation.statistics import bootstrap_interval
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor


MEAN_OF = 1500  # dialogues
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the knowledge's differences from its mean, that remain when it is shrunk
FEWEST_TO_SHRINK = 100  # dialogues, to take the mean of and to choose a share by


def mean_knowledge(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, dialogues: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """The mean [n, h] of the knowledge that the contexts of dialogues evoke, of at most `MEAN_OF` of them."""
    some = random.Random(0).sample(list(dialogues), min(len(dialogues), MEAN_OF))
    examples, _ = prepare(model, processor, some, LIKELIHOOD_ALONE, None, SkipReport())
    return compute_knowledge(model, processor, [example.context for example in examples]).mean(0).to(model.device)


def score_shares(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    dialogues: Sequence[dict[str, Any]],
    mean: torch.Tensor,
) -> dict[float, list[torch.Tensor]]:
    """
    Each share of the knowledge's differences from its mean [n, h] that may remain -> log-likelihoods of the tokens of
    each dialogue's reply, in nats, [tokens] each.
    """
    examples, _ = prepare(model, processor, dialogues, LIKELIHOOD_ALONE, None, SkipReport())
    examples.sort(key=lambda example: -len(example.prompt))
    mean, scores, size = mean.cpu(), {}, LIKELIHOOD_ALONE.batch_size
    own = compute_knowledge(model, processor, [example.context for example in examples])  # [N, n, h]
    for share in SHARES:
        knowledge = mean + share * (own - mean)
        scores[share] = score_replies(model, processor, examples, knowledge, size, f"Share {share}")
    return scores


def choose_share(scores: dict[float, list[torch.Tensor]]) -> dict[str, Any]:
    """
    The share of the knowledge's differences from its mean that should remain. Knowledge is given up only for a gain
    that is clear of zero: from 1 downwards, a share takes the place of a larger one if the 95 % interval of its gain,
    over dialogues, is above zero.

    Args:
        scores: what `score_shares` returns.

    Returns:
        `share`; `gain`, in nats a token over a share of 1, and its `gain_interval`; `nll_by_share`; `dialogues`.

    Raises:
        ValueError: for fewer dialogues than `FEWEST_TO_SHRINK`.
    """
    sums = {share: torch.stack([row.double().sum() for row in rows]) for share, rows in scores.items()}  # [N]
    tokens = torch.tensor([len(score) for score in scores[1.0]])  # [N]
    require_dialogues(len(tokens), "The validation data")

    def gain_interval(share: float, other: float) -> list[float]:
        return list(bootstrap_interval(sums[share] - sums[other], tokens))

    chosen = 1.0
    for share in sorted(sums, reverse=True):
        if gain_interval(share, chosen)[0] > 0:
            chosen = share
    nlls = {share: (-total.sum() / tokens.sum()).item() for share, total in sums.items()}
    return {
        "share": chosen,
        "gain": nlls[1.0] - nlls[chosen],
        "gain_interval": gain_interval(chosen, 1.0),
        "nll_by_share": nlls,
        "dialogues": len(tokens),
    }


def require_dialogues(count: int, source: str) -> None:
    """Raises a ValueError where a source has too few dialogues to shrink knowledge by."""
    if count < FEWEST_TO_SHRINK:
        raise ValueError(
            f"{source} has {count} usable dialogues, too few to shrink knowledge by: at least {FEWEST_TO_SHRINK} are "
            "needed."
        )


def save_shrunk(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    source: str | Path,
    output: Path,
    stage: dict[str, Any],
) -> None:
    """Saves a model whose knowledge was shrunk, with how it was trained: the recipes of its source, and this stage."""
    from ..cards.facts import write_history

    model.save_pretrained(output)
    processor.save_pretrained(output)
    if (state := Path(source, "trainer_state.json")).is_file():
        shutil.copyfile(state, output / state.name)
    write_history({"stage": "shrink", **stage}, output, source)


__all__ = ["choose_share", "mean_knowledge", "require_dialogues", "save_shrunk", "score_shares"]
