"""What an objective is: an entry of the table in modeling_distillation.py; and the parts that objectives share.

Knows no objective by name. `add_shared` computes what objectives may need beside a batch's inputs, once for all of
them. Then come the block through which what is masked asks for knowledge, and cells and patches of pictures.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_vikdf import VikdfConfig
from .modeling_prefix import chosen_columns, columns_apart, pop_columns, read_tokens


Count = torch.Tensor | float | None  # how much the whole batch scores; `None`: what is given is the whole

# What the model computes for the objectives that need it, once for all of them -> the input that it comes from.
SOURCES = {
    "text_knowledge": "context_input_ids",  # K^T [B, n, h]
    "image_knowledge": "pixel_values",  # K^I [B, n, h]
    "partner_knowledge": "partner_input_ids",  # K^T of the second captions [B, n, h]
    "llm_knowledge": "context_input_ids",  # K^T, or K^I in the rows of `use_image_knowledge`, [B, n, h]
    "text_embeddings": "context_input_ids",  # unit vectors [B, d], to be compared over the whole batch
    "image_embeddings": "pixel_values",
    "partner_embeddings": "partner_input_ids",
}

# What a collator knows of where the masked objectives score: patches of pictures [M, k], columns of captions [M, k].
MASKED_COLUMNS = ("scored_patches", "masked_columns")

LLM_STATES = ("output_hidden_states", "output_attentions")  # what may be asked for of the LLM that reads captions

# What a dialogue model trains beside the IQ-Former: each of these is reached by some objectives alone.
SHARED = ("matching_head", "language_projection", "knowledge_gate", "knowledge_base")


def count_pairs(inputs: dict[str, Any], config: VikdfConfig) -> torch.Tensor:
    """The number of captioned pictures in a batch."""
    return torch.tensor(len(inputs["context_input_ids"]))


def count_labels(inputs: dict[str, Any], config: VikdfConfig) -> torch.Tensor:
    """The number of tokens to predict, of which the first of a row has no predecessor, unless they are shifted."""
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
    return (labels != -100).sum()


def no_heads(config: VikdfConfig) -> dict[str, nn.Module | nn.Parameter]:
    """For objectives without parameters of their own."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """
    One objective: all that the package must know of it but its name and default weight (`OBJECTIVES`).

    loss: (model, batch, count) -> scalar. The batch has as attributes the inputs of `VikdfForPreTraining.forward`,
        `None` where there are none, and of the names in `SOURCES` those that are needed; count is what the whole batch
        scores, `None` if this is the whole. A part's loss is a sum divided by the count.
    needs: inputs, or names in `SOURCES`, without which it cannot be computed. `PreTrainingCollator` makes those that
        it knows; what `forward` has no parameter for is handed on by its name.
    stage: the stage whose recipes have it, with its default weight, unless they name objectives.
    trains: prefixes of the parameters of `SHARED` that it reaches; the IQ-Former and its own heads always train.
    heads: configuration -> name -> its own parameters, in float32. A dialogue model that loads the checkpoint leaves
        out what is called `..._block`, `..._decoder`, `..._predictor` or `..._shift`.
    count: (inputs, configuration) -> how much a batch scores; by default its pairs.
    predicts_tokens: whether it takes `batch.smoothing`, the label smoothing.
    masked: whether it scores what is masked at random, perhaps nothing, in the first rows of a batch.
    """

    loss: Callable[[Any, SimpleNamespace, Count], torch.Tensor]
    needs: tuple[str, ...]
    stage: str | None = None
    trains: tuple[str, ...] = ()
    heads: Callable[[VikdfConfig], dict[str, nn.Module | nn.Parameter]] = no_heads
    count: Callable[[dict[str, Any], VikdfConfig], torch.Tensor] = count_pairs
    predicts_tokens: bool = False
    masked: bool = False

    def __post_init__(self):
        if others := [prefix for prefix in self.trains if not prefix.startswith(SHARED)]:
            raise ValueError(
                f"trains={others}: expected what begins with one of {list(SHARED)}. The IQ-Former and an objective's "
                "own heads always train, and the frozen backbones never."
            )

    @property
    def inputs(self) -> set[str]:
        """What a batch must hold; states of the frozen encoders may take the place of what they read."""
        return {SOURCES.get(need, need) for need in self.needs}

    @property
    def contrasts(self) -> bool:
        """Whether it compares a pair with all others, also with those of the batch's other parts."""
        return "text_embeddings" in self.needs

    def require_inputs(self, name: str, batch: SimpleNamespace) -> None:
        """Raises ValueError if a batch lacks an input of this objective, of the given name."""
        missing = [SOURCES.get(need, need) for need in self.needs if getattr(batch, need, None) is None]
        if missing:
            raise ValueError(
                f"The objective {name!r} has a positive weight in config.loss_weights but the batch lacks "
                f"{', '.join(missing)}. Add the inputs (or cached states in their place), or set the weight to 0."
            )


