"""Saving: which parts of a model a checkpoint holds, and that it can be loaded again.

`SavingMixin` writes the trained parts, omits frozen backbones whose weights still equal their repositories' (by
checksum), and writes PEFT's adapter beside them. It does not know how a backbone is found or loaded.
"""

import contextlib
import copy
import functools
import glob
import importlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import initialization as init
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.utils import logging

from .atomic_saving import replace_files
from .configuration_vikdf import BACKBONE_CONFIGS
from .sharing import push_to_hub


logger = logging.get_logger(__name__)

ADAPTER_FOLDER = "adapter"  # with PEFT's files in its own folder a checkpoint would be taken for an adapter only
PART = 1 << 18  # values whose checksums are computed at a time


class SavingMixin:
    """
    `save_pretrained` and `push_to_hub` for models whose frozen backbones stay in their own repositories.

    For a `PreTrainedModel` with a `VikdfConfig`, an attribute for each backbone, and in `_loaded_weights` the
    checksums of the weights as loaded: role -> name -> `checksums` of the weight.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, include_backbones: bool = False, **kwargs: Any
    ) -> None:
        """
        Writes the trained parts as safetensors, without the frozen backbones.

        A backbone whose weights differ from its repository's (it was trained, an adapter was merged into it, its
        vocabulary was resized) is written, too, with a warning, and then loads from the checkpoint. A PEFT adapter is
        written to `adapter/` and loaded with the model.

        The folder's checkpoint is replaced as a whole or not at all, even if the process is killed; see
        atomic_saving.py.

        Args:
            save_directory: folder to write.
            include_backbones: also writes the backbones, which makes the checkpoint self-contained.
            kwargs: further arguments of transformers' `save_pretrained`.

        Raises:
            ValueError: if the checkpoint could not be loaded again; the message says what to do about it.
        """
        for name in ("push_to_hub", "distributed_checkpoint"):
            if kwargs.pop(name, False):
                instead = "call push_to_hub(repo_id) instead" if name == "push_to_hub" else "leave it unset"
                raise ValueError(f"save_pretrained({name}=True) is not supported: {instead}.")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("repo_id", "commit_message")}
        if include_backbones and self.config.vision_config is not None:
            self.attach_vision_encoder()
        state = kwargs.pop("state_dict", None)
        state = self.state_dict() if state is None else state
        stored = set(self.config.backbones) if include_backbones else self._changed_backbones(state)
        if "language_model" in stored and getattr(self.language_model, "is_quantized", False):
            raise ValueError(
                "A quantised LLM cannot be part of a checkpoint. Load the model without quantization_config to save "
                "it with its backbones, or with an adapter merged into its LLM; or save it without them, and an "
                "adapter unmerged."
            )
        named = set(self.config.backbones) - stored
        weights = {
            bare: weight
            for name, weight in state.items()
            if (bare := self._name_without_adapter(name)) is not None and bare.split(".")[0] not in named
        }
        if kwargs.get("is_main_process", True):
            place = replace_files(save_directory, "config.json")
        else:  # takes part in gathering the weights, and writes nothing
            os.makedirs(save_directory, exist_ok=True)
            place = tempfile.TemporaryDirectory()
        with place as folder, self._as_saved(stored):
            if kwargs.get("is_main_process", True):
                self._check_loadable(weights)
                self._save_adapter(folder, state)
            super().save_pretrained(folder, state_dict=weights, **kwargs)
            if not self.can_generate() and getattr(self, "generation_config", None) is not None:
                self.generation_config.save_pretrained(folder)  # for the dialogue model that loads this checkpoint
            _name_shards(folder)

    def _changed_backbones(self, state: dict[str, torch.Tensor]) -> set[str]:
        """Roles in `config.backbones` whose weights are no longer those that were loaded."""
        changed = set()
        for role in self.config.backbones:
            loaded = self._loaded_weights.get(role, {})
            weights = {
                bare.removeprefix(f"{role}."): name
                for name in state
                if (bare := self._name_without_adapter(name)) is not None and bare.startswith(f"{role}.")
            }
            if not weights:  # not attached, or not to be saved
                continue
            different = [
                name
                for name in sorted(weights.keys() | loaded.keys())
                if name not in weights
                or name not in loaded
                or not _is_unchanged(self._read_weight(state, weights[name]), loaded[name])
            ]
            if different:
                changed.add(role)
                logger.warning(
                    f"The {role} is no longer that of {self.config.backbones[role]['repo_id']!r}: {len(different)} of "
                    f"its {len(weights)} weights differ, such as {different[0]}. It is saved with the model."
                )
        return changed

    def _read_weight(self, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return load_offloaded_parameter(self, name) if state[name].is_meta else state[name]

    def _name_without_adapter(self, name: str) -> str | None:
        """A weight's name in the model without PEFT's adapter; `None` for the adapter's own weights."""
        if set(name.split(".")) & set(getattr(self, "peft_config", {})):
            return None
        return name.replace(".base_layer.", ".").replace(".original_module.", ".")

    def _check_loadable(self, weights: dict[str, torch.Tensor]) -> None:
        """Refuses weights that `from_pretrained` would not read, or would miss."""
        # FSDP prepends a class of its own, which cannot be instantiated
        model_class = next(base for base in type(self).__mro__ if not base.__name__.startswith("FSDP"))
        with torch.device("meta"), init.no_init_weights():
            fresh = model_class(copy.deepcopy(self.config))
        expected = {name: weight.shape for name, weight in fresh.state_dict().items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        if wrong := sorted(name for name, _ in shapes.items() ^ expected.items()):
            raise ValueError(
                f"The model would not load again: {len(wrong)} weights are not those of {model_class.__name__} with "
                f"this configuration, such as {wrong[0]!r}. Was a part of it wrapped or replaced? For PEFT use "
                "get_peft_model(model, ...) or model.add_adapter(...) on the whole model, with target_modules such as "
                r"r'language_model\..*\.(q_proj|v_proj)', or merge the adapter: model.language_model = "
                "model.language_model.merge_and_unload()."
            )

    def _save_adapter(self, folder: str, state: dict[str, torch.Tensor]) -> None:
        """Writes the PEFT adapter in PEFT's own format, into a sub-folder."""
        if self.config.adapter is None:
            return
        peft = importlib.import_module("peft")  # an `import` statement would make it a requirement of code on the Hub
        name = self.config.adapter
        settings = copy.deepcopy(self.peft_config[name])
        settings.inference_mode, settings.base_model_name_or_path = True, None  # the model is in the folder above
        settings.save_pretrained(os.path.join(folder, ADAPTER_FOLDER))
        weights = peft.get_peft_model_state_dict(self, state_dict=state, adapter_name=name)
        weights = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
        save_file(weights, os.path.join(folder, ADAPTER_FOLDER, "adapter_model.safetensors"), {"format": "pt"})

    def push_to_hub(self, repo_id: str, *, processor: Any = None, **kwargs: Any) -> Any:
        """
        Commits the trained parts, the code and the model card to a repository of the Hub, in one commit.

        Args:
            repo_id: "org/name"; created if it does not exist.
            processor: the processor to commit with the model.
            kwargs: `include_backbones`, `results`, `private`, `token`, `revision`, `create_pr`, `commit_message`; see
                `sharing.push_to_hub`.

        Raises:
            OSError: if the Hub refuses or the connection breaks; the repository is then unchanged.
            ValueError: if the model would not load elsewhere.
        """
        return push_to_hub(repo_id, model=self, processor=processor, **kwargs)

    @contextlib.contextmanager
    def _as_saved(self, stored: set[str]) -> Iterator[None]:
        """
        Makes the model and its configuration, for the time of a save, those that the checkpoint will hold.

        Args:
            stored: roles of the backbones that are saved with the model.

        Raises:
            ValueError: if there are several adapters.
        """
        adapters = list(getattr(self, "peft_config", {}))
        if len(adapters) > 1:
            raise ValueError(
                f"The model holds the adapters {adapters}, and a checkpoint can hold one. Remove the others with "
                "delete_adapter, or merge them, and save again."
            )
        before = self.config.backbones, self.config.backbone_dtypes, self.config.adapter, self._keys_to_ignore_on_save
        has_adapter, self._hf_peft_config_loaded = self._hf_peft_config_loaded, False  # or it alone would be saved
        device_map = self.__dict__.pop("hf_device_map", None)
        self.config.backbones = {role: source for role, source in self.config.backbones.items() if role not in stored}
        self.config.adapter = adapters[0] if adapters else None
        self._keys_to_ignore_on_save = None
        self.config.backbone_dtypes = {
            role: str(getattr(self, role).dtype).removeprefix("torch.")
            for role in BACKBONE_CONFIGS
            if role not in self.config.backbones and getattr(self, role) is not None
        }
        if device_map is not None and "language_model" not in self.config.backbones:
            self.hf_device_map = device_map  # offloaded weights are read back
        try:
            yield
        finally:
            (
                self.config.backbones,
                self.config.backbone_dtypes,
                self.config.adapter,
                self._keys_to_ignore_on_save,
            ) = before
            self._hf_peft_config_loaded = has_adapter
            if device_map is not None:
                self.hf_device_map = device_map


@functools.cache
def _checksum_keys(device: torch.device) -> torch.Tensor:
    """Odd random numbers [PART], int64."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (PART,), generator=generator, dtype=torch.long)
    return (keys | 1).to(device)


def _sum_words(part: torch.Tensor) -> torch.Tensor:
    """The sum of the 64-bit words of at most `PART` values, each times a random factor, int64, on their device."""
    memory = part.view(torch.uint8)
    if len(memory) % 8 or memory.storage_offset() % 8:
        memory = torch.cat([memory, memory.new_zeros(-len(memory) % 8)])
    words = memory.view(torch.long)
    return (words * _checksum_keys(words.device)[: len(words)]).sum()


def _checksum(weight: torch.Tensor, *dtypes: torch.dtype) -> dict[torch.dtype, int]:
    """
    64-bit checksums that tell whether weights, rounded to each of some dtypes, are bitwise equal.

    Any one changed word changes them; two different tensors share one with a probability below 2^-40. All take one
    pass over memory together, on the weights' device: a part is rounded while it is in the processor's cache.
    """
    if hasattr(weight, "full_tensor"):  # sharded over processes
        weight = weight.full_tensor()
    if hasattr(weight, "__tensor_flatten__"):  # quantised: made of several tensors, and never rounded
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        return dict.fromkeys(dtypes, hash(tuple(_checksum(part, part.dtype)[part.dtype] for part in parts)))
    totals = {dtype: torch.zeros((), dtype=torch.long, device=weight.device) for dtype in dtypes}
    for part in weight.detach().contiguous().view(-1).split(PART):
        for dtype in dtypes:
            totals[dtype] = totals[dtype] * 6364136223846793005 + _sum_words(part.to(dtype))
    return {dtype: int(total) for dtype, total in totals.items()}


def checksums(weight: torch.Tensor) -> dict[torch.dtype, int]:
    """Checksums of weights in their own dtype and, for float32, in the half precisions they may be cast to."""
    rounded = (torch.bfloat16, torch.float16) if weight.dtype == torch.float32 else ()
    return _checksum(weight, weight.dtype, *rounded)


def _is_unchanged(weight: torch.Tensor, loaded: dict[torch.dtype, int]) -> bool:
    """Whether weights equal those of the checksums, possibly rounded or widened since."""
    if weight.dtype in loaded:
        return _checksum(weight, weight.dtype)[weight.dtype] == loaded[weight.dtype]
    dtype = next(iter(loaded))
    original = weight.detach().to(dtype)
    return torch.equal(original.to(weight.dtype), weight) and _checksum(original, dtype)[dtype] == loaded[dtype]


def _name_shards(folder: str) -> None:
    """Gives the shards names unique to this save, so that no reader mixes the index and shards of two saves."""
    save = uuid.uuid4().hex[:8]
    for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors.index*.json")):
        with open(path, encoding="utf-8") as file:
            index = json.load(file)
        names = {name: name.replace("model", f"model-{save}", 1) for name in set(index["weight_map"].values())}
        for old, new in names.items():
            os.rename(os.path.join(folder, old), os.path.join(folder, new))
        index["weight_map"] = {weight: names[name] for weight, name in index["weight_map"].items()}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2, sort_keys=True)


__all__ = ["ADAPTER_FOLDER", "SavingMixin", "checksums"]
