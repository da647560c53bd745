"""The objectives: as functions, against numbers worked by hand; and wired up, with the gradients they should have."""

import inspect
import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from conftest import build_from
from PIL import Image
from tiny_models import tiny_config
from tiny_training import ALL, dialogue_model, dialogues, model_config, pairs, prepare, pretraining_model, processor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

import modeling_vikdf
from modeling_vikdf import VikdfForConditionalGeneration, VikdfForPreTraining
from modeling_vikdf.data.collators import DialogueCollator, PreTrainingCollator
from modeling_vikdf.modeling_distillation import (
    cells_to_pixels,
    masked_image_loss,
    masked_text_loss,
    matching_loss,
    text_to_knowledge_loss,
)
from modeling_vikdf.modeling_prefix import locate_columns, pays_apart, read_tokens
from modeling_vikdf.modeling_vikdf import reply_loss
from modeling_vikdf.training.trainer import freeze_unused


# ---- the loss functions ----


def test_matching_by_hand():
    """Two pairs, text 0 like picture 0 and half like picture 1, text 1 like picture 1 alone; inverse temperature 2."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    image = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    # logits: [[2, 1.2], [0, 1.6]]
    rows = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-1.6))) / 2
    columns = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-0.4))) / 2
    loss = matching_loss(text, image, torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx((rows + columns) / 2, abs=1e-6)


def matching_inputs(rows: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text, image = (F.normalize(torch.randn(rows, 5, generator=generator), dim=-1) for _ in range(2))
    return [text.requires_grad_(), image.requires_grad_(), torch.tensor(1.5, requires_grad=True)]


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 4, 2), (1,) * 7], ids=str)
def test_matching_in_parts(sizes):
    """Of parts of any sizes the values add up to the whole, and so do the gradients, the temperature's among them."""
    whole = matching_inputs()
    loss = matching_loss(*whole)
    loss.backward()
    parts, total = matching_inputs(), 0.0
    text, image, scale = parts
    for start, stop in zip([0, *torch.tensor(sizes).cumsum(0)], torch.tensor(sizes).cumsum(0), strict=False):
        others = [torch.cat([rows[:start], rows[stop:]]).detach() for rows in (text, image)]
        part = matching_loss(text[start:stop], image[start:stop], scale, *others, parts=len(sizes))
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for one, many in zip(whole, parts, strict=True):
        torch.testing.assert_close(many.grad, one.grad, rtol=1e-5, atol=1e-7)


def test_matching_keeps_its_precision_under_autocast():
    """With an inverse temperature of 100, half precision would round logits to the next half."""
    text, image, _ = matching_inputs(64)
    scale = torch.tensor(math.log(100.0))
    expected = matching_loss(text, image, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert matching_loss(text, image, scale).item() == pytest.approx(expected.item(), abs=1e-5)


def test_masked_image_by_hand():
    predicted, pixels = torch.zeros(1, 3, 2, 2), torch.arange(12.0).view(1, 3, 2, 2)
    mask = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    # scored are the values 0, 3 / 4, 7 / 8, 11 of the three channels
    assert masked_image_loss(predicted, pixels, mask).item() == pytest.approx(33 / 6)
    assert masked_image_loss(predicted, pixels, mask, count=8).item() == pytest.approx(33 / 24)


def test_masked_text_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    targets = torch.tensor([1, 2])
    assert masked_text_loss(logits, targets).item() == pytest.approx((math.log(4) - math.log(0.8)) / 2)
    assert masked_text_loss(logits, targets, count=10).item() == pytest.approx((math.log(4) - math.log(0.8)) / 10)


def test_text_to_knowledge_by_hand():
    predicted, knowledge = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    assert text_to_knowledge_loss(predicted, knowledge).item() == pytest.approx(14 / 4)
    assert text_to_knowledge_loss(predicted, knowledge, count=4).item() == pytest.approx(14 / 8)


def test_reply_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.2, 0.8]], [[0.9, 0.1], [0.5, 0.5]]]))
    targets = torch.tensor([[0, 1], [0, -100]])
    nats = -math.log(0.5) - math.log(0.8) - math.log(0.9)
    assert reply_loss(logits, targets).item() == pytest.approx(nats / 3)
    assert reply_loss(logits, targets, torch.tensor(5)).item() == pytest.approx(nats / 5)


def test_nothing_masked_is_zero_and_no_nan():
    pixels = torch.randn(2, 3, 4, 4, requires_grad=True)
    logits = torch.randn(0, 9, requires_grad=True)
    for loss, leaf in (
        (masked_image_loss(pixels, torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)), pixels),
        (masked_image_loss(pixels, torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), count=0), pixels),
        (masked_text_loss(logits, torch.zeros(0, dtype=torch.long)), logits),
    ):
        loss.backward()
        assert loss.item() == 0
        assert not leaf.grad.isnan().any() and not leaf.grad.any()
    logits = torch.randn(1, 2, 9, requires_grad=True)
    reply_loss(logits, torch.full((1, 2), -100)).backward()
    assert not logits.grad.any()


