"""The arms of an experiment: whose knowledge a dialogue or probe item gets. Knows no metrics."""

from collections.abc import Hashable, Sequence

import torch
from tqdm.auto import tqdm

from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor, pad
from .statistics import number_labels


KNOWLEDGE_ARMS = ("own", "shuffled", "mean", "none")
ENCODER_BATCH = 64  # contexts per batch of the text encoder


@torch.no_grad()
def compute_knowledge(
    model: VikdfForConditionalGeneration, processor: VikdfProcessor, contexts: list[list[int]]
) -> torch.Tensor:
    """The knowledge [N, n, h], float32 on the CPU, of N contexts given as token ids of the text encoder."""
    tokenizer, device = processor.context_tokenizer, model.iqformer.query_tokens.device
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    parts = []
    for start in tqdm(range(0, len(order), ENCODER_BATCH), desc="Knowledge", unit=" batches"):
        rows = [contexts[i] for i in order[start : start + ENCODER_BATCH]]
        ids, mask = pad_rows(rows, tokenizer.pad_token_id, tokenizer.padding_side, device)  # [B, C]
        parts.append(model.get_text_knowledge(ids, mask).float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def arm_knowledge(
    knowledge: torch.Tensor, arm: str, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> torch.Tensor:
    """
    The knowledge that an arm of an experiment gives to each example.

    Args:
        knowledge: the examples' own knowledge [N, n, h].
        arm: "own"; "shuffled", a derangement, so that each row's knowledge goes to exactly one other row; or "mean",
            the mean over the rows, for all of them. The arm "none" has prompts without knowledge
            (`use_knowledge=False`).
        seed: of the derangement.
        groups: N labels; a row never gets the knowledge of a row of its own group, such as the same photograph.

    Returns:
        [N, n, h].

    Raises:
        ValueError: for another arm, or if no derangement exists, because one group has more than half of the rows.
    """
    if arm == "own":
        return knowledge
    if arm == "mean":
        return knowledge.mean(0, keepdim=True).expand_as(knowledge)
    if arm != "shuffled":
        reason = "has no knowledge: write its prompts with use_knowledge=False" if arm == "none" else "is unknown"
        raise ValueError(f"The arm {arm!r} {reason}; expected one of {', '.join(KNOWLEDGE_ARMS[:-1])}.")
    rows = len(knowledge)
    group = number_labels(range(rows) if groups is None else groups)  # [N]
    sizes = group.bincount()
    if 2 * int(sizes.max()) > rows:
        raise ValueError(f"Cannot shuffle {rows} rows of knowledge, {int(sizes.max())} of them of the same group.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    # with groups contiguous, in random order, a shift by the largest group's size ends in another group
    order = order[torch.randperm(len(sizes), generator=generator)[group[order]].argsort(stable=True)]  # [N]
    source = torch.empty_like(order)
    source[order] = order.roll(int(sizes.max()))
    return knowledge[source.to(knowledge.device)]


def pad_rows(rows: list[list[int]], value: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows to [B, longest], int64, on `side` ("left" or "right"); also returns their mask [B, longest], int64."""
    ids, mask = pad([torch.tensor(row) for row in rows], value, side)
    return ids.to(device), mask.to(device)


__all__ = ["KNOWLEDGE_ARMS", "arm_knowledge", "compute_knowledge", "pad_rows"]
