"""The table of objectives: whole, and enough for an objective from outside the package to be computed and trained."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import build_from
from tiny_training import ALL, logged_losses, make_trainer, model_config, pairs, pretraining_model, processor
from torch import nn

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfForPreTraining
from modeling_vikdf.configuration_vikdf import OBJECTIVES
from modeling_vikdf.data.collators import PreTrainingCollator
from modeling_vikdf.modeling_distillation import OBJECTIVE_TABLE, Objective, active_objectives, add_objective
from modeling_vikdf.modeling_objectives import SHARED, SOURCES
from modeling_vikdf.training.recipe import check_recipe, default_objectives
from modeling_vikdf.training.trainer import freeze_unused


@pytest.fixture(autouse=True)
def nothing_remains():
    """What a test adds is gone after it."""
    tables = [(table, dict(table)) for table in (OBJECTIVES, OBJECTIVE_TABLE)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def size_of_knowledge(model: nn.Module, batch: SimpleNamespace, count: torch.Tensor | float | None) -> torch.Tensor:
    """Mean square of the first component of K^T; text by text, whatever else is in the batch."""
    rows = batch.text_knowledge[..., 0].square().mean(1)  # [B]
    return rows.sum() / (len(rows) if count is None else count)


def add_size(**settings) -> str:
    add_objective("size", Objective(**{"loss": size_of_knowledge, "needs": ("text_knowledge",), **settings}))
    return "size"


def batch_of(model, **settings) -> dict[str, torch.Tensor]:
    return PreTrainingCollator(processor(), model.config, **settings)(pairs(4))


# ---- the package's own entries ----


def test_every_weight_has_an_entry():
    assert OBJECTIVE_TABLE.keys() == OBJECTIVES.keys()


def test_entries_ask_for_what_the_model_has():
    inputs = inspect.signature(VikdfForPreTraining.forward).parameters
    names = {name for name, _ in pretraining_model(ALL).named_parameters()} | {"matching_head.projection"}
    for name, objective in OBJECTIVE_TABLE.items():
        assert objective.inputs <= set(inputs) and set(objective.needs) <= {*inputs, *SOURCES}, name
        for prefix in objective.trains:
            assert any(parameter.startswith(prefix) for parameter in names), prefix


# ---- an objective from outside the package ----


def test_it_is_computed_and_weighed():
    name = add_size()
    model = pretraining_model({name: 0.5, "masked_text": 1.0})
    output = model(**batch_of(model))
    assert output.losses[name].item() == pytest.approx(output.text_knowledge[..., 0].square().mean().item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(0.5 * output.losses[name].item() + output.losses["masked_text"].item())


def test_it_is_counted_and_logged(tmp_path):
    """Captions in parts weigh as in one batch, because each part is divided by the whole batch's count of tokens."""

    def of_tokens(model, batch, count):
        rows, tokens = batch.text_knowledge[..., 0].square().mean(1), batch.context_attention_mask.sum(1)  # [B]
        return (rows * tokens).sum() / (tokens.sum() if count is None else count)

    name = add_size(loss=of_tokens, count=lambda inputs, config: inputs["context_attention_mask"].sum())
    logged = []
    for parts in (1, 2, 4):
        settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        evaluation = {"evaluation": pairs(6), "per_device_eval_batch_size": 8 // parts}
        trainer = make_trainer(tmp_path, {name: 1.0}, max_steps=1, learning_rate=1e-12, **settings, **evaluation)
        trainer.train()
        logged.append(logged_losses(trainer)[0][f"loss_{name}"])
        logged.append(trainer.evaluate()[f"eval_loss_{name}"])
    assert logged[2::2] == pytest.approx([logged[0]] * 2, rel=1e-5) and logged[0] > 0
    assert logged[3::2] == pytest.approx([logged[1]] * 2, rel=1e-5) and logged[1] > 0


def test_it_is_contrasted_with_the_whole_batch(tmp_path):
    """Of embeddings that are compared each part of a batch gets those of the others."""

    def spread(model, batch, count):
        text = batch.text_embeddings
        everyone = text if batch.other_text is None else torch.cat([text, batch.other_text])
        return (text @ everyone.T).exp().mean(1).sum() / (len(text) if count is None else count)

    name = add_size(loss=spread, needs=("text_embeddings",), trains=("matching_head",))
    losses = []
    for parts in (1, 4):
        settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        trainer = make_trainer(tmp_path, {name: 1.0}, max_steps=1, **settings)
        trainer.train()
        losses.append(logged_losses(trainer)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("part", SHARED)
def test_what_it_trains_is_trained_and_nothing_else(part):
    name = add_size(trains=(part,))
    for weights, trained in (({name: 1.0}, {part}), ({"masked_text": 1.0}, set())):
        model = pretraining_model(weights)
        freeze_unused(model)
        shared = {key: p.requires_grad for key, p in model.named_parameters() if key.startswith(SHARED)}
        assert {key.partition(".")[0] for key, requires_grad in shared.items() if requires_grad} == trained
        assert all(parameter.requires_grad for parameter in model.iqformer.parameters())


def test_frozen_parts_cannot_be_trained():
    with pytest.raises(ValueError, match="language_model.*expected.*language_projection"):
        add_size(trains=("language_model",))


def test_a_missing_input_is_named_and_its_own_inputs_are_handed_on():
    name = add_size(loss=lambda model, batch, count: batch.saliency.sum(), needs=("saliency", "image_knowledge"))
    model = pretraining_model({name: 1.0})
    batch = batch_of(model)
    assert "pixel_values" in batch  # the collator read the table
    with pytest.raises(ValueError, match=f"'{name}'.*lacks saliency"):
        model(**batch)
    assert model(**batch, saliency=torch.ones(3)).loss == 3
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=f"'{name}'.*lacks pixel_values"):
        model(**batch, saliency=torch.ones(3))


@pytest.mark.parametrize("unknown", ["salience", "text_knowledge"])
def test_inputs_that_no_objective_needs_are_refused(unknown):
    model = pretraining_model(ALL)
    with pytest.raises(TypeError, match=f"'{unknown}'"):
        model(**batch_of(model), **{unknown: torch.ones(1)})


@pytest.mark.parametrize(
    ("needs", "inputs"),
    [
        ("partner_knowledge", {"partner_input_ids"}),
        ("draw_input_ids", {"draw_input_ids", "draw_position_ids"}),
        ("labels", {"input_ids", "labels"}),
        ("masked_cells", {"masked_cells", "hidden_cells"}),
        ("masked_labels", {"masked_input_ids", "masked_labels"}),
        ("pixel_values", {"pixel_values"}),
    ],
)
def test_the_collator_makes_what_it_needs(needs, inputs):
    name = add_size(needs=("pixel_values", needs))
    config = model_config(loss_weights={name: 1.0})
    collator = PreTrainingCollator(processor(), config)
    assert inputs <= collator(pairs(4)).keys() and collator.uses_pictures
    assert len(collator(pairs(4))["pixel_values"]) == 4


def test_its_heads_are_its_own(backbones, tmp_path, caplog):
    """Made where it has weight, kept in float32 and saved; left out, without a word, by a dialogue model."""
    name = add_size(heads=lambda config: {"size_predictor": nn.Linear(config.iqformer_config.hidden_size, 1)})
    model, _ = build_from(backbones, "llama", "separate", model_class=VikdfForPreTraining, loss_weights={name: 1.0})
    assert not hasattr(pretraining_model({"masked_text": 1.0}), "size_predictor")
    model.save_pretrained(tmp_path)
    again = VikdfForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.size_predictor.weight, model.size_predictor.weight)
    assert again.size_predictor.weight.dtype == torch.float32
    caplog.clear()
    _, report = VikdfForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and "size_predictor" not in caplog.text
    add_objective("other", Objective(loss=size_of_knowledge, needs=(), heads=OBJECTIVE_TABLE[name].heads))
    with pytest.raises(ValueError, match="size_predictor.* already"):
        pretraining_model({name: 1.0, "other": 1.0})


