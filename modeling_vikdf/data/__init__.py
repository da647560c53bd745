"""Training data: files -> pairs and dialogues -> cached states of the frozen encoders -> batches."""

from .collators import DialogueCollator, JointCollator, PreTrainingCollator, align_at_knowledge
from .dialogues import load_dialogues, load_preferences
from .features import FeatureDataset, cache_features
from .pairs import load_image_text_pairs
from .preferences import PreferenceCollator
from .sources import SkipReport


__all__ = [
    "DialogueCollator",
    "FeatureDataset",
    "JointCollator",
    "PreferenceCollator",
    "PreTrainingCollator",
    "SkipReport",
    "align_at_knowledge",
    "cache_features",
    "load_dialogues",
    "load_image_text_pairs",
    "load_preferences",
]
