"""The configuration: what it fills in, what it refuses, what survives a round trip through a file."""

import json

import pytest
from tiny_models import tiny_config, two_towers
from transformers import AutoConfig, Qwen2Config

from modeling_vikdf import VikdfConfig


def test_sub_configurations_come_from_dicts_objects_or_defaults():
    config = VikdfConfig(text_config={"model_type": "qwen2", "hidden_size": 48}, context_config={"projection_dim": 24})
    assert isinstance(config.text_config, Qwen2Config) and config.text_config.hidden_size == 48
    assert config.context_config.model_type == "clip_text_model"
    assert config.vision_config is None
    assert config.iqformer_config.encoder_hidden_size == 24
    assert (config.num_knowledge_tokens, config.iqformer_config.hidden_size) == (32, 768)


def test_a_two_tower_configuration_stands_for_its_towers():
    both = two_towers("clip")
    config = tiny_config(context_config=both, vision_config=both.to_dict(), project_inputs=False)
    assert config.context_config.model_type == "clip_text_model"
    assert config.vision_config.model_type == "clip_vision_model"


@pytest.mark.parametrize("towers", ["clip", "siglip", "separate"])
def test_round_trip(towers, tmp_path):
    config = tiny_config("qwen", towers, backbones={"language_model": {"repo_id": "org/llm", "revision": "abc"}})
    config.save_pretrained(tmp_path)
    for loaded in (VikdfConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is VikdfConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert type(loaded.text_config) is type(config.text_config)
        assert type(loaded.vision_config) is type(config.vision_config)


def test_an_llm_that_sees_stands_for_its_language_model():
    """What generation asks of a configuration, the number of layers and the like, is the language model's."""
    config = tiny_config(text_config={"model_type": "gemma3", "text_config": {"hidden_size": 48}})
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("gemma3_text", 48)


def test_the_llm_is_what_transformers_looks_for():
    config = tiny_config()
    assert config.get_text_config(decoder=True) is config.text_config


def test_input_projections_set_the_width_the_iqformer_expects():
    assert tiny_config(towers="separate").iqformer_config.encoder_hidden_size == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {"model_type": "lama"}}, r"text_config.*'lama'"),
        ({"context_config": {"model_type": "brt"}}, r"context_config.*'brt'"),
        ({"backbones": {"llm": {"repo_id": "org/llm"}}}, r"\['llm'\]"),
        ({"num_knowledge_tokens": 0}, "at least 1"),
        ({"project_inputs": False}, "vision_config.*40 wide.*32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(Exception, match="num_knowledge_tokens"):
        tiny_config(num_knowledge_tokens="many")


def test_unknown_model_type_in_a_file(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["text_config"]["model_type"] = "gpt-99"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="text_config names the model type 'gpt-99'"):
        AutoConfig.from_pretrained(tmp_path)


def test_configurations_share_nothing():
    first, second = tiny_config(), tiny_config()
    first.backbones["language_model"] = {"repo_id": "org/llm"}
    first.loss_weights["masked_text"] = -1.0
    first.text_config.hidden_size = 1
    assert (second.backbones, second.text_config.hidden_size) == ({}, 48)
    assert -1.0 not in second.loss_weights.values()