# ---- cells of a picture ----


def test_cells_to_pixels_of_whole_cells():
    cells = torch.tensor([[True, False, False, True]])
    quarter = torch.ones(3, 3)
    expected = torch.block_diag(quarter, quarter)[None]
    assert torch.equal(cells_to_pixels(cells, 6, 6), expected)


@pytest.mark.parametrize(("size", "patch", "seen"), [(30, 8, 24), (62, 14, 56), (33, 16, 32), (64, 8, 64)])
def test_cells_to_pixels_of_any_size(size, patch, seen):
    """Every pixel that the encoder sees belongs to one cell, and cells differ by a pixel a side at most."""
    cells = torch.eye(4, dtype=torch.bool)  # four pictures, each with one of the four cells
    pixels = cells_to_pixels(cells, size, size, patch)
    assert pixels.shape == (4, seen, seen)
    assert torch.equal(pixels.sum(0), torch.ones(seen, seen))
    whole = cells_to_pixels(cells, size, size)
    assert (whole.sum((1, 2)) >= (size // 2) ** 2).all() and (whole.sum((1, 2)) <= (size // 2 + 1) ** 2).all()


def test_cells_must_be_a_square():
    with pytest.raises(ValueError, match="square grid.*3 cells"):
        cells_to_pixels(torch.ones(1, 3), 8, 8)


# ---- the model ----


def batch_of(model, rows: int = 4, *, llm: str = "qwen", towers: str = "separate", size: int = 64, **settings):
    collator = PreTrainingCollator(processor(llm, towers, size), model.config, **settings)
    return collator(pairs(rows))


@pytest.mark.parametrize(
    ("towers", "size", "patch"),
    [("clip", 64, 8), ("siglip", 64, 16), ("separate", 64, 8), ("siglip", 62, 14), ("separate", 62, 14)],
)
def test_masked_image_modelling_with_any_encoder(towers, size, patch):
    """CLIP and DINOv2 put a class state first, SigLIP does not; pictures need not be whole numbers of patches."""
    model = pretraining_model({"masked_image": 1.0}, towers=towers, size=size, patch=patch)
    seen = size // patch * patch
    batch = {
        "context_input_ids": torch.tensor([[1, 20, 2]]),
        "context_attention_mask": torch.ones(1, 3, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, size, size),
        "masked_cells": torch.tensor([[True, False, False, False]]),
    }
    # a decoder that says 1 for all pixels of the patch whose state it reads, so that each patch's place is seen
    with torch.no_grad():
        model.pixel_decoder.weight.zero_()
        model.pixel_decoder.bias.fill_(1.0)
    loss = model(**batch).loss
    pixels = batch["pixel_values"][:, :, :seen, :seen]
    mask = cells_to_pixels(batch["masked_cells"], size, size, patch)
    expected = ((pixels - 1).abs() * mask[:, None]).sum() / (3 * mask.sum())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("towers", ["clip", "siglip", "separate"])
def test_each_patch_predicts_its_own_pixels(towers):
    """What is known of the patch in row 2, column 1 gets to that place of the picture."""
    model = pretraining_model({"masked_image": 1.0}, towers=towers)
    grid, patch, width = 8, 8, model.config.iqformer_config.encoder_hidden_size
    seen = {}
    marked = torch.zeros(1, model.encode_images(torch.zeros(1, 3, 64, 64)).shape[1], width)
    marked[:, marked.shape[1] - grid**2 + 2 * grid + 1] = 1.0
    model.encode_images = lambda pixels: marked
    model.iqformer.vision_projection = torch.nn.Identity()
    model.masked_image_block.forward = lambda states, knowledge: states
    with torch.no_grad():
        model.pixel_decoder.weight.fill_(1 / width)
        model.pixel_decoder.bias.zero_()
    knowledge = torch.randn(1, 4, 32)
    pixels = torch.zeros(1, 3, 64, 64)
    place = torch.zeros(1, 64, dtype=torch.bool)
    place[0, 5] = True  # another is scored as well, so that the patch has company
    for number in (2 * grid + 1, 1 * grid + 2):  # its own place, and the one with rows and columns exchanged
        cell = place.clone()
        cell[0, number] = True
        seen[number] = model.masked_image_modelling(pixels, cell, torch.zeros_like(cell), knowledge).item()
    assert patch * grid == 64
    assert seen == {17: pytest.approx(0.5, abs=1e-6), 10: 0.0}


def test_hidden_cells_reach_no_encoder_and_visible_ones_do():
    model = pretraining_model({"masked_image": 1.0})
    seen = []
    model.encode_images = lambda pixels: seen.append(pixels) or torch.zeros(len(pixels), 65, 40)
    pixels = torch.ones(1, 3, 64, 64)
    scored, hidden = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]])
    model.masked_image_modelling(pixels, scored, hidden, torch.randn(1, 4, 32))
    assert not seen[0][:, :, :32, :32].any()
    assert seen[0].sum() == 3 * 3 * 32 * 32


