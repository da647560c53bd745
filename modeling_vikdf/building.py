"""Models ready for use: untrained around pretrained backbones, or loaded, in a precision that is fast on this machine.

    new_model(names of backbones)                    -> an untrained model and its processor
    load_model(folder or Hub id)                     -> a trained model and its processor
    swap_language_model(folder or Hub id, LLM's name) -> that model around another LLM, and its processor

Where backbones are is known to backbones.py.
"""

import copy
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # transformers' own may need torchvision

from .backbones import locate_backbone, require_backbone, require_model
from .configuration_vikdf import VikdfConfig
from .modeling_vikdf import VikdfForConditionalGeneration
from .processing_vikdf import VikdfProcessor


# What has learnt from the encoders alone, so that it is worth the same beside another LLM.
LLM_FREE = ("iqformer", "matching_head", "context_encoder", "vision_encoder")
SETTINGS = (
    "num_knowledge_tokens",
    "knowledge_message",
    "knowledge_placement",
    "system_prompt",
    "max_context_length",
)


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
    Builds an untrained model and its processor around pretrained backbones.

    Args:
        language_model: folder, Hub id or known package of a chat LLM, see `locate_backbone`.
        context_encoder: the same for a text encoder.
        vision_encoder: the same for a vision encoder; `None` for a model that takes no pictures.
        model_class: `VikdfForConditionalGeneration` (default) or `VikdfForPreTraining`.
        num_knowledge_tokens: n, the number of knowledge vectors.
        image_size: side in pixels of a square to which whole pictures are resized; default: the vision encoder's own
            preprocessing (CLIP's and DINOv2's crop a central square).
        system_prompt: see `VikdfProcessor`.
        knowledge_message: see `VikdfProcessor`.
        knowledge_placement: see `VikdfProcessor`.
        model_settings: for `from_backbones`: `iqformer_config`, `bert`, `base_text`, `revisions`, fields of
            `VikdfConfig`.

    Raises:
        BackboneNotFoundError: if a backbone cannot be found.
        ValueError: if the parts do not fit together.
    """
    for name in (language_model, context_encoder, vision_encoder, model_settings.get("bert")):
        if name is not None:
            require_backbone(name)
    image_processor = None
    if vision_encoder is not None:
        size = {}
        if image_size is not None:
            size = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
        image_processor = AutoImageProcessor.from_pretrained(locate_backbone(vision_encoder), **size)
    processor = _processor_for(
        language_model,
        AutoTokenizer.from_pretrained(locate_backbone(context_encoder)),
        image_processor,
        num_knowledge_tokens=num_knowledge_tokens,
        system_prompt=system_prompt,
        knowledge_message=knowledge_message,
        knowledge_placement=knowledge_placement,
    )
    model = (model_class or VikdfForConditionalGeneration).from_backbones(
        language_model, context_encoder, vision_encoder, processor=processor, **model_settings
    )
    return model, processor


def _processor_for(
    language_model: str, context_tokenizer: PreTrainedTokenizerBase, image_processor: Any, **settings: Any
) -> VikdfProcessor:
    """A processor that writes prompts for an LLM."""
    folder = locate_backbone(language_model)
    return VikdfProcessor.from_backbones(
        AutoTokenizer.from_pretrained(folder),
        context_tokenizer,
        image_processor,
        vocab_size=AutoConfig.from_pretrained(folder).get_text_config().vocab_size,
        **settings,
    )


def swap_language_model(
    checkpoint: str | os.PathLike,
    language_model: str,
    *,
    model_class: Any = None,
    loss_weights: dict[str, float] | None = None,
    base_text: str | None = None,
    initial_gate: float = 0.0,
) -> tuple[Any, Any]:
    """
    Loads a trained model around another LLM than it was trained with, and builds its processor.

    IQ-Former and matching head stay as they were trained. Whatever reads the LLM's states or writes into its prompt is
    new: projection, base vectors, gates, the heads of the objectives; a reward head is left out. So the result of
    stage 1, which needs no LLM, serves for any.

    Args:
        checkpoint: folder or Hub id of a VIKDF model with its processor.
        language_model: folder, Hub id or known package of the other LLM, which brings its own chat template.
        model_class: `VikdfForConditionalGeneration` (default) or `VikdfForPreTraining`.
        loss_weights: of the objectives; default the checkpoint's.
        base_text: see `VikdfForConditionalGeneration.from_backbones`.
        initial_gate: see there.

    Raises:
        BackboneNotFoundError: if a backbone cannot be found.
        OSError: if there is no model.
        ValueError: if the checkpoint holds an adapter of its LLM.
    """
    require_model(checkpoint)
    require_backbone(language_model)
    model_class = model_class or VikdfForConditionalGeneration
    former = VikdfProcessor.from_pretrained(checkpoint)
    settings = {name: getattr(former, name) for name in SETTINGS}
    processor = _processor_for(language_model, former.context_tokenizer, former.image_processor, **settings)
    config = _around(model_class.config_class.from_pretrained(checkpoint), language_model, processor)
    config.loss_weights = loss_weights or config.loss_weights
    # the parts for the former LLM are read, where they fit, and then replaced by new ones
    model = model_class.from_pretrained(checkpoint, config=config, ignore_mismatched_sizes=True)
    new = model_class(model.config)
    for name, part in [*new.named_children(), *new.named_parameters(recurse=False)]:
        if name not in LLM_FREE:
            setattr(model, name, part)
    model.generation_config = model.language_model.generation_config
    model._start_at_the_embeddings(processor, base_text, initial_gate)
    return model.eval(), processor


def _around(config: VikdfConfig, language_model: str, processor: VikdfProcessor) -> VikdfConfig:
    """The configuration of a checkpoint, changed in place to that around another LLM."""
    if config.adapter is not None:
        raise ValueError(
            f"The checkpoint holds an adapter {config.adapter!r} of its LLM, which does not fit another one. Start "
            "from a checkpoint without."
        )
    config.text_config = AutoConfig.from_pretrained(locate_backbone(language_model)).get_text_config(decoder=True)
    config.text_config.name_or_path = language_model  # not this machine's folder
    config.backbones = config.backbones | {"language_model": {"repo_id": language_model, "revision": None}}
    config.backbone_dtypes.pop("language_model", None)
    config.knowledge_token_id, config.reward_layer = processor.knowledge_token_id, None
    return config


def load_model(source: str | os.PathLike) -> tuple[Any, Any]:
    """
    Loads a trained model, in evaluation mode, and its processor.

    The model is on the accelerator if there is one, otherwise in a precision that is fast on this CPU.

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
    Whether there is only a CPU on which bfloat16 is slow in PyTorch: on x86 it needs AVX-512.

    Without it a forward pass takes 5 times as long in bfloat16 as in float32, and a training step under autocast 14
    times (SmolLM2-135M, 1,024 tokens).
    """
    return not torch.accelerator.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def widen_slow_half_precision(model: Any) -> None:
    """
    Converts the LLM's half-precision weights to float32, in place, where they would be slow.

    The values stay the same, and memory doubles. Quantised weights are not changed.
    """
    language_model = model.language_model
    if half_precision_is_slow() and not getattr(language_model, "is_quantized", False):
        language_model.float()


def unload_language_model(model: Any) -> None:
    """Frees the LLM's weights but for its input embeddings, which prompts for the same LLM elsewhere are made of."""
    if not getattr(model.language_model, "is_quantized", False):  # such weights cannot be moved
        embeddings = copy.deepcopy(model.get_input_embeddings())
        model.language_model.to("meta").set_input_embeddings(embeddings)


def short_greedy_replies(theirs: GenerationConfig) -> GenerationConfig:
    """The default generation of a chat checkpoint: greedy, short, without loops, with `theirs`' special tokens."""
    tokens = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**tokens, max_new_tokens=64, do_sample=False, no_repeat_ngram_size=3)


__all__ = [
    "half_precision_is_slow",
    "load_model",
    "new_model",
    "short_greedy_replies",
    "swap_language_model",
    "unload_language_model",
    "widen_slow_half_precision",
]
