"""Models ready for use: untrained around pretrained backbones, or loaded, in a precision that this machine is fast in.

    new_model(names of backbones) -> an untrained model and its processor
    load_model(folder or Hub id)  -> a trained model and its processor

Knows no places: where a backbone is, backbones.py says.
"""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # from the top it may want torchvision

from .backbones import locate_backbone, require_backbone, require_model
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import VikdfProcessor


def new_model(
    language_model: str,
    context_encoder: str,
    vision_encoder: str | None = None,
    *,
    model_class: Any = None,
    num_knowledge_tokens: int = 32,
    image_size: int | None = None,
    system_prompt: str | None = None,
    knowledge_message: str = "last_user",
    knowledge_placement: str = "end",
    **model_settings: Any,
) -> tuple[Any, Any]:
    """
    Builds an untrained model and its processor around pretrained backbones, from whatever source has them.

    Args:
        language_model, context_encoder, vision_encoder: see `locate_backbone`.
        model_class: `VikdfForConditionalGeneration` (default) or `VikdfForPreTraining`.
        num_knowledge_tokens: n, the number of knowledge vectors.
        image_size: whole pictures are resized to a square of this side, in pixels; default what the vision encoder's
            own image processor does (CLIP's and DINOv2's cut off what is beyond a central square).
        system_prompt, knowledge_message, knowledge_placement: see `VikdfProcessor`.
        model_settings: for `from_backbones`: `iqformer_config`, `bert`, `base_text`, `revisions`, fields of
            `VikdfConfig`.

    Raises:
        BackboneNotFoundError: if a backbone cannot be found.
        ValueError: if the parts do not fit together.
    """
    for name in (language_model, context_encoder, vision_encoder, model_settings.get("bert")):
        if name is not None:
            require_backbone(name)
    llm, context = locate_backbone(language_model), locate_backbone(context_encoder)
    image_processor = None
    if vision_encoder is not None:
        size = {}
        if image_size is not None:
            size = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
        image_processor = AutoImageProcessor.from_pretrained(locate_backbone(vision_encoder), **size)
    processor = VikdfProcessor.from_backbones(
        AutoTokenizer.from_pretrained(llm),
        AutoTokenizer.from_pretrained(context),
        image_processor,
        vocab_size=AutoConfig.from_pretrained(llm).get_text_config().vocab_size,
        num_knowledge_tokens=num_knowledge_tokens,
        system_prompt=system_prompt,
        knowledge_message=knowledge_message,
        knowledge_placement=knowledge_placement,
    )
    model = (model_class or VikdfForConditionalGeneration).from_backbones(
        language_model, context_encoder, vision_encoder, processor=processor, **model_settings
    )
    return model, processor


def load_model(source: str | os.PathLike) -> tuple[Any, Any]:
    """
    A trained model and its processor, ready for use: in evaluation mode, on the accelerator if there is one, else in
    the precision that this CPU is fast in.

    Args:
        source: folder or Hub id of a VIKDF model with its processor.

    Raises:
        BackboneNotFoundError: if a backbone cannot be found.
        OSError: if there is no model.
    """
    require_model(source)
    model, processor = VikdfForConditionalGeneration.from_pretrained(source), VikdfProcessor.from_pretrained(source)
    widen_slow_half_precision(model)
    return model.eval().to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), processor


def half_precision_is_slow() -> bool:
    """
    Whether there is only a CPU that PyTorch has no fast bfloat16 for: on x86 it needs AVX-512. Without, a pass through
    an LLM takes 5 times as long in bfloat16 as in float32, and a training step under autocast 14 times (SmolLM2-135M,
    1,024 tokens).
    """
    return not torch.accelerator.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def widen_slow_half_precision(model: Any) -> None:
    """
    Makes the LLM's half-precision weights float32, in place, where they would be slow; quantized ones stay. The values
    are the same, the memory is twice as much.
    """
    language_model = model.language_model
    if half_precision_is_slow() and not getattr(language_model, "is_quantized", False):
        language_model.float()


def short_greedy_replies(theirs: GenerationConfig) -> GenerationConfig:
    """How a chat checkpoint speaks: greedily, briefly, without loops, and with the special tokens of `theirs`."""
    tokens = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**tokens, max_new_tokens=64, do_sample=False, no_repeat_ngram_size=3)


__all__ = [
    "half_precision_is_slow",
    "load_model",
    "new_model",
    "short_greedy_replies",
    "widen_slow_half_precision",
]
