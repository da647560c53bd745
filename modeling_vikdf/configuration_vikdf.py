"""Configuration of VIKDF: which frozen backbones, which IQ-Former, how many knowledge vectors.

One `VikdfConfig` describes a whole model; `text_config`, `context_config` and `vision_config` describe the frozen LLM,
text encoder and vision encoder, whatever their family. A backbone listed in `backbones` is loaded from its own
repository and not saved with the model; one that is not listed is part of the checkpoint.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig


# role of a frozen backbone (the attribute of the model) -> the sub-configuration that describes it
BACKBONE_CONFIGS = {
    "language_model": "text_config",
    "context_encoder": "context_config",
    "vision_encoder": "vision_config",
}

# The training objectives with the paper's weights. Two are not in the paper: matching two captions of a picture, and
# replies of text dialogues trained beside captioned pictures.
OBJECTIVES = {
    "text_image_matching": 0.5,
    "masked_image": 0.2,
    "masked_text": 0.2,
    "knowledge_to_text": 1.0,
    "text_to_knowledge": 0.5,
    "text_text_matching": 0.0,
    "reply": 0.0,
}


# what transformers accepts and writes besides a configuration's own fields
GENERIC_FIELDS = {
    "_attn_implementation",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


def nearest_name(name: str, names: Iterable[str]) -> str:
    """A sentence that suggests the closest of the known names for a misspelt one; "" if none is close."""
    matches = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _check_fields(owner: str, config_class: type[PreTrainedConfig], names: Iterable[str]) -> None:
    """Refuses names that are not fields of a configuration; transformers would keep and ignore them."""
    known = {field.name for field in dataclasses.fields(config_class)} | GENERIC_FIELDS
    if unknown := sorted(set(names) - known):
        raise ValueError(f"{owner} has no field {unknown[0]!r}.{nearest_name(unknown[0], known - GENERIC_FIELDS)}")


def _to_config(value: Any, key: str, default_model_type: str) -> PreTrainedConfig:
    """
    Builds a sub-configuration from a dict, by its `model_type`, or passes a configuration through.

    Of a composite configuration (CLIP's two towers, a vision-language model) it takes the relevant part.
    """
    config = value
    if not isinstance(value, PreTrainedConfig):
        fields = dict(value or {})
        model_type = fields.pop("model_type", default_model_type)
        try:
            config = AutoConfig.for_model(model_type, **fields)
        except ValueError as error:
            if "Unrecognized model identifier" not in str(error):
                raise
            raise ValueError(
                f"VikdfConfig.{key} names the model type {model_type!r}, which this transformers does not know. "
                "Check the spelling, or upgrade transformers to a version that has this model."
            ) from None
    if key == "text_config":
        return config.get_text_config(decoder=True)
    tower = {"context_config": "text_config", "vision_config": "vision_config"}.get(key)
    return getattr(config, tower, config) if tower else config


@strict
class VikdfConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VikdfForConditionalGeneration`].

    Args:
        text_config (`dict` or `PreTrainedConfig`): the frozen LLM (any causal language model of transformers).
        context_config (`dict` or `PreTrainedConfig`): the frozen text encoder (CLIP, SigLIP, BERT-like, ...).
        vision_config (`dict` or `PreTrainedConfig`, *optional*): the frozen vision encoder (CLIP, SigLIP, DINOv2,
            ...); `None` for a model that never sees a picture.
        iqformer_config (`dict` or `Blip2QFormerConfig`): the IQ-Former; default BERT-base-sized as in the paper.
        num_knowledge_tokens (`int`): n, the number of queries and so of knowledge vectors (paper: 32).
        knowledge_token_id (`int`, *optional*): id of the placeholder in the LLM's vocabulary that knowledge replaces.
        knowledge_pooling (`"first"`, `"mean"` or `"each"`): how n knowledge vectors become a matching embedding: the
            first query as in the paper, the mean, or `"each"` (not in the paper), where vector i of a text is compared
            with vector i of a picture through one shared projection. Only "each" makes K^T and K^I of a pair alike,
            so that an LLM that has learnt to read one can read the other.
        matching_dim (`int`): width of the matching embeddings (paper: 256); with "each" of each vector.
        project_inputs (`bool`): whether each encoder's states pass through a trained LayerNorm-Linear-LayerNorm to the
            IQ-Former's width. Needed for towers that were not trained together; `False` as in the paper, where CLIP's
            own projections put both towers into one space.
        condition_queries (`bool`): whether the first of an encoder's states and their mean, linearly projected, are
            added to the queries. Not in the paper; the IQ-Former then learns from few pairs as fast as a plain
            projection of these would. The queries are then initialised at the scale of what is added to them.
        state_dropout (`float`): fraction of an encoder's states, except the first, hidden from the queries in
            training. Not in the paper; without it a few thousand pictures are memorised.
        vision_post_layernorm (`bool`): for CLIP's vision tower, whether patch states pass the post-layernorm before
            CLIP's projection, as CLIP's own pooled state does. (The authors' code omits it.)
        reward_layer (`int`, *optional*): index of the LLM's `hidden_states` by which a reward head grades replies, see
            modeling_candidates.py; `None` for a model without one. Written by `vikdf reward`.
        loss_weights (`dict`): objective -> weight, for pre-training; 0 for those not named. Default: the paper's five.
        detach_knowledge_target (`bool`): whether text -> knowledge trains only the LLM side (`True`) or may also make
            the knowledge easier to predict, as in the authors' code.
        backbones (`dict`): role (`language_model`, `context_encoder`, `vision_encoder`) ->
            `{"repo_id": ..., "revision": ...}` of a backbone that is not stored in this checkpoint.
        backbone_dtypes (`dict`): role -> dtype of a backbone that is stored in this checkpoint, where it may differ
            from that of the trained weights; written by `save_pretrained`.
        adapter (`str`, *optional*): name of the PEFT adapter that is stored in this checkpoint, in `adapter/`; written
            by `save_pretrained`.
        saved_in (`str`, *optional*): sub-folder to read the checkpoint from while its save is unfinished, see
            atomic_saving.py; not a setting.

    Raises:
        ValueError: for an unknown field, model type or role in `backbones`, or widths that do not fit.
    """

    model_type = "vikdf"
    sub_configs = {
        "text_config": AutoConfig,
        "context_config": AutoConfig,
        "vision_config": AutoConfig,
        "iqformer_config": Blip2QFormerConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    context_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    iqformer_config: dict | PreTrainedConfig | None = None
    num_knowledge_tokens: int = 32
    knowledge_token_id: int | None = None
    knowledge_pooling: Literal["first", "mean", "each"] = "first"
    matching_dim: int = 256
    project_inputs: bool = False
    condition_queries: bool = False
    state_dropout: float = 0.0
    vision_post_layernorm: bool = True
    reward_layer: int | None = None
    loss_weights: dict | None = None
    detach_knowledge_target: bool = True
    backbones: dict | None = None
    backbone_dtypes: dict | None = None
    adapter: str | None = None
    saved_in: str | None = None
    initializer_range: float = 0.02
    # The language model ties its own embeddings if it wants to; nothing is tied across the parts.
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        if not __name__.startswith("transformers_modules."):
            # refers to the repository's code; transformers would ask to trust it even with this package installed
            kwargs.pop("custom_pipelines", None)
        self.text_config = _to_config(self.text_config, "text_config", "llama")
        self.context_config = _to_config(self.context_config, "context_config", "clip_text_model")
        if self.vision_config is not None:
            self.vision_config = _to_config(self.vision_config, "vision_config", "clip_vision_model")
        _check_fields("VikdfConfig", type(self), kwargs)
        if self.iqformer_config is None or isinstance(self.iqformer_config, dict):
            _check_fields("VikdfConfig.iqformer_config", Blip2QFormerConfig, self.iqformer_config or {})
            width = self.encoder_width("context_config")
            self.iqformer_config = {"encoder_hidden_size": width, **(self.iqformer_config or {})}
        self.iqformer_config = _to_config(self.iqformer_config, "iqformer_config", "blip_2_qformer")
        weights = OBJECTIVES if self.loss_weights is None else self.loss_weights
        self.loss_weights = {name: weights.get(name, 0.0) for name in OBJECTIVES} | weights
        self.backbones = {} if self.backbones is None else self.backbones
        self.backbone_dtypes = {} if self.backbone_dtypes is None else self.backbone_dtypes
        super().__post_init__(**kwargs)
        self._check_fit()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        The fields of a saved configuration, and the remaining arguments.

        Raises:
            OSError: if there is no configuration of this model type; transformers would use its defaults.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if fields.get("model_type") != cls.model_type:
            actual = f"one of a {fields['model_type']!r}" if fields.get("model_type") else "none"
            raise OSError(
                f"Expected the config.json of a {cls.model_type!r} checkpoint in "
                f"{str(pretrained_model_name_or_path)!r} but found {actual}. Name another folder or repository; "
                "VikdfForConditionalGeneration.from_backbones makes a new checkpoint around a language model."
            )
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        The configuration of saved fields; unknown ones, saved by other versions of VIKDF or transformers, are kept.

        Raises:
            ValueError: as `VikdfConfig`; also if `kwargs` has an unknown field in `iqformer_config`.
        """
        if isinstance(kwargs.get("iqformer_config"), dict):
            _check_fields("VikdfConfig.iqformer_config", Blip2QFormerConfig, kwargs["iqformer_config"])
        known = {field.name for field in dataclasses.fields(cls)} | GENERIC_FIELDS
        fields = {name: value for name, value in config_dict.items() if name in known}
        iqformer = fields.get("iqformer_config")
        if isinstance(iqformer, dict) and "encoder_hidden_size" in iqformer:
            fields["iqformer_config"] = Blip2QFormerConfig.from_dict(iqformer)
        result = super().from_dict(fields, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for name in config_dict.keys() - known:
            setattr(config, name, config_dict[name])
        return result

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved."""
        fields = super().to_dict()
        fields.pop("saved_in", None)
        return fields

    def encoder_width(self, key: str) -> int:
        """Width of the states that the encoder of `key` (`context_config`, `vision_config`) returns."""
        config = getattr(self, key)
        # CLIP's towers are followed by CLIP's own projections
        return config.projection_dim if config.model_type.startswith("clip_") else config.hidden_size

    def _check_fit(self) -> None:
        if self.num_knowledge_tokens < 1:
            raise ValueError(f"num_knowledge_tokens must be at least 1, got {self.num_knowledge_tokens}.")
        if not 0 <= self.state_dropout < 1:
            raise ValueError(f"state_dropout must be at least 0 and below 1, got {self.state_dropout}.")
        layers = self.text_config.num_hidden_layers
        if self.reward_layer is not None and not 0 <= self.reward_layer <= layers:
            raise ValueError(f"reward_layer must be from 0 to {layers}, the LLM's layers; got {self.reward_layer}.")
        unknown = sorted(set(self.backbones) - set(BACKBONE_CONFIGS))
        if unknown:
            raise ValueError(f"backbones names the roles {unknown}; known roles are {sorted(BACKBONE_CONFIGS)}.")
        unknown = sorted(set(self.loss_weights) - set(OBJECTIVES))
        if unknown:
            raise ValueError(f"loss_weights names the objectives {unknown}; known objectives are {list(OBJECTIVES)}.")
        width = self.iqformer_config.encoder_hidden_size
        if self.project_inputs:
            # the trained input projections end in the IQ-Former's own width
            self.iqformer_config.encoder_hidden_size = self.iqformer_config.hidden_size
            return
        for key in ("context_config", "vision_config"):
            if getattr(self, key) is not None and self.encoder_width(key) != width:
                raise ValueError(
                    f"{key}: the encoder's states are {self.encoder_width(key)} wide but the IQ-Former expects "
                    f"iqformer_config.encoder_hidden_size={width}. Set encoder_hidden_size to the encoders' width, or "
                    "project_inputs=True to learn a projection for each encoder."
                )


__all__ = ["VikdfConfig"]
