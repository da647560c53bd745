"""Turns what a study left behind into tables and plots: eval/results/*.json, from which README and cards are rendered.

    collect: OUTPUT/seed*/STEP/DATA-KNOWLEDGE.json -> eval/results/DATA.json (means, intervals, paired differences)
    render:  eval/results/*.json -> eval/results/DATA.svg, and the tables between the markers of README.md

Example run:
    python eval/collect.py collect --study outputs/study --data image_chat_test --reference vikdf
    python eval/collect.py render --readme README.md
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from modeling_vikdf.evaluation import compare


RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = {  # of the tables: metric -> its name there, decimals
    "perplexity": ("perplexity", 2),
    "nll": ("NLL", 3),
    "nll_visual_words": ("NLL, visual words", 3),
    "hits_at_1": ("Hits@1", 3),
    "mrr": ("MRR", 3),
    "bleu_1": ("BLEU-1", 3),
    "rouge_l": ("ROUGE-L", 3),
    "embedding_average": ("Average", 3),
    "embedding_extrema": ("Extrema", 3),
    "embedding_greedy": ("Greedy", 3),
    "distinct_1": ("Distinct-1", 3),
    "distinct_2": ("Distinct-2", 3),
    "share_im_not_sure": ('"I\'m not sure"', 3),
}


def collect(study: Path, data: str, reference: str) -> dict[str, Any]:
    """
    Of every step that was evaluated on `data`: each metric's mean over seeds, and the paired differences of the
    reference, with its own knowledge, minus each of the others.

    Raises:
        ValueError: if the reference was not evaluated.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(study.glob(f"seed*/*/{data}-*.json")):
        arm = path.stem.removeprefix(f"{data}-")
        found.setdefault(path.parent.name if arm == "own" else f"{path.parent.name}, {arm}", []).append(path)
    if reference not in found:
        raise ValueError(f"{study} holds no report of {reference!r} on {data!r}; it has those of {sorted(found)}.")
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
            arms[name]["reference_minus_this"] = compare(found[reference], paths)["metrics"]
    return {"data": data, "reference": reference, "arms": arms}


def table(result: dict[str, Any]) -> str:
    """Markdown: a row an arm, the metrics that there are, and how much lower the reference's likelihood losses are."""
    arms, reference = result["arms"], result["reference"]
    columns = [key for key in COLUMNS if any(key in arm["metrics"] for arm in arms.values())]
    compared = [key for key in ("nll", "nll_visual_words") if key in columns]
    titles = [f"{COLUMNS[key][0]} of {reference} minus the arm's [95 %]" for key in compared]
    head = ["arm", "seeds", *(COLUMNS[key][0] for key in columns), *titles]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, arm in sorted(arms.items(), key=lambda item: item[1]["metrics"]["nll"]):
        values = [f"{arm['metrics'][key]:.{COLUMNS[key][1]}f}" if key in arm["metrics"] else "" for key in columns]
        differences = [arm.get("reference_minus_this", {}).get(key) for key in compared]
        told = ["" if each is None else _signed(each) for each in differences]
        label = f"**{name}**" if name == reference else name
        lines.append("| " + " | ".join([label, str(arm["seeds"]), *values, *told]) + " |")
    count = next(iter(arms.values()))["num_dialogues"]
    return f"{result['data']}, {count} dialogues\n\n" + "\n".join(lines)


def _signed(difference: dict[str, Any]) -> str:
    low, high = difference["confidence_95"]
    return f"{difference['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def plot(result: dict[str, Any], path: Path) -> None:
    """The paired differences to the reference, over all tokens and over visual words; left of 0 the reference wins."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    arms = {name: arm["reference_minus_this"] for name, arm in result["arms"].items() if "reference_minus_this" in arm}
    names = sorted(arms, key=lambda name: arms[name]["nll"]["difference"])
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.4 * len(names)), layout="constrained")
    for offset, key, label in ((-0.12, "nll", "all tokens"), (0.12, "nll_visual_words", "visual words")):
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
            label=label,
        )
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"NLL of {result['reference']} minus the arm's, nats a token (95 %)")
    axes.set_title(result["data"])
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def render(readme: Path) -> None:
    """Writes a plot for each result and their tables into the README."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    parts = []
    for result in results:
        picture = RESULTS / f"{result['data']}.svg"
        plot(result, picture)
        parts.append(f"{table(result)}\n\n![{result['data']}]({picture.relative_to(RESULTS.parents[1])})")
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}, between which the tables go.")
    block = f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Collect the results of a study; render their tables and plots.")
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("collect")
    sub.add_argument("--study", type=Path, default=Path("outputs/study"))
    sub.add_argument("--data", nargs="+", required=True, help="names of the files of dialogues, without .jsonl")
    sub.add_argument("--reference", default="vikdf", help="the step that is compared with all others")
    sub.set_defaults(run=_collect)
    sub = commands.add_parser("render")
    sub.add_argument("--readme", type=Path, default=Path("README.md"))
    sub.set_defaults(run=lambda args: render(args.readme))
    args = parser.parse_args()
    args.run(args)


def _collect(args: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    for data in args.data:
        result = collect(args.study, data, args.reference)
        (RESULTS / f"{data}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(result))


if __name__ == "__main__":
    main()