def test_masked_text_scores_the_chosen_tokens_alone():
    model = pretraining_model({"masked_text": 1.0})
    batch = batch_of(model)
    loss = model(**batch).loss
    del batch["masked_columns"]  # of the labels that are replaced
    batch["masked_labels"][:] = -100
    batch["masked_labels"][1, 2], batch["masked_labels"][3, 1] = 60, 61
    states = model.encode_context(batch["masked_input_ids"], batch["context_attention_mask"])
    states = model.masked_text_block(
        model.iqformer.context_projection(states), model.get_image_knowledge(batch["pixel_values"])
    )
    log_probabilities = model.token_decoder(states).log_softmax(-1)
    expected = -(log_probabilities[1, 2, 60] + log_probabilities[3, 1, 61]) / 2
    assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model(**batch).loss.item() != pytest.approx(loss.item(), rel=1e-3)


def test_text_to_knowledge_predicts_each_vector_from_those_before():
    """Vector i is predicted where the LLM has read the text and the vectors before i, and no more."""
    model = pretraining_model({"text_to_knowledge": 1.0}).eval()
    batch = batch_of(model, rows=2)
    ids, mask, knowledge = batch["draw_input_ids"], batch["draw_attention_mask"], torch.randn(2, 4, 32)
    embeds = model.embed_prompt(ids, knowledge)
    predicted = []
    for i in range(4):
        end = ids.shape[1] - 4 + i
        states = model.language_model.base_model(inputs_embeds=embeds[:, :end], attention_mask=mask[:, :end])
        predicted.append(model.knowledge_predictor(states.last_hidden_state[:, -1]))
    expected = (torch.stack(predicted, 1) - knowledge).square().mean()
    assert model.text_to_knowledge(ids, mask, knowledge).item() == pytest.approx(expected.item(), rel=1e-5)


def test_placeholders_must_end_the_draw_prompts():
    model = pretraining_model({"text_to_knowledge": 1.0})
    batch = batch_of(model)
    batch["draw_input_ids"] = F.pad(batch["draw_input_ids"], (0, 1))
    batch["draw_attention_mask"] = F.pad(batch["draw_attention_mask"], (0, 1))
    with pytest.raises(ValueError, match="pad on the left"):
        model(**batch)


SUBSETS = [subset for size in (1, 2) for subset in combinations(ALL, size)]


@pytest.mark.parametrize("objectives", [*SUBSETS, tuple(ALL)], ids="+".join)
def test_any_subset_of_objectives(objectives):
    """
    It needs only what the collator then gives; the loss is the weighted sum; and after `freeze_unused` every parameter
    that is left to train gets a gradient and no other does, of the frozen backbones least of all.
    """
    model = pretraining_model({name: ALL[name] for name in objectives})
    collator = PreTrainingCollator(processor(), model.config)
    freeze_unused(model, pictures=collator.uses_pictures)
    output = model.train()(**collator(pairs(4)))
    assert set(output.losses) == set(objectives)
    total = sum(ALL[name] * value for name, value in output.losses.items())
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-6)
    output.loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("language_model", "context_encoder", "vision_encoder")) for name in reached)
    heads = {
        "text_image_matching": "matching_head.image_projection",
        "text_text_matching": "matching_head.text_projection",
        "masked_image": "pixel_decoder",
        "masked_text": "token_decoder",
        "knowledge_to_text": "language_projection",
        "text_to_knowledge": "knowledge_predictor",
    }
    for objective, head in heads.items():
        as_well = {"knowledge_to_text": "text_to_knowledge", "text_text_matching": "text_image_matching"}.get(
            objective
        )
        assert any(name.startswith(head) for name in reached) == bool({objective, as_well} & {*objectives})


