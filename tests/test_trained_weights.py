"""Whatever was trained, in whatever way, is in the checkpoint, or saving says that it cannot be."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import build_from
from test_checkpoints import LOADERS, inputs_of, logits, names_in
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling_vikdf import VikdfForConditionalGeneration
from modeling_vikdf.modeling_saving import checksums


BACKBONES = {"language_model", "context_encoder", "vision_encoder"}
QUERIES = r"language_model\..*\.(q_proj|v_proj)"


@pytest.fixture(scope="module", autouse=True)
def any_peft():
    """transformers 5.24 asks for a PEFT that is not released yet."""
    with patch("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18"):
        yield


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module", params=["llama", "qwen"])
def checkpoint(request, backbones, tmp_path_factory) -> Path:
    """llama in bfloat16, qwen in float32 with tied embeddings; each names its backbones."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = build_from(backbones, request.param, "separate")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(checkpoint) -> VikdfForConditionalGeneration:
    """A model of one's own."""
    return VikdfForConditionalGeneration.from_pretrained(checkpoint)


def roles_in(folder: Path) -> set[str]:
    return {name.split(".")[0] for name in names_in(folder)} & BACKBONES


def saved_and_loaded(model, folder: Path, **kwargs) -> VikdfForConditionalGeneration:
    model.save_pretrained(folder, **kwargs)
    return VikdfForConditionalGeneration.from_pretrained(folder)


# ---- changed backbones ----


def test_an_llm_that_was_trained(trained, tmp_path, caplog):
    trained.language_model.requires_grad_(True)
    before = logits(trained)
    loss = trained(**inputs_of(trained), labels=inputs_of(trained)["input_ids"]).loss
    loss.backward()
    torch.optim.SGD(trained.language_model.parameters(), lr=0.5).step()
    assert not torch.equal(logits(trained), before)
    loaded = saved_and_loaded(trained, tmp_path)
    assert torch.equal(logits(loaded), logits(trained))
    assert roles_in(tmp_path) == {"language_model"} and set(loaded.config.backbones) == BACKBONES - {"language_model"}
    assert "language_model is no longer that of" in caplog.text
    assert set(trained.config.backbones) == BACKBONES  # as it was
    assert torch.equal(logits(saved_and_loaded(loaded, tmp_path / "again")), logits(trained))


