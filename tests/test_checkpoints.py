"""Saving and loading: what was trained and nothing frozen, to the same bits, from wherever the backbones are."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import build_from
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import KNOWLEDGE_ID, llm_config, pictures, prompt, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BertModel,
    BitsAndBytesConfig,
    Gemma2Config,
)

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration, VikdfForPreTraining, VikdfProcessor
from modeling_vikdf.backbones import BackboneNotFoundError
from modeling_vikdf.building import load_model
from modeling_vikdf.modeling_prefix import locate_columns


PACKAGE_ROOT = Path(__file__).parents[1]
BACKBONES = ("language_model.", "context_encoder.", "vision_encoder.")
LOADERS = {
    "itself": VikdfForConditionalGeneration.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
}


@pytest.fixture(scope="module", params=[("llama", "separate"), ("qwen", "clip"), ("llama", "siglip")], ids="-".join)
def built(request, backbones):
    """A model around saved backbones and its processor. Shared: a test that changes a model loads its own."""
    return build_from(backbones, *request.param)


@pytest.fixture(scope="module")
def checkpoint(built, tmp_path_factory) -> Path:
    """What is trained, saved with its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in built:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(backbones, tmp_path_factory) -> Path:
    """The checkpoint of one model, where one will do; its LLM is saved in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    for part in build_from(backbones, "llama", "separate"):
        part.save_pretrained(folder)
    return folder


def inputs_of(model) -> dict[str, torch.Tensor]:
    batch = prompt([14, 19], sources=2)
    batch["input_ids"][batch["input_ids"] == KNOWLEDGE_ID] = model.config.knowledge_token_id
    return {**batch, "pixel_values": pictures(2)}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs_of(model)).logits


def names_in(folder: Path) -> set[str]:
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            names |= set(weights.keys())
    return names


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without an accelerator")
@pytest.mark.parametrize(("instructions", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_half_precision_is_widened_for_a_cpu_that_is_slow_in_it(llama, tmp_path, monkeypatch, instructions, dtype):
    """To the same values; and what is saved then still says nothing of it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    model, _ = load_model(llama)
    assert model.language_model.dtype == dtype
    plain = VikdfForConditionalGeneration.from_pretrained(llama)
    saved = plain.language_model.state_dict()
    assert saved["lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(value, saved[name].to(dtype)) for name, value in model.language_model.state_dict().items())
    for name, each in (("widened", model), ("plain", plain)):
        each.save_pretrained(tmp_path / name)
    assert (tmp_path / "widened/config.json").read_text() == (tmp_path / "plain/config.json").read_text()


# ---- what is trained, and nothing frozen ----


def test_only_what_is_trained_is_saved(built, checkpoint):
    model, _ = built
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_in(checkpoint) == trained
    assert not any(name.startswith(BACKBONES) for name in trained)
    files = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl")) or name.startswith(".")]


@pytest.mark.parametrize("loader", LOADERS)
def test_reloads_to_the_same_bits(built, checkpoint, loader):
    model = LOADERS[loader](checkpoint)
    assert type(model) is VikdfForConditionalGeneration
    assert torch.equal(logits(model), logits(built[0]))
    assert model.language_model.dtype == built[0].language_model.dtype
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(BACKBONES)), name
    assert not any(module.training for module in model.modules())


def test_the_frozen_weights_are_the_backbones_own(built, backbones):
    model, _ = built
    source = AutoModelForCausalLM.from_pretrained(model.config.backbones["language_model"]["repo_id"])
    ours = model.language_model.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in source.state_dict().items())


def test_a_saved_configuration_names_repositories_and_no_other_path(built, checkpoint, tmp_path):
    again = VikdfForConditionalGeneration.from_pretrained(checkpoint)
    again.save_pretrained(tmp_path)
    for folder in (checkpoint, tmp_path):
        text = (folder / "config.json").read_text()
        for source in built[0].config.backbones.values():
            text = text.replace(json.dumps(source["repo_id"]), '"org/name"')
        paths = [line for line in text.splitlines() if "/" in line.replace("org/name", "")]
        assert paths == []


