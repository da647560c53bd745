"""Training: recipes, stages, and what transformers' Trainer needs for these models."""

from .stages import run_stage
from .trainer import VikdfTrainer, VikdfTrainingArguments, freeze_unused


__all__ = ["VikdfTrainer", "VikdfTrainingArguments", "freeze_unused", "run_stage"]
