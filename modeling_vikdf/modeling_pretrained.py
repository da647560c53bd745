"""Loading: a model whose frozen backbones come from their own repositories and are not stored with it.

`VikdfPreTrainedModel` knows which backbones there are and how each is found, attached and kept frozen; what a
checkpoint holds is decided in modeling_saving.py. It knows nothing of what the model computes.
"""

import contextlib
import copy
import importlib
import json
import os
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import cached_file, has_file, logging

from .atomic_saving import check_saved_in, saved_in
from .configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig, nearest_name
from .modeling_iqformer import CLIP_LOGIT_SCALE, VikdfIQFormer, VikdfMatchingHead
from .modeling_prefix import CACHE
from .modeling_saving import ADAPTER_FOLDER, SavingMixin, checksums


logger = logging.get_logger(__name__)

# arguments of `from_pretrained` that select the files to read
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# its other arguments
_ARGUMENTS = (
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "ignore_mismatched_sizes",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "output_loading_info",
    "quantization_config",
    "state_dict",
    "trust_remote_code",
    "variant",
)


class VikdfPreTrainedModel(SavingMixin, PreTrainedModel):
    """Base class with the frozen backbones: part of the checkpoint, or attached after the trained part is loaded."""

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
    # the trained parts stay in float32 beside a half-precision LLM
    _keep_in_fp32_modules_strict = ["iqformer", "matching_head", "language_projection"]
    _keep_in_fp32_modules_strict += ["knowledge_base", "knowledge_gate"]

    def __init__(self, config: VikdfConfig):
        super().__init__(config)
        self._load_kwargs = {}  # arguments of `attach_backbones`, for backbones that are loaded later
        self._waiting_adapters = []  # arguments of `load_adapter`, until the backbones are attached
        self._loaded_weights = {}  # role -> name -> checksums of the weights as loaded from the repository
        for role, key in BACKBONE_CONFIGS.items():
            sub_config = getattr(config, key)
            if role in config.backbones or sub_config is None:
                setattr(self, role, None)  # attached after loading, or absent
            else:
                setattr(self, role, _build_backbone(role, sub_config, config.backbone_dtypes.get(role)))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VikdfIQFormer):
            # small queries would be nearly equal once the conditioning, as large as a normed state, is added
            std = 1.0 if self.config.condition_queries else self.config.initializer_range
            init.normal_(module.query_tokens, std=std)
        if isinstance(module, VikdfMatchingHead):
            init.constant_(module.logit_scale, CLIP_LOGIT_SCALE)
        if hasattr(module, "knowledge_base"):
            # the paper's parametrisation: nothing but the projected knowledge
            init.zeros_(module.knowledge_base)
            init.ones_(module.knowledge_gate)

    def train(self, mode: bool = True) -> "VikdfPreTrainedModel":
        """Sets the trained parts and PEFT's layers to training mode; frozen backbones stay in evaluation mode."""
        super().train(mode)
        encoders = [role for role in ("context_encoder", "vision_encoder") if getattr(self, role) is not None]
        if mode and (
            trainable := [role for role in encoders if any(p.requires_grad for p in getattr(self, role).parameters())]
        ):
            logger.warning_once(
                f"The {' and '.join(trainable)} has trainable parameters, but the encoders run without gradient: they "
                "will not learn. PEFT's target_modules='all-linear', or a bare list of names, matches encoders, too: "
                r"name the LLM's modules instead: target_modules=r'language_model\..*\.(q_proj|v_proj)'."
            )
        for role in BACKBONE_CONFIGS:
            if getattr(self, role) is not None:
                for module in getattr(self, role).eval().modules():
                    if hasattr(module, "adapter_layer_names"):
                        module.train(mode)
        if hasattr(self.get_input_embeddings(), "neftune_noise_alpha"):
            self.get_input_embeddings().train(mode)  # transformers' hook adds noise in training mode only
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
        Loads the trained part from a folder or the Hub, then attaches each frozen backbone from its own repository.

        Args:
            pretrained_model_name_or_path: folder or repository id of a VIKDF checkpoint; `None` with `config` and
                `state_dict`.
            model_args: for the constructor.
            dtype: of the backbones; `"auto"` keeps each one's saved dtype. The trained part stays in float32.
            device_map: for the LLM, as are `max_memory`, `offload_folder` and `offload_buffers`; the encoders and the
                trained part follow its input embeddings' device. A self-contained checkpoint is placed as a whole.
            quantization_config: for the LLM.
            attn_implementation: for the LLM.
            kwargs: fields of the configuration to change, and further arguments of transformers' `from_pretrained`.

        Raises:
            OSError: if the weights are missing, truncated or incomplete, or a backbone cannot be found.
            TypeError: for an unknown argument.
            ValueError: if the weights or a backbone do not fit the configuration, or weights are not finite.
        """
        if base := _base_of_adapter(pretrained_model_name_or_path):
            settings = {
                "dtype": dtype,
                "device_map": device_map,
                "quantization_config": quantization_config,
                "attn_implementation": attn_implementation,
            }
            adapter = {"adapter_kwargs": {"_adapter_model_path": str(pretrained_model_name_or_path)}}
            return cls.from_pretrained(base, *model_args, **settings, **adapter, **kwargs)
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "VIKDF loads safetensors only: pickled weights can run code. Leave use_safetensors unset."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("torch_dtype", None) or dtype  # its former name
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        path = pretrained_model_name_or_path
        config, source, kwargs = cls._locate(path, kwargs.pop("config", None), kwargs)
        if dtype != "auto":
            config.backbone_dtypes = {}
        offload = ("max_memory", "offload_folder", "offload_buffers")
        placement = {"device_map": device_map, **{key: kwargs.pop(key) for key in offload if key in kwargs}}
        holds_llm = "language_model" not in config.backbones
        if holds_llm and quantization_config is not None:
            raise ValueError(
                "quantization_config is for the LLM, but this checkpoint holds its own LLM. Load the LLM from its "
                "repository instead: set config.backbones['language_model'] = {'repo_id': ...}."
            )
        with _clear_errors(path), _clear_argument_errors():
            model, info = super().from_pretrained(
                source,
                *model_args,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **(placement if holds_llm else {}),
                **kwargs,
            )
        _check_complete(model, info["missing_keys"], path)
        _check_finite(model, path)
        model.attach_backbones(
            dtype=dtype, quantization_config=quantization_config, **placement, **_hub_kwargs(kwargs)
        )
        model.config.name_or_path = model.name_or_path = str(path or "")
        model._load_generation_and_adapter(source, kwargs)
        model.eval()
        return (model, info) if wants_info else model

    def _load_generation_and_adapter(self, source: str | os.PathLike | None, kwargs: dict[str, Any]) -> None:
        """Loads the generation configuration and the adapter that a checkpoint may hold beside its weights."""
        where = {key: kwargs[key] for key in ("revision", "subfolder") if key in kwargs} | _hub_kwargs(kwargs)
        if not self.can_generate() and source is not None:
            self.generation_config = _saved_generation_config(source, **where)
        if (adapter := self.config.adapter) is not None:
            if os.path.isdir(source):  # transformers 5.17 knows sub-folders of repositories only
                source = os.path.join(source, ADAPTER_FOLDER)
            else:
                where["subfolder"] = os.path.join(kwargs.get("subfolder", ""), ADAPTER_FOLDER)
            self.load_adapter(source, adapter_name=adapter, adapter_kwargs=where)

    @classmethod
    def _locate(
        cls, path: str | os.PathLike | None, config: Any, kwargs: dict[str, Any]
    ) -> tuple[VikdfConfig, str | os.PathLike | None, dict[str, Any]]:
        """The configuration, the weights' folder or repository, and the remaining arguments of `from_pretrained`."""
        if path is None and (config is None or kwargs.get("state_dict") is None):
            raise ValueError(
                "Name a folder or repository to load from, or pass None with config= and state_dict= to load from "
                "memory."
            )
        if not isinstance(config, PreTrainedConfig):
            where = {key: kwargs.pop(key) for key in _WHERE if key in kwargs}
            config, kwargs = cls.config_class.from_pretrained(
                config or path, return_unused_kwargs=True, **where, **kwargs
            )
            kwargs |= where
        config = copy.deepcopy(config)
        aside = check_saved_in(config.saved_in, "config.json")
        config.saved_in = None
        if path is None:
            return config, None, kwargs
        if os.path.isdir(path):
            # joined here: given a folder, transformers looks for generation defaults beside the `subfolder`, too
            path = os.path.join(path, kwargs.pop("subfolder", ""))
            path = os.path.normpath(os.path.join(path, saved_in(path, "config.json")))
        else:
            _check_repository_ids(config, path)
            kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), aside)
        where = {key: kwargs[key] for key in ("revision", "subfolder", "variant") if key in kwargs}
        _check_weight_files(path, **where, **_hub_kwargs(kwargs))
        return config, path, kwargs

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
        Loads the backbones that `config.backbones` names, frozen and in evaluation mode.

        The vision encoder is loaded with the first picture: text chats do not need it.

        Raises:
            OSError: if a backbone cannot be found.
            ValueError: if the sizes of the LLM are not those of `config.text_config`.
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
            loaded = self.language_model.config.get_text_config()
            for key in ("hidden_size", "vocab_size"):
                if getattr(loaded, key) != getattr(text_config, key):
                    raise ValueError(
                        f"The language model {self.config.backbones['language_model']['repo_id']!r} has {key}="
                        f"{getattr(loaded, key)}, but this checkpoint was made for {key}={getattr(text_config, key)}. "
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
        self.post_init()  # collects the tied weights and float32 modules of the attached parts
        while self._waiting_adapters:
            self.load_adapter(**self._waiting_adapters.pop(0))

    def attach_vision_encoder(self) -> None:
        """
        Loads the vision encoder, frozen, unless it is already attached.

        Raises:
            OSError: if it cannot be found.
            ValueError: if the model was built without one.
        """
        if self.config.vision_config is None:
            raise ValueError("This model has no vision encoder (config.vision_config is None): it takes no pictures.")
        if self.vision_encoder is None:
            self.vision_encoder = self._load_backbone("vision_encoder").to(self._input_device())

    def load_adapter(self, peft_model_id: str | os.PathLike | None = None, **kwargs: Any) -> Any:
        """
        Loads a PEFT adapter as transformers does (see its arguments), in the dtype in which it was saved.

        Parameters that were trainable stay so. Before the backbones are attached, loading is deferred until they are.

        Raises:
            OSError: if there is no adapter, or it is not saved as safetensors.
        """
        if any(getattr(self, role) is None for role in self.config.backbones if role != "vision_encoder"):
            kwargs.pop("load_config", None)  # belongs to the model, which is not loaded yet
            self._waiting_adapters.append({"peft_model_id": peft_model_id, **kwargs})
            return SimpleNamespace(to_dict=lambda: {"missing_keys": set(), "unexpected_keys": set()})
        if peft_model_id is None:  # given as tensors
            return super().load_adapter(**kwargs)
        where = kwargs.get("adapter_kwargs") or {}
        saved = load_file(cached_file(peft_model_id, "adapter_model.safetensors", **where))
        saved = {name.removeprefix("base_model.model."): weight for name, weight in saved.items()}
        if any(name.startswith("vision_encoder.") for name in saved):
            self.attach_vision_encoder()
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        conversions = getattr(self, "_weight_conversions", None)
        info = super().load_adapter(str(peft_model_id), **kwargs)
        self._weight_conversions = conversions  # or the model itself would be saved under an adapter's names
        self._restore_adapter(saved, kwargs.get("adapter_name") or "default")
        for name, parameter in self.named_parameters():
            if name in trainable:
                parameter.requires_grad_()
        return info

    def _restore_adapter(self, saved: dict[str, torch.Tensor], adapter: str) -> None:
        """Reloads an adapter in its saved dtype; transformers has loaded it in the model's."""
        peft = importlib.import_module("peft")
        for name, parameter in self.named_parameters():
            name = name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")
            if name in saved:
                parameter.data = parameter.data.to(saved[name].dtype)
        peft.set_peft_model_state_dict(self, saved, adapter)

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
        """Loads the backbone that `config.backbones` names for a role, frozen."""
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
        # a pooler is often not saved, and is unused here
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise OSError(
                f"The {role} {source['repo_id']!r} lacks {len(missing)} weights of {type(backbone).__name__}, such as "
                f"{missing[:3]}. It is incomplete, or another model than config.{BACKBONE_CONFIGS[role]} says."
            )
        if role != "language_model" and backbone.dtype == torch.float16 and backbone.device.type == "cpu":
            backbone.float()  # CPUs compute in float16 several times slower
        # not saved with the model as long as its weights equal its repository's
        weights = backbone.state_dict()
        self._loaded_weights[role] = {
            name: checksums(load_offloaded_parameter(backbone, name) if weight.is_meta else weight)
            for name, weight in weights.items()
        }
        self._keys_to_ignore_on_save = {
            *(self._keys_to_ignore_on_save or ()),
            *(f"{role}.{name}" for name in weights),
        }  # tells a Trainer that checkpoints may lack them
        return backbone.requires_grad_(False).eval()


def _backbone_class(role: str, config: PreTrainedConfig) -> Any:
    """The class of a backbone: CLIP's towers with their projections, T5's encoder, otherwise the Auto class."""
    if role == "language_model":
        return AutoModelForCausalLM
    towers = {
        "t5": "T5EncoderModel",  # the Auto class would load the decoder, too
        "mt5": "MT5EncoderModel",
        "umt5": "UMT5EncoderModel",
        "clip_text_model": "CLIPTextModelWithProjection",
        "clip_vision_model": "CLIPVisionModelWithProjection",
        "siglip_text_model": "SiglipTextModel",  # the Auto class knows SigLIP's vision tower only
    }
    return getattr(transformers, towers.get(config.model_type, "AutoModel"))  # imports that tower alone


def _build_backbone(role: str, config: PreTrainedConfig, dtype: str | None) -> PreTrainedModel:
    """A backbone that is part of the checkpoint, frozen; its weights are loaded with the model's."""
    backbone_class = _backbone_class(role, config)
    build = backbone_class.from_config if hasattr(backbone_class, "from_config") else backbone_class._from_config
    return build(config, **({} if dtype is None else {"dtype": getattr(torch, dtype)})).requires_grad_(False).eval()


@contextlib.contextmanager
def _clear_errors(source: str | os.PathLike) -> Iterator[None]:
    """Replaces errors about unloadable weights by ones that name the cause and the remedy."""
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


def _check_complete(model: nn.Module, missing: set[str], source: str | os.PathLike | None) -> None:
    if missing:
        raise OSError(
            f"The checkpoint {source!r} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{sorted(missing)[:3]}. It is incomplete or of another model."
        )


def _check_finite(model: nn.Module, source: str | os.PathLike | None) -> None:
    """Refuses weights that would make all outputs NaN, and every reply consist of token 0."""
    for name, weight in model.state_dict().items():
        # offloaded or 8-bit weights were not trained here
        if not weight.is_meta and weight.is_floating_point() and weight.itemsize > 1 and not weight.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values in the checkpoint {str(source)!r}: its training diverged, or it "
                "was damaged. Load an earlier checkpoint, and train on with a lower learning rate."
            )


