"""Examples -> batches: masks, prompts and labels for every objective, drawn from the example's key and nothing else.

What is random about an example (which caption, which cells and tokens are masked, which instruction) is a function of
the seed, the epoch and the example's key. So a run that was interrupted draws what it would have drawn, whatever the
number of workers or processes, and evaluation, which stays in epoch 0, always sees the same masks.
"""

import copy
import random
from typing import Any

import torch

from .configuration_vikdf import VikdfConfig
from .processing_vikdf import VikdfProcessor


# What the LLM is asked for in knowledge -> text, and told in text -> knowledge.
CAPTION_INSTRUCTIONS = (
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "What can be seen here?",
    "Say briefly what is in this image.",
    "Write a short caption for this photograph.",
    "Tell me what you see.",
    "Give a one-line description of the scene.",
    "What is happening in this picture?",
    "Put this image into words.",
    "Summarise the photograph in a sentence.",
    "How would you caption this?",
)
DRAW_INSTRUCTIONS = (
    "Picture this scene:",
    "Imagine a photograph of this:",
    "Draw what is described here:",
    "Make a picture of the following:",
    "See this before your eyes:",
    "Paint this scene:",
)

MASKED_CELL = 28  # pixels: the side of the cells in which pictures are masked (Xie et al. 2022 mask 32-px cells)
MASKED_CELLS, VISIBLE_CELLS = 0.6, 0.2  # share of cells scored; share of those left visible
MASKED_TOKENS, VISIBLE_TOKENS = 0.15, 0.2  # share of tokens scored; share of those left as they are


def _generator(seed: int, epoch: int, key: str) -> random.Random:
    return random.Random(f"{seed}/{epoch}/{key}")


