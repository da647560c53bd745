"""Tables of a study's results, as Markdown.

Knows the form of eval/results/*.json; reads and writes no file.
"""

from collections.abc import Sequence
from typing import Any

from modeling_vikdf.evaluation.reports import METRICS, Metric


SUMMARY = {  # rows of README's table, from image_chat_test: arm -> what it is, in a newcomer's words
    "vikdf_shrunk": "**VIKDF**, before preferences",
    "vikdf_shrunk, shuffled": "the same, with another dialogue's knowledge",
    "vikdf, mean": "the same, with the mean knowledge of all",
    "paper": "the authors' recipe, trained here",
    "no_distillation": "no distillation: learnt from dialogues alone",
    "caption_only": "captions in place of the photographs",
    "soft_prompt": "free vectors (a soft prompt), no knowledge",
    "language_model_best_prompt": "the LLM alone, with the best of nine prompts",
}
COMPARED = ("nll", "nll_visual_words")  # whose differences to the reference are shown with their intervals
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


def tables(result: dict[str, Any]) -> str:
    """The tables of a result in Markdown: how likely the true replies are, what was replied, or a probe's scores."""
    arms, reference = result["arms"], result["reference"]
    first = arms[reference]
    if "num_items" in first:
        columns = shown_metrics(first)
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


def shown_metrics(arm: dict[str, Any]) -> list[str]:
    """The metrics of a probe's arm that tables and plots show."""
    return [key for key in arm["metrics"] if key.startswith(("accuracy", "hits at 1"))]


def _metric(key: str) -> Metric:
    """The metric that a name in a result stands for; for probes the name has a suffix, as in `kl (raw), hard`."""
    return METRICS[key.split(" (")[0].replace(" ", "_")]


def _title(key: str) -> str:
    return (_metric(key).short or _metric(key).label) if key in METRICS else key


def _best_first(arms: dict[str, dict[str, Any]], key: str) -> list[str]:
    return sorted(arms, key=lambda name: arms[name]["metrics"][key], reverse=_metric(key).better == "higher")


def _table(result: dict[str, Any], names: list[str], columns: Sequence[str], compared: Sequence[str]) -> str:
    """A row for each arm: the metrics it has, and the reference's minus the arm's for those to be compared."""
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
    """The arms of `SUMMARY`: perplexity, and by how much the reference is ahead (below 0) or behind."""
    lines = ["| | perplexity | VIKDF minus this, all words | VIKDF minus this, visual words |", "|---|---|---|---|"]
    for name, title in SUMMARY.items():
        arm = result["arms"][name]
        differences = arm.get("reference_minus_this", {})
        cells = [_signed(differences[key], 3) if differences else "" for key in COMPARED]
        lines.append(f"| {title} | {arm['metrics']['perplexity']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def latency_table(result: dict[str, Any]) -> str:
    """The results of eval/speed/latency.py: a row for each number of queries, a column for each length of context."""
    ratios = {(point["queries"], point["context_tokens"]): point["ratio"] for point in result["latency"]}
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
    """The results of eval/speed/throughput.py."""
    times = result["throughput"]
    batched, alone = (times["seconds_a_dialogue"][name] for name in ("in_batches", "one_at_a_time"))
    return (
        f"Evaluating {result['num_dialogues']} dialogues ({result['data']}; likelihood, and replies by beam search), "
        f"{result['threads']} threads:\n\n| | seconds a dialogue | minutes for 5,000 |\n|---|---|---|\n"
        f"| in batches of {result['batch_size']} | {batched:.2f} | {5000 * batched / 60:.0f} |\n"
        f"| one at a time | {alone:.2f} | {5000 * alone / 60:.0f} |\n\n{times['times_faster']:.1f} times faster."
    )


def speed_table(result: dict[str, Any]) -> str:
    """The results of eval/speed/shapes.py: what is asked of the host, and on a GPU the times."""
    lines = [
        "What is asked of the host by a training step of all five objectives (cached states; forward and backward), "
        "and by a decoding step, in models of these depths:\n",
        "| | operations of a step | over those of LLM, encoders and IQ-Former | `item` | `nonzero` | decoding step "
        "over the bare LLM's: operations | Python calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for shapes, parts in result["speed"].items():
        training, replies = (parts[what]["host_counts"] for what in ("training", "generation"))
        step, ratios = training["step_with_cached_states"], replies["ratios"]
        cells = [shapes, f"{step['aten_ops']:,}", f"{training['step_over_parts']:.2f}", step["item"], step["nonzero"]]
        cells += [f"{ratios[name]:.3f}" for name in ("aten_ops", "python_calls")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if result["device"] == "cuda":
        lines += ["", *_times(result["speed"])]
    lines += ["", "How the time of a tiny model's step over that of its LLM's own grows:", "", "![speed](speed.svg)"]
    return "\n".join(lines)


def memory_table(result: dict[str, Any]) -> str:
    """The results of eval/speed/memory.py: a row for each setting, a column for each number of pairs."""
    settings = result["memory"]
    batches = next(iter(settings.values()))
    kept = (f"{value / 1000:.0f} kB ({name})" for name, value in result["bytes_per_token_and_layer"].items())
    lines = [
        f"GB (computed) that a training step of all five objectives takes at the {result['shapes']} shapes, AdamW's "
        "moments included, by pairs in a batch:\n",
        "| | " + " | ".join(name.removeprefix("batch_") for name in batches) + " |",
        "|" + "---|" * (1 + len(batches)),
    ]
    for name, steps in settings.items():
        cells = [f"{step['peak'] + step['optimizer']:.1f}" for step in steps.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"A layer of the LLM keeps of a token: {', '.join(kept)}."])


def _times(speed: dict[str, Any]) -> list[str]:
    """Rows of what a GPU was timed at."""
    lines = ["| | pairs or tokens a second | over the bare LLM's time | peak GB |", "|---|---|---|---|"]

    def add(name: str, rate: float, ratio: float, peak: float) -> None:
        lines.append(f"| {name} | {rate:.1f} | {ratio:.2f} | {peak:.1f} |")

    for shapes, parts in speed.items():
        for name, times in parts["training"].items():
            if name.startswith("batch_"):
                rate, peak = (times[key]["cached"] for key in ("pairs_per_s", "peak_memory_gb"))
                add(f"{shapes}, step, {name}", rate, times["step_over_llm_ratio"], peak)
        for name, times in parts["generation"].items():
            if isinstance(times, dict) and "overhead_ratio" in times:
                rate = times["tokens_per_s"]["vikdf"]
                add(f"{shapes}, reply, {name}", rate, times["overhead_ratio"], times["peak_memory_gb"])
    return lines


# results that compare no arms
TIMES = {"latency": latency_table, "memory": memory_table, "speed": speed_table, "throughput": throughput_table}
