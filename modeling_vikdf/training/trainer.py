"""Training with transformers' Trainer: which parameters, which objectives and which data are configuration.

What `VikdfTrainer` adds: a batch that is computed in parts (accumulated micro-batches, processes) gives the gradient
of the whole, for every objective; each objective is logged by name, with throughput; evaluation sees the same masks
each time and its means do not depend on how the data was cut into batches; a checkpoint that a kill or a full disk
left unfinished is never resumed from. `run_stage` is what the commands `vikdf distill`, `integrate` and `tune` call.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import save_fsdp_optimizer
from datasets.distributed import split_dataset_by_node
from huggingface_hub import run_as_future
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..backbones import half_precision_is_slow, new_model, require_model, widen_slow_half_precision
from ..configuration_vikdf import BACKBONE_CONFIGS, OBJECTIVES, VikdfConfig
from ..data.collators import DialogueCollator, JointCollator, PreTrainingCollator
from ..data.features import FeatureDataset, cache_features
from ..data.sources import SkipReport, load_dialogues, load_image_text_pairs
from ..modeling_distillation import MATCHING, TOKENS, VikdfForPreTraining, cells_to_pixels
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor
from ..sharing import push_to_hub


logger = logging.get_logger(__name__)


# What of Trainer's settings cannot be used: name -> the values that can, and why no others.
UNUSABLE = {
    "remove_unused_columns": ([False], "the collators read raw columns"),
    "label_names": ([None, ["labels"]], "the collators call them labels"),
    "train_sampling_strategy": (
        ["random", "sequential", "group_by_length", "batch_rebalance"],
        "Trainer would take it for 'random'",
    ),
    "hub_strategy": (["end", "every_save"], "what is committed is the model, never the state of its training"),
    "optim_target_modules": ([None], "optimizers that choose modules know nothing of learning_rates"),
    "parallelism_config": ([None], "a prompt that is cut up loses its knowledge; DDP and FSDP work"),
    "use_liger_kernel": ([False], "its kernels are for the LLM: apply them to model.language_model"),
    "use_cache": ([False], "training reads no cache"),
}
# The same for pre-training alone, whose objectives have losses of their own and make no predictions.
UNUSABLE_IN_PRETRAINING = {
    "compute_loss_func": ([None], "each objective has its own loss; weigh them by config.loss_weights"),
    "compute_metrics": ([None], "pre-training makes no predictions; evaluate() gives each objective's loss"),
    "preprocess_logits_for_metrics": ([None], "pre-training makes no predictions"),
    "include_for_metrics": ([[]], "pre-training makes no predictions"),
    "batch_eval_metrics": ([False], "pre-training makes no predictions"),
    "include_num_input_tokens_seen": (["no"], "the objectives read several inputs; tokens_per_s is logged"),
    "average_tokens_across_devices": ([True], "the objectives are means over the batches of all processes"),
}
GROUPED = ("group_by_length", "batch_rebalance")  # the sampling strategies that need to know lengths
# What Trainer leaves to scripts: `run_stage` has its own ways.
FOR_SCRIPTS = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}


def _refuse_unusable(settings: dict[str, Any], unusable: dict[str, tuple[list, str]]) -> None:
    for name, (usable, reason) in unusable.items():
        if name in settings and settings[name] not in usable:
            expected = " or ".join(map(repr, usable))
            raise ValueError(f"{name}={settings[name]!r} cannot be used here: {reason}. Expected {expected}.")


def _plain(name: str) -> str:
    """A parameter's name as the model itself has it, without what DDP and PEFT put in front."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


