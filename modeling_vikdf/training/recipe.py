"""Recipes: which sections and keys each stage knows, and what does not fit together.

Knows the names of settings and nothing of what they do: `run_stage` (stages.py) acts on recipes checked here.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from ..backbones import new_model
from ..configuration_vikdf import OBJECTIVES, VikdfConfig
from ..modeling_vikdf import VikdfForConditionalGeneration
from .arguments import VikdfTrainingArguments


# What Trainer leaves to scripts: `run_stage` has its own ways.
FOR_SCRIPTS = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}

# The keys of a recipe (a YAML file) and of its sections.
SECTIONS = {
    "model": {
        "checkpoint",
        *inspect.signature(new_model).parameters,
        *inspect.signature(VikdfForConditionalGeneration.from_backbones).parameters,
        *VikdfConfig.__annotations__,
    }
    - {"model_class", "model_settings", "config_kwargs", "processor", "loss_weights", "cls"},
    "objectives": set(OBJECTIVES) - {"reply"},
    "data": {
        "train",
        "validation",
        "sources",
        "probabilities",
        "seed",
        "shuffle_buffer",
        "feature_cache",
        "pool_grid",
    },
    "collator": {"masked_share", "image_knowledge_share", "other_caption", "caption_as_picture"},
    "training": {each.name for each in dataclasses.fields(VikdfTrainingArguments) if each.init} - FOR_SCRIPTS,
}
# Of the stage "tune", on dialogues alone and with captioned pictures beside them.
TUNE_SECTIONS = SECTIONS | {
    "data": {"train", "validation", "sources"},
    "collator": {"max_length", "earlier_replies", "hide_context", "posterior_share"},
}
JOINT_SECTIONS = SECTIONS | {
    "objectives": set(OBJECTIVES),
    "data": TUNE_SECTIONS["data"] | {"pairs", "pairs_validation", "feature_cache", "pool_grid"},
    "collator": TUNE_SECTIONS["collator"] | SECTIONS["collator"],
}

STAGE_OBJECTIVES = {
    "distill": {name: OBJECTIVES[name] for name in ("text_image_matching", "masked_image", "masked_text")},
    "integrate": {name: OBJECTIVES[name] for name in ("knowledge_to_text", "text_to_knowledge")},
    "tune": {},
}


def check_recipe(stage: str, recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe with all its sections, empty where it has none."""
    if stage not in STAGE_OBJECTIVES:
        raise ValueError(f"Unknown stage {stage!r}; expected one of {list(STAGE_OBJECTIVES)}.")
    sections = SECTIONS
    if stage == "tune":
        data = recipe.get("data") or {}
        sections = JOINT_SECTIONS if recipe.get("objectives") else TUNE_SECTIONS
        if bool(recipe.get("objectives")) != bool(data.get("pairs")):
            raise ValueError(
                "To learn from captioned pictures beside the dialogues name both what is to be learnt (the section "
                "'objectives') and the pictures (data.pairs); without them name neither."
            )
        if data.get("pairs") and data.get("validation") and not data.get("pairs_validation"):
            raise ValueError("data.validation is set, so the evaluation needs pictures too: data.pairs_validation.")
    for section, settings in recipe.items():
        if section not in sections:
            raise ValueError(
                f"Unknown section {section!r} in the recipe{_suggest([section], sections)}; {stage!r} knows the "
                f"sections {list(sections)}."
            )
        if not isinstance(settings or {}, dict):
            raise ValueError(f"The section {section!r} must hold settings (key: value), not {settings!r}.")
        unknown = sorted(set(settings or ()) - sections[section])
        if unknown:
            raise ValueError(
                f"Unknown keys {unknown} in section {section!r}{_suggest(unknown, sections[section])}; {stage!r} "
                f"knows the keys {sorted(sections[section])}."
            )
    recipe = {section: recipe.get(section) or {} for section in SECTIONS}
    model, data = recipe["model"], recipe["data"]
    if "checkpoint" in model and len(model) > 1:
        raise ValueError(
            f"The model comes from model.checkpoint, so {sorted(set(model) - {'checkpoint'})} would be ignored: "
            "leave them out, or leave out the checkpoint to begin with a new model."
        )
    if "checkpoint" not in model and not {"language_model", "context_encoder"} <= set(model):
        raise ValueError("The section 'model' needs a checkpoint, or language_model and context_encoder.")
    if not data.get("train"):
        raise ValueError("The recipe names no training data: set data.train.")
    cached = {"probabilities", "shuffle_buffer"} if data.get("feature_cache") else {"pool_grid"}
    if cached & set(data):
        raise ValueError(
            f"{sorted(cached & set(data))} {'do' if len(cached & set(data)) > 1 else 'does'} nothing "
            f"{'with' if data.get('feature_cache') else 'without'} data.feature_cache: leave it out."
        )
    return recipe


def _suggest(words: list[str], known: Iterable[str]) -> str:
    """How a message goes on that names what mistyped words are nearest to."""
    nearest = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word in words}
    return "".join(f"; for {word!r}, did you mean {near[0]!r}?" for word, near in nearest.items() if near)


__all__ = ["SECTIONS", "STAGE_OBJECTIVES", "check_recipe"]
