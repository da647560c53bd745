"""Turns what a study left behind into tables and plots: eval/results/*.json, from which pages and cards are rendered.

    collect: OUTPUT/seed*/STEP/DATA-KNOWLEDGE.json -> eval/results/DATA.json (means, intervals, paired differences)
    render:  eval/results/*.json -> eval/results/DATA.svg; all tables in eval/results/tables.md; between the markers of
             eval/RESULTS.md those of `HEADLINES`, between those of README.md the rows of `SUMMARY`. The prose around
             the markers is written by hand.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_vikdf.evaluation.probes import average_probes, compare_probes
from modeling_vikdf.evaluation.reports import METRICS, REPORT_VERSION, Metric, compare, kind_of


RESULTS = Path(__file__).parents[1] / "results"
UNTRAINED = "language_model"  # how the names of such steps begin
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADLINES = (
    "image_chat_test",
    "image_chat_test_one_epoch",
    "image_chat_test_few_shot",
    "reddit_multireference_test",
    "image_chat_test_replies",
    "flickr8k_unsaid",
)
SUMMARY = {  # rows of README's table, from image_chat_test: arm -> what it is, in a newcomer's words
    "vikdf_shrunk": "**VIKDF**, the packaged recipe",
    "vikdf_shrunk, shuffled": "the same, with another dialogue's knowledge",
    "vikdf, mean": "the same, with the mean knowledge of all",
    "paper": "the authors' recipe, trained here",
    "no_distillation": "no distillation: learnt from dialogues alone",
    "caption_only": "captions in place of the photographs",
    "soft_prompt": "free vectors (a soft prompt), no knowledge",
    "language_model_best_prompt": "the LLM alone, with the best of nine prompts",
}
COMPARED = ("nll", "nll_visual_words")  # whose differences to the reference are told with their intervals
# columns of the two tables of dialogues
LIKELIHOOD = ("perplexity", "nll", "nll_visual_words")
REPLIES = (
    "hits_at_1",
    "mrr",
    "bleu_1",
    "rouge_l",
    "embedding_average",
    "embedding_extrema",
    "embedding_greedy",
    "distinct_1",
    "distinct_2",
    "share_im_not_sure",
)
SIGNIFICANT = 0.05
PARTS = {"all": "", "text_nb_correct=false": ", hard", "seen, not stated": ", seen, not stated"}  # of a probe's items


def collect(
    study: Path, data: str, reference: str, steps: list[str] | None = None, topic: str | None = None
) -> dict[str, Any]:
    """
    Of every step that was evaluated on `data`, dialogues or a probe: each metric's mean over seeds, and the paired
    differences of the reference, with its own knowledge, minus each of the others.

    Args:
        steps: the only ones to collect.
        topic: what they are about; the result's name is then `DATA_TOPIC`.

    Raises:
        ValueError: if the reference was not evaluated.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(study.glob(f"seed*/*/{data}-*.json")):
        if steps is not None and path.parent.name not in steps:
            continue
        knowledge = path.stem.removeprefix(f"{data}-")
        own = knowledge == ("none" if path.parent.name.startswith(UNTRAINED) else "own")
        name = path.parent.name if own else f"{path.parent.name}, {knowledge}"
        found.setdefault(name, []).append(path)
    if reference not in found:
        raise ValueError(f"{study} holds no report of {reference!r} on {data!r}; it has those of {sorted(found)}.")
    first = found[reference][0]
    is_probe = kind_of(json.loads(first.read_text(encoding="utf-8")), first) == "probe"
    arms = _collect_probe(found, reference) if is_probe else _collect_dialogues(found, reference)
    return {
        "kind": "study",
        "version": REPORT_VERSION,
        "data": data if topic is None else f"{data}_{topic}",
        "reference": reference,
        "arms": arms,
    }


def _collect_dialogues(found: dict[str, list[Path]], reference: str) -> dict[str, dict[str, Any]]:
    arms = {}
    for name, paths in found.items():
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        metrics = {
            key: sum(report["metrics"][key] for report in reports) / len(reports)
            for key in reports[0]["metrics"]
            if all(report["metrics"].get(key) is not None for report in reports)
        }
        arms[name] = {"seeds": len(reports), "num_dialogues": reports[0]["num_dialogues"], "metrics": metrics}
        if len(reports) == 1:
            arms[name]["confidence_95"] = reports[0]["confidence_95"]
        if name != reference:
            arms[name]["reference_minus_this"] = compare(_same_seeds(found[reference], paths), paths)["metrics"]
    return arms


