"""Converts checkpoints of the authors' code (one safetensors file and one config.json), weight by weight."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPVisionConfig, LlamaConfig

from .configuration_vikdf import VikdfConfig
from .modeling_distillation import VikdfForPreTraining


# their name -> ours, first match wins
RENAMED = (
    (r"^text_tb\.multihead_attention\.", "masked_text_block.attention."),
    (r"^text_tb\.", "masked_text_block."),
    (r"^text_decoder\.", "token_decoder."),
    (r"^visual_tb\.multihead_attention\.", "masked_image_block.attention."),
    (r"^visual_tb\.", "masked_image_block."),
    (r"^visual_decoder\.0\.", "pixel_decoder."),
    (r"^query_llm_projection\.", "knowledge_predictor."),
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
    """Our name of a weight in the authors' code."""
    for pattern, replacement in RENAMED:
        renamed, matches = re.subn(pattern, replacement, name)
        if matches:
            return renamed
    return name


def find_weights(folder: Path) -> Path:
    """
    The safetensors file of a folder that holds the authors' weights.

    Raises:
        OSError: if there is none, or a file cannot be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                if "query_tokens" in weights.keys():
                    return path
        except SafetensorError as error:
            raise OSError(f"{path} cannot be read ({error}): it is truncated or damaged, copy it again.") from error
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
        # they splice by position and use no id of the vocabulary, so ours is the first one beyond it
        knowledge_token_id=language_model.vocab_size,
        matching_dim=theirs["matching_dim"],
        vision_post_layernorm=False,
        loss_weights=theirs["loss_weights"],
        detach_knowledge_target=False,
    )


def convert_checkpoint(folder: str | Path) -> VikdfForPreTraining:
    """
    Reads a checkpoint of the authors' code.

    Args:
        folder: contains `config.json` and one safetensors file of their weights (any float dtype; read as float32).

    Returns:
        The model with the heads of all objectives, self-contained, in evaluation mode.

    Raises:
        OSError: if a file is missing or damaged.
        ValueError: if config.json is malformed, or a weight is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {folder}.")
    weights = load_file(find_weights(folder))
    try:
        config = convert_config(json.loads((folder / "config.json").read_text()))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not as the authors' code writes it: {error!r}.") from error
    model = VikdfForPreTraining(config)
    state = {rename(name): weight.to(torch.float32) for name, weight in weights.items()}
    if "pixel_decoder.weight" in state:  # their 1x1 convolution is a linear layer over the patch grid
        state["pixel_decoder.weight"] = state["pixel_decoder.weight"].flatten(1)
    expected = model.state_dict()
    # parameters that their model lacks keep their initial values, equivalent to theirs: base and shift 0, gate 1
    ours = ("knowledge_base", "knowledge_gate", "caption_shift")
    state = {name: expected[name] for name in ours if name in expected} | state
    misshapen = [name for name in state.keys() & expected.keys() if state[name].shape != expected[name].shape]
    misfits = {"missing": expected.keys() - state.keys(), "unexpected": state.keys() - expected.keys()}
    misfits |= {"of another shape": misshapen}
    if any(misfits.values()):
        details = "; ".join(f"{kind}: {', '.join(sorted(names)[:5])}" for kind, names in misfits.items() if names)
        raise ValueError(f"The weights in {folder} do not fit its config.json. {details}.")
    model.load_state_dict(state)
    return model.eval()
