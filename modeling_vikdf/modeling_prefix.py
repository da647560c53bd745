"""How the LLM reads a batch of prompts: aligned at the knowledge, what is before it perhaps once, or tokens alone.

    rows of a batch -> `align_at_knowledge`: the knowledge begins in the same column of every row
                    -> `read_prefix`: the LLM's cache of the columns before it; what all rows share is computed once
                    -> `select_rows`: that cache for several replies to one prompt
                    -> `locate_columns`: where tokens, knowledge and targets lie, found once, where the batch is made
                    -> `take_columns`: with padding behind the tokens, where a causal LLM needs no mask

Which of the two ways a training step takes is decided by `columns_apart`. Nothing here is trained. Knows only the
LLM's cache and vocabulary head, and the processor's placeholder and padding.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .modeling_checkpointing import unwritten_cache


# The name of the LLM's cache in the installed transformers: "past_key_values" up to 5.23, "cache" since 5.24.
CACHE = {"cache", "past_key_values"}.intersection(CausalLMOutputWithPast.__dataclass_fields__).pop()

WORTH_SHARING = 64  # tokens that a shared pass must save to pay for another pass through the LLM's layers

# From which width of the LLM on a training step gains by reading the prefix in a pass of its own, by kind of device. A
# CPU computes what that saves more slowly than it starts the operations of another pass. On a GPU the host does not
# keep up: the pass cost an H100 a tenth of the step of a 7b LLM, even with 32 rows. Nothing in the batch counts, so
# that processes that hold the LLM in shards run the same passes.
WORTH_APART = {"cpu": 256}

COLUMNS = ("token_positions", "token_columns", "knowledge_columns", "target_columns")  # see `locate_columns`


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


def pays_apart(input_ids: torch.Tensor, config: PreTrainedConfig) -> bool:
    """Whether a training step over prompts [B, T] is faster if it reads their prefix in a pass of its own."""
    worth = WORTH_APART.get(input_ids.device.type)
    return torch.is_grad_enabled() and worth is not None and config.text_config.hidden_size >= worth


def columns_apart(model: Any, input_ids: torch.Tensor) -> int:
    """Columns before the knowledge in prompts [B, T] that a step reads in a pass of their own; 0 for one pass."""
    return model.tokens_before_knowledge(input_ids) if pays_apart(input_ids, model.config) else 0


def chosen_columns(chosen: torch.Tensor) -> torch.Tensor:
    """Of each row [B, T] (bool) the columns that are chosen, then others, [B, k]: k those of the row with the most."""
    # at least one: what runs in a step must not depend on chance
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, : max(int(chosen.sum(1).max()), 1)]


def locate_columns(batch: dict[str, torch.Tensor], token_id: int) -> dict[str, torch.Tensor]:
    """
    Where in a batch of prompts what lies: found on the CPU, so that a training step need not wait for a GPU to tell.

    Args:
        batch: `input_ids`, `attention_mask` and optionally `labels` [B, T], as they are trained on.
        token_id: the placeholder's.

    Returns:
        `token_positions` [B, T], the position of the token in each column. `token_columns` [B, W], those of a row's
        tokens from left to right, then of padding, without the last token of the longest row, from which nothing is
        predicted. `knowledge_columns` [B, m], those of its placeholders, if all rows have m. With labels
        `target_columns` [B, k], those that predict one, k of the row with the most, then others.
    """
    mask, placeholders = batch["attention_mask"], batch["input_ids"] == token_id
    tokens = chosen_columns(mask == 1)  # [B, W + 1]
    tokens = tokens[:, : max(tokens.shape[1] - 1, 1)]
    columns = {"token_positions": (mask.cumsum(1) - 1).clamp(min=0), "token_columns": tokens}
    if placeholders[0].any() and (placeholders.sum(1) == placeholders[0].sum()).all():
        columns["knowledge_columns"] = chosen_columns(placeholders)
    if "labels" in batch:
        columns["target_columns"] = chosen_columns(shift(batch["labels"]) != -100)
    return columns


def pop_columns(inputs: dict[str, Any], input_ids: torch.Tensor | None, prefix: str = "") -> dict[str, torch.Tensor]:
    """
    Takes what `locate_columns` found out of inputs.

    Args:
        inputs: perhaps with these columns.
        input_ids: the prompts [B, T] that are to be read.
        prefix: of the names in `inputs`.

    Returns:
        The columns by their names; empty where they are not given, or those of prompts that have been cut since.
    """
    columns = {name: inputs.pop(prefix + name, None) for name in COLUMNS}
    positions = columns["token_positions"]
    if positions is None or input_ids is None or positions.shape != input_ids.shape:
        return {}
    return {name: value for name, value in columns.items() if value is not None}


def take_columns(tensor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of each row of a tensor [B, T, ...] the given columns [B, k]: [B, k, ...]."""
    shape = columns.shape + tensor.shape[2:]
    return tensor.gather(1, columns.view(*columns.shape, *[1] * (tensor.dim() - 2)).expand(shape))


def stack_rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors [B_i, T_i, ...], padded with zeros behind their columns, as one [sum of B_i, largest T_i, ...]."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [nn.functional.pad(rows, [0, 0] * (rows.dim() - 2) + [0, width - rows.shape[1]]) for rows in tensors]
    )


class _GivenStates(nn.Module):
    """In the place of an LLM's decoder: gives back its input."""

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> nn.Module:  # which OPT calls
        return self