@pytest.mark.parametrize(
    ("objective", "without", "lacks"),
    [
        ("text_image_matching", "pixel_values", "pixel_values"),
        ("text_image_matching", "context_input_ids", "context_input_ids"),
        ("masked_image", "masked_cells", "masked_cells"),
        ("masked_image", "pixel_values", "pixel_values"),
        ("masked_text", "masked_labels", "masked_labels"),
        ("masked_text", "pixel_values", "pixel_values"),
        ("knowledge_to_text", "labels", "labels"),
        ("knowledge_to_text", "context_input_ids", "context_input_ids"),
        ("text_to_knowledge", "draw_input_ids", "draw_input_ids"),
        ("text_text_matching", "partner_input_ids", "partner_input_ids"),
    ],
)
def test_a_missing_input_is_named(objective, without, lacks):
    model = pretraining_model({objective: 1.0})
    batch = batch_of(model)
    del batch[without]
    with pytest.raises(ValueError, match=f"{objective}.*lacks {lacks}"):
        model(**batch)


def test_no_objective_is_an_error():
    model = pretraining_model({"masked_text": 1.0})
    model.config.loss_weights = dict.fromkeys(ALL, 0.0)
    with pytest.raises(ValueError, match="No objective"):
        model(context_input_ids=torch.ones(1, 3, dtype=torch.long))


def test_masked_pictures_need_a_vision_encoder():
    with pytest.raises(ValueError, match="masked_image needs a vision encoder"):
        VikdfForPreTraining(tiny_config(vision_config=None, loss_weights={"masked_image": 1.0}))


def test_knowledge_of_texts_or_of_pictures_row_by_row():
    model = pretraining_model({"text_to_knowledge": 1.0}).eval()
    batch = batch_of(model, image_knowledge_share=0.5)
    draw = {key: batch[f"draw_{key}"] for key in ("input_ids", "attention_mask", "position_ids")}

    def loss(knowledge):
        return pytest.approx(model.text_to_knowledge(knowledge=knowledge, **draw).item(), rel=1e-6)

    text = model.get_text_knowledge(batch["context_input_ids"], batch["context_attention_mask"])
    image = model.get_image_knowledge(batch["pixel_values"])
    batch["use_image_knowledge"] = torch.tensor([True, False, False, True])
    mixed = torch.stack([image[0], text[1], text[2], image[3]])
    assert model(**batch).loss.item() == pytest.approx(
        model.text_to_knowledge(knowledge=mixed, **draw).item(), rel=1e-6
    )
    # rows that need no text need no text
    batch["use_image_knowledge"][:] = True
    without_text = {key: value for key, value in batch.items() if not key.startswith("context_")}
    assert model(**without_text).loss.item() == loss(image)
    without_text["use_image_knowledge"][2] = False
    with pytest.raises(ValueError, match="lacks context_input_ids"):
        model(**without_text)
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match="lacks pixel_values"):
        model(**batch)
    batch["use_image_knowledge"][:] = False
    assert model(**batch).loss.item() == loss(text)


def test_cached_states_give_the_same_losses():
    model = pretraining_model({name: weight for name, weight in ALL.items() if name != "masked_image"}).eval()
    batch = batch_of(model)
    expected = model(**batch)
    batch["vision_states"] = model.encode_images(batch.pop("pixel_values"))
    batch["context_states"] = model.encode_context(batch["context_input_ids"], batch["context_attention_mask"])
    assert torch.equal(model(**batch).loss, expected.loss)


def test_the_target_is_detached_unless_asked():
    """Detached, it does not pull the knowledge towards what is predicted; the input of the LLM stays connected."""
    gradients = {}
    for detach in (True, False):
        model = pretraining_model({"text_to_knowledge": 1.0}, detach_knowledge_target=detach)
        batch = batch_of(model)
        text = model.get_text_knowledge(batch["context_input_ids"], batch["context_attention_mask"]).detach()
        text.requires_grad_()
        model.text_to_knowledge(batch["draw_input_ids"], batch["draw_attention_mask"], text).backward()
        gradients[detach] = text.grad
        if detach:
            # the last vector is no input of any prediction
            assert not text.grad[:, -1].any() and text.grad[:, 0].any()
    through_target = gradients[False] - gradients[True]
    assert through_target[:, -1].any()


def test_dropout_of_frozen_parts_is_off_in_training():
    model = pretraining_model({"text_image_matching": 1.0}).train()
    assert model.context_encoder.config.hidden_dropout_prob > 0
    assert not any(part.training for part in (model.language_model, model.context_encoder, model.vision_encoder))
    assert model.iqformer.training
    batch = batch_of(model)
    assert torch.equal(model(**batch).loss, model(**batch).loss)


# ---- what transformers asks of every model ----


def test_the_main_input_is_the_first():
    for model_class in (VikdfForPreTraining, VikdfForConditionalGeneration):
        assert model_class.main_input_name == list(inspect.signature(model_class.forward).parameters)[1]


