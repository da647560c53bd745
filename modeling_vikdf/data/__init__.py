"""What models learn from: files -> pairs and dialogues -> cached states of the frozen encoders -> batches."""

from .collators import DialogueCollator, JointCollator, PreTrainingCollator, align_at_knowledge
from .features import FeatureDataset, cache_features
from .sources import SkipReport, load_dialogues, load_image_text_pairs


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
