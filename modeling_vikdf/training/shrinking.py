"""Shrinks a tuned model's knowledge towards its mean, by a share chosen to maximise the likelihood of replies.

Knows what `vikdf shrink` computes and saves. The model's `shrink_knowledge` applies a share, and
evaluation/dialogues.py computes likelihoods.
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


MEAN_OF = 1500  # dialogues, at most
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # candidate fractions of the deviations from the mean to keep
FEWEST_TO_SHRINK = 100  # dialogues needed to estimate the mean, and to choose a share


def mean_knowledge(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, dialogues: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """The mean knowledge [n, h], float32, over the contexts of up to `MEAN_OF` randomly drawn dialogues."""
    sample = random.Random(0).sample(list(dialogues), min(len(dialogues), MEAN_OF))
    examples, _ = prepare(model, processor, sample, LIKELIHOOD_ALONE, None, SkipReport())
    return compute_knowledge(model, processor, [example.context for example in examples]).mean(0).to(model.device)


def score_shares(
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    dialogues: Sequence[dict[str, Any]],
    mean: torch.Tensor,
) -> dict[float, list[torch.Tensor]]:
    """
    Scores the dialogues' replies with the knowledge shrunk by each of `SHARES`.

    Args:
        model: the tuned model.
        processor: its processor.
        dialogues: dialogues with replies.
        mean: mean knowledge [n, h].

    Returns:
        Share -> for each dialogue the log-likelihoods of its reply's tokens [tokens], in nats.
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
    Chooses the fraction of the deviations from the mean to keep.

    Knowledge is shrunk only for a significant gain: from 1 downwards, a share replaces a larger one if the 95 %
    bootstrap interval of its gain in log-likelihood, over dialogues, is above zero.

    Args:
        scores: the result of `score_shares`.

    Returns:
        `share`; `gain` over share 1, in nats per token, and its `gain_interval`; `nll_by_share`, in nats per token;
        `dialogues`, their number.

    Raises:
        ValueError: for fewer dialogues than `FEWEST_TO_SHRINK`.
    """
    sums = {share: torch.stack([row.double().sum() for row in rows]) for share, rows in scores.items()}  # [N]
    tokens = torch.tensor([len(score) for score in scores[1.0]])  # [N]
    require_dialogues(len(tokens), "The validation data")

    def gain_interval(share: float, other: float) -> list[float]:
        return list(bootstrap_interval(sums[share] - sums[other], tokens))

    best = 1.0
    for share in sorted(sums, reverse=True):
        if gain_interval(share, best)[0] > 0:
            best = share
    nlls = {share: (-total.sum() / tokens.sum()).item() for share, total in sums.items()}
    return {
        "share": best,
        "gain": nlls[1.0] - nlls[best],
        "gain_interval": gain_interval(best, 1.0),
        "nll_by_share": nlls,
        "dialogues": len(tokens),
    }


def require_dialogues(count: int, source: str) -> None:
    """Raises a ValueError if a source has fewer than `FEWEST_TO_SHRINK` dialogues."""
    if count < FEWEST_TO_SHRINK:
        raise ValueError(
            f"{source} has {count} usable dialogues; shrinking knowledge needs at least {FEWEST_TO_SHRINK}."
        )


def save_stage(
    name: str,
    model: VikdfForConditionalGeneration,
    processor: VikdfProcessor,
    source: str | Path,
    output: Path,
    stage: dict[str, Any],
) -> None:
    """
    Saves a model with its training history: the recipes of its source, and this stage.

    Args:
        name: of the stage, a command.
        model: the model after it.
        processor: its processor.
        source: folder or Hub id of the model before it.
        output: folder to write.
        stage: what the history says of it.
    """
    from ..cards.facts import write_history

    model.save_pretrained(output)
    processor.save_pretrained(output)
    if (state := Path(source, "trainer_state.json")).is_file():
        shutil.copyfile(state, output / state.name)
    write_history({"stage": name, **stage}, output, source)


__all__ = ["choose_share", "mean_knowledge", "require_dialogues", "save_stage", "score_shares"]