def test_a_processor_reloads_with_the_model(built, checkpoint):
    _, processor = built
    loaded = AutoProcessor.from_pretrained(checkpoint)
    assert type(loaded) is VikdfProcessor
    chat = [[{"role": "user", "content": "What is your dog doing?"}]]
    assert all(torch.equal(loaded(chat)[name], value) for name, value in processor(chat).items())


def test_a_configuration_reloads_alone(checkpoint, built):
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is VikdfConfig and config.backbones == built[0].config.backbones


def test_generation_defaults_are_saved(llama, tmp_path):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    assert model.generation_config.temperature == 0.6  # the LLM's own
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, max_new_tokens=7)
    model.save_pretrained(tmp_path)
    loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (loaded.do_sample, loaded.max_new_tokens) == (False, 7)


def test_loading_and_saving_warn_of_nothing(llama, tmp_path, recwarn, caplog, capfd):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    model.get_image_knowledge(pictures())
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "all", include_backbones=True)
    VikdfForConditionalGeneration.from_pretrained(tmp_path / "all")
    assert [str(warning.message) for warning in recwarn] == []
    assert caplog.messages == []
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [
        line for line in lines if line and "Loading weights" not in line and "Writing model shards" not in line
    ] == []


def test_a_two_tower_repository_gives_each_its_tower(backbones, recwarn, caplog):
    for towers in ("clip", "siglip"):
        model, _ = build_from(backbones, "qwen", towers)
        assert "Text" in type(model.context_encoder).__name__
        model.attach_vision_encoder()
        assert "Vision" in type(model.vision_encoder).__name__
        both = AutoModel.from_pretrained(backbones / towers).state_dict()
        for encoder in (model.context_encoder, model.vision_encoder):
            for name, weight in encoder.state_dict().items():
                tower = "text_model." if "Text" in type(encoder).__name__ else "vision_model."
                assert torch.equal(weight, both.get(name, both.get(tower + name))), name
    assert [message for message in caplog.messages if "newly initialized" in message or "MISSING" in message] == []


def test_pictures_are_only_needed_when_there_is_one(llama):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    text = prompt([14])
    text["input_ids"][0, 2:6] = model.config.knowledge_token_id
    model(**text)
    assert model.vision_encoder is None
    logits(model)
    assert not model.vision_encoder.training
    assert not any(parameter.requires_grad for parameter in model.vision_encoder.parameters())


# ---- self-contained ----


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("llm", "towers"), [("llama", "separate"), ("qwen", "clip"), ("llama", "siglip")])
def test_self_contained(backbones, tmp_path, llm, towers, loader):
    """Loads without the folders it came from; a bfloat16 LLM beside float32 encoders stays that, to the bit."""
    moved = tmp_path / "backbones"
    shutil.copytree(backbones, moved)
    model, processor = build_from(moved, llm, towers)
    expected = logits(model)
    model.save_pretrained(tmp_path / "all", include_backbones=True)
    processor.save_pretrained(tmp_path / "all")
    assert set(model.config.backbones) == {"language_model", "context_encoder", "vision_encoder"}  # as it was
    shutil.rmtree(moved)
    loaded = LOADERS[loader](tmp_path / "all")
    assert loaded.config.backbones == {}
    assert loaded.language_model.dtype == model.language_model.dtype
    assert loaded.context_encoder.dtype == model.context_encoder.dtype
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if name.startswith(BACKBONES))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LOADERS[loader](tmp_path / "again")), expected)


def test_a_model_built_in_memory_is_self_contained(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = {**prompt([12, 15], sources=2), "pixel_values": pictures(2)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("model_class", [VikdfForConditionalGeneration, VikdfForPreTraining])
def test_weights_from_memory(model_class):
    model = model_class(tiny_config())
    loaded = model_class.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model = tiny_model("qwen", "clip")
    model.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in names_in(tmp_path))
    loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path)
    language_model = loaded.language_model
    assert language_model.lm_head.weight is language_model.get_input_embeddings().weight
    assert loaded.get_output_embeddings() is language_model.lm_head


def test_tied_embeddings_of_an_attached_llm_stay_tied(backbones):
    language_model = build_from(backbones, "qwen", "clip")[0].language_model
    assert language_model.lm_head.weight is language_model.get_input_embeddings().weight


