"""A tiny model in the authors' parametrisation, converted, must give the numbers that their code gives.

The folder is named by VIKDF_GOLDEN_DIR; the expected values were computed in float32 from float16 weights.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_vikdf import VikdfForConditionalGeneration
from modeling_vikdf.conversion import convert_checkpoint


GOLDEN = Path(os.environ.get("VIKDF_GOLDEN_DIR", Path(__file__).parents[2] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden folder at {GOLDEN} (set VIKDF_GOLDEN_DIR)")
KNOWLEDGE_POSITION = 3
MASK_TOKEN = 49407


@pytest.fixture(scope="module")
def model():
    return convert_checkpoint(GOLDEN)


@pytest.fixture(scope="module")
def dialogue_model(model, tmp_path_factory):
    """The converted checkpoint as a user loads it: without the heads of the objectives."""
    folder = tmp_path_factory.mktemp("converted")
    model.save_pretrained(folder)
    return VikdfForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "inputs_outputs.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-4, rtol=1e-4)


def with_placeholders(model, ids: torch.Tensor, fill: int) -> torch.Tensor:
    """[B, T] -> [B, T + n]: n copies of `fill` behind the first KNOWLEDGE_POSITION tokens."""
    inserted = torch.full((ids.shape[0], model.config.num_knowledge_tokens), fill)
    return torch.cat([ids[:, :KNOWLEDGE_POSITION], inserted, ids[:, KNOWLEDGE_POSITION:]], dim=1)


def text_knowledge(model, golden):
    return model.get_text_knowledge(golden["in.text_input_ids"], golden["in.text_attention_mask"])


@torch.no_grad()
def test_text_knowledge(model, golden):
    assert close(text_knowledge(model, golden), golden["out.knowledge_text"])


@torch.no_grad()
def test_image_knowledge(model, golden):
    assert close(model.get_image_knowledge(golden["in.pixel_values"]), golden["out.knowledge_image"])


@torch.no_grad()
def test_projected_knowledge(model, golden):
    assert close(model.project_knowledge(text_knowledge(model, golden)), golden["out.knowledge_embeds"])


def spliced(model, golden) -> dict[str, torch.Tensor]:
    return {
        "input_ids": with_placeholders(model, golden["in.i2t_llm_input_ids"], model.config.knowledge_token_id),
        "attention_mask": with_placeholders(model, golden["in.i2t_llm_attention_mask"], 1),
        "knowledge": text_knowledge(model, golden),
    }


@torch.no_grad()
def test_dialogue_logits(dialogue_model, golden):
    model = dialogue_model
    logits = model(**spliced(model, golden)).logits  # [B, T + n, vocabulary]
    # the golden logits are those of the last T positions
    assert close(logits[:, model.config.num_knowledge_tokens :], golden["out.dialogue_logits"])


def draw_prompts(model, golden) -> dict[str, torch.Tensor]:
    """The texts left-padded, with the placeholders behind them."""
    ids, mask = golden["in.t2i_llm_input_ids"], golden["in.t2i_llm_attention_mask"]
    ids = torch.stack([row.roll(int((1 - seen).sum())) for row, seen in zip(ids, mask, strict=True)])
    mask, n = mask.flip(1), model.config.num_knowledge_tokens
    return {
        "draw_input_ids": torch.nn.functional.pad(ids, (0, n), value=model.config.knowledge_token_id),
        "draw_attention_mask": torch.nn.functional.pad(mask, (0, n), value=1),
    }


@pytest.mark.parametrize("training", [False, True], ids=["without_gradient", "with_gradient"])
def test_losses(model, golden, training):
    """The five objectives and their sum; with gradient the text before the knowledge goes another way."""
    inputs = spliced(model, golden)
    del inputs["knowledge"]
    with torch.set_grad_enabled(training):
        output = model(
            context_input_ids=golden["in.text_input_ids"],
            context_attention_mask=golden["in.text_attention_mask"],
            pixel_values=golden["in.pixel_values"],
            masked_cells=golden["in.bool_masked_pos"].bool(),
            masked_input_ids=golden["in.text_input_ids"].masked_fill(golden["in.masked_indices"], MASK_TOKEN),
            masked_labels=golden["in.masked_text_labels"],
            labels=with_placeholders(model, golden["in.labels"], -100),
            **inputs,
            **draw_prompts(model, golden),
        )
    assert set(output.losses) == {name for name, weight in model.config.loss_weights.items() if weight}
    assert len(output.losses) == 5
    for name, loss in output.losses.items():
        assert close(loss, golden[f"out.loss_{name}"]), name
    assert close(output.loss, golden["out.loss_total"])


def test_greedy_tokens(dialogue_model, golden):
    model = dialogue_model
    expected = golden["out.greedy_8_tokens_row0_prompt6"]
    inputs = spliced(model, golden)
    length = 6 + model.config.num_knowledge_tokens
    tokens = model.generate(
        input_ids=inputs["input_ids"][:1, :length],
        attention_mask=inputs["attention_mask"][:1, :length],
        knowledge=inputs["knowledge"][:1],
        max_new_tokens=8,
        do_sample=False,
    )
    assert torch.equal(tokens[:, length:], expected)


@torch.no_grad()
def test_post_layernorm_is_what_the_golden_model_lacks(model, golden):
    """The test above can fail: CLIP's own path gives other knowledge."""
    model.config.vision_post_layernorm = True
    try:
        assert not close(model.get_image_knowledge(golden["in.pixel_values"]), golden["out.knowledge_image"])
    finally:
        model.config.vision_post_layernorm = False
