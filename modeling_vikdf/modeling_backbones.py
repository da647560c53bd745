"""Loading and saving: a model whose frozen backbones come from their own repositories and are not stored with it.

`VikdfPreTrainedModel` knows which backbones there are, where to find them and what of the whole a checkpoint holds.
It knows nothing of what the model computes.
"""

import contextlib
import copy
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file, has_file

from .configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig
from .modeling_iqformer import CLIP_LOGIT_SCALE, VikdfIQFormer, VikdfMatchingHead


# What the installed transformers calls the LLM's cache in arguments and outputs: "past_key_values" up to 5.23, "cache"
# since 5.24.
CACHE = {"cache", "past_key_values"}.intersection(CausalLMOutputWithPast.__dataclass_fields__).pop()

# arguments of `from_pretrained` that say which files to read
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class VikdfPreTrainedModel(PreTrainedModel):
    """Where the frozen backbones live: built in, or attached after the trained part was loaded, and never saved."""

    config: VikdfConfig
    config_class = VikdfConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [CACHE]
    # what is trained keeps float32 weights beside a half-precision LLM
    _keep_in_fp32_modules_strict = [
        "iqformer",
        "matching_head",
        "language_projection",
        "knowledge_base",
        "knowledge_gate",
    ]

    def __init__(self, config: VikdfConfig):
        super().__init__(config)
        self._load_kwargs = {}  # how `attach_backbones` was asked to load, for what follows later
        for role, key in BACKBONE_CONFIGS.items():
            sub_config = getattr(config, key)
            if role in config.backbones or sub_config is None:
                setattr(self, role, None)  # attached after loading, or none
            else:
                setattr(self, role, _build_backbone(role, sub_config, config.backbone_dtypes.get(role)))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VikdfIQFormer):
            # beside what conditions them, which is as large as a normed state, small queries would be all the same
            std = 1.0 if self.config.condition_queries else self.config.initializer_range
            init.normal_(module.query_tokens, std=std)
        if isinstance(module, VikdfMatchingHead):
            init.constant_(module.logit_scale, CLIP_LOGIT_SCALE)
        if hasattr(module, "knowledge_base"):
            # the paper's parametrisation: nothing but the projected knowledge
            init.zeros_(module.knowledge_base)
            init.ones_(module.knowledge_gate)

    def train(self, mode: bool = True) -> "VikdfPreTrainedModel":
        """Sets the trained parts to training mode; the frozen backbones stay in evaluation mode (no dropout)."""
        super().train(mode)
        for role in BACKBONE_CONFIGS:
            if getattr(self, role) is not None:
                getattr(self, role).eval()
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """The LLM's token embedding."""
        return None if self.language_model is None else self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The LLM's vocabulary head."""
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the LLM's vocabulary head."""
        self.language_model.set_output_embeddings(value)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> "VikdfPreTrainedModel":
        """
        Loads the trained part from a folder or the Hub, then attaches the frozen backbones that its configuration
        names, each from its own source.

        Args:
            pretrained_model_name_or_path: folder or repository id of a VIKDF checkpoint; `None` with the arguments
                `config` and `state_dict` in its place.
            dtype: of the backbones; `"auto"` keeps each one's saved dtype. The trained part stays in float32.
            device_map, quantization_config, attn_implementation: for the LLM, as in its own `from_pretrained`, and so
                are `max_memory`, `offload_folder` and `offload_buffers`. The encoders and the trained part follow its
                input embeddings' device. A self-contained checkpoint is placed by `device_map` as a whole.
            kwargs: fields of the configuration to change, and what else transformers' `from_pretrained` takes.

        Raises:
            OSError: if the weights are missing, truncated or incomplete, or a backbone cannot be found.
            ValueError: if the weights or a backbone do not fit the configuration.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "VIKDF loads safetensors only: pickled weights can run code. Leave use_safetensors unset."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("torch_dtype", None) or dtype  # its former name
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            where = {key: kwargs.pop(key) for key in _WHERE if key in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **where, **kwargs
            )
            kwargs |= where
        config = copy.deepcopy(config)
        where = {key: kwargs[key] for key in ("revision", "subfolder") if key in kwargs}
        if pretrained_model_name_or_path is not None:
            if not os.path.isdir(pretrained_model_name_or_path):
                _check_repository_ids(config, pretrained_model_name_or_path)
            _check_weight_files(pretrained_model_name_or_path, **where, **_hub_kwargs(kwargs))
        if dtype != "auto":
            config.backbone_dtypes = {}
        placement = {"device_map": device_map}
        placement |= {
            key: kwargs.pop(key) for key in ("max_memory", "offload_folder", "offload_buffers") if key in kwargs
        }
        if "language_model" in config.backbones:
            load_kwargs = {}
        elif quantization_config is not None:
            raise ValueError(
                "quantization_config is for the LLM, but this checkpoint holds its own LLM. Load the LLM from its "
                "repository instead: set config.backbones['language_model'] = {'repo_id': ...}."
            )
        else:
            load_kwargs = placement
        with _clear_errors(pretrained_model_name_or_path):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **load_kwargs,
                **kwargs,
            )
        if info["missing_keys"]:
            raise OSError(
                f"The checkpoint {pretrained_model_name_or_path!r} lacks {len(info['missing_keys'])} weights of "
                f"{cls.__name__}, such as {sorted(info['missing_keys'])[:3]}. It is incomplete or of another model."
            )
        model.attach_backbones(
            dtype=dtype, quantization_config=quantization_config, **placement, **_hub_kwargs(kwargs)
        )
        if not model.can_generate() and pretrained_model_name_or_path is not None:
            model.generation_config = _saved_generation_config(
                pretrained_model_name_or_path, **where, **_hub_kwargs(kwargs)
            )
        model.eval()
        return (model, info) if wants_info else model

    def attach_backbones(
        self,
        *,
        dtype: str | torch.dtype = "auto",
        quantization_config: Any = None,
        device_map: Any = None,
        max_memory: dict | None = None,
        offload_folder: str | os.PathLike | None = None,
        offload_buffers: bool | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """
        Loads and attaches the backbones that `config.backbones` names, frozen and in evaluation mode: the LLM and the
        text encoder now, the vision encoder with the first picture (a text chat does without).

        Raises:
            OSError: if one cannot be found.
            ValueError: if the LLM found has other sizes than `config.text_config` says.
        """
        self._load_kwargs = {"dtype": dtype, **hub_kwargs}
        text_config = self.config.text_config
        if "language_model" in self.config.backbones:
            self.language_model = self._load_backbone(
                "language_model",
                quantization_config=quantization_config,
                device_map=device_map,
                max_memory=max_memory,
                offload_folder=offload_folder,
                offload_buffers=offload_buffers,
                # where an Auto class puts it
                attn_implementation=text_config._attn_implementation,
            )
            found = self.language_model.config.get_text_config()
            for key in ("hidden_size", "vocab_size"):
                if getattr(found, key) != getattr(text_config, key):
                    raise ValueError(
                        f"The language model {self.config.backbones['language_model']['repo_id']!r} has {key}="
                        f"{getattr(found, key)}, but this checkpoint was made for {key}={getattr(text_config, key)}. "
                        "Attach the language model it was trained with."
                    )
            # everything else follows the LLM's embeddings, wherever a device map put them
            device = self._input_device()
            for name, part in self.named_children():
                if name != "language_model":
                    part.to(device)
            for parameter in self.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            if hasattr(self.language_model, "hf_device_map"):
                self.hf_device_map = {
                    f"language_model.{name}".rstrip("."): place
                    for name, place in self.language_model.hf_device_map.items()
                }
        if "context_encoder" in self.config.backbones:
            self.context_encoder = self._load_backbone("context_encoder").to(self._input_device())
        for role in BACKBONE_CONFIGS:
            if getattr(self, role) is not None:
                getattr(self, role).requires_grad_(False).eval()  # also those that came with the checkpoint
        self.post_init()  # what the parts tie and keep in float32 is now known to the whole

    def attach_vision_encoder(self) -> None:
        """
        Loads the vision encoder, frozen, unless it is there.

        Raises:
            OSError: if it cannot be found.
            ValueError: if the model was built without one.
        """
        if self.config.vision_config is None:
            raise ValueError("This model has no vision encoder (config.vision_config is None): it takes no pictures.")
        if self.vision_encoder is None:
            self.vision_encoder = self._load_backbone("vision_encoder").to(self._input_device())

    def _require(self, role: str) -> None:
        if getattr(self, role) is None:
            raise ValueError(
                f"The {role} is not attached: call attach_backbones(), or load the model with from_pretrained."
            )

    def _input_device(self) -> torch.device:
        """Where the LLM's embeddings are computed; their weights may be offloaded."""
        embeddings = self.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or embeddings.weight.device)

    def _load_backbone(self, role: str, **kwargs: Any) -> PreTrainedModel:
        """The backbone that `config.backbones` names for a role, frozen, from wherever it is found."""
        source, sub_config = self.config.backbones[role], getattr(self.config, BACKBONE_CONFIGS[role])
        load_kwargs = {**self._load_kwargs, **kwargs, "use_safetensors": True}
        path, load_kwargs["revision"] = find_backbone(
            source["repo_id"], source.get("revision"), **_hub_kwargs(load_kwargs)
        )
        if role != "language_model":
            load_kwargs["config"] = copy.deepcopy(sub_config)  # the right tower of a two-tower repository
            load_kwargs["config"].dtype = None  # "auto" is the dtype of the weights, not of this checkpoint
        load_kwargs = {key: value for key, value in load_kwargs.items() if value is not None}
        _check_weight_files(path, load_kwargs.get("revision"), **_hub_kwargs(load_kwargs))
        with _clear_errors(source["repo_id"]):
            backbone, info = _backbone_class(role, sub_config).from_pretrained(
                path, output_loading_info=True, **load_kwargs
            )
        # a pooler is often not saved, and it is not used here
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise OSError(
                f"The {role} {source['repo_id']!r} lacks {len(missing)} weights of {type(backbone).__name__}, such as "
                f"{missing[:3]}. It is incomplete, or another model than config.{BACKBONE_CONFIGS[role]} says."
            )
        if role != "language_model" and backbone.dtype == torch.float16 and backbone.device.type == "cpu":
            backbone.float()  # CPUs compute in float16 several times slower
        # never saved with the model: its repository has it
        backbone._keys_to_ignore_on_save = set(backbone.state_dict())
        self._keys_to_ignore_on_save = {
            *(self._keys_to_ignore_on_save or ()),
            *(f"{role}.{key}" for key in backbone._keys_to_ignore_on_save),
        }
        return backbone.requires_grad_(False).eval()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, include_backbones: bool = False, **kwargs: Any
    ) -> None:
        """
        Writes what was trained and nothing frozen (safetensors); with `include_backbones` a self-contained checkpoint.

        All files are written aside and then moved into place, so that an interrupted save leaves the previous
        checkpoint as it was.
        """
        push = {key: kwargs.pop(key) for key in ("push_to_hub", "repo_id", "commit_message") if key in kwargs}
        if push.get("push_to_hub"):
            raise ValueError("save_pretrained(push_to_hub=True) is not supported: call push_to_hub(repo_id) instead.")
        if include_backbones and getattr(self.language_model, "is_quantized", False):
            raise ValueError(
                "A quantised LLM cannot be part of a self-contained checkpoint. Load the model without "
                "quantization_config to save it with its backbones, or save it without them."
            )
        os.makedirs(save_directory, exist_ok=True)
        aside = tempfile.mkdtemp(dir=save_directory, prefix=".saving-")
        try:
            if include_backbones and self.config.vision_config is not None:
                self.attach_vision_encoder()
            with self._as_saved(include_backbones):
                super().save_pretrained(aside, **kwargs)
            if not self.can_generate() and getattr(self, "generation_config", None) is not None:
                self.generation_config.save_pretrained(aside)  # for the dialogue model that loads this checkpoint
            saved = os.listdir(aside)
            # weights first: a configuration never describes weights that are not there yet
            for name in sorted(saved, key=lambda name: (name.endswith(".json"), name)):
                os.replace(os.path.join(aside, name), os.path.join(save_directory, name))
            if any(name.endswith(".safetensors") for name in saved):
                # of an earlier checkpoint with more or fewer shards
                stale = set(fnmatch.filter(os.listdir(save_directory), "model*.safetensors*")) - set(saved)
                for name in stale:
                    os.remove(os.path.join(save_directory, name))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def push_to_hub(self, repo_id: str, *, processor: Any = None, **kwargs: Any) -> Any:
        """
        Commits what was trained, and the code and card that go with it, to a repository of the Hub, in one step.

        Args:
            repo_id: "org/name"; created if it does not exist.
            processor: the processor to commit with the model.
            kwargs: `include_backbones`, `results`, `private`, `token`, `revision`, `create_pr`, `commit_message`; see
                `sharing.push_to_hub`.

        Raises:
            OSError: if the Hub refuses or breaks off; the repository is then as it was.
            ValueError: if the model would not load elsewhere.
        """
        from .sharing import push_to_hub  # here, for it imports this module

        return push_to_hub(repo_id, model=self, processor=processor, **kwargs)

    @contextlib.contextmanager
    def _as_saved(self, include_backbones: bool) -> Iterator[None]:
        """For the time of a save the model and its configuration are those that the checkpoint will hold."""
        before = self.config.backbones, self.config.backbone_dtypes, self._keys_to_ignore_on_save
        device_map = self.__dict__.pop("hf_device_map", None)
        if include_backbones:
            self.config.backbones, self._keys_to_ignore_on_save = {}, None
        self.config.backbone_dtypes = {
            role: str(getattr(self, role).dtype).removeprefix("torch.")
            for role in BACKBONE_CONFIGS
            if role not in self.config.backbones and getattr(self, role) is not None
        }
        if include_backbones and device_map is not None:
            self.hf_device_map = device_map  # offloaded weights are read back
        try:
            yield
        finally:
            self.config.backbones, self.config.backbone_dtypes, self._keys_to_ignore_on_save = before
            if device_map is not None:
                self.hf_device_map = device_map