@dataclass
class VikdfPreTrainingOutput(ModelOutput):
    """
    What the objectives make of a batch.

    loss: weighted sum of the objectives, scalar.
    losses: name of each objective -> its own value, unweighted and without gradient.
    text_knowledge, image_knowledge: K^T, K^I [B, n, h].
    text_embeddings, image_embeddings, partner_embeddings: what matching compares, unit vectors [B, d].
    context_states, vision_states, partner_states: what the frozen encoders say [B, T, d], [B, S, d], [B, U, d]; with
        `embed_only` alone.
    hidden_states, attentions: of the LLM that reads the captions (knowledge -> text), if asked for, as in
        `VikdfForConditionalGeneration`.

    What the objectives do not need is not computed and `None`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    text_knowledge: torch.Tensor | None = None
    image_knowledge: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    image_embeddings: torch.Tensor | None = None
    partner_embeddings: torch.Tensor | None = None
    context_states: torch.Tensor | None = None
    vision_states: torch.Tensor | None = None
    partner_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# ---- what the model computes for the objectives that need it ----


def refuse_unusable(batch: SimpleNamespace, active: dict[str, Objective], table: dict[str, Objective]) -> None:
    """Refuses a batch without objectives, and what is asked for or given to none of them."""
    asked = [name for name in LLM_STATES if getattr(batch, name)]
    if asked and (batch.embed_only or "knowledge_to_text" not in active):
        raise ValueError(
            f"{' and '.join(asked)}=True asks for what the LLM computes when it reads captions, but the objective "
            "knowledge_to_text is not computed here."
        )
    if not active and not batch.embed_only:
        raise ValueError("No objective has a positive weight in config.loss_weights.")
    known = {need for objective in table.values() for need in objective.needs} - SOURCES.keys()
    if unknown := sorted(batch.others.keys() - known):
        raise TypeError(f"forward() got the inputs {unknown}, which no objective of OBJECTIVE_TABLE needs.")


def take_found_columns(batch: SimpleNamespace) -> None:
    """Takes what a collator found of where things lie out of a batch's further inputs; `None` or empty without."""
    batch.columns = pop_columns(batch.others, batch.input_ids)
    batch.draw_columns = pop_columns(batch.others, batch.draw_input_ids, "draw_")
    for name in MASKED_COLUMNS:
        setattr(batch, name, batch.others.pop(name, None))


def add_shared(model: Any, batch: SimpleNamespace, needs: set[str]) -> None:
    """
    Adds to a batch what its objectives need of `SOURCES`, `None` where the inputs are missing.

    Args:
        model: a `VikdfForPreTraining`.
        batch: the inputs of its `forward`; the frozen encoders' states are added, too.
        needs: what to add; with `batch.embed_only` all but the LLM's knowledge.

    Raises:
        ValueError: if `use_image_knowledge` asks for knowledge whose source is missing.
    """
    vars(batch).update(dict.fromkeys(SOURCES))
    _add_knowledge(model, batch, needs)
    head = model.matching_head
    for side, embed in (("image", head.image), ("partner", head.text), ("text", head.text)):
        knowledge = getattr(batch, f"{side}_knowledge")
        if f"{side}_embeddings" in needs and knowledge is not None:
            setattr(batch, f"{side}_embeddings", embed(knowledge))
    if "llm_knowledge" in needs and not batch.embed_only:
        batch.llm_knowledge = _choose_knowledge(batch.text_knowledge, batch.image_knowledge, batch.use_image_knowledge)