def test_outputs_as_a_tuple_when_asked():
    model = pretraining_model(ALL).eval()
    batch = batch_of(model)
    expected = model(**batch)
    asked = model(**batch, return_dict=False)
    assert isinstance(asked, tuple) and torch.equal(asked[0], expected.loss) and len(asked) == len(expected)
    model.config.return_dict = False  # which the objectives' own passes through the LLM must not follow
    assert torch.equal(model(**batch)[0], expected.loss)
    assert model(**batch, return_dict=True).losses.keys() == expected.losses.keys()
    assert isinstance(model(**batch, embed_only=True), tuple)


def test_hidden_states_are_those_of_the_llm_that_reads_captions():
    """All of them, also in training, where text before the knowledge is otherwise read apart."""
    model = pretraining_model(ALL)
    model.language_model.set_attn_implementation("eager")
    batch = batch_of(model)
    assert model(**batch).hidden_states is None
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    rows, columns = batch["input_ids"].shape
    layers, heads = model.config.text_config.num_hidden_layers, model.config.text_config.num_attention_heads
    width = model.config.text_config.hidden_size
    assert [tuple(states.shape) for states in output.hidden_states] == [(rows, columns, width)] * (layers + 1)
    assert [tuple(weights.shape) for weights in output.attentions] == [(rows, heads, columns, columns)] * layers
    torch.testing.assert_close(output.loss, model(**batch).loss)
    assert output.hidden_states[0].requires_grad
    model.language_model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == layers + 1
    assert model(**batch, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_hidden_states_are_refused_where_the_llm_reads_no_captions(what):
    model = pretraining_model({"text_image_matching": 1.0})
    with pytest.raises(ValueError, match=f"{what}.*knowledge_to_text"):
        model(**batch_of(model), **{what: True})


def test_pretraining_cannot_generate_but_keeps_what_the_llm_generates_with(backbones, tmp_path):
    assert VikdfForConditionalGeneration.can_generate() and not VikdfForPreTraining.can_generate()
    model, _ = build_from(backbones, "llama", "separate", model_class=VikdfForPreTraining)
    model.save_pretrained(tmp_path / "first")
    VikdfForPreTraining.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    replies = VikdfForConditionalGeneration.from_pretrained(tmp_path / "second").generation_config
    assert (replies.do_sample, replies.temperature) == (True, 0.6)
    (tmp_path / "second" / "generation_config.json").unlink()  # a checkpoint need not have one
    VikdfForPreTraining.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / "generation_config.json").exists()


# ---- text before the knowledge, read without gradient ----


@pytest.fixture
def apart(monkeypatch):
    """The prefix is read in a pass of its own, which does not pay for models as small as these."""
    monkeypatch.setattr(modeling_vikdf.modeling_prefix, "WORTH_APART", {"cpu": 0, "cuda": 0})