def _backbone_class(role: str, config: PreTrainedConfig) -> Any:
    """The class that holds a backbone: CLIP's towers with their projections, else what the Auto class finds."""
    if role == "language_model":
        return AutoModelForCausalLM
    towers = {
        "clip_text_model": CLIPTextModelWithProjection,
        "clip_vision_model": CLIPVisionModelWithProjection,
        "siglip_text_model": SiglipTextModel,  # the Auto class knows SigLIP's vision tower only
    }
    return towers.get(config.model_type, AutoModel)


def _build_backbone(role: str, config: PreTrainedConfig, dtype: str | None) -> PreTrainedModel:
    """A backbone that is part of the checkpoint, frozen, its weights yet to be filled in."""
    backbone_class = _backbone_class(role, config)
    build = backbone_class.from_config if hasattr(backbone_class, "from_config") else backbone_class._from_config
    return build(config, **({} if dtype is None else {"dtype": getattr(torch, dtype)})).requires_grad_(False).eval()


@contextlib.contextmanager
def _clear_errors(source: str | os.PathLike) -> Iterator[None]:
    """Says of weights that cannot be loaded what is wrong with them and what to do."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"The weights in {str(source)!r} cannot be read ({error}). The file is truncated or damaged: copy or "
            "download it again."
        ) from error
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights in {str(source)!r} do not have the sizes that config.json says: {error}"
        ) from error


def _check_repository_ids(config: VikdfConfig, source: str) -> None:
    """A repository has no say in which folders of this machine are read."""
    for role, backbone in config.backbones.items():
        try:
            validate_repo_id(backbone["repo_id"])
        except HFValidationError as error:
            raise ValueError(
                f"{source!r} names {backbone['repo_id']!r} as its {role}, which is no repository of the Hub. If you "
                "know that folder, download the repository and load it from there."
            ) from error


def _check_weight_files(
    source: str | os.PathLike, revision: str | None = None, subfolder: str = "", **hub_kwargs: Any
) -> None:
    """Refuses weights that are only there as pickles, and an index that leads out of its folder or repository."""
    where = {"revision": revision, **hub_kwargs}

    def find(name: str) -> str | None:
        try:
            return cached_file(source, name, subfolder=subfolder, **where)
        except OSError:  # where nothing can be found for other reasons, loading says so
            return None

    if find("model.safetensors"):
        return
    pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    if path := find("model.safetensors.index.json"):
        with open(path, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        if outside := sorted(name for name in names if os.path.basename(name) != name):
            raise ValueError(
                f"{os.path.basename(path)} of {str(source)!r} names {outside[0]!r}, which is not beside it."
            )
    elif pickled := [name for name in pickles if has_file(source, os.path.join(subfolder, name), **where)]:
        raise OSError(
            f"{str(source)!r} has its weights as {pickled[0]} only. That is a pickle, which can run code, so it is "
            "not loaded. Ask its owner for model.safetensors, name a revision that has it, or, if you trust the file, "
            "convert it: AutoModel.from_pretrained(...).save_pretrained(folder) writes safetensors."
        )


def _saved_generation_config(source: str | os.PathLike, **where: Any) -> GenerationConfig | None:
    """How a checkpoint's dialogue model generates, if the checkpoint says so."""
    try:
        return GenerationConfig.from_pretrained(source, **where)
    except OSError:
        return None


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where and how to look on the Hub."""
    return {key: kwargs[key] for key in ("cache_dir", "local_files_only", "token") if key in kwargs}


def pop_cache(kwargs: dict[str, Any]) -> Any:
    """
    The LLM's cache, or `None`, taken out of keyword arguments, where it goes by either of its names.

    Raises:
        ValueError: if it is given under both.
    """
    caches = [cache for name in ("cache", "past_key_values") if (cache := kwargs.pop(name, None)) is not None]
    if len(caches) > 1:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them.")
    return caches[0] if caches else None


def find_backbone(repo_id: str, revision: str | None, **hub_kwargs: Any) -> tuple[str, str | None]:
    """Where to load a backbone from: `(folder or repository id, revision)`."""
    try:
        # the installed package knows more sources than the Hub; code loaded from the Hub does without
        from modeling_vikdf.backbones import locate_backbone
    except ImportError:
        return repo_id, revision
    return locate_backbone(repo_id, revision, **hub_kwargs), None


__all__ = ["CACHE", "VikdfPreTrainedModel", "find_backbone", "pop_cache"]
