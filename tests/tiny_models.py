"""Tiny random models: two LLM families, CLIP and SigLIP towers, two towers of different widths; and their inputs."""

import torch
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    Qwen2Config,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from modeling_vikdf import VikdfConfig, VikdfForConditionalGeneration


KNOWLEDGE_ID = 5
VOCABULARY = 512
LLMS = ("llama", "qwen")
TOWERS = ("clip", "siglip", "separate")


def llm_config(family: str):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # sharp distributions: greedy paths do not hang on rounding
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {"llama": LlamaConfig, "qwen": Qwen2Config}[family](**sizes, tie_word_embeddings=family == "qwen")


def tower_configs(kind: str) -> dict:
    block = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 3, **block}
    if kind == "clip":
        return {
            "context_config": CLIPTextConfig(hidden_size=32, projection_dim=24, **text),
            "vision_config": CLIPVisionConfig(hidden_size=32, projection_dim=24, image_size=32, patch_size=8, **block),
        }
    if kind == "siglip":
        return {
            "context_config": SiglipTextConfig(hidden_size=32, **text),
            "vision_config": SiglipVisionConfig(hidden_size=32, image_size=32, patch_size=8, **block),
        }
    block.pop("intermediate_size")
    text["max_position_embeddings"] = 512
    return {
        "context_config": BertConfig(hidden_size=32, **text),
        "vision_config": Dinov2Config(hidden_size=40, image_size=32, patch_size=8, **block),
    }


def two_towers(kind: str) -> CLIPConfig | SiglipConfig:
    """Both towers as one configuration, as CLIP's and SigLIP's repositories have it."""
    towers = tower_configs(kind)
    fields = {
        "text_config": towers["context_config"].to_dict(),
        "vision_config": towers["vision_config"].to_dict(),
    }
    return CLIPConfig(**fields, projection_dim=24) if kind == "clip" else SiglipConfig(**fields)


def tiny_config(llm: str = "llama", towers: str = "separate", **kwargs) -> VikdfConfig:
    iqformer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {
        "text_config": llm_config(llm),
        "iqformer_config": iqformer,
        "num_knowledge_tokens": 4,
        "knowledge_token_id": KNOWLEDGE_ID,
        "project_inputs": towers == "separate",
    }
    return VikdfConfig(**{**defaults, **tower_configs(towers), **kwargs})


def speak_up(model: VikdfForConditionalGeneration) -> VikdfForConditionalGeneration:
    """Random values, large enough that knowledge changes the logits, for what starts at zero or nearly so."""
    with torch.no_grad():
        for parameter in (model.iqformer.query_tokens, model.language_projection.weight, model.knowledge_base):
            parameter.normal_(std=0.5)
        model.knowledge_gate.uniform_(0.5, 1.5)
    return model


def tiny_model(llm: str = "llama", towers: str = "separate", seed: int = 0, **kwargs) -> VikdfForConditionalGeneration:
    torch.manual_seed(seed)
    return speak_up(VikdfForConditionalGeneration(tiny_config(llm, towers, **kwargs)).eval())


def pictures(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def prompt(rows: list[int], n: int = 4, sources: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts of the given lengths, n * sources placeholders in each, and contexts of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    width, context_width = max(rows), max(rows) // 2 + 3
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, context_mask = torch.zeros_like(ids), torch.zeros(len(rows), context_width, dtype=torch.long)
    context = torch.ones_like(context_mask)
    for row, length in enumerate(rows):
        words = torch.randint(10, VOCABULARY, (length,), generator=generator)
        words[2 : 2 + n * sources] = KNOWLEDGE_ID
        ids[row, width - length :], mask[row, width - length :] = words, 1
        size = length // 2 + 3
        context[row, :size] = torch.randint(10, VOCABULARY, (size,), generator=generator)
        context[row, size - 1], context_mask[row, :size] = 3, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "context_input_ids": context,
        "context_attention_mask": context_mask,
    }


def row(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One row of a `prompt` batch alone, its padding cut off."""
    keep, context_keep = batch["attention_mask"][index] == 1, batch["context_attention_mask"][index] == 1
    return {
        "input_ids": batch["input_ids"][index][keep][None],
        "attention_mask": batch["attention_mask"][index][keep][None],
        "context_input_ids": batch["context_input_ids"][index][context_keep][None],
        "context_attention_mask": batch["context_attention_mask"][index][context_keep][None],
    }