def gradients_of(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cut_and_whole(model, batch, monkeypatch):
    """Loss and gradients with the prefix cut off and with it, and how many columns were cut."""
    run, cut = model.run_language_model, []

    def watched(*args, prefix=0, **kwargs):
        cut.append(prefix)
        return run(*args, prefix=prefix, **kwargs)

    monkeypatch.setattr(model, "run_language_model", watched)
    with_cut = gradients_of(model, batch)
    monkeypatch.setattr(model, "run_language_model", lambda *args, prefix=0, **kwargs: run(*args, **kwargs))
    return with_cut, gradients_of(model, batch), cut


def assert_same(one: tuple, other: tuple) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys() != set()
    size = sum(gradient.square().sum() for gradient in other[1].values()).sqrt()
    for name, gradient in one[1].items():
        assert (gradient - other[1][name]).norm() <= 1e-6 * size, name


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("objective", ["knowledge_to_text", "text_to_knowledge"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "left_padded"])
@pytest.mark.parametrize("worth_sharing", [1, 10**6], ids=["shared", "each_row"])
def test_prefix_without_gradient_is_exact(llm, objective, aligned, worth_sharing, monkeypatch):
    monkeypatch.setattr(modeling_vikdf.modeling_prefix, "WORTH_SHARING", worth_sharing)
    model = pretraining_model({objective: 1.0}, llm=llm, knowledge_token_id=processor(llm).knowledge_token_id)
    if not aligned:
        monkeypatch.setattr("modeling_vikdf.data.collators.align_at_knowledge", lambda batch, processor: batch)
    examples = pairs(4)
    for row, example in enumerate(examples):  # rows of very different lengths
        example["captions"] = [" ".join(example["captions"][0].split() * (1 + 3 * row))]
    batch = PreTrainingCollator(processor(llm), model.config)(examples)
    cut, whole, columns = cut_and_whole(model, batch, monkeypatch)
    assert columns[0] > 0
    assert_same(cut, whole)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize(
    "place", [("last_user", "end"), ("last_user", "start"), ("first_user", "start")], ids="-".join
)
def test_prefix_without_gradient_is_exact_for_dialogues(llm, place, monkeypatch):
    reader = processor(llm, knowledge_message=place[0], knowledge_placement=place[1])
    model = dialogue_model(llm=llm, knowledge_token_id=reader.knowledge_token_id)
    batch = DialogueCollator(reader)(dialogues(4))
    cut, whole, columns = cut_and_whole(model, batch, monkeypatch)
    assert columns[0] > 0
    assert_same(cut, whole)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("llm", ["qwen", "llama"])
def test_what_all_dialogues_begin_with_is_read_once(llm, monkeypatch):
    monkeypatch.setattr(modeling_vikdf.modeling_prefix, "WORTH_SHARING", 1)
    reader = processor(llm, system_prompt="You are a friendly person in a casual chat.")
    model = dialogue_model(llm=llm, knowledge_token_id=reader.knowledge_token_id)
    batch = DialogueCollator(reader)(dialogues(4))
    # the same loss and gradients as from prompts that are padded on the left and read in every row
    with monkeypatch.context() as context:
        context.setattr("modeling_vikdf.data.collators.align_at_knowledge", lambda batch, processor: batch)
        padded = DialogueCollator(reader)(dialogues(4))
    assert not padded["attention_mask"][:, 0].all() and "position_ids" not in padded
    read, run = [], model.language_model.base_model.forward

    def watched(*args, **kwargs):
        read.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return run(*args, **kwargs)

    monkeypatch.setattr(model.language_model.base_model, "forward", watched)
    once = gradients_of(model, batch)
    head = len(reader.tokenizer("You are a friendly person in a casual chat.", add_special_tokens=False).input_ids)
    assert read[0][0] == 1 and read[0][1] > head and [rows for rows, _ in read[1:]] == [4, 4]
    assert_same(once, gradients_of(model, padded))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("objectives", [None, ALL, {"knowledge_to_text": 1.0}, {"text_to_knowledge": 1.0}], ids=str)
def test_what_the_collator_found_changes_no_gradient(objectives, llm, checkpointing):
    """Both directions in one pass, tokens alone without a mask, each row's own targets: all of it is exact."""
    reader, settings = processor(llm), {"llm": llm, "knowledge_token_id": processor(llm).knowledge_token_id}
    if objectives is None:
        model, batch = dialogue_model(**settings), DialogueCollator(reader)(dialogues(4))
    else:
        model = pretraining_model(objectives, **settings)
        batch = PreTrainingCollator(reader, model.config, image_knowledge_share=0.5)(pairs(4))
    if checkpointing:
        checkpoint_activations(model)
    plain = {name: value for name, value in batch.items() if not name.endswith(("_columns", "_positions", "_patches"))}
    assert len(plain) < len(batch)
    passes = []
    model.language_model.base_model.register_forward_hook(lambda *_: passes.append(1))
    found = gradients_of(model, batch)
    assert len(passes) == 1
    assert_same(found, gradients_of(model, plain))


def test_columns_of_prompts_that_have_been_cut_are_not_used():
    model = dialogue_model()
    batch = DialogueCollator(processor())(dialogues(4))
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    cut = batch | {name: batch[name][:, 1:] for name in names}
    plain = {name: cut[name] for name in (*names, "context_input_ids", "context_attention_mask")}
    assert_same(gradients_of(model, cut), gradients_of(model, plain))


def test_the_prefix_is_read_apart_where_that_pays():
    """On a CPU with an LLM of a width that is in use; whatever the batch, so that all processes do the same."""
    small, large = (SimpleNamespace(text_config=SimpleNamespace(hidden_size=width)) for width in (48, 576))
    for ids in (torch.zeros(1, 8, dtype=torch.long), torch.zeros(8, 56, dtype=torch.long)):
        assert pays_apart(ids, large) and not pays_apart(ids, small)
        assert not pays_apart(ids.to("meta"), large)  # as on any device that is no CPU
        with torch.no_grad():
            assert not pays_apart(ids, large)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    "objectives", [{"knowledge_to_text": 1.0}, {"text_to_knowledge": 1.0}, ALL], ids=["to_text", "to_knowledge", "all"]
)
def test_compiled_layers_read_no_prefix_apart(objectives):
    """They would compile anew for its part of the cache; so both directions go in one pass there, too."""
    model = pretraining_model(objectives)
    batch, passes = PreTrainingCollator(processor(), model.config)(pairs(4)), []
    expected = gradients_of(model, batch)
    model.language_model.layers_are_compiled = True
    model.language_model.base_model.register_forward_hook(lambda *_: passes.append(1))
    assert_same(gradients_of(model, batch), expected)
    assert len(passes) == 1


