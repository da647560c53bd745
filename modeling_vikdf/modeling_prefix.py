"""What of prompts stands before the knowledge: laid out so that it is one block, and read by the LLM only once.

    rows of a batch -> `align_at_knowledge`: in every row the knowledge begins in the same column
                    -> `read_prefix`: the LLM's cache of the columns before it; what all rows share is read in one row
                    -> `select_rows`: that cache for several replies to one prompt

Nothing here is trained. Knows the LLM by its cache alone, and the processor by its placeholder and padding.
"""

import copy
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


# What the installed transformers calls the LLM's cache in arguments and outputs: "past_key_values" up to 5.23, "cache"
# since 5.24.
CACHE = {"cache", "past_key_values"}.intersection(CausalLMOutputWithPast.__dataclass_fields__).pop()

WORTH_SHARING = 64  # tokens that a shared pass must save to be worth another pass through the LLM's layers


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """
    The LLM's cache, or `None`, taken out of keyword arguments, where it goes by either of its names.

    Raises:
        ValueError: if it is given under both.
    """
    caches = [cache for name in ("cache", "past_key_values") if (cache := kwargs.pop(name, None)) is not None]
    if len(caches) > 1:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them.")
    return caches[0] if caches else None


def align_at_knowledge(batch: dict[str, torch.Tensor], processor: Any) -> dict[str, torch.Tensor]:
    """
    Lays the rows of a left-padded batch out so that the knowledge begins in the same column of every row, and what all
    rows begin with (a system prompt) stands in the first columns: head, padding, rest, knowledge, text, padding. The
    text before the knowledge is then one block, which the model reads without gradient, and the head only once.

    Args:
        batch: `input_ids`, `attention_mask` and perhaps `labels` [B, T]; other entries pass.

    Returns:
        The batch with these three as [B, T'], and `position_ids` [B, T'] that count a row's own tokens.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = mask.argmax(1)[:, None]  # [B, 1] first real token
    start = (ids == processor.knowledge_token_id).int().argmax(1)[:, None]  # [B, 1] first placeholder
    before = start - first  # tokens before the knowledge
    beginning = ids.gather(1, first + torch.arange(int(before.min()), device=ids.device)[None])  # [B, shortest]
    head = int((beginning == beginning[:1]).all(0).cumprod(0).sum())
    columns = torch.arange(int(before.max()) + ids.shape[1] - int(start.min()), device=ids.device)[None]  # [1, T']
    behind = start + columns - before.max()  # [B, T'] where what is not head comes from
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
    The LLM's cache of the first columns of prompts. What all rows begin with is read in one row and copied.

    Args:
        language_model: with its vocabulary head, which is not computed.
        embeds: [B, P, d_llm].
        attention_mask: [B, T >= P]; position_ids [B, T >= P], or `None`: the LLM counts them its own way.
    """
    rows, prefix = embeds.shape[:2]
    same = (embeds == embeds[:1]).all(-1).all(0) & attention_mask[:, :prefix].bool().all(0)  # [P]
    shared = int(same.cumprod(0).sum())
    if rows * shared < WORTH_SHARING:
        shared = 0

    def read(some: slice, columns: slice, past: Cache | None) -> Cache:
        outputs = language_model.base_model(
            inputs_embeds=embeds[some, columns],
            attention_mask=attention_mask[some, : columns.stop],
            use_cache=True,
            **{CACHE: past},
            **({} if position_ids is None else {"position_ids": position_ids[some, columns]}),
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
    """A cache of its own of some rows; selecting replaces each layer's tensors and leaves the old ones as they are."""
    selected = copy.copy(past)
    selected.layers = [copy.copy(layer) for layer in past.layers]
    selected.batch_select_indices(rows)
    return selected


__all__ = ["CACHE", "align_at_knowledge", "pop_cache", "read_prefix", "select_rows"]
