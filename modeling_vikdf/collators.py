"""Former module of the collators, kept for one release: import them from modeling_vikdf.data."""

from .data.collators import DialogueCollator, JointCollator, PreTrainingCollator, align_at_knowledge


__all__ = ["DialogueCollator", "JointCollator", "PreTrainingCollator", "align_at_knowledge"]