def test_logits_that_are_asked_for_in_any_order_are_those_of_their_columns(monkeypatch):
    """Also if some are of the text before the knowledge, which may be read apart."""
    monkeypatch.setattr(modeling_vikdf.modeling_prefix, "WORTH_APART", {"cpu": 0})
    model, batch = dialogue_model(), DialogueCollator(processor())(dialogues(4))
    batch = {name: value for name, value in batch.items() if name != "labels"}
    wanted = torch.tensor([batch["input_ids"].shape[1] - 2, 3])
    whole = model(**batch).logits
    assert model.tokens_before_knowledge(batch["input_ids"]) > 3
    assert torch.allclose(model(**batch, logits_to_keep=wanted).logits, whole[:, wanted], atol=1e-5)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_padding_of_prompts_is_copied(monkeypatch):
    """Of prompts with much padding the LLM gets the tokens alone, and nothing larger is made on the way there."""
    model, width = dialogue_model(), 7
    monkeypatch.setattr(
        model, "run_language_model", lambda embeds, **_: SimpleNamespace(last_hidden_state=embeds.clone())
    )
    ids, readings, expected = torch.full((1, 40), 5), [], []
    for first in (30, 36):  # the first token
        mask = (torch.arange(40) >= first).long()[None]
        embeds, wanted = torch.randn(1, 40, width), torch.tensor([[first + 1, 38]])  # 39 predicts nothing
        readings.append((embeds, locate_columns({"input_ids": ids, "attention_mask": mask}, 400), wanted))
        expected.append(embeds[:, wanted[0]])
    with Largest() as made:
        found = read_tokens(model, *readings)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert made.largest == 2 * 9 * width


def checkpoint_activations(model) -> None:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.24


@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("objectives", [None, {"knowledge_to_text": 1.0}, {"text_to_knowledge": 1.0}], ids=str)
def test_checkpointed_activations_of_the_frozen_llm_are_computed_anew(llm, objectives):
    """In evaluation mode, which it is always in, its layers would keep all."""
    reader = processor(llm)
    if objectives is None:
        model = dialogue_model(llm=llm, knowledge_token_id=reader.knowledge_token_id)
        batch = DialogueCollator(reader)(dialogues(4))
    else:
        model = pretraining_model(objectives, llm=llm, knowledge_token_id=reader.knowledge_token_id)
        batch = PreTrainingCollator(reader, model.config)(pairs(4))
    expected = gradients_of(model, batch)
    read = []
    mlp = model.language_model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: read.append(torch.is_grad_enabled()))
    checkpoint_activations(model)
    assert_same(gradients_of(model, batch), expected)
    assert read.count(True) == 2  # once forward and once backward; without gradient only the prefix, if there is one
    assert not any(module.training for module in model.language_model.modules())


@pytest.mark.usefixtures("apart")
def test_supervised_text_before_the_knowledge_is_not_cut_off(monkeypatch):
    """Replies in front of the knowledge count in the loss when they are asked for."""
    reader = processor()
    model = dialogue_model()
    collators = (DialogueCollator(reader), DialogueCollator(reader, earlier_replies=True))
    final, every = (collator(dialogues(8)) for collator in collators)
    assert (final["labels"] != -100).sum() < (every["labels"] != -100).sum()
    cut, whole, _ = cut_and_whole(model, every, monkeypatch)
    assert_same(cut, whole)
    monkeypatch.undo()
    # they do not depend on the knowledge: no gradient beyond what the shared divisor does to the final replies'
    share = (final["labels"] != -100).sum() / (every["labels"] != -100).sum()
    _, gradients = gradients_of(model, final)
    assert_same((0.0, {name: gradient * share for name, gradient in gradients.items()}), (0.0, whole[1]))


def test_a_batch_without_a_reply_to_learn_has_loss_zero():
    model = dialogue_model()
    batch = DialogueCollator(processor())(dialogues(2))
    batch["labels"][:] = -100
    loss, gradients = gradients_of(model, batch)
    assert loss == 0
    assert not any(gradient.isnan().any() or gradient.any() for gradient in gradients.values())


def test_captions_without_dialogues_leave_the_base_vectors_alone():
    model = pretraining_model({"knowledge_to_text": 1.0, "text_to_knowledge": 1.0})
    freeze_unused(model)
    _, gradients = gradients_of(model, batch_of(model))
    assert gradients["caption_shift"].any() and "knowledge_base" not in gradients
    assert not model.knowledge_base.requires_grad


