"""Quantised LLMs: what is trained gets its gradient through their frozen weights, and they reply.

Skipped without torchao.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_from
from test_checkpoints import inputs_of, logits, names_in
from torch.nn.functional import cosine_similarity
from transformers import TorchAoConfig

from modeling_vikdf import VikdfForConditionalGeneration


@pytest.fixture
def eight_bits() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, _ = build_from(backbones, "llama", "separate")
    model.save_pretrained(folder)
    return folder


def load(checkpoint: Path, quantization: Any = None) -> VikdfForConditionalGeneration:
    where = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
    return VikdfForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, **where)


def loss_of(model: VikdfForConditionalGeneration) -> torch.Tensor:
    inputs = inputs_of(model)
    return model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss


def gradient(model: VikdfForConditionalGeneration) -> torch.Tensor:
    """Of everything that is trained, in one vector."""
    loss_of(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def test_what_is_trained_learns_through_a_quantised_llm(eight_bits, checkpoint):
    model, whole = load(checkpoint, eight_bits), load(checkpoint)
    assert model.language_model.is_quantized and not any(p.requires_grad for p in model.language_model.parameters())
    assert cosine_similarity(logits(model).flatten(), logits(whole).flatten(), 0) > 0.99
    assert cosine_similarity(gradient(model), gradient(whole), 0) > 0.99
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = loss_of(model)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model) < before - 0.05


def test_a_quantised_llm_replies_and_is_left_out_of_the_checkpoint(eight_bits, checkpoint, tmp_path):
    model = load(checkpoint, eight_bits)
    inputs = inputs_of(model)
    evoking = ("context_input_ids", "context_attention_mask", "pixel_values")
    knowledge = model.get_knowledge(**{name: inputs.pop(name) for name in evoking if name in inputs})
    replies = [
        model.generate(**inputs, knowledge=k, max_new_tokens=6, do_sample=False) for k in (knowledge, -knowledge)
    ]
    assert not torch.equal(*replies)
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == names_in(checkpoint)
    assert torch.equal(logits(load(tmp_path, eight_bits)), logits(model))