def _same_seeds(paths: list[Path], others: list[Path]) -> list[Path]:
    """The reports of the seeds that the others are of; all, where these are of a model that was not trained."""
    if others[0].parent.name.startswith(UNTRAINED):
        return paths
    seeds = {path.parents[1].name for path in others}
    return [path for path in paths if path.parents[1].name in seeds] or paths


def _collect_probe(found: dict[str, list[Path]], reference: str) -> dict[str, dict[str, Any]]:
    arms = {}
    for name, paths in found.items():
        mean = _average(*paths)
        parts = {part: mean["subsets"][part] for part in PARTS if part in mean["subsets"]}
        own = _flatten({part: each["arms"]["own"] for part, each in parts.items()})
        arms[name] = {
            "seeds": len(paths),
            "num_items": mean["subsets"]["all"]["items"],
            "metrics": {key: each["mean"] for key, each in own.items()},
            "confidence_95": {key: each["confidence_95"] for key, each in own.items()},
        }
        if name != reference:
            differences = _flatten(compare_probes(_average(*_same_seeds(found[reference], paths)), mean))
            arms[name]["reference_minus_this"] = {
                key: {"difference": each.pop("mean"), **each} for key, each in differences.items()
            }
    return arms


@functools.cache  # the reference is compared with every arm
def _average(*paths: Path) -> dict[str, Any]:
    probes = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return average_probes(probes, probes[0]["arms"][0])


def _flatten(subsets: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Subset -> score -> measure -> estimate, as a metric's name -> estimate; of the subsets that are told."""
    return {
        f"{measure.replace('_', ' ')} ({score}){PARTS[subset]}": estimate
        for subset, scores in subsets.items()
        if subset in PARTS
        for score, measures in scores.items()
        for measure, estimate in measures.items()
    }


def tables(result: dict[str, Any]) -> str:
    """Markdown: how likely the true replies are; what was replied and how the true one ranks; or what a probe asks."""
    arms, reference = result["arms"], result["reference"]
    first = arms[reference]
    if "num_items" in first:
        columns = _shown(first)
        names = _best_first(arms, columns[0])
        return f"{result['data']}, {first['num_items']:,} items\n\n" + _table(result, names, columns, columns)
    names = _best_first(arms, "nll")
    parts = [f"{result['data']}, {first['num_dialogues']:,} dialogues", _table(result, names, LIKELIHOOD, COMPARED)]
    if any(key in first["metrics"] for key in REPLIES):
        parts.append(
            f"+ where {reference} is above the arm and - where it is below (p < {SIGNIFICANT}, approximate "
            "randomisation, corrected for all metrics by Holm):"
        )
        parts.append(_table(result, [name for name in names if "mrr" in arms[name]["metrics"]], REPLIES, ()))
    return "\n\n".join(parts)


def _shown(arm: dict[str, Any]) -> list[str]:
    """The metrics of a probe's arm that tables and plots show."""
    return [key for key in arm["metrics"] if key.startswith(("accuracy", "hits at 1"))]


def _metric(key: str) -> Metric:
    """The metric behind a name in a result; those of probes are written out there, as `kl (raw), hard` is."""
    return METRICS[key.split(" (")[0].replace(" ", "_")]


def _title(key: str) -> str:
    return (_metric(key).short or _metric(key).label) if key in METRICS else key


def _best_first(arms: dict[str, dict[str, Any]], key: str) -> list[str]:
    return sorted(arms, key=lambda name: arms[name]["metrics"][key], reverse=_metric(key).better == "higher")


def _table(result: dict[str, Any], names: list[str], columns: Sequence[str], compared: Sequence[str]) -> str:
    """A row an arm: the metrics that there are and, of those to be compared, the reference's minus the arm's."""
    arms, reference = result["arms"], result["reference"]
    columns = [key for key in columns if any(key in arms[name]["metrics"] for name in names)]
    compared = [key for key in columns if key in compared]
    titles = [f"{_title(key)} of {reference} minus the arm's [95 %]" for key in compared]
    head = ["arm", "seeds", *map(_title, columns), *titles]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        arm = arms[name]
        differences = arm.get("reference_minus_this", {})
        cells = [f"**{name}**" if name == reference else name, str(arm["seeds"])]
        for key in columns:
            cells.append(f"{arm['metrics'][key]:.{_metric(key).decimals}f}" if key in arm["metrics"] else "")
            if not compared and key in differences and differences[key]["p_value_holm"] < SIGNIFICANT:
                cells[-1] += " +" if differences[key]["difference"] > 0 else " -"
        cells += [_signed(differences[key]) if key in differences else "" for key in compared]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(difference: dict[str, Any], decimals: int = 4) -> str:
    low, high = difference["confidence_95"]
    return f"{difference['difference']:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def summary_table(result: dict[str, Any]) -> str:
    """Markdown of the arms of `SUMMARY`: perplexity, and what the reference is ahead (below 0) or behind."""
    lines = ["| | perplexity | VIKDF minus this, all words | VIKDF minus this, visual words |", "|---|---|---|---|"]
    for name, title in SUMMARY.items():
        arm = result["arms"][name]
        differences = arm.get("reference_minus_this", {})
        cells = [_signed(differences[key], 3) if differences else "" for key in COMPARED]
        lines.append(f"| {title} | {arm['metrics']['perplexity']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The paired differences to the reference, which wins left of 0 for likelihood losses, right of it for probes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vikdf"  # the same figures, the same file
    from matplotlib import pyplot

    reference = result["reference"]
    arms = {name: arm["reference_minus_this"] for name, arm in result["arms"].items() if "reference_minus_this" in arm}
    if "num_items" in result["arms"][reference]:
        shown = {key: key for key in _shown(result["arms"][reference])}
        label = f"of {reference} minus the arm's (95 %)"
    else:
        shown = dict(zip(COMPARED, ("all tokens", "visual words"), strict=True))
        label = f"NLL of {reference} minus the arm's, nats a token (95 %)"
    names = sorted(arms, key=lambda name: arms[name][next(iter(shown))]["difference"])
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.2 * max(len(shown), 2) * len(names)), layout="constrained")
    for number, (key, title) in enumerate(shown.items()):
        offset = (number - (len(shown) - 1) / 2) * 0.7 / len(shown)
        rows = [(i + offset, arms[name][key]) for i, name in enumerate(names) if key in arms[name]]
        centre = [each["difference"] for _, each in rows]
        low, high = zip(*(each["confidence_95"] for _, each in rows), strict=True) if rows else ((), ())
        axes.errorbar(
            centre,
            [row for row, _ in rows],
            xerr=[
                [c - each for c, each in zip(centre, low, strict=True)],
                [each - c for c, each in zip(centre, high, strict=True)],
            ],
            fmt="o",
            label=title,
        )
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.set_title(result["data"])
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def latency_table(result: dict[str, Any]) -> str:
    """Markdown of what eval/speed/latency.py found: a row for each number of queries, a column for each context."""
    ratios = {(each["queries"], each["context_tokens"]): each["ratio"] for each in result["latency"]}
    rows, columns = (sorted({key[axis] for key in ratios}) for axis in (0, 1))
    lines = [
        f"Time of a reply of {result['new_tokens']} tokens with knowledge over the LLM alone (batch 1, "
        f"{result['threads']} threads, median of {result['repeats']} pairs), by queries and tokens of context:\n",
        "| queries | " + " | ".join(f"{tokens:,}" for tokens in columns) + " |",
        "|" + "---|" * (1 + len(columns)),
    ]
    for queries in rows:
        lines.append(f"| {queries} | " + " | ".join(f"{ratios[queries, tokens]:.2f}" for tokens in columns) + " |")
    return "\n".join(lines)


