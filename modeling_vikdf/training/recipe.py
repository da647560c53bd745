"""Recipes: the sections and settings that each stage knows, their types, and what does not fit together.

Knows nothing of what settings do, nor their defaults: `run_stage` (stages.py) hands them on. The section `training` is
`VikdfTrainingArguments` or a subclass, which checks its values itself.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_args

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from ..configuration_vikdf import OBJECTIVES
from ..modeling_distillation import OBJECTIVE_TABLE
from .arguments import PreferenceTrainingArguments, VikdfTrainingArguments


STAGES = ("distill", "integrate", "tune", "prefer")

# What Trainer leaves to scripts: `run_stage` has its own ways.
FOR_SCRIPTS = {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}


class Section:
    """Settings of a recipe; what it does not set is `None`."""

    def given(self, section_class: "type[Section] | None" = None) -> dict[str, Any]:
        """The settings that the recipe sets; of a class that this one inherits from, if it is named."""
        names = [setting.name for setting in dataclasses.fields(section_class or self)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}


# What may stand beside a checkpoint: another LLM, and where the way into it starts.
SWAP = {"language_model", "base_text", "initial_gate"}


# ---- sections ----


@strict
@dataclass(kw_only=True)
class ModelSection(Section):
    """A trained model (`checkpoint`), also with another LLM (`swap_language_model`), or what `new_model` takes."""

    checkpoint: str | os.PathLike | None = None
    language_model: str | None = None
    context_encoder: str | None = None
    vision_encoder: str | None = None
    # of the processor
    image_size: int | None = None
    system_prompt: str | None = None
    knowledge_message: str | None = None
    knowledge_placement: str | None = None
    # of `from_backbones`
    revisions: dict | None = None
    iqformer_config: dict | None = None
    bert: str | None = None
    base_text: str | None = None
    initial_gate: float | None = None
    dtype: str | torch.dtype | None = None
    # of `VikdfConfig`
    num_knowledge_tokens: int | None = None
    knowledge_pooling: Literal["first", "mean", "each"] | None = None
    matching_dim: int | None = None
    project_inputs: bool | None = None
    condition_queries: bool | None = None
    state_dropout: float | None = None
    vision_post_layernorm: bool | None = None
    detach_knowledge_target: bool | None = None
    initializer_range: float | None = None

    def __post_init__(self):
        given = self.given()
        ignored = set(given) - {"checkpoint"} - (SWAP if "language_model" in given else set())
        if "checkpoint" in given and ignored:
            raise ValueError(
                f"The model comes from model.checkpoint, so {sorted(ignored)} would be ignored: leave them out, or "
                "leave out the checkpoint to begin with a new model. What may stand beside a checkpoint is another "
                "language_model, with its base_text and initial_gate."
            )
        if "checkpoint" not in given and not {"language_model", "context_encoder"} <= set(given):
            raise ValueError("The section 'model' needs a checkpoint, or language_model and context_encoder.")


def objectives_section(*, dialogues: bool) -> type[Section]:
    """The section of weights, one for each objective of the table; those of dialogues only where there are some."""
    names = [name for name, objective in OBJECTIVE_TABLE.items() if dialogues or "dialogues" not in objective.needs]
    return strict(make_dataclass("Objectives", [(name, float | None, None) for name in names], bases=(Section,)))


@strict
@dataclass(kw_only=True)
class DialogueData(Section):
    """Text dialogues; `sources` are the names that a card has for the data."""

    train: Any = None
    validation: Any = None
    sources: str | list | None = None

    def __post_init__(self):
        if not self.train:
            raise ValueError("The recipe names no training data: set data.train.")


@strict
@dataclass(kw_only=True)
class PairData(DialogueData):
    """Image-text pairs, streamed, or from a cache of the frozen encoders' states."""

    probabilities: list | None = None
    seed: int | None = None
    shuffle_buffer: int | None = None
    feature_cache: str | os.PathLike | None = None
    pool_grid: int | None = None

    def __post_init__(self):
        super().__post_init__()
        _refuse_idle(self, {"probabilities", "shuffle_buffer"})


@strict
@dataclass(kw_only=True)
class JointData(DialogueData):
    """Dialogues, and captioned pictures beside them."""

    pairs: Any = None
    pairs_validation: Any = None
    feature_cache: str | os.PathLike | None = None
    pool_grid: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.validation and not self.pairs_validation:
            raise ValueError("data.validation is set, so the evaluation needs pictures too: data.pairs_validation.")
        _refuse_idle(self, set())


def _refuse_idle(data: PairData | JointData, streaming: set[str]) -> None:
    """Refuses settings of a stream where there is a cache, and those of a cache where there is none."""
    if idle := sorted((streaming if data.feature_cache else {"pool_grid"}) & set(data.given())):
        raise ValueError(
            f"{idle} {'do' if len(idle) > 1 else 'does'} nothing {'with' if data.feature_cache else 'without'} "
            "data.feature_cache: leave it out."
        )


@strict
@dataclass(kw_only=True)
class PreferenceData(DialogueData):
    """Pairs of replies, among which ordinary dialogues may be; and `dialogues`, one of which goes with each pair."""

    dialogues: Any = None


@strict
@dataclass(kw_only=True)
class PairCollation(Section):
    """Of `PreTrainingCollator`."""

    masked_share: float | None = None
    image_knowledge_share: float | None = None
    other_caption: bool | None = None


@strict
@dataclass(kw_only=True)
class PreferenceCollation(Section):
    """Of `PreferenceCollator`."""

    max_length: int | None = None


@strict
@dataclass(kw_only=True)
class DialogueCollation(PreferenceCollation):
    """Of `DialogueCollator`."""

    earlier_replies: bool | None = None
    hide_context: float | None = None