@contextlib.contextmanager
def _clear_argument_errors() -> Iterator[None]:
    """Names the unknown argument: transformers' `from_pretrained` hands it to the model, whose error would not."""
    try:
        yield
    except TypeError as error:
        if not (match := re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))):
            raise
        known = {*VikdfConfig.__dataclass_fields__, *_WHERE, *_ARGUMENTS}
        raise TypeError(
            f"from_pretrained got an unexpected argument {match[1]!r}, which is not a field of the configuration "
            f"either.{nearest_name(match[1], known)}"
        ) from error


def _base_of_adapter(path: str | os.PathLike | None) -> str | None:
    """The base model of a folder that holds only an adapter, as saved by PEFT; `None` for other folders."""
    if path is None or not os.path.isfile(settings := os.path.join(path, "adapter_config.json")):
        return None
    if os.path.isfile(os.path.join(path, "config.json")):
        return None
    with open(settings, encoding="utf-8") as file:
        return json.load(file).get("base_model_name_or_path")


def _check_repository_ids(config: VikdfConfig, source: str) -> None:
    """Refuses local folders as backbones: a repository must not choose which folders of this machine are read."""
    for role, backbone in config.backbones.items():
        try:
            validate_repo_id(backbone["repo_id"])
        except HFValidationError as error:
            raise ValueError(
                f"{source!r} names {backbone['repo_id']!r} as its {role}, which is not a Hub repository. If you know "
                "that folder, download the repository and load it from there."
            ) from error