class PreTrainingCollator:
    """
    Image-text pairs -> the inputs of `VikdfForPreTraining.forward` that its objectives of positive weight need.

    Args:
        processor: tokenizers, image processor, prompts.
        config: says which objectives have weight.
        seed: of all that is drawn.
        masked_share: share of a batch that takes part in the two masked objectives (the costly ones: each needs the
            encoder again, on masked input).
        image_knowledge_share: share of the rows whose BVIF knowledge is the picture's instead of the text's.
        other_caption: whether the LLM's target is another caption of the picture than the one its knowledge is from,
            where there is another.
    """

    def __init__(
        self,
        processor: VikdfProcessor,
        config: VikdfConfig,
        *,
        seed: int = 0,
        masked_share: float = 1.0,
        image_knowledge_share: float = 0.0,
        other_caption: bool = False,
    ):
        self.processor, self.config, self.seed, self.epoch = processor, config, seed, 0
        self.masked_share, self.image_knowledge_share = masked_share, image_knowledge_share
        self.other_caption = other_caption
        tokenizer = processor.context_tokenizer
        self.mask_id = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
        if config.loss_weights["masked_text"] and self.mask_id is None:
            raise ValueError("masked_text needs a mask or unknown token, and the context tokenizer has neither.")
        # text -> knowledge wants the knowledge behind the text, wherever dialogues put it
        self.draw_processor = copy.copy(processor)
        self.draw_processor.knowledge_message, self.draw_processor.knowledge_placement = "last_user", "end"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples: `{"key", "captions"}` with `"image"` (PIL), or with the cached `"vision_states"` [S, d],
                `"context_states"` (one [T, d] for each caption) and `"context_input_ids"`; masked image modelling
                needs the image in either case.
        """
        weights = self.config.loss_weights
        draws = [_generator(self.seed, self.epoch, example["key"]) for example in examples]
        chosen = [draw.randrange(len(example["captions"])) for draw, example in zip(draws, examples, strict=True)]
        batch = self._captions(examples, chosen)
        masked = -(-len(examples) * self.masked_share // 1)  # rounded up
        masked = int(masked) if weights["masked_image"] or weights["masked_text"] else 0
        batch |= self._pictures(examples, masked)
        if weights["masked_image"]:
            batch |= self._masked_cells(draws[:masked], batch["pixel_values"].shape[-1])
        if weights["masked_text"]:
            batch |= self._masked_tokens(draws[:masked], batch)
        if weights["knowledge_to_text"]:
            batch |= self._caption_prompts(examples, chosen, draws)
        if weights["text_to_knowledge"]:
            batch |= self._draw_prompts(examples, chosen, draws)
        if self.image_knowledge_share and (weights["knowledge_to_text"] or weights["text_to_knowledge"]):
            batch["use_image_knowledge"] = torch.tensor([draw.random() < self.image_knowledge_share for draw in draws])
        return batch

    def _captions(self, examples: list[dict], chosen: list[int]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.context_tokenizer
        if "context_input_ids" in examples[0]:
            ids = [example["context_input_ids"][i] for example, i in zip(examples, chosen, strict=True)]
        else:
            captions = [example["captions"][i] for example, i in zip(examples, chosen, strict=True)]
            limit = min(self.processor.max_context_length or tokenizer.model_max_length, 10**6)
            ids = tokenizer(captions, truncation=True, max_length=limit)["input_ids"]
            ids = [torch.tensor(row) for row in ids]
        batch = {
            "context_input_ids": _pad_right(ids, tokenizer.pad_token_id),  # [B, T]
            "context_attention_mask": _pad_right([torch.ones_like(row) for row in ids], 0),
        }
        if "context_states" in examples[0]:
            states = [example["context_states"][i] for example, i in zip(examples, chosen, strict=True)]
            batch["context_states"] = _pad_right(states, 0.0)  # [B, T, d]
        return batch

    def _pictures(self, examples: list[dict], masked: int) -> dict[str, torch.Tensor]:
        if "vision_states" in examples[0]:
            batch = {"vision_states": torch.stack([example["vision_states"] for example in examples])}  # [B, S, d]
            needed = examples[:masked] if self.config.loss_weights["masked_image"] else []
        else:
            batch, needed = {}, examples
        if needed:
            images = [example["image"] for example in needed]
            batch["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    def _masked_cells(self, draws: list[random.Random], size: int) -> dict[str, torch.Tensor]:
        cells = max(size // MASKED_CELL, 1) ** 2
        scored, hidden = torch.zeros(2, len(draws), cells, dtype=torch.bool)
        for row, draw in enumerate(draws):
            order = torch.tensor(draw.sample(range(cells), round(MASKED_CELLS * cells)))
            scored[row, order] = True
            hidden[row, order[round(VISIBLE_CELLS * len(order)) :]] = True
        return {"masked_cells": scored, "hidden_cells": hidden}

    def _masked_tokens(self, draws: list[random.Random], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.context_tokenizer
        ids = batch["context_input_ids"][: len(draws)].clone()
        labels = torch.full_like(ids, -100)
        special = set(tokenizer.all_special_ids)
        for row, draw in enumerate(draws):
            for column, token in enumerate(ids[row].tolist()):
                if token not in special and draw.random() < MASKED_TOKENS:
                    labels[row, column] = token
                    if draw.random() >= VISIBLE_TOKENS:
                        ids[row, column] = self.mask_id
        return {"masked_input_ids": ids, "masked_labels": labels}

    def _caption_prompts(self, examples: list[dict], chosen: list[int], draws: list[random.Random]) -> dict:
        chats = []
        for example, i, draw in zip(examples, chosen, draws, strict=True):
            captions, instruction = example["captions"], draw.choice(CAPTION_INSTRUCTIONS)
            if self.other_caption and len(captions) > 1:
                i = draw.choice([other for other in range(len(captions)) if other != i])
            chats.append(
                [{"role": "user", "content": instruction}, {"role": "assistant", "content": captions[i]}],
            )
        inputs = self.processor(chats, return_labels=True)
        return align_at_knowledge(
            {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}, self.processor
        )

    def _draw_prompts(self, examples: list[dict], chosen: list[int], draws: list[random.Random]) -> dict:
        chats = [
            [{"role": "user", "content": f"{draw.choice(DRAW_INSTRUCTIONS)} {example['captions'][i]}"}]
            for example, i, draw in zip(examples, chosen, draws, strict=True)
        ]
        inputs = self.draw_processor(chats)
        # what the template writes behind the knowledge is not needed, and is the same in every row
        last = (inputs["input_ids"] == self.processor.knowledge_token_id).any(0).nonzero()[-1]
        return {
            "draw_input_ids": inputs["input_ids"][:, : last + 1],
            "draw_attention_mask": inputs["attention_mask"][:, : last + 1],
        }


class DialogueCollator:
    """
    Dialogues `{"messages": [...]}` that end in a reply -> the inputs of `VikdfForConditionalGeneration.forward`.

    Args:
        processor: writes prompts, contexts and labels.
        max_length: most tokens of a prompt with its replies; older turns are left out.
    """

    def __init__(self, processor: VikdfProcessor, *, max_length: int | None = None):
        self.processor, self.max_length, self.epoch = processor, max_length, 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `attention_mask`, `labels` [B, T]; `context_input_ids`, `context_attention_mask` [B, C]."""
        chats = [example["messages"] for example in examples]
        inputs = self.processor(chats, return_labels=True, max_length=self.max_length)
        return align_at_knowledge(dict(inputs), self.processor)


def align_at_knowledge(batch: dict[str, torch.Tensor], processor: VikdfProcessor) -> dict[str, torch.Tensor]:
    """
    Shifts the rows of a left-padded batch so that the knowledge begins in the same column of every row, and pads on
    both sides. All text before it is then one block, which the model reads without gradient.

    Args:
        batch: `input_ids`, `attention_mask` and perhaps `labels` [B, T]; other entries pass.

    Returns:
        The batch with these three as [B, T'], T' >= T, and `position_ids` [B, T'] that count a row's own tokens.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    start = (ids == processor.knowledge_token_id).int().argmax(1)  # [B] first placeholder
    shift = start.max() - start  # [B] by how many columns a row moves to the right
    first = mask.argmax(1)  # [B] first real token
    left = (first + shift).min()
    width = ids.shape[1] + int(shift.max()) - int(left)
    columns = torch.arange(width)[None] + left - shift[:, None]  # [B, T'] where each comes from
    inside = (columns >= 0) & (columns < ids.shape[1])
    columns = columns.clamp(0, ids.shape[1] - 1)
    fills = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    aligned = {
        key: batch[key].gather(1, columns).masked_fill(~inside, fill) for key, fill in fills.items() if key in batch
    }
    aligned["position_ids"] = (aligned["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, **aligned}


def _pad_right(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


__all__ = ["DialogueCollator", "PreTrainingCollator", "align_at_knowledge"]
