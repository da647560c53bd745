"""Training with transformers' Trainer: which parameters, which objectives and which data are configuration.

What `VikdfTrainer` adds: a batch that is computed in parts (accumulated micro-batches, processes) gives the gradient of
the whole, for every objective; each objective is logged by name, with throughput; evaluation sees the same masks each
time; a checkpoint that a kill left unfinished is never resumed from. `run_stage` is what the commands `vikdf distill`,
`integrate` and `tune` call.
"""

import copy
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .backbones import new_model
from .collators import DialogueCollator, PreTrainingCollator
from .configuration_vikdf import OBJECTIVES
from .data import SkipReport, load_dialogues, load_image_text_pairs
from .features import FeatureDataset, cache_features
from .modeling_distillation import VikdfForPreTraining
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import VikdfProcessor


logger = logging.get_logger(__name__)

# The keys of a recipe (a YAML file) and of its sections.
SECTIONS = {
    "model": None,  # `checkpoint`, or the arguments of `new_model`
    "objectives": set(OBJECTIVES),
    "data": {"train", "validation", "probabilities", "seed", "shuffle_buffer", "feature_cache", "pool_grid"},
    "collator": {"masked_share", "image_knowledge_share", "other_caption", "max_length"},
    "training": None,  # VikdfTrainingArguments
}