@pytest.mark.parametrize("first", [False, True])
def test_one_kind_of_checkpoint_replaces_the_other(llama, tmp_path, first):
    """Also in shards: no file of the earlier one may be read with the later one's."""
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    model.save_pretrained(tmp_path, include_backbones=first, max_shard_size="60KB")
    model.knowledge_gate.data.add_(1)
    expected = logits(model)
    model.save_pretrained(tmp_path, include_backbones=not first)
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path)), expected)
    model.knowledge_gate.data.add_(1)
    expected = logits(model)
    model.save_pretrained(tmp_path, include_backbones=first, max_shard_size="60KB")
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path)), expected)


# ---- from_backbones ----


def test_bert_initialises_the_iqformer(backbones):
    model, _ = build_from(backbones, "qwen", "siglip", iqformer_config=None, bert=str(backbones / "bert"))
    bert = BertModel.from_pretrained(backbones / "bert")
    qformer = model.iqformer.qformer
    assert (qformer.config.hidden_size, len(qformer.encoder.layer)) == (32, 2)
    for layer, source in zip(qformer.encoder.layer, bert.encoder.layer, strict=True):
        assert torch.equal(layer.intermediate_query.dense.weight, source.intermediate.dense.weight)
        assert torch.equal(layer.output_query.dense.weight, source.output.dense.weight)
        assert torch.equal(layer.attention.attention.key.weight, source.attention.self.key.weight)
    assert logits(model).isfinite().all()


