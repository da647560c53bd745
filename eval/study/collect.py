"""Collects the reports of a study in eval/results/*.json, and renders tables and plots from these.

    collect: OUTPUT/seed*/STEP/DATA-KNOWLEDGE.json -> eval/results/DATA.json (means, intervals, paired differences)
    render:  eval/results/*.json -> eval/results/DATA.svg; all tables in eval/results/tables.md; between the markers of
             eval/RESULTS.md the tables of `HEADLINES`, between those of README.md the rows of `SUMMARY`. The prose
             around the markers is written by hand.

Example run:
    python eval/study/collect.py collect --study outputs/study --data image_chat_test flickr8k_unsaid --reference vikdf
    python eval/study/collect.py collect --study outputs/study --data image_chat_test --topic queries \
        --steps vikdf with_4_queries with_16_queries
    python eval/study/collect.py render
"""

import argparse
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from plots import plot
from tables import TIMES, summary_table, tables

from modeling_vikdf.evaluation.probes import average_probes, compare_probes
from modeling_vikdf.evaluation.reports import REPORT_VERSION, compare, kind_of


RESULTS = Path(__file__).parents[1] / "results"
UNTRAINED = "language_model"  # how the names of steps without training begin
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADLINES = (
    "image_chat_test",
    "image_chat_test_one_epoch",
    "image_chat_test_few_shot",
    "reddit_multireference_test",
    "image_chat_test_replies",
    "flickr8k_unsaid",
)
# subsets of a probe's items -> how the names of their metrics end
PARTS = {"all": "", "text_nb_correct=false": ", hard", "seen, not stated": ", seen, not stated"}


def collect(
    study: Path, data: str, reference: str, steps: list[str] | None = None, topic: str | None = None
) -> dict[str, Any]:
    """
    The results of all steps that were evaluated on a data set, dialogues or a probe.

    For every arm (a step under one kind of knowledge) they have each metric's mean over seeds, and the paired
    differences of the reference, with its own knowledge, minus the arm.

    Args:
        study: the folder of the study, with `seed*/STEP/DATA-KNOWLEDGE.json`.
        data: the name of the data set.
        reference: the step that all arms are compared with.
        steps: the steps to collect; all by default.
        topic: what these steps are about; the result's name is then `DATA_TOPIC`.

    Raises:
        ValueError: if the reference was not evaluated.
    """
    reports: dict[str, list[Path]] = {}
    for path in sorted(study.glob(f"seed*/*/{data}-*.json")):
        if steps is not None and path.parent.name not in steps:
            continue
        knowledge = path.stem.removeprefix(f"{data}-")
        own = knowledge == ("none" if path.parent.name.startswith(UNTRAINED) else "own")
        name = path.parent.name if own else f"{path.parent.name}, {knowledge}"
        reports.setdefault(name, []).append(path)
    if reference not in reports:
        raise ValueError(f"{study} holds no report of {reference!r} on {data!r}; it has those of {sorted(reports)}.")
    first = reports[reference][0]
    is_probe = kind_of(json.loads(first.read_text(encoding="utf-8")), first) == "probe"
    arms = _collect_probe(reports, reference) if is_probe else _collect_dialogues(reports, reference)
    return {
        "kind": "study",
        "version": REPORT_VERSION,
        "data": data if topic is None else f"{data}_{topic}",
        "reference": reference,
        "arms": arms,
    }


def _collect_dialogues(reports: dict[str, list[Path]], reference: str) -> dict[str, dict[str, Any]]:
    arms = {}
    for name, paths in reports.items():
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        metrics = {
            key: sum(report["metrics"][key] for report in runs) / len(runs)
            for key in runs[0]["metrics"]
            if all(report["metrics"].get(key) is not None for report in runs)
        }
        arms[name] = {"seeds": len(runs), "num_dialogues": runs[0]["num_dialogues"], "metrics": metrics}
        if len(runs) == 1:
            arms[name]["confidence_95"] = runs[0]["confidence_95"]
        if name != reference:
            arms[name]["reference_minus_this"] = compare(_same_seeds(reports[reference], paths), paths)["metrics"]
    return arms


