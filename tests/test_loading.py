"""What `from_pretrained` takes, refuses and says: arguments, fields, values, files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_from
from safetensors.torch import load_file, save_file
from test_checkpoints import LOADERS, around, logits
from tiny_models import prompt, tiny_config, tiny_model
from transformers import AutoModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration
from modeling_vikdf.modeling_distillation import VikdfForPreTraining


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in build_from(backbones, "qwen", "separate"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


# ---- weights given as tensors ----


def test_a_state_dict_without_a_folder(checkpoint):
    expected = VikdfForConditionalGeneration.from_pretrained(checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    model = VikdfForConditionalGeneration.from_pretrained(None, config=expected.config, state_dict=state)
    assert torch.equal(logits(model), logits(expected))
    del state["knowledge_gate"]
    with pytest.raises(OSError, match="lacks 1 weights.*knowledge_gate"):
        VikdfForConditionalGeneration.from_pretrained(None, config=expected.config, state_dict=state)


@pytest.mark.parametrize("given", ["nothing", "config", "state_dict"])
def test_without_a_folder_both_are_needed(given):
    arguments = {"nothing": {}, "config": {"config": tiny_config()}, "state_dict": {"state_dict": {}}}[given]
    with pytest.raises(ValueError, match="config= and state_dict="):
        VikdfForConditionalGeneration.from_pretrained(None, **arguments)


# ---- values that no computing gets over ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["knowledge_gate", "knowledge_base", "language_projection.weight", "iqformer.query_tokens"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite(copy, name, value, dtype):
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name].to(dtype)
    weights[name].view(-1)[-1] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_values_of_a_trained_llm_that_are_not_finite(copy, tmp_path):
    model = VikdfForConditionalGeneration.from_pretrained(copy)
    model.language_model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="language_model.model.norm.weight holds NaN"):
        VikdfForConditionalGeneration.from_pretrained(tmp_path / "broken")


# ---- names that are none ----


@pytest.mark.parametrize("owner", [VikdfForConditionalGeneration, VikdfForPreTraining])
@pytest.mark.parametrize(
    ("wrong", "right"), [("knowlege_pooling", "knowledge_pooling"), ("device_maps", "device_map")]
)
def test_unknown_arguments_of_the_model(checkpoint, owner, wrong, right):
    with pytest.raises(TypeError, match=f"unexpected argument {wrong!r}.*{right!r}"):
        owner.from_pretrained(checkpoint, **{wrong: "mean"})


def test_unknown_arguments_by_an_auto_class(checkpoint):
    with pytest.raises(TypeError, match="unexpected argument 'knowlege_pooling'.*'knowledge_pooling'"):
        AutoModel.from_pretrained(checkpoint, knowlege_pooling="mean")


def test_unknown_fields_of_the_iqformer(backbones):
    with pytest.raises(ValueError, match="iqformer_config.*'num_layers'.*'num_hidden_layers'"):
        tiny_config(iqformer_config={"num_layers": 1})
    with pytest.raises(ValueError, match="iqformer_config.*'num_layers'.*'num_hidden_layers'"):
        around(backbones / "qwen", backbones, iqformer_config={"num_layers": 1})


def test_unknown_fields_of_the_configuration(backbones):
    with pytest.raises(ValueError, match="VikdfConfig.*'knowlege_pooling'.*'knowledge_pooling'"):
        tiny_config(knowlege_pooling="mean")
    with pytest.raises(ValueError, match="VikdfConfig.*'knowlege_pooling'.*'knowledge_pooling'"):
        around(backbones / "qwen", backbones, knowlege_pooling="mean")


def test_fields_of_other_versions_are_no_typos(copy):
    """A checkpoint may have been saved by a transformers that writes more than this one knows."""
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "torchscript": False,
        "transformers_version": "9.0",
        "use_bfloat16": False,
        "tie_encoder_decoder": False,
    }
    config["iqformer_config"] |= {"torchscript": False, "pruned_heads": {}, "use_bfloat16": False}
    (copy / "config.json").write_text(json.dumps(config))
    VikdfForConditionalGeneration.from_pretrained(copy)
    assert VikdfConfig.from_pretrained(copy).model_type == "vikdf"


# ---- files that run code ----


@pytest.mark.parametrize("name", ["w.bin", "pytorch_model.pt"])
@pytest.mark.parametrize("loader", LOADERS)
def test_an_index_that_names_other_files(copy, loader, name):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="safetensors only"):
        LOADERS[loader](copy)


# ---- an encoder that is half of a model ----

SIZES = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module", params=["the whole", "the encoder alone"])
def t5(request, backbones, tmp_path_factory) -> Path:
    """A repository of T5; its tokenizer is another's."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    owner = T5ForConditionalGeneration if request.param == "the whole" else T5EncoderModel
    owner(T5Config(**SIZES, pad_token_id=0, decoder_start_token_id=0)).save_pretrained(folder)
    shutil.copyfile(backbones / "bert/tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(backbones / "bert/tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def test_t5_as_text_encoder(backbones, t5, tmp_path, caplog):
    model, _ = build_from(backbones, "qwen", "separate", context=str(t5))
    assert type(model.context_encoder) is T5EncoderModel
    source = T5EncoderModel.from_pretrained(t5).state_dict()
    ours = model.context_encoder.state_dict()
    assert ours.keys() == source.keys() and all(torch.equal(ours[name], source[name]) for name in source)
    caplog.clear()
    for name, include_backbones in {"named": False, "all": True}.items():
        model.save_pretrained(tmp_path / name, include_backbones=include_backbones)
        loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path / name)
        assert torch.equal(logits(loaded), logits(model))
        assert type(loaded.context_encoder) is T5EncoderModel
    assert caplog.messages == []


@torch.no_grad()
def test_t5_reads_no_padding():
    model = tiny_model("qwen", "separate", context_config=T5Config(**SIZES))
    rows = prompt([20, 9])
    ids, mask = rows["context_input_ids"], rows["context_attention_mask"]
    alone = model.get_text_knowledge(ids[1:, : mask[1].sum()])
    torch.testing.assert_close(model.get_text_knowledge(ids, mask)[1:], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.get_text_knowledge(ids)[1:], alone, atol=1e-3)