@pytest.fixture
def gemma(backbones, tmp_path) -> Path:
    """An LLM that scales its embeddings, with the tokenizer of another."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=512, num_hidden_layers=2, head_dim=12, max_position_embeddings=512, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(backbones / "qwen").save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def around(llm: Path, backbones: Path, **kwargs) -> tuple[VikdfForConditionalGeneration, VikdfProcessor]:
    folders = [str(llm), str(backbones / "bert")]
    processor = VikdfProcessor.from_backbones(
        *(AutoTokenizer.from_pretrained(folder) for folder in folders), vocab_size=512, num_knowledge_tokens=4
    )
    return VikdfForConditionalGeneration.from_backbones(*folders, processor=processor, **kwargs), processor


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_base_text_starts_with_silent_knowledge(backbones, name, request):
    llm = request.getfixturevalue("gemma") if name == "gemma" else backbones / name
    model, processor = around(llm, backbones, base_text="the dog")
    inputs = processor([[{"role": "user", "content": "What is your dog doing?"}]])
    words = torch.tensor((processor.tokenizer("the dog")["input_ids"] * 4)[:4])
    spoken = inputs["input_ids"].clone()
    spoken[spoken == processor.knowledge_token_id] = words
    assert torch.equal(model(**inputs).logits, model.language_model(input_ids=spoken).logits)
    assert (model.knowledge_gate == 0).all()
    # or with gates that are open
    model, processor = around(llm, backbones, base_text="the dog", initial_gate=0.5)
    assert (model.knowledge_gate == 0.5).all()
    assert not torch.allclose(model(**inputs).logits, model.language_model(input_ids=spoken).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen", "gemma"])
def test_the_projection_starts_at_the_embeddings_scale(backbones, name, request):
    llm = request.getfixturevalue("gemma") if name == "gemma" else backbones / name
    model, _ = around(llm, backbones)
    knowledge = model.get_text_knowledge(torch.arange(1, 9).view(2, 4))
    words = model.get_input_embeddings()(torch.arange(512)).norm(dim=-1).mean()
    assert 0.5 < model.project_knowledge(knowledge).norm(dim=-1).mean() / words < 2


def test_revisions_are_recorded(backbones):
    model, _ = build_from(backbones, "qwen", "clip", revisions={"language_model": "abc"})
    assert model.config.backbones["language_model"]["revision"] == "abc"
    assert model.config.backbones["context_encoder"]["revision"] is None


def test_repositories_found_elsewhere_keep_their_names(backbones, tmp_path, monkeypatch):
    """A folder of this machine is where a backbone was found, not what it is called."""
    monkeypatch.setenv("VIKDF_BACKBONES", str(backbones))
    processor = VikdfProcessor.from_backbones(
        *(AutoTokenizer.from_pretrained(backbones / name) for name in ("qwen", "clip")), vocab_size=512
    )
    model = VikdfForConditionalGeneration.from_backbones("org/qwen", "org/clip", "org/clip", processor=processor)
    for name, include_backbones in {"trained": False, "all": True}.items():
        model.save_pretrained(tmp_path / name, include_backbones=include_backbones)
        text = (tmp_path / name / "config.json").read_text()
        assert str(backbones) not in text and "org/qwen" in text
    loaded = VikdfForConditionalGeneration.from_pretrained(tmp_path / "trained")
    loaded.save_pretrained(tmp_path / "again")
    assert not {str(backbones), str(tmp_path)} & set((tmp_path / "again" / "config.json").read_text().split('"'))
    assert torch.equal(loaded.knowledge_gate, model.knowledge_gate)


# ---- dtype, attention, devices, quantisation ----


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16"])
@pytest.mark.parametrize("self_contained", [False, True])
def test_dtype_is_the_backbones(llama, tmp_path_factory, loader, dtype, name, self_contained):
    folder = llama
    if self_contained:
        folder = tmp_path_factory.getbasetemp() / "self-contained"
        if not folder.exists():
            VikdfForConditionalGeneration.from_pretrained(llama).save_pretrained(folder, include_backbones=True)
    model = LOADERS[loader](folder, **{name: dtype})
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in model.language_model.parameters()} == {expected}
    assert {p.dtype for p in model.context_encoder.parameters()} == {expected}
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == expected
    assert model.get_text_knowledge(torch.tensor([[1, 20, 3]])).dtype == torch.float32


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_is_the_llms(llama, loader, implementation):
    model = LOADERS[loader](llama, attn_implementation=implementation)
    assert model.language_model.config._attn_implementation == implementation
    expected = VikdfForConditionalGeneration.from_pretrained(llama)
    words = inputs_of(model)["attention_mask"].bool()  # padding attends to nothing, and to no one's concern
    torch.testing.assert_close(logits(model.float())[words], logits(expected.float())[words], atol=1e-3, rtol=1e-3)


def test_the_attention_implementation_is_not_saved(llama, tmp_path):
    VikdfForConditionalGeneration.from_pretrained(llama, attn_implementation="eager").save_pretrained(tmp_path)
    model = VikdfForConditionalGeneration.from_pretrained(tmp_path)
    assert model.language_model.config._attn_implementation == "sdpa"


def test_flex_attention_reads_padding_and_knowledge_as_another_does(both_directions, llama):
    """Without compiling, which takes a C++ compiler on a CPU, and has no backward pass there."""
    one = VikdfForConditionalGeneration.from_pretrained(llama, dtype=torch.float32)
    flex = {"dtype": torch.float32, "attn_implementation": "flex_attention"}
    other, words = VikdfForConditionalGeneration.from_pretrained(llama, **flex), inputs_of(one)["attention_mask"] == 1
    assert other.language_model.config._attn_implementation == "flex_attention"
    how = {"max_new_tokens": 4, "do_sample": False}
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(other)[words], logits(one)[words], atol=1e-4, rtol=1e-4)
        for beams in (1, 3):
            replies = [each.generate(**inputs_of(each), **how, num_beams=beams) for each in (one, other)]
            assert torch.equal(*replies)
        losses = []
        for settings in ({"dtype": torch.float32}, flex):
            learner = both_directions(**settings)
            with torch.no_grad():
                losses.append(learner(**training_inputs(learner)).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loader", LOADERS)
def test_device_map_of_one_device(llama, loader, recwarn, tmp_path):
    model = LOADERS[loader](llama, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(VikdfForConditionalGeneration.from_pretrained(llama)))
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(llama)
    assert [str(warning.message) for warning in recwarn] == []


OFFLOADED = {
    "a layer": {"": "cpu", "model.layers.1": "disk"},
    "the embeddings": {"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"},
}


@pytest.mark.parametrize("device_map", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("loader", LOADERS)
def test_device_map_with_weights_on_disk(llama, loader, device_map, tmp_path):
    device_map = {"model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"} | {
        name: place for name, place in device_map.items() if name
    }
    for name in ("model.layers.1", "model.embed_tokens", "lm_head"):
        device_map.setdefault(name, "cpu")
    model = LOADERS[loader](llama, device_map=device_map, offload_folder=tmp_path / "offload")
    on_disk = [name for name, parameter in model.language_model.named_parameters() if parameter.is_meta]
    assert on_disk and all(device_map[place] == "disk" for place in device_map for name in on_disk if place in name)
    expected = VikdfForConditionalGeneration.from_pretrained(llama)
    assert torch.equal(logits(model), logits(expected))
    replies = [each.generate(**inputs_of(each), max_new_tokens=3, do_sample=False) for each in (model, expected)]
    assert torch.equal(*replies)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of what is saved is on the disk
        model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path / "trained")), logits(expected))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "all", include_backbones=True)
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path / "all")), logits(expected))


def training_inputs(model) -> dict[str, torch.Tensor]:
    """Captions for both directions of the LLM, and where in them what lies, as a collator gives it."""
    token, batch = model.config.knowledge_token_id, prompt([14, 19])
    batch["input_ids"][batch["input_ids"] == KNOWLEDGE_ID] = token
    words = (batch["attention_mask"] == 1) & (batch["input_ids"] != token)
    batch["labels"] = batch["input_ids"].masked_fill(~words, -100)
    draws = {"input_ids": torch.cat([torch.arange(10, 32).view(2, 11), torch.full((2, 4), token)], dim=1)}
    draws["attention_mask"] = torch.ones_like(draws["input_ids"])
    draws |= locate_columns(draws, token)
    return batch | locate_columns(batch, token) | {f"draw_{name}": value for name, value in draws.items()}


def learn(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of both directions, and the gradients of all that is trained."""
    torch.manual_seed(0)
    loss = model.train()(**training_inputs(model)).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def both_directions(llama):
    """Loads a model that learns both directions, the same each time; with further arguments."""

    def load(**kwargs):
        torch.manual_seed(0)
        weights = {"knowledge_to_text": 1.0, "text_to_knowledge": 1.0}
        return VikdfForPreTraining.from_pretrained(llama, loss_weights=weights, **kwargs)

    return load


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_trained_learns_through_weights_on_disk(both_directions, checkpointing, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    model, expected = both_directions(device_map=places, offload_folder=tmp_path), both_directions()
    assert model.language_model.lm_head.weight.is_meta
    for each in (model, expected):
        if checkpointing:
            getattr(each, "activation_checkpointing_enable", each.gradient_checkpointing_enable)()
    for ours, theirs in zip(learn(model), learn(expected), strict=True):
        assert torch.equal(ours, theirs)


class Elsewhere(torch.Tensor):
    """As if on another device: with a tensor of this one it meets only where it has been moved."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and isinstance(args[1], (str, torch.device)):
            return super().__torch_function__(func, types, args, kwargs or {}).as_here()
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        assert all(isinstance(each, cls) for each in tensors), f"{func.__name__} of tensors on two devices"
        return super().__torch_function__(func, types, args, kwargs or {})

    def as_here(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("known", [True, False])
def test_what_the_llm_computes_on_its_last_device_comes_back(both_directions, known, monkeypatch):
    """In a device map over several the states and logits are where its last layer and its head are."""
    model = both_directions()
    if not known:
        monkeypatch.setattr(sys.modules[__name__], "locate_columns", lambda batch, token: {})
    expected = learn(model)
    model.zero_grad()
    language_model = model.language_model

    def send(_, __, outputs):
        outputs.last_hidden_state = outputs.last_hidden_state.as_subclass(Elsewhere)
        return outputs

    # as accelerate's hooks: the head takes its input to its own device, and the LLM's outputs come back as a whole
    language_model.base_model.register_forward_hook(send)
    language_model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].to("cpu"),))
    language_model.lm_head.register_forward_hook(lambda _, __, logits: logits.as_subclass(Elsewhere))

    def come_back(_, __, outputs):
        outputs.logits = outputs.logits.to("cpu")
        return outputs

    language_model.register_forward_hook(come_back)
    for ours, theirs in zip(learn(model), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_device_map_of_a_self_contained_checkpoint(llama, tmp_path):
    expected = VikdfForConditionalGeneration.from_pretrained(llama)
    expected.save_pretrained(tmp_path, include_backbones=True)
    for device_map in ({"": "cpu"}, "auto"):
        model = VikdfForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("owner", [VikdfForConditionalGeneration, AutoModel, AutoModelForCausalLM])
def test_quantization_config_reaches_the_llm_and_nothing_else(llama, backbones, owner):
    """Quantisers need packages of their own, so what the LLM's loader was given stands for what it does with it."""
    quantization, calls = BitsAndBytesConfig(load_in_4bit=True), []
    load = AutoModelForCausalLM.from_pretrained.__func__

    def spy(cls, path, *args, **kwargs):
        if str(path) == str(backbones / "llama"):
            calls.append((kwargs.pop("quantization_config"), kwargs["device_map"]))
        return load(cls, path, *args, **kwargs)

    with patch.object(AutoModelForCausalLM, "from_pretrained", classmethod(spy)):
        model = owner.from_pretrained(llama, quantization_config=quantization, device_map={"": "cpu"})
    assert calls == [(quantization, {"": "cpu"})]
    assert not hasattr(model.config, "quantization_config")
    assert logits(model).isfinite().all()


def test_quantising_a_self_contained_checkpoint_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds its own LLM"):
        VikdfForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def test_a_quantised_llm_is_not_saved(llama, tmp_path):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    model.language_model.is_quantized = True
    with pytest.raises(ValueError, match="quantised LLM"):
        model.save_pretrained(tmp_path / "all", include_backbones=True)
    model.save_pretrained(tmp_path / "trained")
    assert names_in(tmp_path / "trained") == names_in(llama)


def test_fields_of_the_configuration_can_be_changed(llama):
    model = VikdfForConditionalGeneration.from_pretrained(llama, knowledge_pooling="mean")
    assert model.config.knowledge_pooling == "mean" and model.matching_head.pooling == "mean"


# ---- offline ----

OFFLINE = """
import sys, torch
import modeling_vikdf
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained("org/vikdf")
processor = AutoProcessor.from_pretrained("org/vikdf")
inputs = processor([[{"role": "user", "content": "What is your dog doing?"}]])
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[1])
"""


def hub_cache(root: Path, repositories: dict[str, Path]) -> None:
    """Lays folders out as the Hub cache does."""
    for name, folder in repositories.items():
        repository = root / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)


