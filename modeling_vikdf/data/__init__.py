"""Training data: files -> pairs and dialogues -> cached states of the frozen encoders -> batches."""

from .collators import DialogueCollator, JointCollator, PreTrainingCollator, align_at_knowledge
from .dialogues import load_dialogues
from .features import FeatureDataset, cache_features
from .pairs import load_image_text_pairs
from .sources import SkipReport


__all__ = [
    "DialogueCollator",
    "FeatureDataset",
    "JointCollator",
    "PreTrainingCollator",
    "SkipReport",
    "align_at_knowledge",
    "cache_features",
    "load_dialogues",
    "load_image_text_pairs",
]