def throughput_table(result: dict[str, Any]) -> str:
    """Markdown of what eval/speed/throughput.py found."""
    found = result["throughput"]
    batched, alone = (found["seconds_a_dialogue"][name] for name in ("in_batches", "one_at_a_time"))
    return (
        f"Evaluating {result['num_dialogues']} dialogues ({result['data']}; likelihood, and replies by beam search), "
        f"{result['threads']} threads:\n\n| | seconds a dialogue | minutes for 5,000 |\n|---|---|---|\n"
        f"| in batches of {result['batch_size']} | {batched:.2f} | {5000 * batched / 60:.0f} |\n"
        f"| one at a time | {alone:.2f} | {5000 * alone / 60:.0f} |\n\n{found['times_faster']:.1f} times faster."
    )


TIMES = {"latency": latency_table, "throughput": throughput_table}  # results that are no comparison of arms


def render(page: Path) -> None:
    """Writes a plot for each result, the tables of all into `tables.md` and the headlines into `page`."""
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
        ValueError: if the page lacks them.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} lacks the markers {BEGIN} and {END}, between which the tables go.")
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{block}\n{END}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def _show(name: str, result: dict[str, Any], folder: str) -> str:
    """Markdown of a result: its tables and, from the folder, its plot."""
    for kind in TIMES.keys() & result.keys():
        return TIMES[kind](result)
    return f"{tables(result)}\n\n![{name}]({folder}{name}.svg)"


def main() -> None:
    """Entry point."""
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
