"""Tiny random models, built in memory or saved to folders of their own as backbones."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import LLMS, TOWERS, llm_config, speak_up, tiny_model, tower_configs, two_towers
from tiny_tokenizers import bert_tokenizer, clip_like_tokenizer, image_processor, llama_tokenizer, qwen_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # from the top it may want torchvision

from modeling_vikdf import VikdfForConditionalGeneration, VikdfProcessor


# No test fails by time: a machine may be slow, or busy with other tests.
# Nor by chance: every run tries the same examples. To look for others: pytest --hypothesis-profile=search
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("vikdf", settings.get_profile("search"), derandomize=True)
settings.load_profile("vikdf")


@pytest.fixture(scope="session", params=[(llm, towers) for llm in LLMS for towers in TOWERS], ids="-".join)
def model(request: pytest.FixtureRequest) -> VikdfForConditionalGeneration:
    """Every LLM family with every kind of towers. Shared: a test that changes a model builds its own."""
    return tiny_model(*request.param)


@pytest.fixture
def llama_model() -> VikdfForConditionalGeneration:
    """A model of one's own."""
    return tiny_model("llama", "separate")


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained backbones, each in a folder as its own repository would be: llama (bfloat16), qwen (tied embeddings),
    bert, dinov2, clip and siglip (both towers in one; siglip in bfloat16)."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(llm_config("llama"), dtype=torch.bfloat16)
    # as chat LLMs come; VIKDF's own defaults must be able to differ
    llama.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    models = {
        "llama": llama,
        "qwen": AutoModelForCausalLM.from_config(llm_config("qwen")),
        "bert": AutoModel.from_config(tower_configs("separate")["context_config"]),
        "dinov2": AutoModel.from_config(tower_configs("separate")["vision_config"]),
        "clip": AutoModel.from_config(two_towers("clip")),
        "siglip": AutoModel.from_config(two_towers("siglip"), dtype=torch.bfloat16),
    }
    for name, each in models.items():
        each.save_pretrained(root / name)
    tokenizers = {
        "llama": llama_tokenizer(),
        "qwen": qwen_tokenizer(),
        "bert": bert_tokenizer(),
        "clip": clip_like_tokenizer(),
        "siglip": clip_like_tokenizer(),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(root / name)
    for name in ("dinov2", "clip", "siglip"):
        image_processor().save_pretrained(root / name)
    return root


def build_from(backbones: Path, llm: str, towers: str, model_class=VikdfForConditionalGeneration, **kwargs):
    """A model around saved backbones, its trained part random, and its processor."""
    context, vision = ("bert", "dinov2") if towers == "separate" else (towers, towers)
    context = kwargs.pop("context", context)
    folders = [str(backbones / name) for name in (llm, context, vision)]
    processor = VikdfProcessor.from_backbones(
        AutoTokenizer.from_pretrained(folders[0]),
        AutoTokenizer.from_pretrained(folders[1]),
        AutoImageProcessor.from_pretrained(folders[2]),
        vocab_size=512,
        num_knowledge_tokens=4,
    )
    torch.manual_seed(1)
    iqformer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = model_class.from_backbones(
        *folders,
        processor=processor,
        **{"iqformer_config": iqformer, "project_inputs": towers == "separate", **kwargs},
    )
    return speak_up(model), processor


def load_script(name: str) -> ModuleType:
    """A script of eval/, `study/train` or so, as a module. It imports what lies beside it, as when it is run."""
    path = Path(__file__).parents[1] / "eval" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module
