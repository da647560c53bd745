"""Versions and hardware that the package runs with: recorded beside results, and printed for bug reports."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from . import DEFAULT_CHECKPOINT, VikdfConfig, __version__
from .backbones import BackboneNotFoundError, locate_backbone


LIBRARIES = ("torch", "transformers", "huggingface_hub", "accelerate", "peft", "datasets")


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    return {
        "modeling_vikdf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_environment() -> dict[str, Any]:
    """
    Describes the environment for a bug report. Downloads nothing, and contains no token, key or home folder's name.

    Returns:
        Name -> value: versions, the platform, the accelerators, whether PyTorch uses AVX-512 (without it bfloat16 is
        slow), and where each backbone of the packaged checkpoint is.
    """
    description = {
        "modeling_vikdf": f"{__version__}, in {_without_home(Path(__file__).parent)}",
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in LIBRARIES},
        "accelerators": ", ".join(_accelerators()) or "none",
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "AVX-512": "yes" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "no",
        "VIKDF_BACKBONES": _without_home(os.environ.get("VIKDF_BACKBONES", "not set")),
    }
    backbones = VikdfConfig.from_pretrained(DEFAULT_CHECKPOINT).backbones
    return description | {f"{role} {source['repo_id']}": _place(source) for role, source in backbones.items()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[str]:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return []
    get_name = getattr(torch.get_device_module(device), "get_device_name", lambda index: "")  # MPS has none
    return [f"{device.type}:{i} {get_name(i)}".rstrip() for i in range(torch.accelerator.device_count())]


def _place(source: dict[str, Any]) -> str:
    try:
        return _without_home(locate_backbone(source["repo_id"], source.get("revision"), local_files_only=True))
    except BackboneNotFoundError:
        return "not found"
    except ImportError as error:  # a library to unpack it is missing
        return _without_home(str(error))


def _without_home(path: str | Path) -> str:
    return str(path).replace(str(Path.home()), "~")


__all__ = ["describe_environment", "versions"]