def test_two_captions_of_a_picture_are_matched_as_it_is_with_one():
    model = pretraining_model({"text_image_matching": 1.0, "text_text_matching": 1.0})
    batch = batch_of(model)
    output = model(**batch)
    partner = model.get_text_embeddings(batch["partner_input_ids"], batch["partner_attention_mask"])
    torch.testing.assert_close(output.partner_embeddings, partner)
    for name, others in (("text_image_matching", output.image_embeddings), ("text_text_matching", partner)):
        expected = matching_loss(output.text_embeddings, others, model.matching_head.logit_scale)
        assert output.losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_captions_beside_dialogues_shift_the_base_vectors():
    """Only in their own prompts: the base vectors learn from the replies alone, unless the shift is frozen."""
    model = pretraining_model({"knowledge_to_text": 1.0, "reply": 1.0})
    silent = DialogueCollator(processor())(dialogues(2))
    silent["labels"][:] = -100  # so that what is learnt is learnt from captions
    batch = batch_of(model) | {"dialogues": silent}
    loss, gradients = gradients_of(model, batch)
    assert gradients["caption_shift"].any() and gradients["language_projection.weight"].any()
    assert not gradients["knowledge_base"].any()
    with torch.no_grad():
        model.caption_shift.normal_()
    shifted, _ = gradients_of(model, batch)
    assert shifted != pytest.approx(loss, rel=1e-5)
    said = DialogueCollator(processor())(dialogues(2))
    plain = dialogue_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model(**batch | {"dialogues": said}).losses["reply"].item() == pytest.approx(plain(**said).loss.item())
    model.caption_shift.requires_grad = False
    assert gradients_of(model, batch)[1]["knowledge_base"].any()


@pytest.mark.usefixtures("apart")
def test_lora_on_the_llm(monkeypatch):
    """The LLM's own new weights get gradients, and then the text before the knowledge is part of what is learnt."""
    peft = pytest.importorskip("peft")
    model = dialogue_model()
    settings = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["iqformer", "language_projection"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, settings).train()
    batch = DialogueCollator(processor())(dialogues(4))
    _, gradients = gradients_of(adapted, batch)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert set(gradients) == {name for name in trained if ".vision_projection." not in name}
    lora = [name for name in gradients if "lora_" in name]
    assert len(lora) == 2 * 2 * 2 and all(gradients[name].any() for name in lora)
    assert not any("_encoder." in name for name in gradients)
    # were the prefix read without gradient, these would be others
    cut, whole, columns = cut_and_whole(model, batch, monkeypatch)
    assert columns[0] > 0
    assert_same(cut, whole)


# ---- checkpoints ----


def test_heads_of_new_objectives_start_fresh(tmp_path, recwarn):
    """A model distilled with some objectives goes on with others: what they share is kept."""
    first = pretraining_model({"masked_image": 1.0})
    first.save_pretrained(tmp_path)
    config = model_config(loss_weights={"text_to_knowledge": 1.0})
    second = VikdfForPreTraining.from_pretrained(tmp_path, config=config)
    assert torch.equal(second.iqformer.query_tokens, first.iqformer.query_tokens)
    assert second.knowledge_predictor.weight.std() > 0 and not hasattr(second, "pixel_decoder")
    assert second.knowledge_predictor.weight.isfinite().all()


@pytest.mark.parametrize("encoder", ["dinov2", "clip"])
def test_pictures_are_resized_whole(encoder, backbones):
    """A wide picture, red at both ends, becomes a square that is still red there."""
    from modeling_vikdf.building import new_model

    folders = [str(backbones / name) for name in ("llama", "clip" if encoder == "clip" else "bert", encoder)]
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    _, processor = new_model(
        *folders, num_knowledge_tokens=4, image_size=64, iqformer_config=sizes, project_inputs=True
    )
    wide = Image.new("RGB", (300, 100))
    for left in (0, 250):
        wide.paste((255, 0, 0), (left, 0, left + 50, 100))
    pixels = processor.image_processor([wide], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    red = pixels[0, 0] > pixels[0, 0].mean()
    assert red[:, :8].all() and red[:, -8:].all() and not red[:, 20:44].any()


def test_heads_are_float32_beside_a_half_precision_llm(backbones, tmp_path):
    from modeling_vikdf.building import new_model

    folders = [str(backbones / name) for name in ("llama", "bert", "dinov2")]
    model, _ = new_model(
        *folders,
        model_class=VikdfForPreTraining,
        num_knowledge_tokens=4,
        iqformer_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
        project_inputs=True,
    )
    model.save_pretrained(tmp_path)
    for each in (model, VikdfForPreTraining.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert each.language_model.dtype == torch.bfloat16
        assert {p.dtype for p in each.parameters() if p.requires_grad} == {torch.float32}


def test_forward_under_autocast_keeps_gradients_in_float32():
    model = pretraining_model(ALL)
    model.language_model.to(torch.bfloat16)
    prepare(model, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**batch_of(model)).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