@dataclass
class VikdfTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with one addition and defaults that fit.

    Args:
        learning_rates: beginning of parameter names -> their learning rate, e.g. `{"knowledge_gate": 5e-3}`; all other
            parameters have `learning_rate`. The longest matching beginning counts; what has the rate 0 is frozen.
    """

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Beginning of parameter names -> learning rate, as JSON."}
    )
    # pinned memory is for an accelerator; without one the Trainer's default only warns
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    # without an accelerator the Trainer refuses bf16 unless it is told that the CPU is meant
    use_cpu: bool = field(default_factory=lambda: not torch.accelerator.is_available())
    # the collators read raw columns
    remove_unused_columns: bool | None = False
    # every step reaches every parameter that `freeze_unused` leaves, so DDP need not look
    ddp_find_unused_parameters: bool | None = False
    # every process reads the stream and takes its own batches of it
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})

    def __post_init__(self):
        if isinstance(self.learning_rates, str):
            self.learning_rates = json.loads(self.learning_rates)
        # YAML reads 1e-4, without a decimal point, as a text
        self.learning_rates = {prefix: float(rate) for prefix, rate in (self.learning_rates or {}).items()}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) and each.type in (float, float | None, "float"):
                setattr(self, each.name, float(value))
            if each.name.endswith("_strategy") and value is False:
                setattr(self, each.name, "no")  # which YAML reads as false
        super().__post_init__()
        _refuse_unusable(vars(self), UNUSABLE)
        get_reporting_integration_callbacks(self.report_to)  # raises for what is no tracker
        # two that are not listed, or not always, where they are installed
        missing = sorted({*self.report_to} - {*get_available_reporting_integrations(), "azure_ml", "flyte"})
        if missing:
            raise ImportError(
                f"report_to={missing} is not installed. Install it (pip install 'modeling_vikdf[track]' has trackio), "
                "or set report_to to 'none'."
            )

    def rate_of(self, name: str) -> float:
        """The learning rate of a parameter."""
        name = _plain(name)
        prefix = max((prefix for prefix in self.learning_rates if name.startswith(prefix)), key=len, default=None)
        return self.learning_rate if prefix is None else self.learning_rates[prefix]


class VikdfTrainer(Trainer):
    """
    Trains `VikdfForPreTraining` on image-text pairs or `VikdfForConditionalGeneration` on dialogues.

    Takes what `Trainer` takes; `data_collator` is a `PreTrainingCollator` or `DialogueCollator`, `processing_class`
    the processor, which is saved with every checkpoint. Predictions of dialogues, which `compute_metrics` and
    `predict` get, are described at `prediction_step`; pre-training makes none. Label smoothing is of all objectives
    that predict tokens, and as in `Trainer` of `eval_loss` too.

    Raises:
        TypeError: if `args` are not `VikdfTrainingArguments`.
        ValueError: without a collator, or for a setting that would do nothing or break.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: VikdfTrainingArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, VikdfTrainingArguments):
            raise TypeError(
                f"args must be VikdfTrainingArguments, which takes all that TrainingArguments does; got "
                f"{type(args).__name__}."
            )
        if data_collator is None:
            raise ValueError(
                "Pass a data_collator: DialogueCollator(processor) for dialogues, or PreTrainingCollator(processor, "
                "model.config) for image-text pairs."
            )
        if args.n_gpu > 1:
            args._n_gpu = 1  # replicas that each see a slice know nothing of the rest: one process a GPU, by torchrun
        self.args, self.data_collator = args, data_collator
        for name in {"train_dataset", "eval_dataset"} & {*kwargs}:
            kwargs[name] = self._with_lengths(kwargs[name])
        self.others = kwargs
        if model is not None:
            self._prepare_model(model)
        super().__init__(model=model, args=args, data_collator=data_collator, **kwargs)
        self._whole_temperature(self.model)
        self.label_smoother = None  # the model smooths, which knows where labels are predicted
        self.add_callback(_SetEpoch(self.data_collator))
        self.sums, self.logged_step, self.logged_at = defaultdict(float), 0, None
        self.eval_sums, self.eval_counts = defaultdict(float), defaultdict(float)
        self.scored = 0

    def _prepare_model(self, model: nn.Module) -> None:
        """Refuses what cannot be used with this model, and freezes what it does not train."""
        self.is_pretraining = isinstance(_base(model), VikdfForPreTraining)
        self._check_settings(_base(model).config)
        if _base(model) is model:  # else PEFT says what trains and what is saved
            freeze_unused(model, pictures=getattr(self.data_collator, "uses_pictures", True))
        for name, parameter in model.named_parameters():
            if self.args.learning_rate and self.args.rate_of(name) == 0:
                parameter.requires_grad_(False)

    def _check_settings(self, config: VikdfConfig) -> None:
        args, others = self.args, self.others
        if self.is_pretraining:
            _refuse_unusable({**vars(args), **others}, UNUSABLE_IN_PRETRAINING)
        data = others.get("train_dataset")
        stream = data is not None and not has_length(data)
        grouped = args.train_sampling_strategy in GROUPED
        loading = args.accelerator_config
        ignored = {
            "label_smoothing_factor: no objective of positive weight predicts tokens": args.label_smoothing_factor
            and self.is_pretraining
            and not any(config.loss_weights[name] for name in TOKENS),
            "label_smoothing_factor: compute_loss_func replaces the loss": args.label_smoothing_factor
            and others.get("compute_loss_func"),
            "compute_metrics: with prediction_loss_only there are no predictions": args.prediction_loss_only
            and others.get("compute_metrics"),
            "learning_rates: the optimizer that is passed has its own": args.learning_rates
            and others.get("optimizers", (None, None))[0] is not None,
            "train_sampling_strategy: a stream has its own order": stream and grouped,
            "split_batches and dispatch_batches: every process reads its own share of a stream": stream
            and (loading.split_batches or loading.dispatch_batches),
        }
        if reasons := [reason for reason, holds in ignored.items() if holds]:
            raise ValueError(f"These settings would be ignored. {'; '.join(reasons)}.")
        if grouped and data is not None and args.length_column_name not in getattr(data, "column_names", ()):
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} needs the lengths of the examples: pass a "
                f"datasets.Dataset of dialogues, or one with a column {args.length_column_name!r}, as train_dataset."
            )

    def _whole_temperature(self, model: nn.Module) -> None:
        """FSDP cannot cut a scalar; `_save` makes it one again."""
        if self.is_fsdp_enabled:
            head = _base(model).matching_head
            head.logit_scale = nn.Parameter(head.logit_scale.detach().view(1), head.logit_scale.requires_grad)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init`, which trains what a model that is passed does."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        self._whole_temperature(model)
        return model

    @property
    def loss_weights(self) -> dict[str, float]:
        """Objective -> weight, without those of weight 0; empty for dialogues."""
        if not self.is_pretraining:
            return {}
        config = _base(self.accelerator.unwrap_model(self.model)).config
        return {name: weight for name, weight in config.loss_weights.items() if weight}

    # ---- what trains, and how fast ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) with the learning rates of `args.learning_rates`; biases and norms do not decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        groups, names = defaultdict(list), []
        for full_name, parameter in model.named_parameters():
            name = _plain(full_name)
            names.append(name)
            if not parameter.requires_grad:
                continue
            rate = self.args.rate_of(name)
            # queries, base vectors, gates and the temperature are no weights of a linear map
            no_map = name.endswith(("query_tokens", "knowledge_base", "caption_shift")) or parameter.dim() < 2
            decay = self.args.weight_decay if full_name in decaying and not no_map else 0.0
            groups[rate != self.args.learning_rate, rate, decay].append(parameter)
        unknown = [prefix for prefix in self.args.learning_rates if not any(name.startswith(prefix) for name in names)]
        if unknown:
            raise ValueError(
                f"learning_rates names {unknown}, but no parameter's name begins so. They begin with "
                f"{sorted({name.partition('.')[0] for name in names})}."
            )
        optimizer_class, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, model
        )
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & {*settings}:
            raise ValueError(
                f"optim={self.args.optim.value!r} groups the parameters by itself, and would ignore learning_rates: "
                "choose another, or pass `optimizers`."
            )
        rate = settings.get("lr", self.args.learning_rate)
        self.optimizer = optimizer_class(
            [
                {"params": groups[key], "lr": key[1] if key[0] else rate, "weight_decay": key[2]}
                for key in sorted(groups)  # `learning_rate` first, for the Trainer logs the first group's
            ],
            **{**settings, "lr": rate},
        )
        return self.optimizer

    # ---- data ----

    def _with_lengths(self, data: Any) -> Any:
        """A `datasets.Dataset` of dialogues, or several by name, with their lengths, if these are to be grouped by."""
        if isinstance(data, dict):
            return {name: self._with_lengths(dataset) for name, dataset in data.items()}
        columns = data.column_names if isinstance(data, datasets.Dataset) else ()
        column = self.args.length_column_name
        if self.args.train_sampling_strategy not in GROUPED or column in columns or "messages" not in columns:
            return data
        lengths = [sum(len(message["content"]) for message in chat) for chat in data["messages"]]  # in characters
        return data.add_column(column, lengths)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; a stream goes on from epoch to epoch, each process with its own share of it."""
        if self.train_dataset is None or has_length(self.train_dataset):
            if self.train_dataset is not None and not len(self.train_dataset):
                raise ValueError("Nothing can be learnt: the training data hold no examples.")
            return super().get_train_dataloader()
        stream = _Endless(self.train_dataset, self.args.process_index, self.args.world_size)
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        # as if this were the only process: the stream is split already
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    # ---- a batch in parts ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one step, each with what it must know of the others."""
        if self.state.global_step >= self.state.max_steps:
            return [], None  # resumed when all was done: the Trainer would make one more step
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.logged_at is None:  # the clock starts with the first batch
            self.logged_at, self.logged_step = time.perf_counter(), self.state.global_step
        for i, batch in enumerate(batches):
            place = f"{self.args.seed}/{self.state.global_step}/{self.args.process_index}/{i}"
            batch["dropout_seed"] = random.Random(place).getrandbits(62)
            self.sums["pairs"] += len(batch["context_input_ids"]) * self.args.world_size
            for key in ("attention_mask", "draw_attention_mask"):
                if key in batch:
                    self.sums["tokens"] += batch[key].sum() * self.args.world_size
        if not (self.is_pretraining and batches):
            for counts in map(self._counts, batches):
                self.scored += sum(counts.values()) if counts else 1  # what a loss of one's own scores is not known
            return batches, items
        batches = [self._prepare_inputs(batch) for batch in batches]
        counts = self._whole_counts(batches)
        parts = len(batches) * self.args.world_size
        self.scored += sum(counts.values())
        for batch in batches:
            batch["counts"], batch["parts"] = counts, parts
        if parts > 1 and {*MATCHING} & {*self.loss_weights}:
            self._add_negatives(batches)
        return batches, 1  # not None: the losses are divided by the counts of the whole

    def _counts(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Objective -> how much of it a batch scores: pairs, pixels, tokens; nothing of dialogues without labels."""
        counts = {name: torch.tensor(len(batch["context_input_ids"])) for name in self.loss_weights}
        if "masked_image" in counts:
            patch = _base(self.accelerator.unwrap_model(self.model)).config.vision_config.patch_size
            size = batch["pixel_values"].shape[-2:]
            counts["masked_image"] = cells_to_pixels(batch["masked_cells"], *size, patch).sum()
        if "masked_text" in counts:
            counts["masked_text"] = (batch["masked_labels"] != -100).sum()
        if "shift_labels" in batch:
            counts["knowledge_to_text"] = (batch["shift_labels"] != -100).sum()
        elif "knowledge_to_text" in counts or (not self.is_pretraining and "labels" in batch):
            counts["knowledge_to_text"] = (batch["labels"][:, 1:] != -100).sum()
        if "reply" in counts:
            counts["reply"] = (batch["dialogues"]["labels"][:, 1:] != -100).sum()
        return {name: count.to(self.args.device, torch.float) for name, count in counts.items()}

    def _whole_counts(self, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Objective -> what it scores over all micro-batches and processes."""
        own = [self._counts(batch) for batch in batches]
        total = self.accelerator.reduce(
            torch.stack([sum(counts[name] for counts in own) for name in own[0]]), reduction="sum"
        )
        return dict(zip(own[0], total, strict=True))

    @torch.no_grad()
    def _add_negatives(self, batches: list[dict[str, Any]]) -> None:
        """
        Gives every micro-batch the matching embeddings of all others, of this process and the rest: so it contrasts
        with the whole batch while holding the activations of its own rows alone (Gao et al. 2021, GradCache).
        """
        self.model_wrapped.train()  # as in the step itself, also in the first one and after an evaluation
        kinds = ("context_input_ids", "context_attention_mask", "context_states", "pixel_values", "vision_states")
        kinds += ("partner_input_ids", "partner_attention_mask", "partner_states")
        embeddings = defaultdict(list)  # of texts, and of what they are matched with: those of each micro-batch
        for batch in batches:
            with self._dropout(batch["dropout_seed"]), self.compute_loss_context_manager():
                # through the wrapper, which may hold the weights in shards and compute in half precision
                output = self.model_wrapped(embed_only=True, **{key: batch[key] for key in kinds if key in batch})
            for name, value in output.items():
                if name.endswith("_states"):  # what the frozen encoders say is kept for the step itself
                    batch[name] = value
                else:
                    embeddings[name.removesuffix("_embeddings")].append(value.float())
        elsewhere = self._from_other_processes(*(torch.cat(own) for own in embeddings.values()))
        for (name, own), rest in zip(embeddings.items(), elsewhere, strict=True):
            for i, batch in enumerate(batches):
                batch[f"other_{name}"] = torch.cat([*own[:i], *own[i + 1 :], rest])

    @contextlib.contextmanager
    def _dropout(self, seed: int) -> Iterator[None]:
        """
        Within, dropout is drawn from the seed, which is a function of the micro-batch's place in the run: so it is the
        same in both passes over a micro-batch, and after resuming, whatever else draws random numbers.
        """
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

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
        seed = inputs.pop("dropout_seed", None)  # none in an evaluation
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "smoothing": self.args.label_smoothing_factor}
        with contextlib.nullcontext() if seed is None else self._dropout(seed):
            if not self.is_pretraining:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            for name, value in outputs.losses.items():
                self.sums[name] += value
            loss = loss * self.args.world_size  # processes average their gradients, but each is a share of the whole
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
            self.sums = defaultdict(float)
            self.logged_at, self.logged_step = time.perf_counter(), self.state.global_step
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """What is done within does not count in the throughput, and once if it is off the clock in parts too."""
        logged_at, start = self.logged_at, time.perf_counter()
        yield
        if logged_at is not None:
            self.logged_at = logged_at + time.perf_counter() - start

    # ---- evaluation ----

    @contextlib.contextmanager
    def _evaluation_collator(self) -> Iterator[None]:
        """Within, the collator is as in epoch 0: the same masks, captions and prompts each time."""
        training_collator = self.data_collator
        if hasattr(training_collator, "for_evaluation"):
            self.data_collator = training_collator.for_evaluation()
        try:
            yield
        finally:
            self.data_collator = training_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, with the same masks, captions and prompts each time."""
        with self._evaluation_collator():
            return super().get_eval_dataloader(self._with_lengths(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._evaluation_collator():
            return super().get_test_dataloader(self._with_lengths(test_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`; raises ValueError where the data hold nothing to score."""
        with self._off_the_clock():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.predict`, for dialogues; see `prediction_step` for what is predicted."""
        if self.is_pretraining:
            raise ValueError(
                "Pre-training makes no predictions: call evaluate() for the objectives' losses, or load the "
                "checkpoint with VikdfForConditionalGeneration to predict replies."
            )
        with self._off_the_clock():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """
        `eval_loss` and, of each objective, `eval_loss_<name>`: means over all that is scored (tokens, pixels, pairs),
        however the data was cut into batches. Only matching depends on the batch size, which sets its negatives. A
        masked objective that nothing was drawn for has none.
        """
        self.eval_sums, self.eval_counts, self.unlabelled = defaultdict(float), defaultdict(float), False
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.unlabelled:
            return output  # there are predictions, and no loss
        losses = {}
        for name in self.loss_weights or ["knowledge_to_text"]:
            whole = torch.tensor([self.eval_sums[name], self.eval_counts[name]], device=self.args.device)
            total, count = self.accelerator.reduce(whole, reduction="sum").tolist()
            if count:
                losses[name] = total / count
        # what is masked is drawn, and of a few examples perhaps nothing; of all else nothing is never meant
        lacking = [name for name in self.loss_weights if name not in losses and not name.startswith("masked_")]
        if lacking or not losses:
            raise ValueError(
                f"The evaluation data ({output.num_samples} examples) hold nothing to score for "
                f"{', '.join(lacking) or 'any objective'}. Is every label -100, because all examples are too long, or "
                "every batch smaller than dataloader_drop_last keeps?"
            )
        if self.is_pretraining:
            output.metrics.update({f"{metric_key_prefix}_loss_{name}": loss for name, loss in losses.items()})
            losses = {name: self.loss_weights[name] * loss for name, loss in losses.items()}
        output.metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        The loss of one evaluation batch, and unless `prediction_loss_only` its predictions: logits [B, k, vocabulary]
        and label ids [B, k] of the columns from the one that predicts the batch's first label to that of its last.
        As of every causal LM, the logits of column t predict label t + 1, and -100 is no label. Trainer pads k on the
        right with -100. Without labels there is no loss, and the logits are those of all columns.
        """
        inputs = self._prepare_inputs(inputs)
        predicts, labels = not (prediction_loss_only or self.is_pretraining), inputs.get("labels")
        counts = self._counts(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if not counts:
                self.unlabelled = True
                return None, model(**inputs).logits if predicts else None, None
            if predicts:
                columns = _supervised(labels)
                labels = labels[:, columns]
                if self.compute_loss_func is None:
                    inputs["logits_to_keep"] = columns
            loss, outputs = self._evaluation_loss(model, inputs, counts)
        losses = outputs.losses if self.is_pretraining else {"knowledge_to_text": loss}
        for name, count in counts.items():
            if count:
                self.eval_sums[name] += float(losses[name]) * float(count)
            self.eval_counts[name] += float(count)
        if not predicts:
            return loss, None, None
        return loss, outputs.logits if self.compute_loss_func is None else outputs.logits[:, columns], labels

    def _evaluation_loss(
        self, model: nn.Module, inputs: dict[str, Any], counts: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any]:
        if self.compute_loss_func is None:
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach().mean(), outputs
        items = counts["knowledge_to_text"]
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        if self.args.average_tokens_across_devices:
            loss = loss / self.accelerator.num_processes  # the mean of this batch, which is no share of a step
        return loss.detach().mean(), outputs

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        As `Trainer.train`; `True` resumes from the last *finished* checkpoint, or starts where there is none.

        Raises:
            ValueError: at the end, if there was nothing to learn in the data.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        self.sums, self.logged_at, self.scored = defaultdict(float), None, 0
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        scored = self.accelerator.reduce(torch.as_tensor(self.scored, device=self.args.device), reduction="sum")
        if not scored and not resume_from_checkpoint:
            raise ValueError(
                f"Nothing was learnt in {result.global_step} steps: the training data hold "
                + ("no examples." if not result.global_step else "nothing to score (every label is -100).")
            )
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        As the Trainer's, whose state file is written last and marks the checkpoint as finished.

        Raises:
            OSError: if it could not be written, on a full disk say; earlier checkpoints are as they were.
        """
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        state = os.path.join(folder, "trainer_state.json")
        if self.args.should_save and os.path.isfile(state):
            os.remove(state)  # of an earlier run: what is written over it is not finished
        try:
            with self._off_the_clock():
                super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            last = last_checkpoint(self._get_output_dir(trial))
            if last == folder:
                raise  # it is finished, and what failed was to clear away an older one
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {folder} could not be written: {error}. Make room (or set save_total_limit) and "
                f"start the same command again: it goes on from "
                f"{last or 'the beginning, for there is no earlier checkpoint'}."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:
            scale = {key: value.view(()) for key, value in state_dict.items() if key.endswith(".logit_scale")}
            state_dict = {**state_dict, **scale}
        token, self.args.hub_token = self.args.hub_token, None  # the arguments are pickled beside the weights
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.hub_token = token

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Saves model and processor to `args.output_dir` and commits them to `args.hub_model_id`, in one step.

        Args:
            blocking: `False` uploads in the background and returns a future.
            token, revision, private: default `args.hub_token`, `args.hub_revision`, `args.hub_private_repo`.
            kwargs: `results`, `include_backbones`, `create_pr`; see `sharing.push_to_hub`.

        Returns:
            What the Hub says of the commit; `None` in all processes but the first.

        Raises:
            OSError, ValueError: as `sharing.push_to_hub`.
        """
        self.save_model(_internal_call=True)  # else, with args.push_to_hub, it would push what it saves
        if not self.is_world_process_zero():
            return None
        push = functools.partial(
            push_to_hub,
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            model=self.args.output_dir,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            **kwargs,
        )
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer's own uploads all of output_dir, with the pickled arguments and in them the token.
        if self.args.hub_strategy == "end":
            return
        try:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")
        except OSError as error:  # the training goes on
            logger.warning(str(error))

    @property
    def _saves_whole_tensors(self) -> bool:
        """Whether FSDP holds the model and its checkpoints are to hold what was trained, in one file."""
        if not self.is_fsdp_enabled or _base(self.model) is not self.model:
            return False
        return "FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._saves_whole_tensors:
            return super()._save_optimizer_and_scheduler(output_dir)
        # the Trainer would also write the whole model, frozen backbones and all, in a file of FSDP's
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._saves_whole_tensors:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights = {}
        if self.args.process_index == 0:  # which hands the others their shards
            weights = load_file(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME))
            weights = {key: value.view(1) if key.endswith(".logit_scale") else value for key, value in weights.items()}
        set_model_state_dict(
            self.model if model is None else model,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
        )

    def _load_best_model(self) -> None:
        if not self._saves_whole_tensors:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that marks the checkpoint as finished comes after

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Says nothing of the frozen backbones: they are as they were, whether the checkpoint holds them or not."""
        trained = ([key for key in keys if not key.startswith((*BACKBONE_CONFIGS,))] for keys in load_result)
        super()._issue_warnings_after_load(type(load_result)(*trained))