def _check_weight_files(
    source: str | os.PathLike,
    revision: str | None = None,
    subfolder: str = "",
    variant: str | None = None,
    **hub_kwargs: Any,
) -> None:
    """Refuses weights available only as pickles, and an index that names pickles or files outside its folder."""
    where = {"revision": revision, **hub_kwargs}

    def find(name: str) -> str | None:
        try:
            return cached_file(source, name, subfolder=subfolder, **where)
        except OSError:  # other reasons are reported by loading itself
            return None

    dotted = f".{variant}" if variant else ""
    if find(f"model{dotted}.safetensors"):
        return
    pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    if path := find(f"model.safetensors.index{dotted}.json"):
        with open(path, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        if outside := sorted(name for name in names if os.path.basename(name) != name):
            raise ValueError(
                f"{os.path.basename(path)} of {str(source)!r} names {outside[0]!r}, which is not beside it."
            )
        if others := sorted(name for name in names if not name.endswith(".safetensors")):
            raise ValueError(
                f"{os.path.basename(path)} of {str(source)!r} names {others[0]!r}. VIKDF loads safetensors only: "
                "pickled weights can run code."
            )
    elif pickled := [name for name in pickles if has_file(source, os.path.join(subfolder, name), **where)]:
        raise OSError(
            f"{str(source)!r} has its weights only as {pickled[0]}. That is a pickle, which can run code, so it is "
            "not loaded. Ask its owner for model.safetensors, name a revision that has it, or, if you trust the file, "
            "convert it: AutoModel.from_pretrained(...).save_pretrained(folder) writes safetensors."
        )


def _saved_generation_config(source: str | os.PathLike, **where: Any) -> GenerationConfig | None:
    """The generation configuration in a checkpoint, or `None`."""
    try:
        return GenerationConfig.from_pretrained(source, **where)
    except OSError:
        return None


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that concern the Hub, except `revision`."""
    return {key: kwargs[key] for key in ("cache_dir", "local_files_only", "token") if key in kwargs}


def find_backbone(repo_id: str, revision: str | None, **hub_kwargs: Any) -> tuple[str, str | None]:
    """Where to load a backbone from: `(folder or repository id, revision)`."""
    try:
        # the installed package knows more sources than the Hub; code loaded from the Hub does not have it
        from modeling_vikdf.backbones import locate_backbone
    except ImportError:
        return repo_id, revision
    return locate_backbone(repo_id, revision, **hub_kwargs), None


__all__ = ["VikdfPreTrainedModel", "find_backbone"]
