"""Training: recipes, stages, and what transformers' Trainer needs for these models.

Imports lazily, because `shrinking` needs no library of the extra `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .stages import run_stage
    from .trainer import VikdfTrainer, VikdfTrainingArguments, freeze_unused

__all__ = ["VikdfTrainer", "VikdfTrainingArguments", "freeze_unused", "run_stage"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".stages" if name == "run_stage" else ".trainer", __name__), name)