class _Endless(torch.utils.data.IterableDataset):
    """
    A stream that begins again, reshuffled, where it ends. So a step is never short of a batch, processes whose shares
    differ never wait for one another, and a run that resumes in the third epoch skips to the third epoch. Each example
    is told its epoch, which what is drawn for it depends on.
    """

    def __init__(self, dataset: Any, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        if world_size > 1 and isinstance(dataset, datasets.IterableDataset):
            dataset, self.rank, self.world_size = split_dataset_by_node(dataset, rank, world_size), 0, 1
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # a copy, for `datasets` keeps the epoch in memory that the workers share
        dataset = copy.deepcopy(self.dataset) if hasattr(self.dataset, "set_epoch") else self.dataset
        for epoch in itertools.count():
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            example = None
            for example in itertools.islice(dataset, self.rank, None, self.world_size):
                yield {**example, "epoch": epoch}
            if example is None:
                return  # nothing to read, as for a worker without a shard


# The keys of a recipe (a YAML file) and of its sections.
SECTIONS = {
    "model": {
        "checkpoint",
        *inspect.signature(new_model).parameters,
        *inspect.signature(VikdfForConditionalGeneration.from_backbones).parameters,
        *VikdfConfig.__annotations__,
    }
    - {"model_class", "model_settings", "config_kwargs", "processor", "loss_weights", "cls"},
    "objectives": set(OBJECTIVES) - {"reply"},
    "data": {
        "train",
        "validation",
        "sources",
        "probabilities",
        "seed",
        "shuffle_buffer",
        "feature_cache",
        "pool_grid",
    },
    "collator": {"masked_share", "image_knowledge_share", "other_caption", "caption_as_picture"},
    "training": {each.name for each in dataclasses.fields(VikdfTrainingArguments) if each.init} - FOR_SCRIPTS,
}
# Of the stage "tune", on dialogues alone and with captioned pictures beside them.
TUNE_SECTIONS = SECTIONS | {
    "data": {"train", "validation", "sources"},
    "collator": {"max_length", "earlier_replies", "hide_context", "posterior_share"},
}
JOINT_SECTIONS = SECTIONS | {
    "objectives": set(OBJECTIVES),
    "data": TUNE_SECTIONS["data"] | {"pairs", "pairs_validation", "feature_cache", "pool_grid"},
    "collator": TUNE_SECTIONS["collator"] | SECTIONS["collator"],
}

STAGE_OBJECTIVES = {
    "distill": {name: OBJECTIVES[name] for name in ("text_image_matching", "masked_image", "masked_text")},
    "integrate": {name: OBJECTIVES[name] for name in ("knowledge_to_text", "text_to_knowledge")},
    "tune": {},
}


def run_stage(stage: str, recipe: dict[str, Any]) -> dict[str, float]:
    """
    Runs one stage of training from a recipe, or goes on with it where it was interrupted.

    Args:
        stage: "distill" (default objectives: the three on image-text pairs), "integrate" (the two of BVIF), or "tune"
            (replies of text dialogues). A recipe's `objectives` may name any subset of the five for the first two; for
            "tune" they are what is learnt from captioned pictures (`data.pairs`) beside the replies, whose own weight
            is 1 unless they name it.
        recipe: a mapping with the sections in `SECTIONS`; see configs/.

    Returns:
        The metrics of the last evaluation, empty without validation data. The model, its processor, the Trainer's
        state, `recipe.yaml` (the recipes of all stages up to this one) and `skipped.txt` (what was skipped of the
        data, and why) are in `training.output_dir`.

    Raises:
        ValueError: for an unknown stage, section or key, a missing one, or settings that do not fit together.
    """
    recipe = _check_recipe(stage, recipe)
    data, settings = recipe["data"], dict(recipe["model"])
    # a recipe's bf16 is to be fast, which it is not everywhere
    slow = {"bf16": False} if half_precision_is_slow() else {}
    args = VikdfTrainingArguments(**recipe["training"] | slow)
    set_seed(args.seed)  # of new weights; the Trainer seeds itself
    tuning = stage == "tune"
    objectives = recipe["objectives"] or STAGE_OBJECTIVES[stage]
    joint = tuning and bool(objectives)  # dialogues, and captioned pictures beside them
    if joint:
        objectives = {"reply": 1.0, **objectives}
    loss_weights = {name: float(objectives.get(name, 0.0)) for name in OBJECTIVES} if objectives else None
    model_class = VikdfForPreTraining if objectives else VikdfForConditionalGeneration
    checkpoint = settings.pop("checkpoint", None)
    if checkpoint is not None:
        require_model(checkpoint)
        processor = VikdfProcessor.from_pretrained(checkpoint)
        config = model_class.config_class.from_pretrained(checkpoint)
        config.loss_weights = loss_weights or config.loss_weights
        model = model_class.from_pretrained(checkpoint, config=config)
    else:
        model, processor = new_model(model_class=model_class, loss_weights=loss_weights, **settings)
    widen_slow_half_precision(model)
    if args.bf16 and args.device.type == "cpu":
        use_plain_attention(model)
    report = SkipReport(os.path.join(args.output_dir, "skipped"))

    def collate(collator_class: type, **further: Any) -> Any:
        known = inspect.signature(collator_class).parameters
        chosen = {key: value for key, value in recipe["collator"].items() if key in known}
        return collator_class(processor, seed=args.seed, **chosen, **further)

    pairs = collate(PreTrainingCollator, config=model.config) if objectives else None
    dialogues = collate(DialogueCollator, report=report) if tuning else None
    if pairs is not None and pairs.uses_pictures:
        model.attach_vision_encoder()  # now, to be placed and perhaps cut into shards with the rest
    splits = ("train", "validation")
    with args.main_process_first(desc="reading the data"):
        if tuning:  # all in memory
            loaded = (load_dialogues(data[each], report=report) if data.get(each) else None for each in splits)
        else:
            loaded = (_load_pairs(model, processor, data, each, args, report) for each in splits)
        train, validation = loaded
        collator = dialogues if tuning else pairs
        if joint:
            beside = data | {"train": data["pairs"], "validation": data.get("pairs_validation")}
            pictures = (_load_pairs(model, processor, beside, each, args, report) for each in splits)
            collator = JointCollator(dialogues, pairs, *pictures)
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
    metrics = _last_evaluation(trainer) if validation is not None else {}
    if args.should_save:
        from ..cards.facts import write_history

        sections = {section: settings for section, settings in recipe.items() if settings}
        write_history({"stage": stage, **sections}, args.output_dir, checkpoint)
        trainer.state.save_to_json(os.path.join(args.output_dir, "trainer_state.json"))
        with open(os.path.join(args.output_dir, "skipped.txt"), "w", encoding="utf-8") as file:
            file.write(report.summary() + "\n")
    logger.info(report.summary())
    return metrics


def _last_evaluation(trainer: VikdfTrainer) -> dict[str, float]:
    """The metrics of the weights that the model has now: those of the training, if it ended with an evaluation."""
    state, step = trainer.state, trainer.state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        step = state.best_global_step
    for entry in reversed(state.log_history):
        if entry["step"] == step and "eval_loss" in entry:
            return {key: value for key, value in entry.items() if key != "step"}
    return trainer.evaluate()


def _check_recipe(stage: str, recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe with all its sections, empty where it has none."""
    if stage not in STAGE_OBJECTIVES:
        raise ValueError(f"Unknown stage {stage!r}; expected one of {list(STAGE_OBJECTIVES)}.")
    sections = SECTIONS
    if stage == "tune":
        data = recipe.get("data") or {}
        sections = JOINT_SECTIONS if recipe.get("objectives") else TUNE_SECTIONS
        if bool(recipe.get("objectives")) != bool(data.get("pairs")):
            raise ValueError(
                "To learn from captioned pictures beside the dialogues name both what is to be learnt (the section "
                "'objectives') and the pictures (data.pairs); without them name neither."
            )
        if data.get("pairs") and data.get("validation") and not data.get("pairs_validation"):
            raise ValueError("data.validation is set, so the evaluation needs pictures too: data.pairs_validation.")
    for section, settings in recipe.items():
        if section not in sections:
            raise ValueError(
                f"Unknown section {section!r} in the recipe{_suggest([section], sections)}; {stage!r} knows the "
                f"sections {list(sections)}."
            )
        if not isinstance(settings or {}, dict):
            raise ValueError(f"The section {section!r} must hold settings (key: value), not {settings!r}.")
        unknown = sorted(set(settings or ()) - sections[section])
        if unknown:
            raise ValueError(
                f"Unknown keys {unknown} in section {section!r}{_suggest(unknown, sections[section])}; {stage!r} "
                f"knows the keys {sorted(sections[section])}."
            )
    recipe = {section: recipe.get(section) or {} for section in SECTIONS}
    model, data = recipe["model"], recipe["data"]
    if "checkpoint" in model and len(model) > 1:
        raise ValueError(
            f"The model comes from model.checkpoint, so {sorted(set(model) - {'checkpoint'})} would be ignored: "
            "leave them out, or leave out the checkpoint to begin with a new model."
        )
    if "checkpoint" not in model and not {"language_model", "context_encoder"} <= set(model):
        raise ValueError("The section 'model' needs a checkpoint, or language_model and context_encoder.")
    if not data.get("train"):
        raise ValueError("The recipe names no training data: set data.train.")
    cached = {"probabilities", "shuffle_buffer"} if data.get("feature_cache") else {"pool_grid"}
    if cached & set(data):
        raise ValueError(
            f"{sorted(cached & set(data))} {'do' if len(cached & set(data)) > 1 else 'does'} nothing "
            f"{'with' if data.get('feature_cache') else 'without'} data.feature_cache: leave it out."
        )
    return recipe


def _suggest(words: list[str], known: Iterable[str]) -> str:
    """How a message goes on that names what mistyped words are nearest to."""
    nearest = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word in words}
    return "".join(f"; for {word!r}, did you mean {near[0]!r}?" for word, near in nearest.items() if near)


def _load_pairs(
    model: nn.Module,
    processor: VikdfProcessor,
    data: dict,
    split: str,
    args: VikdfTrainingArguments,
    report: SkipReport,
) -> Any:
    """Image-text pairs, streamed, or from a cache of the frozen encoders' states, built when it is not there."""
    if not data.get(split):
        return None
    settings = {"seed": data.get("seed", 0), "report": report}
    if data.get("feature_cache"):
        folder = os.path.join(data["feature_cache"], split)
        pairs = load_image_text_pairs(data[split], shuffle_buffer=0, decode=False, **settings)
        model.attach_vision_encoder()  # for the cache, also where no objective asks for pictures
        for part in (model.context_encoder, model.vision_encoder, model.iqformer):
            part.to(args.device)  # the Trainer moves the model later
        images = None
        if model.config.loss_weights["masked_image"]:  # a masked picture has to be seen anew: its file stays in memory
            pairs = list(pairs)
            images = {pair["key"]: pair["image"] for pair in pairs}
        cache_features(model, processor, pairs, folder, pool_grid=data.get("pool_grid"), report=report)
        return FeatureDataset(folder, images)
    if split == "validation" or data.get("pairs"):  # read in any order
        return load_image_text_pairs(data[split], streaming=False, **settings)
    settings |= {key: data[key] for key in ("probabilities", "shuffle_buffer") if key in data}
    readers = args.world_size * max(args.dataloader_num_workers, 1)
    return load_image_text_pairs(data[split], num_shards=readers, **settings)


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    """Columns [k] of labels [B, T] from the one that predicts the first label of any row to that of the last label."""
    labelled = (labels != -100).any(0).nonzero()
    if not len(labelled):
        return torch.zeros(1, dtype=torch.long, device=labels.device)
    return torch.arange(max(int(labelled[0]) - 1, 0), int(labelled[-1]) + 1, device=labels.device)


def _base(model: nn.Module) -> nn.Module:
    """The VIKDF model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_plain_attention(model: nn.Module) -> None:
    """For training in bfloat16 on a CPU, where PyTorch's fused attention has a slow backward pass."""
    for part in (model.language_model, model.iqformer.qformer):
        part.set_attn_implementation("eager")


def freeze_unused(model: nn.Module, *, pictures: bool = True) -> None:
    """
    Leaves gradients to the parameters that the objectives reach, so that the optimizer holds no others: the matching
    head only with matching, the way into the LLM only with an objective that goes there, the base vectors only with
    replies, the projection of the vision encoder's states only with `pictures` among the data.
    """
    if isinstance(model, VikdfForPreTraining):
        weights = model.config.loss_weights
        matching, replies = any(weights[name] for name in MATCHING), bool(weights["reply"])
        language = bool(weights["knowledge_to_text"] or weights["text_to_knowledge"] or replies)
    else:
        matching, replies, language = False, True, True
    model.matching_head.requires_grad_(matching)
    if matching and not weights["text_image_matching"] and model.config.knowledge_pooling != "each":
        model.matching_head.image_projection.requires_grad_(False)
    for part in (model.language_projection, model.knowledge_gate):
        part.requires_grad_(language)
    model.knowledge_base.requires_grad_(replies)
    model.iqformer.vision_projection.requires_grad_(pictures)


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


class _SetEpoch(TrainerCallback):
    """Tells the collator the epoch, which its draws depend on."""

    def __init__(self, collator: PreTrainingCollator | DialogueCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


__all__ = [
    "VikdfTrainer",
    "VikdfTrainingArguments",
    "freeze_unused",
    "last_checkpoint",
    "run_stage",
    "use_plain_attention",
]