def _add_knowledge(model: Any, batch: SimpleNamespace, needs: set[str]) -> None:
    inputs = {SOURCES[need] for need in needs if need in SOURCES}
    for role, knowledge in (("context", "text_knowledge"), ("partner", "partner_knowledge")):
        if f"{role}_input_ids" not in inputs:
            continue
        ids, mask, states = (getattr(batch, f"{role}_{kind}") for kind in ("input_ids", "attention_mask", "states"))
        if states is None and ids is not None:
            states = model.encode_context(ids, mask)  # [B, T, d]
            setattr(batch, f"{role}_states", states)
        if states is not None:
            setattr(batch, knowledge, model.iqformer.text_knowledge(states, mask))  # K^T [B, n, h]
    chosen_by_row = "llm_knowledge" in needs and batch.use_image_knowledge is not None
    if "pixel_values" in inputs or chosen_by_row:
        if batch.vision_states is None and batch.pixel_values is not None:
            batch.vision_states = model.encode_images(batch.pixel_values)  # [B, S, d]
        if batch.vision_states is not None:
            batch.image_knowledge = model.iqformer.image_knowledge(batch.vision_states)  # K^I [B, n, h]


def _choose_knowledge(
    text: torch.Tensor | None, image: torch.Tensor | None, use_image: torch.Tensor | None
) -> torch.Tensor | None:
    """The text's knowledge [B, n, h], the picture's, or either by row; `None` if the text's is missing."""
    if use_image is None:
        return text
    if text is None and use_image.all():
        text = image
    if image is None and not use_image.any():
        image = text
    if text is None or image is None:
        raise ValueError(
            "use_image_knowledge asks for the knowledge of texts in some rows and of pictures in others, but the "
            f"batch lacks {'context_input_ids' if text is None else 'pixel_values'}."
        )
    return torch.where(use_image[:, None, None], image, text)


# ---- the LLM, read in both directions ----


def read_captions_and_draws(model: Any, batch: SimpleNamespace, active: Collection[str]) -> None:
    """
    Adds to a batch what its objectives need of the LLM in both directions, from one pass.

    `caption_states` [B, k, d_llm], the last states in the columns that predict a caption's tokens, and `draw_states`
    [B, n, d_llm], those before each knowledge vector. `None` where each objective reads its own prompts: one of them
    is not active, their columns are not known, a pass for the prefix pays, or the LLM's states are asked for.
    """
    batch.caption_states = batch.draw_states = None
    if not {"knowledge_to_text", "text_to_knowledge"} <= set(active) or model.returns_states(vars(batch)):
        return
    prompts, columns = (batch.input_ids, batch.draw_input_ids), (batch.columns, batch.draw_columns)
    known = all("knowledge_columns" in found for found in columns) and "target_columns" in batch.columns
    if not known or any(columns_apart(model, ids) for ids in prompts):
        return
    embeds = (
        model.embed_prompt(ids, batch.llm_knowledge, base=base, columns=found["knowledge_columns"])
        for ids, base, found in zip(prompts, (model.caption_base(), None), columns, strict=True)
    )
    wanted = (batch.columns["target_columns"], batch.draw_columns["knowledge_columns"] - 1)
    batch.caption_states, batch.draw_states = read_tokens(model, *zip(embeds, columns, wanted, strict=True))


