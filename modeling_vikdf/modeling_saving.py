"""Saving: what of a model a checkpoint holds, and that it loads again.

`SavingMixin` writes what was trained, leaves out the frozen backbones that are still what their repositories gave
(checksums tell), and writes PEFT's adapter beside it. It does not know how a backbone is found or loaded.
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

ADAPTER_FOLDER = "adapter"  # of a checkpoint; PEFT's files in the folder itself would be taken for the whole of it


class SavingMixin:
    """
    `save_pretrained` and `push_to_hub` of a model whose frozen backbones stay in their own repositories. For a
    `PreTrainedModel` with a `VikdfConfig`, an attribute for each backbone, and in `_loaded_weights` the checksums of
    what their repositories gave: role -> name -> `checksums` of the weight.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, include_backbones: bool = False, **kwargs: Any
    ) -> None:
        """
        Writes what was trained and nothing frozen (safetensors); with `include_backbones` a self-contained checkpoint.

        A backbone whose weights are no longer those that its repository gave (it was trained, an adapter was merged
        into it, its vocabulary was resized) is written, too, and then loads from the checkpoint; a warning says so. An
        adapter that PEFT put into the model is written beside it, to `adapter/`, and loaded with it.

        The folder's checkpoint is replaced as a whole or not at all, wherever the process is killed; see
        atomic_saving.py.

        Raises:
            ValueError: if what would be written could not be loaded again, with what to do about it.
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
        else:  # takes part in gathering what is to be saved, and writes nothing
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
        """Those that `config.backbones` names, but whose weights are no longer what was loaded."""
        changed = set()
        for role in self.config.backbones:
            loaded = self._loaded_weights.get(role, {})
            weights = {
                bare.removeprefix(f"{role}."): name
                for name in state
                if (bare := self._name_without_adapter(name)) is not None and bare.startswith(f"{role}.")
            }
            if not weights:  # not attached, or not among what is to be saved
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
                    f"The {role} is no longer what {self.config.backbones[role]['repo_id']!r} gave: {len(different)} "
                    f"of its {len(weights)} weights differ, such as {different[0]}. It is saved with the model."
                )
        return changed

    def _read_weight(self, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return load_offloaded_parameter(self, name) if state[name].is_meta else state[name]

    def _name_without_adapter(self, name: str) -> str | None:
        """What a weight is called without PEFT's adapter in the model; `None` for the adapter's own."""
        if set(name.split(".")) & set(getattr(self, "peft_config", {})):
            return None
        return name.replace(".base_layer.", ".").replace(".original_module.", ".")

    def _check_loadable(self, weights: dict[str, torch.Tensor]) -> None:
        """Refuses weights that `from_pretrained` would not read, or would miss."""
        # FSDP puts a class of its own in front, which cannot be built
        own = next(each for each in type(self).__mro__ if not each.__name__.startswith("FSDP"))
        with torch.device("meta"), init.no_init_weights():
            expected = {name: weight.shape for name, weight in own(copy.deepcopy(self.config)).state_dict().items()}
        found = {name: weight.shape for name, weight in weights.items()}
        if wrong := sorted(name for name, _ in found.items() ^ expected.items()):
            raise ValueError(
                f"The model would not load again: {len(wrong)} weights are not those of a {own.__name__} with this "
                f"configuration, such as {wrong[0]!r}. Was a part of it wrapped or replaced? For PEFT use "
                "get_peft_model(model, ...) or model.add_adapter(...) on the whole model, with target_modules such as "
                r"r'language_model\..*\.(q_proj|v_proj)', or merge the adapter: model.language_model = "
                "model.language_model.merge_and_unload()."
            )

    def _save_adapter(self, folder: str, state: dict[str, torch.Tensor]) -> None:
        """Writes the adapter that PEFT put into the model, as PEFT would, into a sub-folder of its own."""
        if self.config.adapter is None:
            return
        peft = importlib.import_module("peft")  # an `import` would make every user of the code install it
        name = self.config.adapter
        settings = copy.deepcopy(self.peft_config[name])
        settings.inference_mode, settings.base_model_name_or_path = True, None  # the model is in the folder above
        settings.save_pretrained(os.path.join(folder, ADAPTER_FOLDER))
        weights = peft.get_peft_model_state_dict(self, state_dict=state, adapter_name=name)
        weights = {f"base_model.model.{key}": weight.contiguous() for key, weight in weights.items()}
        save_file(weights, os.path.join(folder, ADAPTER_FOLDER, "adapter_model.safetensors"), {"format": "pt"})

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
        return push_to_hub(repo_id, model=self, processor=processor, **kwargs)

    @contextlib.contextmanager
    def _as_saved(self, stored: set[str]) -> Iterator[None]:
        """
        For the time of a save the model and its configuration are those that the checkpoint will hold, with the
        `stored` backbones in it.

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
    """Odd random numbers [2^17], int64."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (1 << 17,), generator=generator, dtype=torch.long)
    return (keys | 1).to(device)


def _checksum(weight: torch.Tensor) -> int:
    """
    64 bits that tell whether weights are the same to the bit: a sum over their memory, each word of it by a random
    factor. Any one changed word changes it; any two tensors share it with a chance below 2^-40.

    One pass over the memory where the weights are; a CPU core reads about 2 GB/s, a 7B model in bfloat16 has 14 GB.
    """
    if hasattr(weight, "full_tensor"):  # sharded over processes
        weight = weight.full_tensor()
    if hasattr(weight, "__tensor_flatten__"):  # quantised: made of several tensors
        return hash(tuple(_checksum(getattr(weight, name)) for name in weight.__tensor_flatten__()[0]))
    memory = weight.detach().contiguous().view(-1).view(torch.uint8)
    if len(memory) % 8 or memory.storage_offset() % 8:
        memory = torch.cat([memory, memory.new_zeros(-len(memory) % 8)])
    keys = _checksum_keys(memory.device)
    total = torch.zeros((), dtype=torch.long, device=memory.device)
    for words in memory.view(torch.long).split(len(keys)):
        total = total * 6364136223846793005 + (words * keys[: len(words)]).sum()
    return int(total)


def checksums(weight: torch.Tensor) -> dict[torch.dtype, int]:
    """Checksums of weights in their own dtype; and in those that they may be rounded to for computing."""
    rounded = (torch.bfloat16, torch.float16) if weight.dtype == torch.float32 else ()
    return {dtype: _checksum(weight.detach().to(dtype)) for dtype in (weight.dtype, *rounded)}


def _is_unchanged(weight: torch.Tensor, loaded: dict[torch.dtype, int]) -> bool:
    """Whether weights are those whose checksums were taken, perhaps rounded or widened since."""
    if weight.dtype in loaded:
        return _checksum(weight) == loaded[weight.dtype]
    dtype = next(iter(loaded))
    original = weight.detach().to(dtype)
    return torch.equal(original.to(weight.dtype), weight) and _checksum(original) == loaded[dtype]


def _name_shards(folder: str) -> None:
    """Names the shards after this save alone: no reader finds the shards of one save by the index of another."""
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