@dataclass
class VikdfTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with one addition and defaults that fit.

    Args:
        learning_rates: beginning of parameter names -> their learning rate, e.g. `{"knowledge_gate": 5e-3}`; all other
            parameters have `learning_rate`. The longest matching beginning counts.
    """

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Beginning of parameter names -> learning rate, as JSON."}
    )
    # the collators read raw columns
    remove_unused_columns: bool | None = False
    # a step need not touch every part: no picture among the dialogues, say
    ddp_find_unused_parameters: bool | None = True
    # every process reads the stream and takes its own batches of it
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})

    def __post_init__(self):
        if isinstance(self.learning_rates, str):
            self.learning_rates = json.loads(self.learning_rates)
        super().__post_init__()


class VikdfTrainer(Trainer):
    """
    Trains `VikdfForPreTraining` on image-text pairs or `VikdfForConditionalGeneration` on dialogues.

    Takes what `Trainer` takes; `data_collator` is a `PreTrainingCollator` or `DialogueCollator`, `processing_class` the
    processor, which is saved with every checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(_SetEpoch(self.data_collator))
        self.is_pretraining = isinstance(self.accelerator.unwrap_model(self.model), VikdfForPreTraining)
        freeze_unused(self.accelerator.unwrap_model(self.model))
        self.sums, self.logged_step, self.logged_at = defaultdict(float), 0, None
        self.eval_sums = defaultdict(float)

    # ---- what trains, and how fast ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) with the learning rates of `args.learning_rates`; biases and norms do not decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        rates = self.args.learning_rates or {}
        groups = defaultdict(list)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            name = name.removeprefix("module.")
            prefix = max((prefix for prefix in rates if name.startswith(prefix)), key=len, default=None)
            rate = self.args.learning_rate if prefix is None else rates[prefix]
            # queries, base vectors, gates and the temperature are no weights of a linear map
            decays = name in decaying and parameter.dim() > 1 and not name.endswith(("query_tokens", "knowledge_base"))
            groups[rate, self.args.weight_decay if decays else 0.0].append(parameter)
        unknown = [prefix for prefix in rates if not any(n.startswith(prefix) for n, _ in model.named_parameters())]
        if unknown:
            raise ValueError(f"learning_rates names {unknown}, but no parameter's name begins so.")
        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()],
            **{key: value for key, value in settings.items() if key != "lr"},
            lr=self.args.learning_rate,
        )
        return self.optimizer

    # ---- a batch in parts ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one step, each with what it must know of the others."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.logged_at is None:  # the clock starts with the first batch, and again after an evaluation or a save
            self.logged_at, self.logged_step = time.perf_counter(), self.state.global_step
        for batch in batches:
            self.sums["pairs"] += len(batch["context_input_ids"]) * self.args.world_size
            for key in ("attention_mask", "draw_attention_mask"):
                if key in batch:
                    self.sums["tokens"] += batch[key].sum() * self.args.world_size
        if not (self.is_pretraining and batches):
            return batches, items
        batches = [self._prepare_inputs(batch) for batch in batches]
        counts = self._whole_counts(batches)
        parts = len(batches) * self.args.world_size
        for batch in batches:
            batch["counts"], batch["parts"] = counts, parts
        if parts > 1 and self.accelerator.unwrap_model(self.model).config.loss_weights["text_image_matching"]:
            self._add_negatives(batches)
        return batches, 1  # not None: the losses are divided by the counts of the whole

    def _whole_counts(self, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Objective -> what it scores over all micro-batches and processes."""
        zero = torch.zeros((), device=self.args.device)
        counts = {
            "masked_image": sum((_masked_pixels(batch) for batch in batches), zero),
            "masked_text": sum(((b["masked_labels"] != -100).sum() for b in batches if "masked_labels" in b), zero),
            "knowledge_to_text": sum(((b["labels"][:, 1:] != -100).sum() for b in batches if "labels" in b), zero),
            "text_to_knowledge": sum((len(batch["context_input_ids"]) for batch in batches), zero),
        }
        total = self.accelerator.reduce(torch.stack([value.float() for value in counts.values()]), reduction="sum")
        return dict(zip(counts, total, strict=True))

    @torch.no_grad()
    def _add_negatives(self, batches: list[dict[str, Any]]) -> None:
        """
        Gives every micro-batch the matching embeddings of all others, of this process and the rest: so it contrasts
        with the whole batch while holding the activations of its own rows alone (Gao et al. 2021, GradCache).
        """
        model = self.accelerator.unwrap_model(self.model)
        text, image = [], []
        for batch in batches:
            # what the frozen encoders say is kept for the step itself
            if "context_states" not in batch:
                batch["context_states"] = model.encode_context(
                    batch["context_input_ids"], batch["context_attention_mask"]
                )
            if "vision_states" not in batch:
                batch["vision_states"] = model.encode_images(batch["pixel_values"])
            # through the wrapper, which may hold the weights in shards
            output = self.model_wrapped(
                embed_only=True,
                **{k: batch[k] for k in ("context_states", "context_attention_mask", "vision_states")},
            )
            text.append(output.text_embeddings.float())
            image.append(output.image_embeddings.float())
        others_text, others_image = self._from_other_processes(torch.cat(text), torch.cat(image))
        for i, batch in enumerate(batches):
            batch["other_text"] = torch.cat([*text[:i], *text[i + 1 :], others_text])
            batch["other_image"] = torch.cat([*image[:i], *image[i + 1 :], others_image])

    def _from_other_processes(self, *own: torch.Tensor) -> list[torch.Tensor]:
        """Rows [R, d] of all other processes, whose numbers of rows may differ."""
        if self.args.world_size == 1:
            return [rows[:0] for rows in own]
        lengths = self.accelerator.gather(torch.tensor([len(own[0])], device=own[0].device)).tolist()
        gathered, own_rank = [], self.args.process_index
        for rows in own:
            padded = self.accelerator.pad_across_processes(rows)
            everyone = self.accelerator.gather(padded).split(len(padded))
            gathered.append(
                torch.cat(
                    [e[:n] for rank, (e, n) in enumerate(zip(everyone, lengths, strict=True)) if rank != own_rank]
                )
            )
        return gathered

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the objectives; its parts are kept for the log."""
        if not self.is_pretraining:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        sums = self.sums if model.training else self.eval_sums
        for name, value in outputs.losses.items():
            sums[name] += value
        # processes average their gradients, but each loss is already a share of the whole
        loss = outputs.loss * self.args.world_size if model.training else outputs.loss
        return (loss, outputs) if return_outputs else loss

    # ---- what is seen of it ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the objectives (mean over the logged steps) and throughput to what the Trainer logs."""
        if "loss" in logs and self.logged_at is not None:
            seconds = time.perf_counter() - self.logged_at
            steps = max(self.state.global_step - self.logged_step, 1)
            for name in ("pairs", "tokens"):
                if name in self.sums:
                    logs[f"{name}_per_s"] = round(float(self.sums.pop(name)) / seconds, 2)
            for name, value in self.sums.items():
                value = self.accelerator.reduce(value.detach().float(), reduction="sum")
                logs[f"loss_{name}"] = round(float(value) / steps, 6)
            self.sums, self.logged_at = defaultdict(float), None
        super().log(logs, *args, **kwargs)

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The evaluation data with the collator as it is in epoch 0: the same masks, captions and prompts each time."""
        training_collator = self.data_collator
        self.data_collator = copy.copy(training_collator)
        self.data_collator.epoch = 0
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds `eval_loss_<objective>` to `eval_loss`: means over the batches of the evaluation data."""
        self.eval_sums = defaultdict(float)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        batches = self.eval_sums.pop("batches", 1)
        for name, value in self.eval_sums.items():
            mean = self.accelerator.reduce(value.float() / batches, reduction="mean")
            output.metrics[f"{metric_key_prefix}_loss_{name}"] = float(mean)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, None, None]:
        """The loss of one evaluation batch; logits are not kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.eval_sums["batches"] += 1
        return loss.detach().mean(), None, None

    # ---- resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; `True` resumes from the last *finished* checkpoint, or starts where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def run_stage(stage: str, recipe: dict[str, Any]) -> dict[str, float]:
    """
    Runs one stage of training from a recipe, or goes on with it where it was interrupted.

    Args:
        stage: "distill" (default objectives: the three on image-text pairs), "integrate" (the two of BVIF), or "tune"
            (replies of text dialogues). A recipe's `objectives` may name any subset of the five for the first two.
        recipe: a mapping with the sections in `SECTIONS`; see configs/.

    Returns:
        The metrics of the last evaluation, empty without validation data. The model, its processor, the Trainer's state
        and `skipped.txt` (what was skipped of the data, and why) are in `training.output_dir`.

    Raises:
        ValueError: for an unknown stage, section or key.
    """
    if stage not in STAGE_OBJECTIVES:
        raise ValueError(f"Unknown stage {stage!r}; expected one of {list(STAGE_OBJECTIVES)}.")
    _check_recipe(recipe)
    args = VikdfTrainingArguments(**recipe.get("training", {}))
    set_seed(args.seed)  # of new weights; the Trainer seeds itself
    tuning = stage == "tune"
    settings = dict(recipe.get("model", {}))
    checkpoint = settings.pop("checkpoint", None)
    if tuning:
        loss_weights = None
    else:
        loss_weights = dict.fromkeys(OBJECTIVES, 0.0) | (recipe.get("objectives") or STAGE_OBJECTIVES[stage])
    model_class = VikdfForConditionalGeneration if tuning else VikdfForPreTraining
    if checkpoint is not None:
        processor = VikdfProcessor.from_pretrained(checkpoint)
        config = model_class.config_class.from_pretrained(checkpoint)
        config.loss_weights = loss_weights or config.loss_weights
        model = model_class.from_pretrained(checkpoint, config=config)
    else:
        model, processor = new_model(model_class=model_class, loss_weights=loss_weights, **settings)
    data, report = recipe.get("data", {}), SkipReport(os.path.join(args.output_dir, "skipped"))
    load = _load_dialogues if tuning else _load_pairs
    with args.main_process_first(desc="reading the data"):
        train = load(model, processor, data, "train", report)
        validation = load(model, processor, data, "validation", report)
    collator_settings = recipe.get("collator", {})
    if tuning:
        collator = DialogueCollator(processor, **collator_settings)
    else:
        collator = PreTrainingCollator(processor, model.config, seed=args.seed, **collator_settings)
    trainer = VikdfTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    metrics = trainer.evaluate() if validation is not None else {}
    if args.should_save:
        trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
        with open(os.path.join(args.output_dir, "skipped.txt"), "w", encoding="utf-8") as file:
            file.write(report.summary() + "\n")
    logger.info(report.summary())
    return metrics


STAGE_OBJECTIVES = {
    "distill": {name: OBJECTIVES[name] for name in ("text_image_matching", "masked_image", "masked_text")},
    "integrate": {name: OBJECTIVES[name] for name in ("knowledge_to_text", "text_to_knowledge")},
    "tune": None,
}


def _check_recipe(recipe: dict[str, Any]) -> None:
    for section, keys in recipe.items():
        if section not in SECTIONS:
            raise ValueError(f"Unknown section {section!r} in the recipe; known sections are {list(SECTIONS)}.")
        known = SECTIONS[section]
        unknown = sorted(set(keys or ()) - known) if known else []
        if unknown:
            raise ValueError(f"Unknown keys {unknown} in section {section!r}; known keys are {sorted(known)}.")


def _load_pairs(model: nn.Module, processor: VikdfProcessor, data: dict, split: str, report: SkipReport) -> Any:
    """Image-text pairs, streamed, or from a cache of the frozen encoders' states that is built when it is not there."""
    if not data.get(split):
        return None
    settings = {"seed": data.get("seed", 0), "report": report}
    if data.get("feature_cache"):
        folder = os.path.join(data["feature_cache"], split)
        pairs = load_image_text_pairs(data[split], shuffle_buffer=0, **settings)
        cache_features(model, processor, pairs, folder, pool_grid=data.get("pool_grid"))
        return FeatureDataset(folder)
    if split == "validation":
        return load_image_text_pairs(data[split], streaming=False, **settings)
    settings |= {key: data[key] for key in ("probabilities", "shuffle_buffer") if key in data}
    return load_image_text_pairs(data[split], **settings)