def read_draws(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    knowledge: torch.Tensor,
    position_ids: torch.Tensor | None,
    columns: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The LLM's last hidden states before each knowledge vector [B, n, d_llm]; see `text_to_knowledge`."""
    n, before = model.config.num_knowledge_tokens, columns_apart(model, input_ids)
    if "knowledge_columns" in columns and not before:
        places = columns["knowledge_columns"]
        embeds = model.embed_prompt(input_ids, knowledge, columns=places)  # [B, T, d_llm]
        return read_tokens(model, (embeds, columns, places - 1))[0]
    if not (input_ids[:, -n:] == model.config.knowledge_token_id).all():
        raise ValueError(f"draw_input_ids must end in {n} placeholders in every row: pad on the left.")
    embeds = model.embed_prompt(input_ids, knowledge)[:, :-1]  # [B, T - 1, d_llm]: nothing follows the last vector
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = {} if position_ids is None else {"position_ids": position_ids[:, :-1]}
    outputs = model.run_language_model(
        embeds,
        mask[:, :-1],
        **positions,
        prefix=max(before - 1, 0),  # the state of the token before the first vector is wanted
        language_model=model.language_model.base_model,
    )
    return outputs.last_hidden_state[:, -n:].to(embeds.device)


# ---- the parts of masked modelling ----


class VikdfReconstructionBlock(nn.Module):
    """
    The one-block transformer through which a masked modality asks the other one's knowledge.

    Cross-attention, then a feed-forward, each with its residual and a LayerNorm behind it. There is no attention among
    the queries.
    """

    def __init__(self, width: int, knowledge_width: int, dropout: float = 0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            width, num_heads=4, dropout=dropout, kdim=knowledge_width, vdim=knowledge_width, batch_first=True
        )
        self.norm1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, knowledge: torch.Tensor) -> torch.Tensor:
        """States [B, S, width] that ask knowledge [B, n, h] -> [B, S, width]."""
        asked, _ = self.attention(states, knowledge, knowledge, need_weights=False)
        states = self.norm1(states + self.dropout(asked))
        return self.norm2(states + self.dropout(self.ffn(states)))


def cells_to_pixels(cells: torch.Tensor, height: int, width: int, patch: int = 1) -> torch.Tensor:
    """
    A square grid of cells [M, cells] over pictures of H x W pixels as a pixel mask of 0 and 1, [M, H', W'].

    H' and W' leave out what remains behind the last whole patch, which encoders do not see.
    """
    side = math.isqrt(cells.shape[1])
    if side**2 != cells.shape[1]:
        raise ValueError(f"masked_cells: expected a square grid in each row, got {cells.shape[1]} cells.")
    grid = cells.view(-1, 1, side, side).float()
    mask = F.interpolate(grid, size=(height, width), mode="nearest")[:, 0]  # [M, H, W]
    return mask[:, : height // patch * patch, : width // patch * patch]


def to_patches(pictures: torch.Tensor, patch: int) -> torch.Tensor:
    """Pictures [M, C, H, W] -> their patches [M, patches, C * patch^2]."""
    return F.pixel_unshuffle(pictures, patch).flatten(2).transpose(1, 2)


def scored_patches(mask: torch.Tensor) -> torch.Tensor:
    """In each picture of a mask [M, patches, pixels] the k patches to score, if it has so many, [M, k]."""
    return chosen_columns(mask.any(-1))


def count_masked_pixels(inputs: dict[str, Any], config: VikdfConfig) -> torch.Tensor:
    """The number of pixels to score."""
    height, width = inputs["pixel_values"].shape[-2:]
    return cells_to_pixels(inputs["masked_cells"], height, width, config.vision_config.patch_size).sum()


__all__ = [
    "LLM_STATES",
    "SHARED",
    "SOURCES",
    "Objective",
    "VikdfPreTrainingOutput",
    "VikdfReconstructionBlock",
    "add_shared",
    "cells_to_pixels",
    "count_labels",
    "count_masked_pixels",
    "count_pairs",
    "read_captions_and_draws",
    "read_draws",
    "refuse_unusable",
    "scored_patches",
    "take_found_columns",
    "to_patches",
]