def test_labels_are_smoothed_where_it_says_that_it_predicts_tokens(tmp_path):
    name = add_size(loss=lambda model, batch, count: batch.smoothing + 0 * batch.text_knowledge.sum())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(tmp_path, {name: 1.0}, label_smoothing_factor=0.25)
    smooth = Objective(loss=OBJECTIVE_TABLE[name].loss, needs=("text_knowledge",), predicts_tokens=True)
    add_objective("smooth", smooth)
    trainer = make_trainer(tmp_path, {"smooth": 1.0}, label_smoothing_factor=0.25, max_steps=1)
    trainer.train()
    assert logged_losses(trainer)[0]["loss_smooth"] == 0.25


def test_recipes_take_its_name():
    recipe = {"model": {"checkpoint": "x"}, "data": {"train": "x"}, "objectives": {"size": 0.1}}
    with pytest.raises(ValueError, match=r"Unknown keys \['size'\] in section 'objectives'"):
        check_recipe("distill", recipe)
    add_objective("size", Objective(loss=size_of_knowledge, needs=("text_knowledge",), stage="distill"), weight=0.2)
    assert check_recipe("distill", recipe).objectives.given() == {"size": 0.1}
    assert default_objectives("distill")["size"] == 0.2 and "size" not in default_objectives("integrate")
    assert VikdfConfig(**model_config().to_dict() | {"loss_weights": None}).loss_weights["size"] == 0.2


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'reply' already"):
        add_objective("reply", OBJECTIVE_TABLE["reply"])


def test_a_weight_without_an_entry_is_refused():
    OBJECTIVES["nothing"] = 0.0
    assert active_objectives(model_config(loss_weights={"masked_text": 1.0})).keys() == {"masked_text"}
    with pytest.raises(ValueError, match=r"\['nothing'\] a weight, but no entry"):
        pretraining_model({"nothing": 1.0})
