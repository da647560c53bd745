"""A trained model around another LLM: what has learnt without the LLM stays, the way into it is new."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_from
from safetensors.torch import load_file
from tiny_models import llm_config
from tiny_tokenizers import qwen_tokenizer
from tiny_training import dialogues, pairs, write_shard
from transformers import AutoModelForCausalLM

from modeling_vikdf import VikdfForConditionalGeneration, VikdfForPreTraining, VikdfProcessor
from modeling_vikdf.building import swap_language_model
from modeling_vikdf.training.recipe import check_recipe
from modeling_vikdf.training.stages import run_stage


CHAT = [{"role": "user", "content": "It is snowing outside."}]
BASE = "I picture the scene"


@pytest.fixture(scope="module")
def folders(backbones, tmp_path_factory) -> dict[str, str]:
    """The name of an LLM -> its folder: as wide as the checkpoint's, or wider."""
    config = llm_config("qwen")
    config.hidden_size, config.initializer_range = 64, 0.1
    wider = tmp_path_factory.mktemp("llm") / "wider"
    AutoModelForCausalLM.from_config(config).save_pretrained(wider)
    qwen_tokenizer().save_pretrained(wider)
    return {"as wide": str(backbones / "qwen"), "wider": str(wider)}


@pytest.fixture
def checkpoint(backbones, tmp_path) -> Path:
    """A checkpoint of stages 1 and 2 around Llama, with a reward head, whose LLM has been removed since."""
    shutil.copytree(backbones / "llama", tmp_path / "llama")
    for name in ("bert", "dinov2"):
        (tmp_path / name).symlink_to(backbones / name)
    weights = {"text_image_matching": 1.0, "knowledge_to_text": 1.0, "text_to_knowledge": 1.0}
    settings = {"loss_weights": weights, "model_class": VikdfForPreTraining}
    model, processor = build_from(tmp_path, "llama", "separate", **settings)
    with torch.no_grad():
        for parameter in (model.caption_shift, model.knowledge_predictor.weight, model.language_projection.bias):
            parameter.fill_(7.0)
    processor.system_prompt, processor.knowledge_placement = "Be brief.", "start"
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    shutil.rmtree(tmp_path / "llama")
    return tmp_path / "trained"


@pytest.mark.parametrize("name", ["as wide", "wider"])
def test_what_needs_no_llm_stays_and_the_way_into_the_llm_is_new(name, folders, checkpoint, tmp_path):
    model, processor = swap_language_model(checkpoint, folders[name], base_text=BASE, initial_gate=0.25)
    llm = AutoModelForCausalLM.from_pretrained(folders[name])
    assert all(torch.equal(weight, llm.state_dict()[key]) for key, weight in model.language_model.state_dict().items())

    trained = _weights(checkpoint)
    for key, weight in model.state_dict().items():
        if key.startswith(("iqformer", "matching_head")):
            assert torch.equal(weight, trained.pop(key)), key
    assert not [key for key in trained if key.startswith(("iqformer", "matching_head"))]

    ids = processor.tokenizer(BASE, add_special_tokens=False, return_tensors="pt").input_ids[0]
    expected = llm.get_input_embeddings()(ids.repeat(4)[:4])
    assert torch.equal(model.knowledge_base, expected)
    assert model.knowledge_gate.tolist() == [0.25] * 4
    assert not torch.equal(model.language_projection.bias, torch.full_like(model.language_projection.bias, 7.0))
    assert (processor.system_prompt, processor.knowledge_placement) == ("Be brief.", "start")
    assert processor.knowledge_token_id == model.config.knowledge_token_id
    assert model.generation_config.eos_token_id == llm.generation_config.eos_token_id

    inputs = processor(CHAT)
    reply = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "swapped")
    loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path / "swapped")
    assert loaded.config.backbones["language_model"] == {"repo_id": folders[name], "revision": None}
    inputs = VikdfProcessor.from_pretrained(tmp_path / "swapped")(CHAT)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=4, do_sample=False), reply)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["as wide", "wider"])
def test_the_heads_of_the_objectives_are_new(name, folders, checkpoint):
    model, _ = swap_language_model(checkpoint, folders[name], model_class=VikdfForPreTraining)
    assert not model.caption_shift.any()
    assert model.knowledge_predictor.weight.std() > 0
    # without a text to start from, as in the paper
    assert not model.knowledge_base.any() and model.knowledge_gate.tolist() == [1.0] * 4


def test_encoders_that_the_checkpoint_holds_stay(folders, backbones, tmp_path):
    model, processor = build_from(backbones, "llama", "separate")
    model.save_pretrained(tmp_path, include_backbones=True)
    processor.save_pretrained(tmp_path)
    swapped, _ = swap_language_model(tmp_path, folders["wider"])
    assert {*swapped.config.backbones} == {"language_model"}
    for role in ("context_encoder", "vision_encoder"):
        kept = getattr(swapped, role).state_dict()
        assert all(torch.equal(weight, kept[name]) for name, weight in getattr(model, role).state_dict().items())
    assert swapped.get_input_embeddings().embedding_dim == 64


def test_a_reward_head_is_left_out(folders, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "reward_layer": 1}))
    model, _ = swap_language_model(checkpoint, folders["wider"])
    assert model.config.reward_layer is None and not hasattr(model, "reward_weight")


def test_an_adapter_of_the_llm_is_refused(folders, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "adapter": "lora"}))
    with pytest.raises(ValueError, match="adapter 'lora' of its LLM"):
        swap_language_model(checkpoint, folders["wider"])


def test_stages_go_on_from_a_checkpoint_with_another_llm(folders, checkpoint, tmp_path):
    (checkpoint / "recipe.yaml").write_text("stage: distill\n")
    shard = write_shard(tmp_path / "pairs.tar", pairs(8))
    lines = [json.dumps({"messages": dialogue["messages"]}) for dialogue in dialogues(4)]
    (tmp_path / "dialogues.jsonl").write_text("\n".join(lines))
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    training["save_strategy"] = "no"
    swap = {"checkpoint": str(checkpoint), "language_model": folders["wider"], "base_text": BASE, "initial_gate": 0.5}
    for stage, model, data in (
        ("integrate", swap, shard),
        ("tune", {"checkpoint": str(tmp_path / "integrate")}, tmp_path / "dialogues.jsonl"),
    ):
        training["output_dir"] = str(tmp_path / stage)
        run_stage(stage, {"model": model, "data": {"train": str(data)}, "training": training})
    before, after = _weights(checkpoint), _weights(tmp_path / "tune")
    moved = [key for key in after if key.startswith("iqformer") and not torch.equal(after[key], before[key])]
    assert moved and after["language_projection.weight"].shape[0] == 64
    stages = list(yaml.safe_load_all((tmp_path / "tune" / "recipe.yaml").read_text()))
    assert [stage["stage"] for stage in stages] == ["distill", "integrate", "tune"]
    assert stages[1]["model"]["base_text"] == BASE


@pytest.mark.parametrize(
    "beside, ignored",
    [({"base_text": "x"}, "base_text"), ({"language_model": "x", "num_knowledge_tokens": 4}, "num_knowledge_tokens")],
)
def test_what_a_checkpoint_decides_is_not_set_anew(beside, ignored):
    recipe = {"model": {"checkpoint": "x", **beside}, "data": {"train": "y"}}
    with pytest.raises(ValueError, match=rf"so \['{ignored}'\] would be ignored"):
        check_recipe("integrate", recipe)
