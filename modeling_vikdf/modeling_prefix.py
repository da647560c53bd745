"""The prompt's prefix, all tokens before the knowledge: aligned across rows, and read by the LLM only once.

    rows of a batch -> `align_at_knowledge`: the knowledge begins in the same column of every row
                    -> `read_prefix`: the LLM's cache of the columns before it; what all rows share is computed once
                    -> `select_rows`: that cache for several replies to one prompt

Nothing here is trained. Knows only the LLM's cache, and the processor's placeholder and padding.
"""

import copy
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


# The name of the LLM's cache in the installed transformers: "past_key_values" up to 5.23, "cache" since 5.24.
CACHE = {"cache", "past_key_values"}.intersection(CausalLMOutputWithPast.__dataclass_fields__).pop()

WORTH_SHARING = 64  # tokens that a shared pass must save to pay for another pass through the LLM's layers


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """
    Removes the LLM's cache, under either of its names, from keyword arguments and returns it, or `None`.

    Raises:
        ValueError: if both names are given.
    """
    # two steps, because `torch.compile` breaks its graph at a walrus within a comprehension
    caches = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    caches = [cache for cache in caches if cache is not None]
    if len(caches) > 1:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them.")
    return caches[0] if caches else None


def align_at_knowledge(batch: dict[str, torch.Tensor], processor: Any) -> dict[str, torch.Tensor]:
    """
    Aligns the rows of a left-padded batch so that the knowledge begins in the same column of every row.

    Tokens that all rows begin with (a system prompt) come first: head, padding, rest, knowledge, text, padding. The
    text before the knowledge is then one block, which the model reads without gradient, and the head only once.

    Args:
        batch: `input_ids`, `attention_mask` and optionally `labels` [B, T]; other entries pass unchanged.
        processor: gives the ids of the placeholder and the padding.

    Returns:
        The batch with these three as [B, T'], and `position_ids` [B, T'] that do not count padding.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = mask.argmax(1)[:, None]  # [B, 1] first real token
    start = (ids == processor.knowledge_token_id).int().argmax(1)[:, None]  # [B, 1] first placeholder
    before = start - first  # tokens before the knowledge
    beginning = ids.gather(1, first + torch.arange(int(before.min()), device=ids.device)[None])  # [B, shortest]
    head = int((beginning == beginning[:1]).all(0).cumprod(0).sum())
    columns = torch.arange(int(before.max()) + ids.shape[1] - int(start.min()), device=ids.device)[None]  # [1, T']
    behind = start + columns - before.max()  # [B, T'] source column of everything but the head
    source = torch.where(columns < head, first + columns, behind)
    inside = (columns < head) | ((behind >= first + head) & (behind < ids.shape[1]))
    source = source.clamp(0, ids.shape[1] - 1)
    fills = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    aligned = {
        key: batch[key].gather(1, source).masked_fill(~inside, fill) for key, fill in fills.items() if key in batch
    }
    aligned["position_ids"] = (aligned["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, **aligned}


@torch.no_grad()
def read_prefix(
    language_model: PreTrainedModel,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> Cache:
    """
    The LLM's cache of the first P columns of prompts. Tokens that all rows begin with are computed once and copied.

    Args:
        language_model: the LLM; its vocabulary head is not run.
        embeds: [B, P, d_llm].
        attention_mask: [B, T], T >= P.
        position_ids: [B, T], T >= P; `None`: as the LLM counts them itself.
    """
    rows, prefix = embeds.shape[:2]
    same = (embeds == embeds[:1]).all(-1).all(0) & attention_mask[:, :prefix].bool().all(0)  # [P]
    shared = int(same.cumprod(0).sum())
    if rows * shared < WORTH_SHARING:
        shared = 0

    def read(batch: slice, columns: slice, past: Cache | None) -> Cache:
        outputs = language_model.base_model(
            inputs_embeds=embeds[batch, columns],
            attention_mask=attention_mask[batch, : columns.stop],
            use_cache=True,
            **{CACHE: past},
            **({} if position_ids is None else {"position_ids": position_ids[batch, columns]}),
        )
        return getattr(outputs, CACHE)

    past = None
    if shared:
        past = read(slice(1), slice(0, shared), None)
        past.batch_repeat_interleave(rows)
    if shared < prefix:
        past = read(slice(None), slice(shared, prefix), past)
    return past


def select_rows(past: Cache, rows: torch.Tensor) -> Cache:
    """A copy of a cache with the given rows [R] (int64); the original keeps its tensors."""
    selected = copy.copy(past)
    selected.layers = [copy.copy(layer) for layer in past.layers]
    selected.batch_select_indices(rows)
    return selected


__all__ = ["CACHE", "align_at_knowledge", "pop_cache", "read_prefix", "select_rows"]
