"""Examples -> batches: masks, prompts and labels for every objective.

Everything random about an example (its caption, its masked cells and tokens, its instruction) is a function of the
seed, the epoch and the example's key. So a resumed run sees what the uninterrupted run would have seen, whatever the
number of workers or processes, and evaluation, which stays in epoch 0, always sees the same masks. This module knows
no files and no losses.
"""

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..configuration_vikdf import VikdfConfig
from ..modeling_distillation import active_objectives, needs_of
from ..modeling_objectives import MASKED_COLUMNS, cells_to_pixels, scored_patches, to_patches
from ..modeling_prefix import COLUMNS, align_at_knowledge, chosen_columns, locate_columns
from ..processing_vikdf import VikdfProcessor, pad
from .features import tokenize_captions
from .sources import SkipReport


logger = logging.get_logger(__name__)


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
MAX_CAPTION = 1000  # characters of a caption that the LLM reads; the text encoder cuts for itself


def _make_rng(seed: int, epoch: int, key: str) -> random.Random:
    """The random generator of an example in an epoch."""
    return random.Random(f"{seed}/{epoch}/{key}")


LOCATED = {*COLUMNS, *(f"draw_{name}" for name in COLUMNS), *MASKED_COLUMNS}  # what `locate` finds


def locate(
    batch: dict[str, torch.Tensor], token_id: int, vision_config: PreTrainedConfig | None
) -> dict[str, torch.Tensor]:
    """
    Where in a batch what lies that objectives score, so that none of them has to look for it on a GPU.

    Args:
        batch: inputs of a model.
        token_id: the placeholder's.
        vision_config: the vision encoder's, for its patches.
    """
    columns = {}
    if "input_ids" in batch:
        columns |= locate_columns(batch, token_id)
    if "draw_input_ids" in batch:
        draws = {key: batch[f"draw_{key}"] for key in ("input_ids", "attention_mask")}
        columns |= {f"draw_{name}": value for name, value in locate_columns(draws, token_id).items()}
    if "masked_cells" in batch and vision_config is not None:
        size, patch = batch["pixel_values"].shape[-2:], vision_config.patch_size
        pixels = cells_to_pixels(batch["masked_cells"], *size, patch)[:, None]
        columns["scored_patches"] = scored_patches(to_patches(pixels, patch))
    if "masked_labels" in batch:
        columns["masked_columns"] = chosen_columns(batch["masked_labels"] != -100)
    return columns


class RelocatingCollator:
    """
    Batches of any collator, in which what `locate` found, in their dialogues too, is true of what they hold now.

    So labels and masks count that were changed behind the collator that found it. What was not there is not added.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], config: VikdfConfig):
        self.collate, self.vision_config = collate, config.vision_config
        self.token_id = -1 if config.knowledge_token_id is None else config.knowledge_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples -> a batch."""
        return self._relocate(self.collate(examples))

    def _relocate(self, batch: dict[str, Any]) -> dict[str, Any]:
        if stale := LOCATED.intersection(batch):
            found = locate(batch, self.token_id, self.vision_config)
            kept = {name: value for name, value in batch.items() if name not in stale}
            batch = kept | {name: found[name] for name in stale.intersection(found)}
        if "dialogues" in batch:
            batch = {**batch, "dialogues": self._relocate(batch["dialogues"])}
        return batch


class _Collator:
    """Knows the epoch, in memory shared with the DataLoader's workers, which may live through several epochs."""

    def __init__(self):
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch of examples without one of their own (`example["epoch"]`)."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "_Collator":
        """A copy of this collator that stays in epoch 0."""
        collator = copy.copy(self)
        collator._epoch = torch.zeros((), dtype=torch.long)
        return collator