def test_offline_from_the_hub_cache(backbones, tmp_path):
    """In a process of its own, with nothing but what an earlier download left."""
    model, processor = build_from(backbones, "llama", "separate")
    for role, name in {"language_model": "llama", "context_encoder": "bert", "vision_encoder": "dinov2"}.items():
        model.config.backbones[role]["repo_id"] = f"org/{name}"
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vikdf")
    hub_cache(
        tmp_path / "home",
        {"org/vikdf": tmp_path / "vikdf", **{f"org/{name}": backbones / name for name in ("llama", "bert", "dinov2")}},
    )
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "VIKDF_", "TRANSFORMERS_"))}
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**keep, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", "-c", OFFLINE, str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inputs = processor([[{"role": "user", "content": "What is your dog doing?"}]])
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**inputs).logits)


# ---- saving while training, and interrupted ----


def test_a_state_dict_given_by_a_trainer(llama, tmp_path):
    """Trainers pass the whole state, gathered from wherever it was."""
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    state["knowledge_gate"] += 1
    model.save_pretrained(tmp_path, state_dict=state, is_main_process=True)
    assert names_in(tmp_path) == names_in(llama)
    assert torch.equal(
        VikdfForConditionalGeneration.from_pretrained(tmp_path).knowledge_gate, model.knowledge_gate + 1
    )


