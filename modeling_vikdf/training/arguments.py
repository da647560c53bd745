"""Settings of a training: those of `TrainingArguments`, learning rates by parameter name, and what is refused and why.

Knows nothing of models and data: `VikdfTrainer` checks what depends on them.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks


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


def refuse_unusable(settings: dict[str, Any], unusable: dict[str, tuple[list, str]]) -> None:
    """Raises a ValueError for a setting that has none of its usable values, with the reason; see `UNUSABLE`."""
    for name, (usable, reason) in unusable.items():
        if name in settings and settings[name] not in usable:
            expected = " or ".join(map(repr, usable))
            raise ValueError(f"{name}={settings[name]!r} cannot be used here: {reason}. Expected {expected}.")


def canonical_name(name: str) -> str:
    """A parameter's name in the model itself, without the prefixes of DDP and PEFT."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


@dataclass
class VikdfTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with one addition and defaults that fit.

    Args:
        learning_rates: prefix of parameter names -> their learning rate, e.g. `{"knowledge_gate": 5e-3}`; all other
            parameters have `learning_rate`. The longest matching prefix counts; parameters with rate 0 are frozen.
    """

    learning_rates: dict[str, float] | None = field(
        default=None, metadata={"help": "Prefix of parameter names -> learning rate, as JSON."}
    )
    # pinned memory is for an accelerator; without one the Trainer's default only warns
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    # without an accelerator the Trainer refuses bf16 unless it is told that the CPU is meant
    use_cpu: bool = field(default_factory=lambda: not torch.accelerator.is_available())
    # the collators read raw columns
    remove_unused_columns: bool | None = False
    # every step reaches every parameter that `freeze_unused` leaves, so DDP need not look
    ddp_find_unused_parameters: bool | None = False
    # every process reads the stream and takes its own share of it
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})

    def __post_init__(self):
        if isinstance(self.learning_rates, str):
            self.learning_rates = json.loads(self.learning_rates)
        # YAML reads 1e-4, without a decimal point, as a string
        self.learning_rates = {prefix: float(rate) for prefix, rate in (self.learning_rates or {}).items()}
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if isinstance(value, str) and setting.type in (float, float | None, "float"):
                setattr(self, setting.name, float(value))
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
        """The learning rate of a parameter."""
        name = canonical_name(name)
        prefix = max((prefix for prefix in self.learning_rates if name.startswith(prefix)), key=len, default=None)
        return self.learning_rate if prefix is None else self.learning_rates[prefix]


__all__ = ["VikdfTrainingArguments"]
