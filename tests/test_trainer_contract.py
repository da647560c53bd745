"""Trainer's contract: every setting of it works, or is refused before anything runs."""

import copy

import pytest
import torch
from tiny_training import ALL, arguments, dialogue_model, dialogues, make_trainer, pairs, pretraining_model, processor
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from modeling_vikdf.collators import DialogueCollator, PreTrainingCollator
from modeling_vikdf.modeling_backbones import CACHE
from modeling_vikdf.training import VikdfTrainer, VikdfTrainingArguments


def enable_checkpointing(model: nn.Module, **kwargs) -> None:
    """By its present name, or the one it had up to transformers 5.23."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs or None)


def saved_bytes(run, where=lambda: True) -> int:
    """How much the backward pass of `run()` keeps, but for parameters; of what runs `where()` holds."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        if where() and not isinstance(tensor, nn.Parameter):
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def batch_of(model: nn.Module, rows: int = 4) -> dict:
    if hasattr(model, "pixel_decoder"):
        collate = PreTrainingCollator(processor(), model.config, image_knowledge_share=0.5, other_caption=True)
        return collate(pairs(rows))
    return DialogueCollator(processor())(dialogues(rows))


def gradients(model: nn.Module, **batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


MODELS = {"dialogues": dialogue_model, "pairs": lambda **kwargs: pretraining_model(ALL, **kwargs)}


# ---- gradient checkpointing ----


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("llm", ["qwen", "llama"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_keeps_the_gradients(kind, llm, use_reentrant):
    """With dropout in what trains and, had it its way, in the LLM; the prefix is read once, into the cache."""
    model = MODELS[kind](llm=llm, dropout=0.1)
    model.language_model.config.attention_dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = batch_of(model)
    expected = gradients(model, **batch)
    read = []
    model.read_prefix = lambda *args: read.append(type(model).read_prefix(model, *args)) or read[-1]
    enable_checkpointing(model, use_reentrant=use_reentrant)
    found = gradients(model, **batch)
    assert read and all(cache.get_seq_length() > 0 for cache in read)
    assert found.keys() == expected.keys() != set()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not any(module.training for module in model.language_model.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_keeps_the_input_of_the_llms_layers_alone(kind):
    """And of the columns behind the prefix alone, which is read without gradient as it is without checkpointing."""
    model = MODELS[kind]()
    batch, inside, inputs = batch_of(model), [], []

    def enter(layer, args):
        inside.append(torch.is_grad_enabled())
        inputs.append(args[0].numel() * args[0].element_size() if inside[-1] else 0)

    def leave(*_):
        inside.pop()

    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    activations = saved_bytes(lambda: model(**batch), where=lambda: inside and inside[-1])
    whole = 4 * batch["input_ids"].numel() * model.config.text_config.hidden_size
    inputs.clear()
    enable_checkpointing(model)
    kept = saved_bytes(lambda: model(**batch), where=lambda: inside and inside[-1])
    assert kept == sum(inputs) < activations / 5
    assert max(inputs) < whole


def test_the_llms_own_checkpointing_saves_as_much():
    """The knowledge in the first column, so that there is no prefix to read apart."""
    model = dialogue_model()
    batch = DialogueCollator(processor())(dialogues(4))
    first = int((batch["input_ids"] == model.config.knowledge_token_id).any(0).int().argmax())
    batch |= {key: batch[key][:, first:] for key in ("input_ids", "attention_mask", "labels", "position_ids")}
    found, expected = [], []
    for enabled in (False, True):
        if enabled:
            enable_checkpointing(model)
            model.iqformer.eval()
        found.append(saved_bytes(lambda: model(**batch)))
        llm = copy.deepcopy(model.language_model).train()
        embeds = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size, requires_grad=True)
        mask, positions = batch["attention_mask"], batch["position_ids"]
        expected.append(
            saved_bytes(lambda: llm.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions))
        )
    assert found[0] - found[1] == expected[0] - expected[1] > expected[0] / 2
