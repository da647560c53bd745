"""Training: recipes, stages, and what transformers' Trainer needs for these models.

Imports lazily, because `shrinking` needs no library of the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .arguments import PreferenceTrainingArguments, VikdfTrainingArguments
    from .preferences import PreferenceTrainer
    from .stages import run_stage
    from .trainer import VikdfTrainer, freeze_unused

__all__ = [
    "PreferenceTrainer",
    "PreferenceTrainingArguments",
    "VikdfTrainer",
    "VikdfTrainingArguments",
    "freeze_unused",
    "run_stage",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = ".arguments" if name.endswith("Arguments") else ".trainer"
    module = {"PreferenceTrainer": ".preferences", "run_stage": ".stages"}.get(name, module)
    return getattr(importlib.import_module(module, __name__), name)