def predict_tokens(language_model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits [B, k, vocabulary] of the decoder's last states [B, k, d_llm], with all that the LLM does to them."""
    head = copy.copy(language_model)  # the same parameters
    vars(head)["_modules"] = {**vars(language_model)["_modules"], language_model.base_model_prefix: _GivenStates()}
    # the class's: what hooks put on the instance belongs to the LLM, not to its copy
    return type(head).forward(head, inputs_embeds=states).logits.to(states.device)


def read_tokens(
    model: Any, *readings: tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor], **kwargs: Any
) -> list[torch.Tensor]:
    """
    The LLM's last states at some columns of prompts, of all readings in one pass.

    Args:
        model: the dialogue model.
        readings: embeddings [B, T, d_llm]; what `locate_columns` found there; the columns [B, k] that are wanted.
        kwargs: for the LLM.

    Returns:
        Of each reading [B, k, d_llm].
    """
    embeds, found, wanted = zip(*readings, strict=True)
    sizes, cache = [len(rows) for rows in embeds], unwritten_cache(model.language_model)
    tokens = stack_rows([columns["token_columns"] for columns in found]).split(sizes)  # [B, W], W the widest reading's
    inputs = [take_columns(rows, some) for rows, some in zip(embeds, tokens, strict=True)]  # [B, W, d_llm]
    kwargs |= {CACHE: cache} if cache is None else {CACHE: cache, "use_cache": False}
    outputs = model.run_language_model(
        torch.cat(inputs) if len(inputs) > 1 else inputs[0],  # the padding is behind the tokens, and needs no mask
        language_model=model.language_model.base_model,
        **kwargs,
    )
    # an LLM on several devices leaves them on the last
    states = outputs.last_hidden_state.to(embeds[0].device).split(sizes)
    wanted = (take_columns(columns["token_positions"], some) for columns, some in zip(found, wanted, strict=True))
    return [take_columns(rows, some) for rows, some in zip(states, wanted, strict=True)]


def read_prompts(
    model: Any,
    input_ids: torch.Tensor | None,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    columns: dict[str, torch.Tensor],
    *,
    shift_labels: torch.Tensor | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs: Any,
) -> tuple[ModelOutput, torch.Tensor | None]:
    """
    The LLM's outputs, and the targets of their logits; `None` without labels.

    Args:
        model: the dialogue model.
        input_ids: prompts [B, T], if they are given as ids.
        embeds: the same, spliced [B, T, d_llm].
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        labels: ids [B, T] that position t - 1 predicts.
        columns: what `locate_columns` found in the prompts, or nothing.
        shift_labels: ids [B, T] that position t predicts, in place of `labels`.
        logits_to_keep: as in transformers; with labels 0 means those of the labels.
        kwargs: for the LLM.
    """
    # requested caches, hidden states and attentions are those of all columns
    whole = kwargs.get(CACHE) is not None or kwargs.get("use_cache") or model.returns_states(kwargs)
    prefix = 0 if input_ids is None or whole else columns_apart(model, input_ids)
    all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
    located = "target_columns" in columns and labels is not None and shift_labels is None
    if located and all_logits and not (whole or prefix):
        unread = ("position_ids", CACHE)  # those of tokens alone are as the LLM counts them
        settings = {name: value for name, value in kwargs.items() if name not in unread}
        (states,) = read_tokens(model, (embeds, columns, columns["target_columns"]), **settings)  # [B, k, d_llm]
        targets = take_columns(shift(labels), columns["target_columns"])  # [B, k]
        return CausalLMOutputWithPast(logits=predict_tokens(model.language_model, states)), targets
    targets, logits_to_keep = choose_targets(labels, shift_labels, logits_to_keep)
    llm = {"prefix": prefix, "logits_to_keep": logits_to_keep, **kwargs}
    return model.run_language_model(embeds, attention_mask, **llm), targets


def shift(labels: torch.Tensor) -> torch.Tensor:
    """The ids that each column predicts, [B, T]: column t those of label t + 1, -100 for none."""
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


def choose_targets(
    labels: torch.Tensor | None, shifted: torch.Tensor | None, logits_to_keep: int | torch.Tensor
) -> tuple[torch.Tensor | None, int | torch.Tensor]:
    """
    The ids that the logits predict, -100 for none, [B, k], and the columns of these logits.

    Args:
        labels: ids [B, T] that position t - 1 predicts, or `None`.
        shifted: ids [B, T] that position t predicts; replaces `labels`.
        logits_to_keep: as in transformers; with `labels` 0 means the columns in which any row has a target.
    """
    targets = shifted
    if labels is not None:
        if targets is None:
            targets = shift(labels)
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            # the vocabulary head is a large part of a small LLM: compute logits only where some row has a label
            logits_to_keep = (targets != -100).any(0).nonzero().squeeze(1)  # [k]
    if targets is not None:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        targets = targets[:, keep]  # [B, k]
    return targets, logits_to_keep


def select_rows(past: Cache, rows: torch.Tensor) -> Cache:
    """A copy of a cache with the given rows [R] (int64); the original keeps its tensors."""
    selected = copy.copy(past)
    selected.layers = [copy.copy(layer) for layer in past.layers]
    selected.batch_select_indices(rows)
    return selected


__all__ = [
    "CACHE",
    "COLUMNS",
    "align_at_knowledge",
    "choose_targets",
    "chosen_columns",
    "columns_apart",
    "locate_columns",
    "pays_apart",
    "pop_cache",
    "pop_columns",
    "predict_tokens",
    "read_prefix",
    "read_prompts",
    "read_tokens",
    "select_rows",
    "shift",
    "stack_rows",
    "take_columns",
]