@pytest.mark.parametrize("role", sorted(BACKBONES))
@pytest.mark.parametrize("amount", ["one bit of one weight", "two weights swapped"])
def test_no_change_is_too_small(trained, tmp_path, role, amount):
    """Nor does it matter that `data` is written, of which autograd's version counter knows nothing."""
    trained.attach_vision_encoder()
    weight = max(getattr(trained, role).parameters(), key=torch.numel).data.flatten(1)
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
    if amount == "one bit of one weight":
        bits[-1, -1] ^= 1
    else:
        bits[-1, :2] = bits[-1, :2].flip(0).clone()
    loaded = saved_and_loaded(trained, tmp_path)
    assert roles_in(tmp_path) == {role}
    loaded.attach_vision_encoder() if role == "vision_encoder" else None
    theirs = getattr(loaded, role).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in getattr(trained, role).state_dict().items())
    assert torch.equal(logits(loaded), logits(trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_precision_is_no_change(trained, tmp_path, dtype):
    if trained.language_model.dtype == torch.bfloat16 and dtype == torch.float16:
        pytest.skip("rounds to values that the repository does not give")
    trained.attach_vision_encoder()
    for role in BACKBONES:
        getattr(trained, role).to(dtype)
    trained.save_pretrained(tmp_path)
    assert roles_in(tmp_path) == set()
    weight = trained.language_model.get_input_embeddings().weight.data
    weight.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 0] ^= 1
    loaded = saved_and_loaded(trained, tmp_path)
    assert roles_in(tmp_path) == {"language_model"}
    assert torch.equal(loaded.get_input_embeddings().weight, weight)


class LargestResult(TorchDispatchMode):
    """The number of values of the largest tensor that is made, views excepted."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_checksums_of_each_precision_take_one_pass(dtype):
    """Copies of a backbone in half precision would cost more than reading it."""
    weight = torch.arange(3_000_001).remainder(127).to(dtype)  # no whole number of words or parts
    with LargestResult() as largest:
        sums = checksums(weight)
    assert largest.size < len(weight) / 4
    rounded = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    assert [*sums] == [dtype, *rounded]
    for precision in rounded:
        assert checksums(weight.to(precision)) == {precision: sums[precision]}
    assert checksums(weight[1:]) != sums and checksums(weight[1:]) == checksums(weight[1:].clone())
    for position in (0, 1_234_567, 3_000_000):
        changed = weight.clone()
        changed[position] += 1
        assert all(checksums(changed)[precision] != value for precision, value in sums.items())


def test_a_vocabulary_that_was_resized(trained, tmp_path):
    trained.resize_token_embeddings(520)
    loaded = saved_and_loaded(trained, tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 520
    assert torch.equal(logits(loaded), logits(trained))


def test_an_llm_put_in_by_hand(trained, tmp_path):
    """Of which nobody knows whether it is what the repository has."""
    trained.language_model = AutoModelForCausalLM.from_config(trained.config.text_config).eval()
    assert torch.equal(logits(saved_and_loaded(trained, tmp_path)), logits(trained))


def test_a_state_dict_is_compared_in_the_models_place(trained, tmp_path):
    state = {name: weight.clone() for name, weight in trained.state_dict().items()}
    state["language_model.model.norm.weight"] += 1
    trained.save_pretrained(tmp_path, state_dict=state)
    trained.language_model.model.norm.weight.data.add_(1)
    assert torch.equal(logits(VikdfForConditionalGeneration.from_pretrained(tmp_path)), logits(trained))


def test_weights_on_the_disk_are_compared(checkpoint, tmp_path):
    device_map = {"model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.embed_tokens": "cpu", "lm_head": "cpu"}
    model = VikdfForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    model.save_pretrained(tmp_path / "same")
    assert roles_in(tmp_path / "same") == set()
    model.language_model.model.norm.weight.data.add_(1)
    with pytest.warns(UserWarning, match="offloaded"):
        loaded = saved_and_loaded(model, tmp_path / "other")
    assert torch.equal(logits(loaded), logits(model))


def test_a_quantised_llm_that_changed_is_refused(trained, tmp_path):
    trained.language_model.is_quantized = True
    trained.language_model.model.norm.weight.data.add_(1)
    with pytest.raises(ValueError, match="quantised LLM"):
        trained.save_pretrained(tmp_path)


# ---- PEFT ----


def settings(peft, **kwargs):
    return peft.LoraConfig(**{"target_modules": QUERIES, "init_lora_weights": False, **kwargs})


@pytest.mark.parametrize("modules_to_save", [None, ["language_projection"]])
def test_merged(trained, tmp_path, peft, modules_to_save):
    before = logits(trained)
    adapted = peft.get_peft_model(trained, settings(peft, modules_to_save=modules_to_save))
    if modules_to_save:
        adapted.base_model.model.language_projection.modules_to_save["default"].weight.data.add_(1)
    model = adapted.merge_and_unload()
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(saved_and_loaded(model, tmp_path)), logits(model))


@pytest.mark.parametrize("loader", LOADERS)
def test_add_adapter_beside_what_is_trained(trained, tmp_path, peft, loader):
    trained.knowledge_gate.data.add_(1)
    trained.iqformer.query_tokens.data.add_(1)
    trained.add_adapter(settings(peft, modules_to_save=["language_projection"]))
    trained.language_projection.modules_to_save["default"].weight.data.add_(1)
    trained.save_pretrained(tmp_path)
    assert roles_in(tmp_path) == set() and (tmp_path / "config.json").exists()
    loaded = LOADERS[loader](tmp_path)
    assert torch.equal(logits(loaded), logits(trained))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} >= {"knowledge_gate", "knowledge_base"}
    assert not any(p.requires_grad for p in loaded.context_encoder.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LOADERS[loader](tmp_path / "again")), logits(trained))
    # and it is gone with the next checkpoint that has none
    loaded.delete_adapter("default")
    assert not torch.equal(logits(saved_and_loaded(loaded, tmp_path / "again")), logits(trained))
    assert not (tmp_path / "again/adapter/adapter_config.json").exists()


def test_add_adapter_and_an_llm_that_changed(trained, tmp_path, peft):
    trained.add_adapter(settings(peft, target_modules=r"(language_model|iqformer)\..*\.(q_proj|query|dense)"))
    trained.language_model.model.norm.weight.data.add_(1)
    assert torch.equal(logits(saved_and_loaded(trained, tmp_path)), logits(trained))
    assert roles_in(tmp_path) == {"language_model"}


def test_add_adapter_self_contained(trained, tmp_path, peft):
    trained.add_adapter(settings(peft))
    loaded = saved_and_loaded(trained, tmp_path, include_backbones=True)
    assert loaded.config.backbones == {}
    assert torch.equal(logits(loaded), logits(trained))


def test_an_adapter_names_no_folder_of_this_machine(trained, checkpoint, tmp_path, peft):
    trained.add_adapter(settings(peft))
    trained.save_pretrained(tmp_path)
    assert str(checkpoint) not in (tmp_path / "adapter/adapter_config.json").read_text()


@pytest.mark.parametrize("how", ["PeftModel", "AutoModelForCausalLM", "itself", "AutoPeftModelForCausalLM"])
def test_get_peft_model(checkpoint, trained, tmp_path, peft, how):
    adapted = peft.get_peft_model(
        trained, settings(peft, modules_to_save=["language_projection"], task_type="CAUSAL_LM")
    )
    adapted.base_model.model.language_projection.modules_to_save["default"].weight.data.add_(1)
    adapted.save_pretrained(tmp_path)
    if how == "PeftModel":
        base = VikdfForConditionalGeneration.from_pretrained(checkpoint)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    elif how == "AutoPeftModelForCausalLM":
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    else:
        loaded = LOADERS[how](tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of(trained)).logits, adapted(**inputs_of(trained)).logits)


@pytest.mark.parametrize("loader", LOADERS)
def test_peft_in_the_models_own_folder(checkpoint, trained, tmp_path, peft, loader):
    """As a script does that saves both of them."""
    trained.knowledge_gate.data.add_(1)
    trained.save_pretrained(tmp_path)
    adapted = peft.get_peft_model(trained, settings(peft))
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(LOADERS[loader](tmp_path)), adapted(**inputs_of(trained)).logits)


def test_the_base_of_a_peft_model(trained, tmp_path, peft):
    adapted = peft.get_peft_model(trained, settings(peft))
    assert torch.equal(logits(saved_and_loaded(adapted.get_base_model(), tmp_path)), logits(trained))


def test_all_linear_hits_the_encoders_and_says_so(trained, tmp_path, peft, caplog):
    logging.warning_once.cache_clear()  # or another test may have had the warning
    trained.attach_vision_encoder()
    adapted = peft.get_peft_model(trained, settings(peft, target_modules="all-linear"))
    assert "context_encoder" not in caplog.text
    adapted.train()
    assert "context_encoder and vision_encoder" in caplog.text and "target_modules" in caplog.text
    model = adapted.eval().merge_and_unload()
    assert torch.equal(logits(saved_and_loaded(model, tmp_path)), logits(model))
    assert roles_in(tmp_path) == BACKBONES


WRAPPED = {
    "get_peft_model": lambda peft, part: peft.get_peft_model(part, settings(peft, target_modules=["q_proj"])),
    "compile": lambda peft, part: torch.compile(part),
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_part_that_was_wrapped_is_refused(trained, tmp_path, peft, wrap):
    trained.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    trained.language_model = WRAPPED[wrap](peft, trained.language_model)
    with pytest.raises(ValueError, match="would not load again.*wrapped or replaced"):
        trained.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    if wrap == "get_peft_model":  # what the error says to do
        trained.language_model = trained.language_model.merge_and_unload()
        assert torch.equal(logits(saved_and_loaded(trained, tmp_path)), logits(trained))


def test_a_replaced_part_of_its_own_is_refused(trained, tmp_path):
    trained.language_projection = nn.Sequential(trained.language_projection)
    with pytest.raises(ValueError, match="would not load again"):
        trained.save_pretrained(tmp_path)


def test_several_adapters_are_refused(trained, tmp_path, peft):
    for name in ("first", "second"):
        trained.add_adapter(settings(peft), name)
    with pytest.raises(ValueError, match=r"adapters \['first', 'second'\]"):
        trained.save_pretrained(tmp_path)
    assert json.loads(json.dumps(trained.config.to_dict()))["adapter"] is None