@strict
@dataclass(kw_only=True)
class JointCollation(DialogueCollation, PairCollation):
    """Of both collators."""


# ---- recipes ----


@strict
@dataclass(kw_only=True)
class Recipe:
    """A recipe of the stages "distill" and "integrate", on image-text pairs."""

    model: ModelSection
    objectives: Section  # see `objectives_section`
    data: PairData
    collator: PairCollation
    training: dict = field(default_factory=dict)


@strict
@dataclass(kw_only=True)
class DialogueRecipe(Recipe):
    """A recipe of the stage "tune" on dialogues alone."""

    data: DialogueData
    collator: DialogueCollation


@strict
@dataclass(kw_only=True)
class JointRecipe(Recipe):
    """A recipe of the stage "tune" on dialogues and captioned pictures beside them."""

    data: JointData
    collator: JointCollation


@strict
@dataclass(kw_only=True)
class PreferenceRecipe(Recipe):
    """A recipe of the stage "prefer", on pairs of replies."""

    data: PreferenceData
    collator: PreferenceCollation

    def __post_init__(self):
        if given := sorted(self.objectives.given()):
            raise ValueError(
                f"objectives {given} would be ignored: 'prefer' learns from replies alone, which beta, rpo_alpha and "
                "reply_weight of the section 'training' weight. Leave them out."
            )


SECTIONS = tuple(section.name for section in dataclasses.fields(Recipe))


def check_recipe(stage: str, recipe: dict[str, Any]) -> Recipe:
    """
    The recipe with all its sections; each setting has its type.

    Raises:
        ValueError: for an unknown stage, section or key, a missing one, a wrong type, or settings that do not fit
            together.
    """
    if stage not in STAGES:
        raise ValueError(f"Unknown stage {stage!r}; expected one of {list(STAGES)}.")
    for section, settings in recipe.items():
        if section in SECTIONS and not isinstance(settings or {}, dict):
            raise ValueError(f"The section {section!r} must hold settings (key: value), not {settings!r}.")
    recipe_class = _choose_class(stage, recipe)
    classes = {section.name: section.type for section in dataclasses.fields(recipe_class)}
    classes["objectives"] = objectives_section(dialogues=recipe_class is JointRecipe)
    if unknown := [section for section in recipe if section not in classes]:
        raise ValueError(
            f"Unknown section {unknown[0]!r} in the recipe{suggest(unknown[:1], classes)}; {stage!r} knows the "
            f"sections {list(classes)}."
        )
    for section, settings in recipe.items():
        _refuse_unknown_keys(stage, section, settings or {}, classes[section])
    return recipe_class(**{name: _read_section(name, classes[name], recipe.get(name) or {}) for name in classes})


def default_objectives(stage: str) -> dict[str, float]:
    """The weights in recipes of a stage that name no objectives."""
    return {name: OBJECTIVES[name] for name, objective in OBJECTIVE_TABLE.items() if objective.stage == stage}


def arguments_class(stage: str) -> type[VikdfTrainingArguments]:
    """What the section `training` of a stage's recipes holds."""
    return PreferenceTrainingArguments if stage == "prefer" else VikdfTrainingArguments


def _choose_class(stage: str, recipe: dict[str, Any]) -> type[Recipe]:
    """The class of a stage's recipe; in tuning it depends on whether there are captioned pictures."""
    if stage != "tune":
        return PreferenceRecipe if stage == "prefer" else Recipe
    objectives = [weight for weight in (recipe.get("objectives") or {}).values() if weight is not None]
    pairs = (recipe.get("data") or {}).get("pairs")
    if bool(objectives) != bool(pairs):
        raise ValueError(
            "To learn from captioned pictures beside the dialogues name both what is to be learnt (the section "
            "'objectives') and the pictures (data.pairs); without them name neither."
        )
    return JointRecipe if objectives else DialogueRecipe


def _refuse_unknown_keys(stage: str, section: str, settings: dict[str, Any], section_class: type) -> None:
    settings_class = arguments_class(stage) if section == "training" else section_class
    known = {setting.name for setting in dataclasses.fields(settings_class) if setting.init} - FOR_SCRIPTS
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"Unknown keys {unknown} in section {section!r}{suggest(unknown, known)}; {stage!r} knows the keys "
            f"{sorted(known)}."
        )


def _read_section(section: str, section_class: type, settings: dict[str, Any]) -> Any:
    """The settings of a section as its class; those of the training as they are."""
    if section == "training":
        return dict(settings)
    types = {setting.name: setting.type for setting in dataclasses.fields(section_class)}
    numbers = {key: _to_float(value) for key, value in settings.items() if float in get_args(types[key])}
    try:
        return section_class(**settings | numbers)
    except StrictDataclassFieldValidationError as error:
        key = next(key for key in settings if f"field {key!r}:" in str(error))
        raise ValueError(f"{section}.{key} must be {_describe_type(types[key])}, not {settings[key]!r}.") from error


def _to_float(value: Any) -> Any:
    """A number as a float; other values as they are. YAML reads 1e-4, without a decimal point, as a string."""
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _describe_type(hint: Any) -> str:
    """What an error says that a value must be, e.g. "int" or "'first' or 'mean'"."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    names = [repr(value) for kind in kinds for value in get_args(kind)] or [kind.__name__ for kind in kinds]
    return " or ".join(names)


def suggest(words: list[str], known: Iterable[str]) -> str:
    """The part of a message that says what mistyped words may have meant."""
    nearest = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.7) for word in words}
    return "".join(f"; for {word!r}, did you mean {near[0]!r}?" for word, near in nearest.items() if near)


__all__ = ["SECTIONS", "STAGES", "Recipe", "arguments_class", "check_recipe", "default_objectives"]
