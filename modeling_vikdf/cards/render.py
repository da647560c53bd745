"""Cards for the Hub: templates filled from the files of a run, and nothing that is in no file.

    folder: config.json, weights              -> what the model is     facts.py
            recipe.yaml                       -> how it was trained    facts.py
            trainer_state.json, reports of
            evaluate, retrieve ...            -> how good it is        evaluations.py
    all of it -> metadata and a template of hub_cards/ -> README.md

Knows the templates and the facts they ask for; facts.py and evaluations.py know the files.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    CardData,
    DatasetCardData,
    EvalResultEntry,
    ModelCardData,
    SpaceCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import validate_repo_id

from ..configuration_vikdf import VikdfConfig
from ..evaluation.reports import metric_label
from .evaluations import (
    HUB_METRICS,
    estimate,
    last_evaluation,
    markdown_table,
    model_index,
    read_evaluations,
    read_json,
)
from .facts import (
    DATA_SETS,
    count_lines,
    count_pictures,
    describe_backbones,
    describe_data,
    describe_data_sets,
    describe_stage,
    describe_weights,
    read_stages,
    repo_ids,
    split_of,
)


# A wheel holds hub_cards/ inside the package; a checkout, also one installed editable, has it beside the package.
TEMPLATES = next(
    place
    for place in (Path(__file__).parents[1] / "hub_cards", Path(__file__).parents[2] / "hub_cards")
    if place.is_dir()
)
FIGURE = TEMPLATES / "vikdf.svg"  # model cards show it and expect it beside them
LICENSE = "apache-2.0"
GRADIO_VERSION = "6.31.0"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_model_card(folder: str | Path, repo_id: str | None = None, results: Iterable[str | Path] = ()) -> str:
    """
    The card of a checkpoint. It shows `FIGURE`, which has to be beside it.

    Args:
        folder: the checkpoint. Reports of `vikdf evaluate`, `retrieve` and `probe` in it, and results that
            eval/study/collect.py wrote, become the card's section on evaluation.
        repo_id: its repository on the Hub, now or later; without it the examples name a folder.
        results: further reports, which must be of this model.

    Returns:
        The text of README.md, metadata included.

    Raises:
        OSError: if the folder holds no VIKDF model, or a report cannot be read.
        ValueError: if `repo_id` is not a valid one, a file is not a report, or reports are of different weights.
    """
    folder, results = Path(folder), [Path(path) for path in results]
    config = VikdfConfig.from_pretrained(folder)
    backbones, stages = describe_backbones(config), read_stages(folder)
    data_sets = describe_data_sets(stages)
    evaluations = read_evaluations(sorted(folder.glob("*.json")), results)
    language_model = backbones[0]
    title = _name(repo_id) if repo_id else f"VIKDF around {language_model['name']}"
    base_models, eval_results = repo_ids(backbones), model_index(evaluations)
    metrics = {result.metric_type for result in eval_results} & set(HUB_METRICS.values())
    # the checkpoint itself is Apache-2.0, but it may hold backbones whose terms are not known here
    stored = [backbone for backbone in backbones if backbone["stored"]]
    free = all(backbone["license"] == "Apache-2.0" for backbone in stored)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=LICENSE if free else "other",
        license_name=None if free else "apache-2.0-and-licenses-of-the-backbones",
        language=language_model["language"],
        base_model=base_models,
        base_model_relation="adapter" if base_models else None,
        datasets=repo_ids(data_sets),
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
        backbones=markdown_table(
            ["role", "backbone", "revision", "licence"],
            [
                [backbone["role"], backbone["label"], backbone["revision"], backbone["license"]]
                for backbone in backbones
            ],
        ),
        stored=stored,
        remote_code=bool(getattr(config, "auto_map", None)),
        **describe_weights(folder),
        stages=[describe_stage(stage) for stage in stages],
        data_sets=markdown_table(
            ["stage", "data", "licence"], [[data["stage"], data["name"], data["terms"]] for data in data_sets]
        ),
        last_evaluation=last_evaluation(folder),
        evaluations=evaluations,
        figure=FIGURE.name,
    )


def render_space_readme(folder: str | Path, repo_id: str | None = None) -> str:
    """
    The README of the Space that demonstrates a checkpoint.

    Args:
        folder: the checkpoint.
        repo_id: its repository on the Hub; without it the Space shows the packaged checkpoint.

    Raises:
        OSError: if the folder holds no VIKDF model.
        ValueError: if `repo_id` is not a valid one.
    """
    backbones = describe_backbones(VikdfConfig.from_pretrained(folder))
    models = [{"repo_id": repo_id}, *backbones]
    metadata = SpaceCardData(
        title=_name(repo_id) if repo_id else "VIKDF",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license=LICENSE,
        models=repo_ids(models),
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
        backbones=markdown_table(
            ["role", "backbone", "licence"],
            [[backbone["role"], backbone["label"], backbone["license"]] for backbone in backbones],
        ),
    )


def render_dataset_card(folder: str | Path, repo_id: str | None = None, sources: Sequence[str] = ()) -> str:
    """
    The card of training data: dialogues (`*.jsonl`) and shards of image-text pairs (`*.tar`), with their counts.

    Args:
        folder: holds the files; a name with "validation" or "test" in it tells a file's split, otherwise "train".
        repo_id: the data's repository on the Hub, now or later.
        sources: names of the data sets that the files were made from.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there are no such files, or `repo_id` is not a valid one.
    """
    folder = Path(folder)
    counts = {path: count_lines(path) for path in sorted(folder.glob("*.jsonl"))}
    counts |= {path: count_pictures(path) for path in sorted(folder.glob("*.tar"))}
    if not counts:
        raise ValueError(f"{folder} holds neither dialogues (*.jsonl) nor image-text shards (*.tar).")
    configs = []
    for name, suffix in (("dialogues", ".jsonl"), ("pairs", ".tar")):
        splits: dict[str, list[str]] = {}
        for path in counts:
            if path.suffix == suffix:
                splits.setdefault(split_of(path), []).append(path.name)
        if splits:
            files = [{"split": split, "path": paths} for split, paths in splits.items()]
            configs.append({"config_name": name, "data_files": files})
    kinds = [config["config_name"] for config in configs]
    made_from = [describe_data(name) for name in sources]
    licenses = {DATA_SETS[data["name"]].license if data["name"] in DATA_SETS else "other" for data in made_from}
    title = _name(repo_id) if repo_id else "Data for VIKDF"
    metadata = DatasetCardData(
        pretty_name=title,
        license=("unknown" if not licenses else licenses.pop() if len(licenses) == 1 else "other"),
        language="en" if made_from and all(data["name"] in DATA_SETS for data in made_from) else None,
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
        files=markdown_table(
            ["file", "split", "examples"], [[path.name, split_of(path), f"{n:,}"] for path, n in counts.items()]
        ),
        made_from=markdown_table(["data", "licence"], [[data["name"], data["terms"]] for data in made_from]),
    )


def render_eval_results(report: str | Path, metric: str, dataset_id: str, task_id: str) -> str:
    """
    A file of `.eval_results/`, with which a figure appears on the leaderboard of a benchmark.

    The Hub accepts only data sets that are registered there as benchmarks, so the caller names the benchmark.

    Args:
        report: JSON that `vikdf evaluate` wrote.
        metric: which of its metrics the benchmark ranks by.
        dataset_id: the benchmark's repository.
        task_id: the task, as the benchmark's `eval.yaml` calls it.

    Raises:
        OSError: if the report cannot be read.
        ValueError: if it has no such metric, or `dataset_id` cannot be one.
    """
    validate_repo_id(dataset_id)
    content = read_json(Path(report))
    if not isinstance(content, dict) or metric not in content.get("metrics", {}):
        raise ValueError(f"{report} is no report of `vikdf evaluate` with the metric {metric!r}.")
    value = content["metrics"][metric]
    interval = estimate(metric, value, content["confidence_95"][metric]).brackets()
    notes = f"{metric_label(metric)}, {content['num_dialogues']} dialogues, 95 % interval {interval}"
    entry = EvalResultEntry(dataset_id=dataset_id, task_id=task_id, value=value, notes=notes)
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _render(template: str, metadata: CardData, **facts: Any) -> str:
    """Fills a template; a missing fact is an error instead of a gap."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(metadata=metadata.to_yaml(), **facts)


def _name(repo_id: str) -> str:
    validate_repo_id(repo_id)
    return repo_id.split("/")[-1]


__all__ = ["FIGURE", "render_dataset_card", "render_eval_results", "render_model_card", "render_space_readme"]
