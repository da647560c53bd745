"""Training: recipes, stages, and what transformers' Trainer needs for these models."""

from .trainer import VikdfTrainer, VikdfTrainingArguments, freeze_unused, run_stage


__all__ = ["VikdfTrainer", "VikdfTrainingArguments", "freeze_unused", "run_stage"]