def test_only_the_main_process_writes(llama, tmp_path):
    VikdfForConditionalGeneration.from_pretrained(llama).save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["weights", "configuration", "first move", "second move"])
def test_an_interrupted_save_leaves_a_loadable_checkpoint(llama, tmp_path, moment):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    model.save_pretrained(tmp_path)
    before, old = logits(model), {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.knowledge_gate.data.add_(1)
    after = logits(model)

    moves, replace = [], os.replace

    def interrupted_replace(source, target):
        moves.append(target)
        if len(moves) == {"first move": 1, "second move": 2}[moment]:
            raise KeyboardInterrupt
        return replace(source, target)

    def half_written(tensors, filename, **kwargs):
        Path(filename).write_bytes(b"\x00" * 100)
        raise OSError("No space left on device")

    interruption = {
        "weights": patch("transformers.modeling_utils.safe_save_file", half_written),
        "configuration": patch.object(VikdfConfig, "save_pretrained", side_effect=KeyboardInterrupt),
    }.get(moment, patch("modeling_vikdf.modeling_saving.os.replace", interrupted_replace))
    with interruption, pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded = logits(VikdfForConditionalGeneration.from_pretrained(tmp_path))
    if moment == "second move":  # the weights are in place, all of them
        assert torch.equal(loaded, after)
    else:
        assert torch.equal(loaded, before)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert set(model.config.backbones) == {"language_model", "context_encoder", "vision_encoder"}
    model.save_pretrained(tmp_path)  # and the next one succeeds
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path)), after)