def _same_seeds(paths: list[Path], others: list[Path]) -> list[Path]:
    """The reports of the seeds that the others have too; all, where the others are of a model that was not trained."""
    if others[0].parent.name.startswith(UNTRAINED):
        return paths
    seeds = {path.parents[1].name for path in others}
    return [path for path in paths if path.parents[1].name in seeds] or paths


def _collect_probe(reports: dict[str, list[Path]], reference: str) -> dict[str, dict[str, Any]]:
    arms = {}
    for name, paths in reports.items():
        mean = _average(*paths)
        parts = {part: mean["subsets"][part] for part in PARTS if part in mean["subsets"]}
        own = _flatten({part: subset["arms"]["own"] for part, subset in parts.items()})
        arms[name] = {
            "seeds": len(paths),
            "num_items": mean["subsets"]["all"]["items"],
            "metrics": {key: estimate["mean"] for key, estimate in own.items()},
            "confidence_95": {key: estimate["confidence_95"] for key, estimate in own.items()},
        }
        if name != reference:
            differences = _flatten(compare_probes(_average(*_same_seeds(reports[reference], paths)), mean))
            arms[name]["reference_minus_this"] = {
                key: {"difference": estimate.pop("mean"), **estimate} for key, estimate in differences.items()
            }
    return arms


@functools.cache  # the reference is compared with every arm
def _average(*paths: Path) -> dict[str, Any]:
    probes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return average_probes(probes, probes[0]["arms"][0])


def _flatten(subsets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Subset -> score -> measure -> estimate, as a metric's name -> estimate; of the subsets in `PARTS`."""
    return {
        f"{measure.replace('_', ' ')} ({score}){PARTS[subset]}": estimate
        for subset, scores in subsets.items()
        if subset in PARTS
        for score, measures in scores.items()
        for measure, estimate in measures.items()
    }


def render(page: Path) -> None:
    """Writes a plot for each result, all tables into `tables.md` and the tables of `HEADLINES` into `page`."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    folder = f"{os.path.relpath(RESULTS, page.parent)}/"
    headlines = [_show(name, results[name], folder) for name in HEADLINES if name in results]
    fill(page, "\n\n".join(headlines))
    for name, result in results.items():
        if not TIMES.keys() & result.keys():
            plot(result, RESULTS / f"{name}.svg")
    everything = ["# All results", *(_show(name, result, "") for name, result in results.items())]
    (RESULTS / "tables.md").write_text("\n\n".join(everything) + "\n", encoding="utf-8")


def render_summary(readme: Path) -> None:
    """Writes the table of `SUMMARY` into `readme`."""
    fill(readme, summary_table(json.loads((RESULTS / "image_chat_test.json").read_text(encoding="utf-8"))))


def fill(page: Path, block: str) -> None:
    """
    Puts a block of Markdown between the markers of a page.

    Raises:
        ValueError: if the page lacks the markers.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} lacks the markers {BEGIN} and {END}, between which the tables go.")
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{block}\n{END}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def _show(name: str, result: dict[str, Any], folder: str) -> str:
    """Markdown of a result: its tables, and its plot from the folder."""
    for kind in TIMES.keys() & result.keys():
        return TIMES[kind](result)
    return f"{tables(result)}\n\n![{name}]({folder}{name}.svg)"


def main() -> None:
    """Collects reports, or renders what was collected."""
    parser = argparse.ArgumentParser(description="Collect the results of a study; render their tables and plots.")
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("collect")
    sub.add_argument("--study", type=Path, default=Path("outputs/study"))
    sub.add_argument("--data", nargs="+", required=True, help="names of the files of dialogues, without .jsonl")
    sub.add_argument("--reference", default="vikdf", help="the step that is compared with all others")
    sub.add_argument("--steps", nargs="+", help="the only steps to collect (default: all that were evaluated)")
    sub.add_argument("--topic", help="what these steps are about: the result is called DATA_TOPIC")
    sub.set_defaults(run=_collect)
    sub = commands.add_parser("render")
    sub.set_defaults(run=_render)
    args = parser.parse_args()
    args.run(args)


def _collect(args: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    for data in args.data:
        result = collect(args.study, data, args.reference, args.steps, args.topic)
        (RESULTS / f"{result['data']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(tables(result))


def _render(args: argparse.Namespace) -> None:
    render(RESULTS.parent / "RESULTS.md")
    render_summary(RESULTS.parents[1] / "README.md")


if __name__ == "__main__":
    main()
