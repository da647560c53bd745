"""Training with transformers' Trainer: which parameters, which objectives and which data are configuration.

What `VikdfTrainer` adds: a batch that is computed in parts (accumulated micro-batches, processes) gives the gradient
of the whole, for every objective; each objective is logged by name, with throughput; evaluation sees the same masks
each time and its means do not depend on how the data was cut into batches. It knows nothing of recipes and files:
`run_stage` (stages.py) builds its parts, and `CheckpointingTrainer` (checkpoints.py) writes what it has learnt.
"""

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import TorchDynamoPlugin
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from ..configuration_vikdf import VikdfConfig
from ..data.collators import DialogueCollator, PreTrainingCollator, RelocatingCollator
from ..data.sources import EndlessStream
from ..modeling_compilation import compile_layers
from ..modeling_distillation import OBJECTIVE_TABLE, VikdfForPreTraining, active_objectives
from ..modeling_objectives import SHARED, count_labels
from .arguments import GROUPED, UNUSABLE_IN_PRETRAINING, VikdfTrainingArguments, canonical_name, refuse_unusable
from .checkpoints import CheckpointingTrainer, align_special_tokens, last_checkpoint, unwrap_peft


class VikdfTrainer(CheckpointingTrainer):
    """
    Trains `VikdfForPreTraining` on image-text pairs or `VikdfForConditionalGeneration` on dialogues.

    Takes what `Trainer` takes; `data_collator` is a `PreTrainingCollator` or `DialogueCollator`, `processing_class`
    the processor, which is saved with every checkpoint. Predictions of dialogues, which `compute_metrics` and
    `predict` get, are described at `prediction_step`; pre-training makes none. Label smoothing applies to every
    objective that predicts tokens and, as in `Trainer`, to `eval_loss`.

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
        self._reshape_temperature(self.model)
        self.label_smoother = None  # the model smooths, which knows where labels are predicted
        self.add_callback(_SetEpoch(self.data_collator))
        self.sums, self.logged_step, self.logged_at = defaultdict(float), 0, None
        self.eval_sums, self.eval_counts = defaultdict(float), defaultdict(float)
        self.scored = 0

    def _prepare_model(self, model: nn.Module) -> None:
        """Refuses what cannot be used with this model, and freezes what it does not train."""
        self.is_pretraining = isinstance(unwrap_peft(model), VikdfForPreTraining)
        self._check_settings(unwrap_peft(model).config)
        align_special_tokens(unwrap_peft(model), self.others.get("processing_class"))
        if unwrap_peft(model) is model:  # else PEFT says what trains and what is saved
            freeze_unused(model, pictures=getattr(self.data_collator, "uses_pictures", True))
        if self.args.torch_compile:
            how = {"backend": self.args.torch_compile_backend, "mode": self.args.torch_compile_mode}
            compile_layers(unwrap_peft(model).language_model, **how)
        for name, parameter in model.named_parameters():
            if self.args.learning_rate and self.args.rate_of(name) == 0:
                parameter.requires_grad_(False)

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator, which compiles nothing: the whole model would be many graphs; see `compile_layers`."""
        super().create_accelerator_and_postprocess()
        if self.args.torch_compile:
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    def _check_settings(self, config: VikdfConfig) -> None:
        args, others = self.args, self.others
        if self.is_pretraining:
            refuse_unusable({**vars(args), **others}, UNUSABLE_IN_PRETRAINING)
        data = others.get("train_dataset")
        stream = data is not None and not has_length(data)
        grouped = args.train_sampling_strategy in GROUPED
        loading = args.accelerator_config
        ignored = {
            "label_smoothing_factor: no objective of positive weight predicts tokens": args.label_smoothing_factor
            and self.is_pretraining
            and not any(objective.predicts_tokens for objective in active_objectives(config).values()),
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

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init`, which trains what a model that is passed does."""
        model = super().call_model_init(trial)
        self._prepare_model(model)
        self._reshape_temperature(model)
        return model

    @property
    def model_config(self) -> VikdfConfig:
        """The configuration of the model, whatever it is wrapped in."""
        return unwrap_peft(self.accelerator.unwrap_model(self.model)).config

    @property
    def loss_weights(self) -> dict[str, float]:
        """Objective -> weight, without those of weight 0; empty for dialogues."""
        if not self.is_pretraining:
            return {}
        return {name: weight for name, weight in self.model_config.loss_weights.items() if weight}

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or `args.optim`) with the learning rates of `args.learning_rates`; biases and norms do not decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        groups, names = defaultdict(list), []
        for full_name, parameter in model.named_parameters():
            name = canonical_name(full_name)
            names.append(name)
            if not parameter.requires_grad:
                continue
            rate = self.args.rate_of(name)
            # queries, base vectors, gates and the temperature are not weights of a linear map
            not_linear = name.endswith(("query_tokens", "knowledge_base", "caption_shift")) or parameter.dim() < 2
            decay = self.args.weight_decay if full_name in decaying and not not_linear else 0.0
            groups[rate != self.args.learning_rate, rate, decay].append(parameter)
        unknown = [prefix for prefix in self.args.learning_rates if not any(name.startswith(prefix) for name in names)]
        if unknown:
            raise ValueError(
                f"learning_rates names {unknown}, but no parameter's name starts with that. They start with "
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

    @contextlib.contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        """Loaders that the Trainer makes inside the context collate with this."""
        own = self.data_collator
        self.data_collator = RelocatingCollator(collator, self.model_config)
        try:
            yield
        finally:
            self.data_collator = own

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's; a stream goes on from epoch to epoch, each process with its own share of it."""
        if self.train_dataset is None or has_length(self.train_dataset):
            if self.train_dataset is not None and not len(self.train_dataset):
                raise ValueError("Nothing can be learnt: the training data hold no examples.")
            with self._collating(self.data_collator):
                return super().get_train_dataloader()
        stream = EndlessStream(self.train_dataset, self.args.process_index, self.args.world_size)
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=RelocatingCollator(self.data_collator, self.model_config),
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
            return [], None  # resumed after the last step: the Trainer would make one more
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
        counts = self._total_counts(batches)
        parts = len(batches) * self.args.world_size
        self.scored += sum(counts.values())
        for batch in batches:
            batch["counts"], batch["parts"] = counts, parts
        if parts > 1 and any(OBJECTIVE_TABLE[name].contrasts for name in self.loss_weights):
            self._add_negatives(batches)
        return batches, 1  # not None: the losses are already divided by the counts of the whole step

    def _counts(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Objective -> how much of it a batch scores: pairs, pixels, tokens; nothing of dialogues without labels."""
        config = self.model_config
        if self.is_pretraining:
            counts = {name: OBJECTIVE_TABLE[name].count(batch, config) for name in self.loss_weights}
        else:
            counts = {"reply": count_labels(batch, config)} if {"labels", "shift_labels"} & {*batch} else {}
        return {name: torch.as_tensor(count).to(self.args.device, torch.float) for name, count in counts.items()}

    def _total_counts(self, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Objective -> what it scores over all micro-batches and processes."""
        own = [self._counts(batch) for batch in batches]
        total = self.accelerator.reduce(
            torch.stack([sum(counts[name] for counts in own) for name in own[0]]), reduction="sum"
        )
        return dict(zip(own[0], total, strict=True))

    @torch.no_grad()
    def _add_negatives(self, batches: list[dict[str, Any]]) -> None:
        """
        Gives every micro-batch the matching embeddings of all others, of this process and the rest.

        So it contrasts with the whole batch while holding the activations of its own rows alone (Gao et al. 2021,
        GradCache).
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
                if name.endswith("_states"):  # the frozen encoders' states are kept for the step itself
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
        Draws dropout from the seed inside the context.

        The seed is a function of the micro-batch's place in the run. So dropout is the same in both passes over a
        micro-batch, and after resuming, whatever else draws random numbers.
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
                    [
                        theirs[:n]
                        for rank, (theirs, n) in enumerate(zip(everyone, lengths, strict=True))
                        if rank != own_rank
                    ]
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
                self.sums[f"loss_{name}"] += value
            loss = loss * self.args.world_size  # processes average their gradients, but each is a share of the whole
        return (loss, outputs) if return_outputs else loss

    # ---- logging ----

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
                logs[name] = round(float(value) / steps, 6)
            self.sums = defaultdict(float)
            self.logged_at, self.logged_step = time.perf_counter(), self.state.global_step
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Leaves the time spent inside out of the throughput; nested uses leave it out once."""
        logged_at, start = self.logged_at, time.perf_counter()
        yield
        if logged_at is not None:
            self.logged_at = logged_at + time.perf_counter() - start

    # ---- evaluation ----

    def _evaluation_collator(self) -> Any:
        """The collator of epoch 0: the same masks, captions and prompts each time."""
        collator = self.data_collator
        return collator.for_evaluation() if hasattr(collator, "for_evaluation") else collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, with the same masks, captions and prompts each time."""
        with self._collating(self._evaluation_collator()):
            return super().get_eval_dataloader(self._with_lengths(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`."""
        with self._collating(self._evaluation_collator()):
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
        Adds `eval_loss` and, of each objective, `eval_loss_<name>`.

        These are means over all that is scored (tokens, pixels, pairs), however the data was cut into batches. Only
        matching depends on the batch size, which sets its negatives. A masked objective has none where nothing was
        masked.
        """
        self.eval_sums, self.eval_counts, self.unlabelled = defaultdict(float), defaultdict(float), False
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self.unlabelled:  # else there are predictions, and no loss
            metrics = self._evaluation_metrics(output.num_samples)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _evaluation_means(self, names: Iterable[str]) -> dict[str, float]:
        """Name -> mean over all that was scored, without the names of which nothing was."""
        means = {}
        for name in names:
            whole = torch.tensor([self.eval_sums[name], self.eval_counts[name]], device=self.args.device)
            total, count = self.accelerator.reduce(whole, reduction="sum").tolist()
            if count:
                means[name] = total / count
        return means

    def _evaluation_metrics(self, num_samples: int) -> dict[str, float]:
        """`loss`, and in pre-training `loss_<name>` of each objective."""
        losses = self._evaluation_means(self.loss_weights or ["reply"])
        # masks are random, and may leave a few examples whole; anything else with nothing to score is a mistake
        lacking = [name for name in self.loss_weights if name not in losses and not OBJECTIVE_TABLE[name].masked]
        if lacking or not losses:
            raise ValueError(
                f"The evaluation data ({num_samples} examples) hold nothing to score for "
                f"{', '.join(lacking) or 'any objective'}. Is every label -100, because all examples are too long, or "
                "every batch smaller than dataloader_drop_last keeps?"
            )
        if not self.is_pretraining:
            return {"loss": losses["reply"]}
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        return {"loss": total, **{f"loss_{name}": loss for name, loss in losses.items()}}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """
        The loss of one evaluation batch, and its predictions unless `prediction_loss_only`.

        These are logits [B, k, vocabulary] and label ids [B, k] of the columns from the one that predicts the batch's
        first label to that of its last. As of every causal LM, the logits of column t predict label t + 1, and -100
        is no label. Trainer pads k on the right with -100. Without labels there is no loss, and the logits are those
        of all columns.
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
        losses = outputs.losses if self.is_pretraining else {"reply": loss}
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
        items = counts["reply"]
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
        with self._off_the_clock():
            super()._save_checkpoint(model, trial)


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    """Columns [k] of labels [B, T] from the one that predicts the first label of any row to that of the last label."""
    labelled = (labels != -100).any(0).nonzero()
    if not len(labelled):
        return torch.zeros(1, dtype=torch.long, device=labels.device)
    return torch.arange(max(int(labelled[0]) - 1, 0), int(labelled[-1]) + 1, device=labels.device)


def freeze_unused(model: nn.Module, *, pictures: bool = True) -> None:
    """
    Leaves only the parameters that the objectives reach trainable, so that the optimizer holds no others.

    Of those that only some objectives reach (`SHARED`) the ones that an active objective `trains`; of a dialogue model
    those of replies. The projection of the vision encoder's states only with `pictures` among the data.
    """
    active = {"reply": OBJECTIVE_TABLE["reply"]}
    if isinstance(model, VikdfForPreTraining):
        active = active_objectives(model.config)
    reached = tuple(prefix for objective in active.values() for prefix in objective.trains)
    for name, parameter in model.named_parameters():
        if name.startswith(SHARED):
            parameter.requires_grad_(name.startswith(reached))
    model.iqformer.vision_projection.requires_grad_(pictures)


class _SetEpoch(TrainerCallback):
    """Tells the collator the epoch, which its random choices depend on."""

    def __init__(self, collator: PreTrainingCollator | DialogueCollator):
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


__all__ = ["VikdfTrainer", "VikdfTrainingArguments", "freeze_unused"]