class PreTrainingCollator(_Collator):
    """
    Image-text pairs -> the inputs of `VikdfForPreTraining.forward` that its objectives of positive weight need.

    Args:
        processor: tokenizers, image processor, prompts.
        config: which objectives have a weight.
        seed: of everything random.
        masked_share: share of the examples that take part in the two masked objectives (the costly ones: each needs
            the encoder again, on masked input).
        image_knowledge_share: share of the rows whose BVIF knowledge is the picture's instead of the text's.
        other_caption: whether the LLM's target is a caption of the picture other than the one that its knowledge comes
            from, if there is another.
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
        super().__init__()
        for name, share in (("masked_share", masked_share), ("image_knowledge_share", image_knowledge_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}.")
        masked = [name for name, objective in active_objectives(config).items() if objective.masked]
        if masked and not masked_share:
            raise ValueError(f"masked_share=0 turns {' and '.join(masked)} off: set their weights to 0 instead.")
        self.processor, self.config, self.seed = processor, config, seed
        self.masked_share, self.image_knowledge_share = masked_share, image_knowledge_share
        self.other_caption = other_caption
        tokenizer = processor.context_tokenizer
        self.mask_id = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
        if needs_of(config) & {"masked_input_ids", "masked_labels"} and self.mask_id is None:
            raise ValueError("masked_text needs a mask or unknown token, and the context tokenizer has neither.")
        # text -> knowledge needs the knowledge after the text, wherever dialogues put it
        self.draw_processor = copy.copy(processor)
        self.draw_processor.knowledge_message, self.draw_processor.knowledge_placement = "last_user", "end"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Image-text pairs -> the inputs that the objectives of positive weight need.

        Args:
            examples: `{"key", "captions"}` with `"image"` (PIL), or with the cached `"vision_states"` [S, d],
                `"context_states"` (one [T, d] for each caption) and `"context_input_ids"`; masked image modelling
                needs the image in either case (PIL, or the content of its file).
        """
        active, needs = active_objectives(self.config), needs_of(self.config)
        rngs = [_make_rng(self.seed, example.get("epoch", self.epoch), example["key"]) for example in examples]
        masked = 0
        if any(objective.masked for objective in active.values()):
            examples, rngs, masked = self._masked_first(examples, rngs)
        chosen = [rng.randrange(len(example["captions"])) for rng, example in zip(rngs, examples, strict=True)]
        batch = self._captions("context", examples, chosen)
        if any(need.startswith("partner_") for need in needs):
            second_captions = [
                _pick_other(i, len(example["captions"]), rng)
                for example, i, rng in zip(examples, chosen, rngs, strict=True)
            ]
            batch |= self._captions("partner", examples, second_captions)
        examples = self.choose_pictures(examples, chosen, rngs)
        batch |= self._pictures(examples, masked)
        # where no row takes part the first one does, with nothing to score: which modules run in a step must not
        # depend on chance, because processes that hold a model in shards wait for one another
        rows, any_masked = rngs[: max(masked, 1)], masked > 0
        if needs & {"masked_cells", "hidden_cells"}:
            batch |= self._masked_cells(rows, batch["pixel_values"].shape[-1], any_masked)
        if needs & {"masked_input_ids", "masked_labels"}:
            batch |= self._masked_tokens(rows, batch, any_masked)
        if needs & {"input_ids", "attention_mask", "position_ids", "labels"}:
            batch |= self._caption_prompts(examples, chosen, rngs)
        if any(need.startswith("draw_") for need in needs):
            batch |= self._draw_prompts(examples, chosen, rngs)
        if self.uses_image_knowledge:
            batch["use_image_knowledge"] = torch.tensor([rng.random() < self.image_knowledge_share for rng in rngs])
        return batch | locate(batch, self.processor.knowledge_token_id, self.config.vision_config)

    def choose_pictures(
        self, examples: list[dict[str, Any]], chosen: list[int], rngs: list[random.Random]
    ) -> list[dict[str, Any]]:
        """
        The examples with what is shown as their pictures: here as they are. A subclass may show something else.

        Args:
            examples: see `__call__`.
            chosen: the index of the caption that each example is matched with.
            rngs: the random generator of each example.
        """
        return examples

    @property
    def uses_pictures(self) -> bool:
        """Whether pictures become knowledge, or are masked."""
        active = active_objectives(self.config).values()
        return any("pixel_values" in objective.inputs for objective in active) or self.uses_image_knowledge

    @property
    def uses_image_knowledge(self) -> bool:
        """Whether the LLM gets knowledge of the picture in some rows."""
        return bool(self.image_knowledge_share and "llm_knowledge" in needs_of(self.config))

    def _masked_first(self, examples: list[dict], rngs: list[random.Random]) -> tuple[list, list, int]:
        """The rows that take part in the masked objectives before the others, and their number."""
        masked = [rng.random() < self.masked_share for rng in rngs]
        order = sorted(range(len(masked)), key=lambda row: not masked[row])
        return [examples[row] for row in order], [rngs[row] for row in order], sum(masked)

    def _captions(self, role: str, examples: list[dict], chosen: list[int]) -> dict[str, torch.Tensor]:
        """The chosen caption of each example, as `role`'s ids, mask and, where they are cached, states."""
        if "context_input_ids" in examples[0]:
            ids = [example["context_input_ids"][i] for example, i in zip(examples, chosen, strict=True)]
        else:
            captions = [example["captions"][i] for example, i in zip(examples, chosen, strict=True)]
            ids = tokenize_captions(self.processor, captions)
        input_ids, attention_mask = pad(ids, self.processor.context_tokenizer.pad_token_id)  # [B, T]
        batch = {f"{role}_input_ids": input_ids, f"{role}_attention_mask": attention_mask}
        if "context_states" in examples[0]:
            states = [example["context_states"][i] for example, i in zip(examples, chosen, strict=True)]
            batch[f"{role}_states"], _ = pad(states)  # [B, T, d]
        return batch

    def _pictures(self, examples: list[dict], masked: int) -> dict[str, torch.Tensor]:
        active = active_objectives(self.config)
        batch, needed = {}, []
        if needs_of(self.config) & {"image_knowledge", "image_embeddings"} or self.uses_image_knowledge:
            if "vision_states" in examples[0]:
                batch["vision_states"] = torch.stack([example["vision_states"] for example in examples])  # [B, S, d]
            else:
                needed = examples
        reading = [name for name, objective in active.items() if "pixel_values" in objective.needs]
        if reading and not needed:
            needed = examples[: max(masked, 1)] if all(active[name].masked for name in reading) else examples
        if needed:
            if "image" not in needed[0]:
                raise ValueError(
                    f"{' and '.join(reading) or 'an objective'} needs the pictures themselves, and the examples only "
                    "have the encoder's states: give FeatureDataset the images."
                )
            batch["pixel_values"] = self.processor.pixel_values(example["image"] for example in needed)
        return batch

    def _masked_cells(self, rngs: list[random.Random], size: int, any_masked: bool) -> dict[str, torch.Tensor]:
        cells = max(size // MASKED_CELL, 1) ** 2
        scored, hidden = torch.zeros(2, len(rngs), cells, dtype=torch.bool)
        for row, rng in enumerate(rngs if any_masked else ()):
            count = _stochastic_round(MASKED_CELLS * cells, rng)
            order = torch.tensor(rng.sample(range(cells), count), dtype=torch.long)
            scored[row, order] = True
            hidden[row, order[_stochastic_round(VISIBLE_CELLS * len(order), rng) :]] = True
        return {"masked_cells": scored, "hidden_cells": hidden}

    def _masked_tokens(
        self, rngs: list[random.Random], batch: dict[str, torch.Tensor], any_masked: bool
    ) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.context_tokenizer
        ids = batch["context_input_ids"][: len(rngs)].clone()
        labels = torch.full_like(ids, -100)
        special = set(tokenizer.all_special_ids)
        for row, rng in enumerate(rngs if any_masked else ()):
            for column, token in enumerate(ids[row].tolist()):
                if token not in special and rng.random() < MASKED_TOKENS:
                    labels[row, column] = token
                    if rng.random() >= VISIBLE_TOKENS:
                        ids[row, column] = self.mask_id
        return {"masked_input_ids": ids, "masked_labels": labels}

    def _caption_prompts(self, examples: list[dict], chosen: list[int], rngs: list[random.Random]) -> dict:
        chats = []
        for example, i, rng in zip(examples, chosen, rngs, strict=True):
            captions, instruction = example["captions"], rng.choice(CAPTION_INSTRUCTIONS)
            if self.other_caption:
                i = _pick_other(i, len(captions), rng)
            caption = self._readable(captions[i])
            chats.append([{"role": "user", "content": instruction}, {"role": "assistant", "content": caption}])
        inputs = self.processor(chats, return_labels=True)
        return align_at_knowledge(
            {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}, self.processor
        )

    def _draw_prompts(self, examples: list[dict], chosen: list[int], rngs: list[random.Random]) -> dict:
        chats = [
            [{"role": "user", "content": f"{rng.choice(DRAW_INSTRUCTIONS)} {self._readable(example['captions'][i])}"}]
            for example, i, rng in zip(examples, chosen, rngs, strict=True)
        ]
        inputs = self.draw_processor(chats)
        # what the template writes after the knowledge is not needed, and is the same in every row
        last = (inputs["input_ids"] == self.processor.knowledge_token_id).any(0).nonzero()[-1]
        cut = {key: inputs[key][:, : last + 1] for key in ("input_ids", "attention_mask")}
        return {f"draw_{key}": value for key, value in align_at_knowledge(cut, self.processor).items()}

    def _readable(self, caption: str) -> str:
        """The part of a caption that the LLM reads."""
        return caption[:MAX_CAPTION].strip() or "..."


class DialogueCollator(_Collator):
    """
    Dialogues `{"messages": [...]}` that end in a reply -> the inputs of `VikdfForConditionalGeneration.forward`.

    A dialogue without a valid prompt (say, because its newest turn is too long) is skipped and reported: its row stays
    in the batch, without labels.

    Args:
        processor: writes prompts, contexts and labels.
        max_length: maximum tokens of a prompt with its replies; the oldest turns are dropped.
        earlier_replies: whether replies before the knowledge have labels, too. The knowledge cannot change them, so
            this only helps an LLM that is itself trained (LoRA).
        hide_context: share of the dialogues, chosen anew in every epoch, of which the LLM reads only the newest turn
            while the knowledge comes from the whole dialogue, so that it has something to add. 0 in evaluation.
        seed: of this choice.
        report: records what is skipped; by default it is only logged.
    """

    uses_pictures = False  # a picture in a dialogue is read, but does not train the projection of pictures

    # takes the place of a skipped dialogue
    STUB = ({"role": "user", "content": "..."}, {"role": "assistant", "content": "..."})

    def __init__(
        self,
        processor: VikdfProcessor,
        *,
        max_length: int | None = None,
        earlier_replies: bool = False,
        hide_context: float = 0.0,
        seed: int = 0,
        report: SkipReport | None = None,
    ):
        super().__init__()
        if not 0 <= hide_context <= 1:
            raise ValueError(f"hide_context must be between 0 and 1, got {hide_context}.")
        self.processor, self.max_length, self.earlier_replies = processor, max_length, earlier_replies
        self.hide_context, self.seed, self.report = hide_context, seed, report

    def for_evaluation(self) -> "DialogueCollator":
        """A copy of this collator that stays in epoch 0 and hides nothing."""
        collator = super().for_evaluation()
        collator.hide_context = 0.0
        return collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        -> `input_ids`, `attention_mask`, `labels` [B, T]; `context_input_ids`, `context_attention_mask` [B, C].

        And what `locate_columns` finds in them.
        """
        chats = [example["messages"] for example in examples]
        rngs = [_make_rng(self.seed, self.epoch, example.get("key", "")) for example in examples]
        hidden = [rng.random() < self.hide_context for rng in rngs]
        skipped = []
        try:
            inputs = self._read(chats)
        except (TypeError, ValueError):
            for row, example in enumerate(examples):
                try:
                    self._read(chats[row : row + 1])
                except (TypeError, ValueError) as error:
                    chats[row] = list(self.STUB)
                    skipped.append(row)
                    self._skip(str(example.get("key", row)), str(error).removeprefix("row 0: "))
            inputs = self._read(chats)
        inputs = dict(inputs)
        if any(hidden):  # the contexts of whole dialogues stay
            newest = [_newest_turn(chat) if hide else chat for chat, hide in zip(chats, hidden, strict=True)]
            prompts = self._read(newest)
            inputs |= {key: prompts[key] for key in ("input_ids", "attention_mask", "labels")}
        known = self.choose_contexts(chats, rngs)
        if known != chats:  # the prompts stay
            contexts = self._read(known)
            inputs |= {key: contexts[key] for key in ("context_input_ids", "context_attention_mask")}
        batch = align_at_knowledge(inputs, self.processor)
        batch["labels"][skipped] = -100
        if not self.earlier_replies:
            knowledge = (batch["input_ids"] == self.processor.knowledge_token_id).any(0).int().argmax()
            batch["labels"][:, :knowledge] = -100
        return batch | locate_columns(batch, self.processor.knowledge_token_id)

    def choose_contexts(
        self, chats: list[list[dict[str, Any]]], rngs: list[random.Random]
    ) -> list[list[dict[str, Any]]]:
        """
        The chats whose contexts the knowledge comes from: here those that are replied to. A subclass may read others.

        Args:
            chats: the messages of each dialogue.
            rngs: the random generator of each dialogue, after the draw of what is hidden.
        """
        return chats

    def _read(self, chats: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        return self.processor(chats, return_labels=True, max_length=self.max_length)

    def _skip(self, key: str, reason: str) -> None:
        if self.report is not None:
            self.report.add("unusable dialogue", key, reason)
        else:
            logger.warning(f"Skipped the dialogue {key}: {reason}")


class JointCollator(_Collator):
    """
    Text dialogues, each with a captioned picture, so that tuning on dialogues does not undo what pictures taught.

    Args:
        dialogues, pairs: the collators of both kinds.
        pictures: the image-text pairs (map-style); each dialogue gets a random one, another in every epoch.
        validation_pictures: the pairs for evaluation.
    """

    def __init__(
        self,
        dialogues: DialogueCollator,
        pairs: PreTrainingCollator,
        pictures: Sequence[dict[str, Any]],
        validation_pictures: Sequence[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.dialogues, self.pairs = dialogues, pairs
        self.pictures, self.validation_pictures = pictures, validation_pictures

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Dialogues -> the inputs of `VikdfForPreTraining.forward`, their own under `dialogues`."""
        shown = []
        for example in examples:
            rng = _make_rng(self.pairs.seed, self.epoch, example["key"])
            shown.append({**self.pictures[rng.randrange(len(self.pictures))], "epoch": self.epoch})
        self.dialogues.epoch = self.epoch
        return {**self.pairs(shown), "dialogues": self.dialogues(examples)}

    def for_evaluation(self) -> "JointCollator":
        """A copy of this collator, of the validation pictures, that stays in epoch 0 and hides nothing."""
        collator = super().for_evaluation()
        collator.pictures = self.validation_pictures
        collator.dialogues = self.dialogues.for_evaluation()
        return collator

    @property
    def uses_pictures(self) -> bool:
        """Whether pictures become knowledge, or are masked."""
        return self.pairs.uses_pictures


def _newest_turn(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat from its last user turn on, and the system message if it has one."""
    last = max(index for index, message in enumerate(chat) if message["role"] == "user")
    return [message for message in chat[:1] if message["role"] == "system"] + list(chat[last:])


def _pick_other(chosen: int, count: int, rng: random.Random) -> int:
    """A random index below `count` other than `chosen`; `chosen` itself if there is no other."""
    return rng.choice([other for other in range(count) if other != chosen] or [chosen])


def _stochastic_round(value: float, rng: random.Random) -> int:
    """`value` rounded up or down at random, so that its mean is kept."""
    return math.floor(value + rng.random())


__all__ = ["DialogueCollator", "JointCollator", "PreTrainingCollator", "RelocatingCollator", "align_at_knowledge"]