def test_files_of_others_in_the_folder_stay(llama, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "optimizer.pt").write_text("the trainer's")
    VikdfForConditionalGeneration.from_pretrained(llama).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "optimizer.pt").exists()


def test_saving_to_the_hub_goes_another_way(llama, tmp_path):
    model = VikdfForConditionalGeneration.from_pretrained(llama)
    with pytest.raises(ValueError, match="call push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


# ---- damaged or wrong checkpoints ----


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of a saved configuration; `key__field=value` those of a sub-configuration."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        *outer, field = key.split("__")
        target = config
        for name in outer:
            target = target[name]
        target[field] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("loader", LOADERS)
def test_missing_weights(copy, loader):
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        LOADERS[loader](copy)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_weights(copy, keep):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(OSError, match="copy or download it again"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_incomplete_weights(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["iqformer.query_tokens"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks 1 weights.*iqformer.query_tokens"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_weights_of_other_sizes(copy):
    edit_config(copy, num_knowledge_tokens=8)
    with pytest.raises(ValueError, match="do not have the sizes"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VikdfForConditionalGeneration.from_pretrained(copy)
    with pytest.raises(ValueError, match="safetensors only"):
        VikdfForConditionalGeneration.from_pretrained(copy, use_safetensors=False)


def test_no_configuration(copy):
    (copy / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_unknown_model_type_of_a_backbone(copy):
    edit_config(copy, text_config__model_type="gpt-99")
    with pytest.raises(ValueError, match="text_config names the model type 'gpt-99'"):
        VikdfForConditionalGeneration.from_pretrained(copy)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 64), ("vocab_size", 1024)])
def test_an_llm_of_another_size(copy, field, value):
    edit_config(copy, **{f"text_config__{field}": value})
    with pytest.raises(ValueError):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_another_llm_than_the_one_trained_with(copy, tmp_path):
    config = llm_config("llama")
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    edit_config(copy, backbones__language_model={"repo_id": str(tmp_path / "wider")})
    with pytest.raises(ValueError, match="hidden_size=64, but this checkpoint was made for hidden_size=48"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_an_encoder_that_is_another_model(copy, backbones):
    edit_config(copy, backbones__context_encoder={"repo_id": str(backbones / "qwen")})
    with pytest.raises(OSError, match="context_encoder.*qwen.*lacks.*BertModel"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_a_backbone_with_truncated_weights(copy, backbones, tmp_path):
    shutil.copytree(backbones / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    edit_config(copy, backbones__language_model={"repo_id": str(tmp_path / "llama")})
    with pytest.raises(OSError, match=r"llama.*copy or download it again"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_a_backbone_that_is_nowhere(copy):
    edit_config(copy, backbones__language_model={"repo_id": "org/nowhere-to-be-found"})
    with pytest.raises(BackboneNotFoundError, match="org/nowhere-to-be-found"):
        VikdfForConditionalGeneration.from_pretrained(copy)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path / "nothing")):
        VikdfForConditionalGeneration.from_pretrained(tmp_path / "nothing")


def test_a_checkpoint_of_another_model(backbones):
    with pytest.raises(OSError, match="found one of a 'llama'.*from_backbones"):
        VikdfForConditionalGeneration.from_pretrained(backbones / "llama")
