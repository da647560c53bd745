"""Tiny random models, built in memory: every kind of backbone the tests need, none of them from a file."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_models import LLMS, TOWERS, tiny_config

from modeling_vikdf import VikdfForConditionalGeneration


def build(llm: str, towers: str, seed: int = 0, **kwargs) -> VikdfForConditionalGeneration:
    torch.manual_seed(seed)
    model = VikdfForConditionalGeneration(tiny_config(llm, towers, **kwargs)).eval()
    with torch.no_grad():  # weights large enough that knowledge changes the logits
        for parameter in (model.iqformer.query_tokens, model.language_projection.weight, model.knowledge_base):
            parameter.normal_(std=0.5)
        model.knowledge_gate.uniform_(0.5, 1.5)
    return model


@pytest.fixture(params=[(llm, towers) for llm in LLMS for towers in TOWERS], ids="-".join)
def model(request: pytest.FixtureRequest) -> VikdfForConditionalGeneration:
    """Every LLM family with every kind of towers."""
    return build(*request.param)


@pytest.fixture
def llama_model() -> VikdfForConditionalGeneration:
    return build("llama", "separate")
