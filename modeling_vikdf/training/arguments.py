"""Training arguments: `TrainingArguments` with learning rates by parameter name, and settings that are refused.

Knows neither models nor data: `VikdfTrainer` checks what depends on them.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks


# Restricted settings of the Trainer: name -> usable values, and the reason against others.
UNUSABLE = {
    "remove_unused_columns": ([False], "the collators read raw columns"),
    "label_names": ([None, ["labels"]], "the collators call them labels"),
    "train_sampling_strategy": (
        ["random", "sequential", "group_by_length", "batch_rebalance"],
        "Trainer would treat it as 'random'",
    ),
    "hub_strategy": (["end", "every_save"], "only the model is committed, never the training state"),
    "optim_target_modules": ([None], "optimizers that choose modules ignore learning_rates"),
    "parallelism_config": ([None], "splitting a prompt would separate it from its knowledge; DDP and FSDP work"),
    "use_liger_kernel": ([False], "its kernels are for the LLM: apply them to model.language_model"),
    "use_cache": ([False], "training reads no cache"),
}
# The same for pre-training only, whose objectives have their own losses and make no predictions.
UNUSABLE_IN_PRETRAINING = {
    "compute_loss_func": ([None], "each objective has its own loss; weight them by config.loss_weights"),
    "compute_metrics": ([None], "pre-training makes no predictions; evaluate() gives each objective's loss"),
    "preprocess_logits_for_metrics": ([None], "pre-training makes no predictions"),
    "include_for_metrics": ([[]], "pre-training makes no predictions"),
    "batch_eval_metrics": ([False], "pre-training makes no predictions"),
    "include_num_input_tokens_seen": (["no"], "the objectives read several inputs; tokens_per_s is logged"),
    "average_tokens_across_devices": ([True], "the objectives are means over the batches of all processes"),
}
# The same for learning from preferences.
UNUSABLE_IN_PREFERENCES = {
    "label_smoothing_factor": ([0.0], "a preference is no label"),
    "compute_loss_func": ([None], "the loss is that of pairs; weight its parts by beta, rpo_alpha and reply_weight"),
    "compute_metrics": ([None], "pairs are no predictions; evaluate() gives losses and rewards"),
    "preprocess_logits_for_metrics": ([None], "pairs are no predictions"),
    "include_for_metrics": ([[]], "pairs are no predictions"),
    "batch_eval_metrics": ([False], "pairs are no predictions"),
    "average_tokens_across_devices": ([True], "the losses are means over the batches of all processes"),
}
GROUPED = ("group_by_length", "batch_rebalance")  # the sampling strategies that need to know lengths


def refuse_unusable(settings: dict[str, Any], unusable: dict[str, tuple[list, str]]) -> None:
    """Raises a ValueError, with the reason, for a setting outside its usable values; see `UNUSABLE`."""
    for name, (usable, reason) in unusable.items():
        if name in settings and settings[name] not in usable:
            expected = " or ".join(map(repr, usable))
            raise ValueError(f"{name}={settings[name]!r} cannot be used here: {reason}. Expected {expected}.")


def canonical_name(name: str) -> str:
    """A parameter's name in the VIKDF model, without the prefixes of DDP and PEFT."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


@dataclass
class VikdfTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with learning rates by parameter name, and defaults for VIKDF models.

    Args:
        learning_rates: prefix of parameter names -> learning rate, e.g. `{"knowledge_gate": 5e-3}`; all other
            parameters have `learning_rate`. The longest matching prefix counts; rate 0 freezes parameters.

    Raises:
        ImportError: if a tracker in `report_to` is not installed.
        ValueError: if a setting cannot be used with VIKDF models, see `UNUSABLE`.
    """

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Prefix of parameter names -> learning rate, as JSON."}
    )
    # without an accelerator pinned memory only causes a warning
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    # without an accelerator the Trainer refuses bf16 unless use_cpu is set
    use_cpu: bool = field(default_factory=lambda: not torch.accelerator.is_available())
    # the collators read raw columns
    remove_unused_columns: bool | None = False
    # every step reaches every parameter that `freeze_unused` leaves, so DDP need not look
    ddp_find_unused_parameters: bool | None = False
    # every process reads its own share of the stream
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})

    def __post_init__(self):
        if isinstance(self.learning_rates, str):
            self.learning_rates = json.loads(self.learning_rates)
        # YAML reads 1e-4, without a decimal point, as a string
        self.learning_rates = {prefix: float(rate) for prefix, rate in (self.learning_rates or {}).items()}
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, str) and setting.type in (float, float | None, "float"):
                try:
                    setattr(self, setting.name, float(value))
                except ValueError as error:
                    raise ValueError(f"{setting.name} must be a number, got {value!r}.") from error
            if setting.name.endswith("_strategy") and value is False:
                setattr(self, setting.name, "no")  # which YAML reads as false
        super().__post_init__()
        refuse_unusable(vars(self), UNUSABLE)
        get_reporting_integration_callbacks(self.report_to)  # raises for an unknown tracker
        # transformers does not always list these two where they are installed
        missing = sorted({*self.report_to} - {*get_available_reporting_integrations(), "azure_ml", "flyte"})
        if missing:
            raise ImportError(
                f"report_to={missing} is not installed. Install it (pip install 'modeling_vikdf[track]' has trackio), "
                "or set report_to to 'none'."
            )

    def rate_of(self, name: str) -> float:
        """The learning rate of the parameter `name`, by its longest prefix in `learning_rates`."""
        name = canonical_name(name)
        prefix = max((prefix for prefix in self.learning_rates if name.startswith(prefix)), key=len, default=None)
        return self.learning_rate if prefix is None else self.learning_rates[prefix]


@dataclass
class PreferenceTrainingArguments(VikdfTrainingArguments):
    """
    `VikdfTrainingArguments` with what direct preference optimisation adds, by TRL's names.

    Args:
        beta: how much a pair's margin counts, in 1/nats: the larger, the nearer to the LLM alone the model stays.
        rpo_alpha: weight of the chosen replies' negative log-likelihood.
        reply_weight: weight of that of the replies of dialogues without a rejected one.

    Raises:
        ValueError: also for a beta that is not above 0, or a weight below 0.
    """

    beta: float = field(default=0.1, metadata={"help": "How much a pair's margin counts."})
    rpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the chosen replies' likelihood."})
    reply_weight: float = field(default=1.0, metadata={"help": "Weight of ordinary dialogues' likelihood."})

    def __post_init__(self):
        super().__post_init__()
        refuse_unusable(vars(self), UNUSABLE_IN_PREFERENCES)
        for name in ("beta", "rpo_alpha", "reply_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf or name == "beta" and not value:
                raise ValueError(f"{name} must be {'above 0' if name == 'beta' else '0 or more'}, got {value!r}.")


__all__ = ["PreferenceTrainingArguments", "VikdfTrainingArguments"]