def _load_dialogues(model: nn.Module, processor: VikdfProcessor, data: dict, split: str, report: SkipReport) -> Any:
    """Dialogues that end in a reply, all in memory."""
    return load_dialogues(data[split], report=report) if data.get(split) else None


def freeze_unused(model: nn.Module) -> None:
    """
    Leaves gradients to the parameters that the objectives reach, so that the optimizer holds no others: the matching
    head only with text-image matching, the way into the LLM only with an objective that goes there.
    """
    if isinstance(model, VikdfForPreTraining):
        weights = model.config.loss_weights
        matching = bool(weights["text_image_matching"])
        language = bool(weights["knowledge_to_text"] or weights["text_to_knowledge"])
    else:
        matching, language = False, True
    model.matching_head.requires_grad_(matching)
    for part in (model.language_projection, model.knowledge_base, model.knowledge_gate):
        part.requires_grad_(language)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest `checkpoint-N` that was written to its end; `None` if there is none.

    The Trainer writes its state last, so a checkpoint without a readable one was cut off by a kill or a full disk.
    """
    if not os.path.isdir(output_dir):
        return None
    finished = {}
    for name in os.listdir(output_dir):
        prefix, _, step = name.rpartition("-")
        state = os.path.join(output_dir, name, "trainer_state.json")
        if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() and os.path.isfile(state):
            try:
                with open(state, encoding="utf-8") as file:
                    json.load(file)
            except ValueError:
                continue
            finished[int(step)] = os.path.join(output_dir, name)
    return finished[max(finished)] if finished else None


def _masked_pixels(batch: dict[str, Any]) -> torch.Tensor:
    """How many pixels of a batch are scored by masked image modelling."""
    if "masked_cells" not in batch:
        return torch.zeros(())
    cells = batch["masked_cells"]
    height, width = batch["pixel_values"].shape[-2:]
    return cells.sum() * (height * width / cells.shape[1])


class _SetEpoch(TrainerCallback):
    """Tells the collator the epoch, which its draws depend on."""

    def __init__(self, collator: PreTrainingCollator | DialogueCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


__all__ = ["VikdfTrainer", "VikdfTrainingArguments", "freeze_unused", "last_checkpoint"]
