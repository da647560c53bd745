"""Evaluation reports as a card shows them: tables with intervals, and metadata for the Hub.

Knows the files that `vikdf evaluate`, `retrieve` and `probe`, eval/study/collect.py and the Trainer write, by their
`kind` and not by their names. Knows no template.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from ..evaluation.reports import METRICS, kind_of, metric_label


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
    """
    A value and its 95 % interval, if it has one.

    A metric of `METRICS` has `fixed_decimals`; for what else the Trainer measures they depend on the value's size.
    """

    value: float
    interval: list[float] | None = None
    fixed_decimals: int | None = None

    @property
    def decimals(self) -> int:
        """How many decimals are shown."""
        if self.fixed_decimals is None:
            return 2 if abs(self.value) >= 10 else 3
        return self.fixed_decimals

    def __str__(self) -> str:
        return f"{self.value:.{self.decimals}f} {self.brackets()}".rstrip()

    def brackets(self) -> str:
        """The interval in square brackets; empty without one."""
        return "[{:.{n}f}, {:.{n}f}]".format(*self.interval, n=self.decimals) if self.interval else ""


@dataclass
class Evaluation:
    """
    Results on one data set, as a card shows them.

    Args:
        data: name of the data set.
        size: how many examples it has, in words.
        arms: arm of knowledge -> metric -> estimate.
        differences: another model -> metric -> the subject minus that model.
        meaning: what is compared, and what the sign of a difference says.
        subject: "this model", or "this recipe" for means over several training seeds.
    """

    data: str
    size: str
    arms: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    meaning: str = ""
    subject: str = MODEL

    def table(self) -> str:
        """A row per metric, a column per arm."""
        return _metrics_table(["metric"], self.arms)

    def differences_table(self) -> str:
        """A row per metric, a column per other model."""
        return _metrics_table([f"{self.subject} minus"], self.differences)


# ---- reports ----


def read_evaluations(candidates: list[Path], reports: list[Path]) -> list[Evaluation]:
    """
    The evaluations that files hold; reports of `vikdf evaluate` that differ only in the arm of knowledge are one.

    Args:
        candidates: JSON files that may be reports; others are passed over.
        reports: files that must be reports.

    Raises:
        ValueError: if one of `reports` is none, a file is no JSON, or reports are of different weights.
    """
    evaluations, arms, weights = [], {}, {}
    for path in dict.fromkeys([*candidates, *reports]):
        content = read_json(path)
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
        elif path in reports:
            raise ValueError(f"{path} is no report of an evaluation.")
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"The reports {', '.join(path.name for path in weights)} are of different weights; keep those of this "
            "model only."
        )
    for evaluation in evaluations:
        evaluation.arms = {arm: evaluation.arms[arm] for arm in (RECIPE, *ARMS.values()) if arm in evaluation.arms}
    return evaluations


def _estimates(metrics: dict[str, float | None], intervals: dict[str, list[float]]) -> dict[str, Estimate]:
    return {key: estimate(key, value, intervals.get(key)) for key, value in metrics.items() if value is not None}


def estimate(metric: str, value: float, interval: list[float] | None = None) -> Estimate:
    """A metric's value with the decimals of `METRICS`; a study names those of probes like "hits at 1 random (raw)"."""
    known = METRICS.get(metric.split(" (")[0].replace(" ", "_"))
    return Estimate(value, interval, None if known is None else known.decimals)


def _read_collected(content: dict[str, Any]) -> Evaluation:
    """
    The evaluation in a result of eval/study/collect.py; its reference is this model, or its recipe over several seeds.

    Other models are shown by their paired difference to the reference. Means over seeds belong to no single model, so
    they do not count as this model's own figures.
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
                key: estimate(key, difference["difference"], difference["confidence_95"])
                for key, difference in arm["reference_minus_this"].items()
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
        f"{direction.replace('_', ' ')}, {metric_label(key)}": estimate(
            key, value, content["confidence_95"][direction][key]
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
            f"{metric_label(measure)} ({score})": estimate(measure, result["mean"], result["confidence_95"])
            for score, measures in scores.items()
            for measure, result in measures.items()
        }
        for arm, scores in whole["arms"].items()
    }
    return Evaluation(path.stem, f"{whole['items']:,} items", arms)


def model_index(evaluations: list[Evaluation]) -> list[EvalResult]:
    """What the Hub shows beside the card: the model's own figures, without intervals, for which it has no place."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Dialogue",
            dataset_type=re.sub(r"[^\w.-]+", "-", evaluation.data),
            dataset_name=evaluation.data,
            metric_type=HUB_METRICS.get(key, key),
            metric_name=metric_label(key),
            metric_value=round(figure.value, figure.decimals),
        )
        for evaluation in evaluations
        for key, figure in evaluation.arms.get(MODEL, {}).items()
        if key in METRICS
    ]


def last_evaluation(folder: Path) -> dict[str, Any] | None:
    """Steps, epochs and the results of the Trainer's last evaluation; `None` without a `trainer_state.json`."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    state = read_json(path)
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
        "table": markdown_table(["on validation data", "value"], rows),
    }


# ---- files and tables ----


def read_json(path: Path) -> Any:
    """The contents of a JSON file; a `ValueError` names a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _metrics_table(corner: list[str], columns: dict[str, dict[str, Estimate]]) -> str:
    measured = {metric for estimates in columns.values() for metric in estimates}
    metrics = [key for key in METRICS if key in measured]
    metrics += [key for estimates in columns.values() for key in estimates if key not in METRICS]
    rows = [
        [metric_label(metric), *(estimates.get(metric, "") for estimates in columns.values())]
        for metric in dict.fromkeys(metrics)
    ]
    return markdown_table([*corner, *columns], rows)


def markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""

    def line(cells: list[Any]) -> str:
        texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(texts) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
