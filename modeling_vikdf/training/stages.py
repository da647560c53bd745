"""Stages: what `vikdf distill`, `integrate`, `tune` and `prefer` run.

A recipe becomes a model, collators, data and a training.

Knows which parts a stage is put together from; which keys a recipe may have is in recipe.py, how training works in
trainer.py.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.utils import logging

from ..backbones import require_model
from ..building import half_precision_is_slow, new_model, swap_language_model, widen_slow_half_precision
from ..configuration_vikdf import OBJECTIVES
from ..data.collators import DialogueCollator, JointCollator, PreTrainingCollator
from ..data.dialogues import load_dialogues, load_preferences
from ..data.features import FeatureDataset, cache_features
from ..data.pairs import load_image_text_pairs
from ..data.preferences import PreferenceCollator
from ..data.sources import SkipReport
from ..modeling_distillation import VikdfForPreTraining, needs_of
from ..modeling_vikdf import VikdfForConditionalGeneration
from ..processing_vikdf import VikdfProcessor
from .arguments import VikdfTrainingArguments
from .preferences import PreferenceTrainer
from .recipe import (
    SECTIONS,
    DialogueCollation,
    PairCollation,
    Section,
    arguments_class,
    check_recipe,
    default_objectives,
)
from .trainer import VikdfTrainer


logger = logging.get_logger(__name__)

SPLITS = ("train", "validation")
Collators = Mapping[str, type[PreTrainingCollator] | type[DialogueCollator]]


def run_stage(stage: str, recipe: dict[str, Any], collators: Collators | None = None) -> dict[str, float]:
    """
    Runs one stage of training from a recipe, or resumes it where it was interrupted.

    Args:
        stage: "distill" (default objectives: the three on image-text pairs), "integrate" (the two of BVIF), "tune"
            (replies of text dialogues), or "prefer" (pairs of a chosen and a rejected reply). A recipe's `objectives`
            may name any subset of the five for the first two; for "tune" they are what is learnt from captioned
            pictures (`data.pairs`) beside the replies, whose own weight is 1 unless they name it; "prefer" has none.
        recipe: a mapping with the sections in `SECTIONS`; see configs/.
        collators: classes in place of `PreTrainingCollator` ("pairs") and `DialogueCollator`, or `PreferenceCollator`
            in "prefer" ("dialogues"), from which they inherit. `recipe.yaml` names them.

    Returns:
        The metrics of the last evaluation, empty without validation data. The model, its processor, the Trainer's
        state, `recipe.yaml` (the recipes of all stages up to this one) and `skipped.txt` (what was skipped of the
        data, and why) are in `training.output_dir`.

    Raises:
        ValueError: for an unknown stage, section or key, a missing one, a wrong type, settings that do not fit
            together, or a collator of data that the stage does not read.
    """
    checked = check_recipe(stage, recipe)
    loss_weights = _loss_weights(stage, checked.objectives.given())
    collator_classes = _choose_collators(stage, loss_weights, collators or {})
    # recipes ask for bf16 because it is fast, which it is not on every CPU
    slow = {"bf16": False} if half_precision_is_slow() else {}
    args = arguments_class(stage)(**checked.training | slow)
    set_seed(args.seed)  # of new weights; the Trainer seeds itself
    model, processor = _build_model(checked.model.given(), loss_weights, args)
    report = SkipReport(os.path.join(args.output_dir, "skipped"))
    pairs, dialogues = _build_collators(collator_classes, checked.collator, model, processor, args, report)
    with args.main_process_first(desc="reading the data"):
        train, validation, collator = _load_data(
            checked.data.given(), model, processor, pairs, dialogues, args, report
        )
    trainer_class = PreferenceTrainer if stage == "prefer" else VikdfTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    metrics = _last_evaluation(trainer) if validation is not None else {}
    if args.should_save:
        _write_records(stage, recipe, collators or {}, trainer, report)
    logger.info(report.summary())
    return metrics


def _loss_weights(stage: str, objectives: dict[str, Any]) -> dict[str, float] | None:
    """Every objective's weight, 0 for what is not learnt; `None` where text dialogues alone are."""
    objectives = objectives or default_objectives(stage)
    if stage == "tune" and objectives:  # dialogues, and captioned pictures beside them
        objectives = {"reply": 1.0, **objectives}
    return {name: float(objectives.get(name, 0.0)) for name in OBJECTIVES} if objectives else None


def _choose_collators(stage: str, loss_weights: dict[str, float] | None, collators: Collators) -> Collators:
    """The class of the collator of each kind of data that the stage reads."""
    classes = {"pairs": PreTrainingCollator} if loss_weights else {}
    if stage in ("tune", "prefer"):
        classes["dialogues"] = DialogueCollator if stage == "tune" else PreferenceCollator
    if unread := sorted(set(collators) - set(classes)):
        raise ValueError(
            f"There are collators of {unread}, but {stage!r} with this recipe reads {sorted(classes)} alone: leave "
            "them out."
        )
    return {**classes, **collators}


def _build_model(
    settings: dict[str, Any], loss_weights: dict[str, float] | None, args: VikdfTrainingArguments
) -> tuple[nn.Module, VikdfProcessor]:
    """The model of a checkpoint, perhaps around another LLM, or a new one; and its processor."""
    model_class = VikdfForPreTraining if loss_weights else VikdfForConditionalGeneration
    checkpoint = settings.get("checkpoint")
    if checkpoint is not None and "language_model" in settings:
        model, processor = swap_language_model(model_class=model_class, loss_weights=loss_weights, **settings)
    elif checkpoint is not None:
        require_model(checkpoint)
        processor = VikdfProcessor.from_pretrained(checkpoint)
        config = model_class.config_class.from_pretrained(checkpoint)
        config.loss_weights = loss_weights or config.loss_weights
        model = model_class.from_pretrained(checkpoint, config=config)
    else:
        model, processor = new_model(model_class=model_class, loss_weights=loss_weights, **settings)
    widen_slow_half_precision(model)
    if args.bf16 and args.device.type == "cpu":
        use_plain_attention(model)
    return model, processor


