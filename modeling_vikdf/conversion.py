"""Checkpoints in the authors' parametrisation (one safetensors file and one config.json) -> ours, weight by weight."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig

from .configuration_vikdf import VikdfConfig
from .modeling_vikdf import VikdfForConditionalGeneration


# their name -> ours, first match wins
RENAMED = (
    (r"^clip_text_model\.", "context_encoder.text_model."),
    (r"^clip_text_projection\.", "context_encoder.text_projection."),
    (r"^clip_vision_model\.", "vision_encoder.vision_model."),
    (r"^clip_visual_projection\.", "vision_encoder.visual_projection."),
    (r"^query_tokens$", "iqformer.query_tokens"),
    (r"^query_text_projection\.", "matching_head.text_projection."),
    (r"^query_visual_projection\.", "matching_head.image_projection."),
    (r"^logit_scale$", "matching_head.logit_scale"),
    (r"^qformer\.embeddings\.LayerNorm\.", "iqformer.qformer.layernorm."),
    (r"^qformer\.(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.", r"iqformer.qformer.\1.attention."),
    (r"^qformer\.", "iqformer.qformer."),
)


def rename(name: str) -> str:
    """Our name of the weight that the authors' code calls `name`."""
    for pattern, replacement in RENAMED:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    return name


def find_weights(folder: Path) -> Path:
    """
    The safetensors file of a folder that holds the authors' weights.

    Raises:
        FileNotFoundError: if there is none.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            if "query_tokens" in weights.keys():
                return path
    raise FileNotFoundError(
        f"No *.safetensors file with a weight named 'query_tokens' in {folder}: expected a checkpoint of the authors' "
        "code, saved as safetensors, beside its config.json."
    )


def convert_config(theirs: dict[str, Any]) -> VikdfConfig:
    """The authors' configuration as ours: CLIP towers without post-layernorm on patch states, a Llama, no gate."""
    iqformer = {
        key: value
        for key, value in theirs["query_transformer"].items()
        if key not in ("tie_word_embeddings", "bos_token_id", "eos_token_id")
    }
    language_model = LlamaConfig(**theirs["language_model"])
    return VikdfConfig(
        text_config=language_model,
        context_config=CLIPTextConfig(**theirs["text_encoder"]),
        vision_config=CLIPVisionConfig(**theirs["vision_encoder"]),
        iqformer_config=iqformer,
        num_knowledge_tokens=theirs["num_query_tokens"],
        # their splice goes by position, so no id of the vocabulary is taken: the first one behind it
        knowledge_token_id=language_model.vocab_size,
        matching_dim=theirs["matching_dim"],
        vision_post_layernorm=False,
    )


def convert_checkpoint(folder: str | Path) -> tuple[VikdfForConditionalGeneration, list[str]]:
    """
    Reads a checkpoint of the authors' code.

    Args:
        folder: with `config.json` and one safetensors file of their weights (any float type; kept in float32).

    Returns:
        The model, self-contained, in evaluation mode; and the names of the weights it has no place for (the heads of
        the distillation objectives).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a weight that the model needs is missing or has another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {folder}.")
    weights = load_file(find_weights(folder))
    model = VikdfForConditionalGeneration(convert_config(json.loads((folder / "config.json").read_text())))
    state = {rename(name): weight.to(torch.float32) for name, weight in weights.items()}
    wanted = model.state_dict()
    # the parameters that their model does not have keep the values that stand for theirs
    missing = [name for name in wanted if name not in state and name not in ("knowledge_base", "knowledge_gate")]
    wrong = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or wrong:
        raise ValueError(
            f"The checkpoint in {folder} does not fit its config.json: missing {missing[:5]}, of another shape "
            f"{wrong[:5]}."
        )
    model.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    return model.eval(), sorted(name for name in weights if rename(name) not in wanted)