def _build_collators(
    classes: Collators,
    settings: Section,
    model: nn.Module,
    processor: VikdfProcessor,
    args: VikdfTrainingArguments,
    report: SkipReport,
) -> tuple[PreTrainingCollator | None, DialogueCollator | None]:
    """The collators of image-text pairs and of dialogues; `None` for what the stage does not read."""
    pairs = dialogues = None
    if "pairs" in classes:
        pairs = classes["pairs"](processor, model.config, seed=args.seed, **settings.given(PairCollation))
        if pairs.uses_pictures:
            model.attach_vision_encoder()  # now, to be placed and perhaps cut into shards with the rest
    if "dialogues" in classes:
        settings = settings.given(DialogueCollation if pairs else None)
        dialogues = classes["dialogues"](processor, seed=args.seed, report=report, **settings)
    return pairs, dialogues


def _load_data(
    data: dict[str, Any],
    model: nn.Module,
    processor: VikdfProcessor,
    pairs: PreTrainingCollator | None,
    dialogues: DialogueCollator | None,
    args: VikdfTrainingArguments,
    report: SkipReport,
) -> tuple[Any, Any, Any]:
    """The training data, the validation data (`None` without), and the collator of both."""
    if dialogues is None:
        return *(_load_pairs(model, processor, data, split, args, report) for split in SPLITS), pairs
    load = load_preferences if isinstance(dialogues, PreferenceCollator) else load_dialogues
    if data.get("dialogues"):
        dialogues.beside = load(data["dialogues"], report=report)
        if any(rejected is not None for rejected in dialogues.beside["rejected"]):
            raise ValueError("data.dialogues hold pairs, whose rejected replies would be ignored: use data.train.")
    # all in memory
    loaded = (load(data[split], report=report) if data.get(split) else None for split in SPLITS)
    if pairs is None:
        return *loaded, dialogues
    train, validation = loaded
    beside = data | {"train": data["pairs"], "validation": data.get("pairs_validation")}
    pictures = (_load_pairs(model, processor, beside, split, args, report) for split in SPLITS)
    return train, validation, JointCollator(dialogues, pairs, *pictures)


def _write_records(
    stage: str, recipe: dict[str, dict[str, Any]], collators: Collators, trainer: VikdfTrainer, report: SkipReport
) -> None:
    """Writes beside the model how it was trained: the recipes so far, the Trainer's state, and what was skipped."""
    from ..cards.facts import write_history

    folder = trainer.args.output_dir
    record = {section: recipe[section] for section in SECTIONS if recipe.get(section)}
    if collators:
        record["collators"] = {data: collator.__name__ for data, collator in collators.items()}
    write_history({"stage": stage, **record}, folder, recipe["model"].get("checkpoint"))
    trainer.state.save_to_json(os.path.join(folder, "trainer_state.json"))
    with open(os.path.join(folder, "skipped.txt"), "w", encoding="utf-8") as file:
        file.write(report.summary() + "\n")


def _last_evaluation(trainer: VikdfTrainer) -> dict[str, float]:
    """The metrics of the model's present weights: from the log, if training ended with an evaluation."""
    state, step = trainer.state, trainer.state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        step = state.best_global_step
    for entry in reversed(state.log_history):
        if entry["step"] == step and "eval_loss" in entry:
            return {key: value for key, value in entry.items() if key != "step"}
    return trainer.evaluate()


def _load_pairs(
    model: nn.Module,
    processor: VikdfProcessor,
    data: dict,
    split: str,
    args: VikdfTrainingArguments,
    report: SkipReport,
) -> Any:
    """Image-text pairs, streamed, or from a cache of the frozen encoders' states, built when it is not there."""
    if not data.get(split):
        return None
    settings = {"seed": data.get("seed", 0), "report": report}
    if data.get("feature_cache"):
        folder = os.path.join(data["feature_cache"], split)
        pairs = load_image_text_pairs(data[split], shuffle_buffer=0, decode=False, **settings)
        model.attach_vision_encoder()  # for the cache, also where no objective asks for pictures
        for part in (model.context_encoder, model.vision_encoder, model.iqformer):
            part.to(args.device)  # the Trainer moves the model later
        images = None
        if "pixel_values" in needs_of(model.config):  # masked pictures are encoded anew: their files stay in memory
            pairs = list(pairs)
            images = {pair["key"]: pair["image"] for pair in pairs}
        cache_features(model, processor, pairs, folder, pool_grid=data.get("pool_grid"), report=report)
        return FeatureDataset(folder, images)
    if split == "validation" or data.get("pairs"):  # read in any order
        return load_image_text_pairs(data[split], streaming=False, **settings)
    settings |= {key: data[key] for key in ("probabilities", "shuffle_buffer") if key in data}
    readers = args.world_size * max(args.dataloader_num_workers, 1)
    return load_image_text_pairs(data[split], num_shards=readers, **settings)


def use_plain_attention(model: nn.Module) -> None:
    """Avoids PyTorch's fused attention, whose backward pass in bfloat16 is slow on a CPU."""
    for part in (model.language_model, model.iqformer.qformer):
        part.set_attn_implementation("eager")


__all__ = ["run_stage", "use_plain_attention"]
