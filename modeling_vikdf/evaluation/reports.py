"""Reports: their kinds, metrics over the records of an evaluation, and comparison of two evaluations.

records of dialogues -> summarise -> metrics with 95 % intervals
two reports          -> compare   -> paired differences, approximate randomisation

Knows no model: everything is computed from records.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..environment import versions
from .statistics import (
    CHUNK,
    RANDOMISATIONS,
    bootstrap_counts,
    bootstrap_interval,
    holm,
    jackknife_interval,
    leave_groups_out,
    paired_randomisation,
)


class Metric(NamedTuple):
    """How a metric is displayed, and which of two values is better; `short` is the column header in wide tables."""

    label: str
    decimals: int
    better: Literal["higher", "lower"]
    short: str | None = None


# Every metric of every report, in display order.
METRICS = {
    "perplexity": Metric("perplexity", 2, "lower"),
    "perplexity_per_example": Metric("perplexity, mean over replies", 2, "lower"),
    "nll": Metric("NLL, nats a token", 3, "lower", "NLL"),
    "nll_per_example": Metric("NLL, mean over replies", 3, "lower"),
    "nll_visual_words": Metric("NLL, visual words", 3, "lower"),
    "nll_other_words": Metric("NLL, other words", 3, "lower"),
    "hits_at_1": Metric("Hits@1", 3, "higher"),
    "mrr": Metric("MRR", 3, "higher"),
    **{f"bleu_{n}": Metric(f"BLEU-{n}", 3, "higher") for n in (1, 2, 3, 4)},
    "rouge_l": Metric("ROUGE-L", 3, "higher"),
    "embedding_average": Metric("embedding Average", 3, "higher", "Average"),
    "embedding_extrema": Metric("embedding Extrema", 3, "higher", "Extrema"),
    "embedding_greedy": Metric("embedding Greedy", 3, "higher", "Greedy"),
    "distinct_1": Metric("Distinct-1", 3, "higher"),
    "distinct_2": Metric("Distinct-2", 3, "higher"),
    "share_im_not_sure": Metric('share of "I\'m not sure"', 3, "lower", '"I\'m not sure"'),
    # of probes
    "accuracy": Metric("accuracy", 3, "higher"),
    "spearman": Metric("spearman", 3, "higher"),
    "kl": Metric("kl", 3, "lower"),
    "hits_at_1_random": Metric("hits at 1 random", 3, "higher"),
    "mrr_random": Metric("mrr random", 3, "higher"),
    "hits_at_1_adversarial": Metric("hits at 1 adversarial", 3, "higher"),
    "mrr_adversarial": Metric("mrr adversarial", 3, "higher"),
    # of retrieval
    **{f"recall_at_{k}": Metric(f"recall at {k} (%)", 2, "higher") for k in (1, 5, 10)},
}

REPORT_VERSION = 1
# Keys that identify the kind of reports written before these had a `kind`.
KEYS_BY_KIND = {
    "dialogues": {"metrics", "confidence_95", "knowledge", "data", "num_dialogues"},
    "study": {"arms", "reference", "data"},
    "retrieval": {"text_to_image", "image_to_text", "confidence_95", "num_captions"},
    "probe": {"task", "subsets", "records"},
}

NOT_SURE = re.compile(r"i['’]m not sure", re.IGNORECASE)  # a common beginning of bland replies

# Metrics that are sum(values) / sum(weights) over dialogues -> the names of both in a dialogue's record.
RATIOS = {
    "nll": ("nll", "tokens"),
    "nll_per_example": ("mean_nll", "examples"),
    "nll_visual_words": ("visual_nll", "visual_tokens"),
    "nll_other_words": ("other_nll", "other_tokens"),
    **{
        name: (name, None)
        for name in (
            "hits_at_1",
            "mrr",
            "rouge_l",
            "embedding_average",
            "embedding_extrema",
            "embedding_greedy",
            "share_im_not_sure",
        )
    },
}
PERPLEXITIES = {"perplexity": "nll", "perplexity_per_example": "nll_per_example"}  # perplexity = exp(NLL)

# Keys that must be equal in compared reports, and keys that must be equal if present.
SAME, SAME_IF_ANY = ("data_sha256", "limit", "all_references"), ("visual_words_sha256", "word_vectors_sha256")


def metric_label(name: str) -> str:
    """A metric's label in `METRICS`, or its name if it has none."""
    return METRICS[name].label if name in METRICS else name


def kind_of(report: Any, source: str | Path = "The report") -> str | None:
    """
    The kind of a report: its `kind`, or by its keys if it was written without one.

    Args:
        report: the parsed JSON.
        source: its name in errors.

    Returns:
        "dialogues" (`vikdf evaluate`), "retrieval", "probe" or "study" (eval/study/collect.py); `None` for anything
        else.

    Raises:
        ValueError: if this release does not support the report's version.
    """
    if not isinstance(report, dict):
        return None
    if "kind" not in report:
        return next((kind for kind, keys in KEYS_BY_KIND.items() if keys <= report.keys()), None)
    kind = report["kind"]
    if not isinstance(kind, str) or kind not in KEYS_BY_KIND:
        return None
    if report.get("version") != REPORT_VERSION:
        raise ValueError(
            f"{source} has version {report.get('version')}, but this release reads version {REPORT_VERSION}: update "
            "modeling_vikdf."
        )
    return kind


# ---- records -> metrics ----


def summarise(
    records: list[dict[str, Any]],
    references: list[list[str]],
    word_vectors: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Metrics over dialogues, with 95 % intervals over resamples of dialogues.

    The metrics of each reply are added to its record. `nll` is in nats per token, end of turn included, and
    `perplexity` its exponential; `perplexity_per_example` is that of the mean over replies of per-reply means, as in
    the authors' code. `bleu_n` and `distinct_n` are corpus metrics. Resampling repeats replies, which lowers
    Distinct, so its interval uses the delete-a-group jackknife.

    Args:
        records: the N dialogues' records, changed in place.
        references: the N dialogues' references.
        word_vectors: file for the embedding metrics of the replies, see [`load_word_vectors`].
        seed: of the resampling.

    Returns:
        `{"metrics": {name: value}, "confidence_95": {name: [low, high]}}`.
    """
    metrics, intervals = {}, {}
    if "reply" in records[0]:
        metrics, intervals = _summarise_replies(records, references, word_vectors, seed)
    sums = {name: _sums(records, *keys) for name, keys in RATIOS.items() if keys[0] in records[0]}
    sums = {name: pair for name, pair in sums.items() if pair[1].sum() > 0}
    values, weights = torch.stack([torch.stack(pair) for pair in sums.values()], dim=2)  # [N, k] each
    ratios = dict(zip(sums, (values.sum(0) / weights.sum(0)).tolist(), strict=True))
    ends = zip(*bootstrap_interval(values, weights, seed=seed), strict=True)
    ends = dict(zip(sums, map(list, ends), strict=True))
    perplexities = {name: math.exp(ratios[nll]) for name, nll in PERPLEXITIES.items()}
    perplexity_ends = {name: [math.exp(end) for end in ends[nll]] for name, nll in PERPLEXITIES.items()}
    return {
        "metrics": {**perplexities, **ratios, **metrics},
        "confidence_95": {**perplexity_ends, **ends, **intervals},
    }


def _sums(records: list[dict[str, Any]], value: str, weight: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The values and weights [N] of each dialogue, float64; a metric is the ratio of their sums."""
    return (
        torch.tensor([record[value] for record in records]).double(),
        torch.tensor([1 if weight is None else record[weight] for record in records]).double(),
    )


def _summarise_replies(
    records: list[dict[str, Any]], references: list[list[str]], word_vectors: str | Path | None, seed: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Corpus BLEU and Distinct with their intervals; metrics that are means over replies are added to the records."""
    from ..metrics import (  # needs NLTK, of the extra `eval`; cards read reports without it
        bleu_from_statistics,
        bleu_statistics,
        distinct_from_statistics,
        distinct_statistics,
        embedding_similarity_items,
        rouge_l_items,
        tokenize,
    )

    replies = [" ".join(tokenize(record["reply"])) for record in records]
    references = [[" ".join(tokenize(text)) for text in texts] for texts in references]
    items = {"rouge_l": rouge_l_items(replies, references, tokenized=True)}
    if word_vectors is not None:
        words = {word for texts in [replies, *references] for text in texts for word in text.split()}
        vectors = load_word_vectors(word_vectors, words)
        similarities = embedding_similarity_items(replies, references, vectors, tokenized=True)
        items |= {f"embedding_{name}": similarities[name] for name in ("average", "extrema", "greedy")}
    for i, record in enumerate(records):
        record |= {name: float(values[i]) for name, values in items.items()}
        record["share_im_not_sure"] = float(NOT_SURE.match(record["reply"]) is not None)

    statistics = bleu_statistics(replies, references, tokenized=True)  # [N, 9]
    for record, row in zip(records, statistics.tolist(), strict=True):
        record["bleu"] = row
    metrics = {name: float(value) for name, value in bleu_from_statistics(statistics.sum(0)).items()}
    counts = bootstrap_counts(len(replies), seed=seed)
    resampled = bleu_from_statistics(np.concatenate([times.numpy() @ statistics for times in counts]))
    intervals = {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in resampled.items()}

    ngrams = distinct_statistics(replies, tokenized=True)
    without = distinct_from_statistics(ngrams, leave_groups_out(len(replies)))  # [groups] each
    for name, value in distinct_from_statistics(ngrams, np.ones(len(replies), dtype=bool)).items():
        metrics[name], intervals[name] = value.item(), jackknife_interval(value.item(), without[name])
    return metrics, intervals


def load_word_vectors(path: str | Path, words: set[str]) -> dict[str, list[float]]:
    """
    Reads the vectors of the given words from a text file with `word v1 v2 ...` per line, like GloVe's and fastText's.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the line of such a word is malformed, or there is none.
    """
    vectors, width = {}, None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:  # fastText's header: numbers of words and dimensions
                continue
            width = width or len(fields) - 1
            word = " ".join(fields[:-width])  # some of GloVe's words contain spaces
            if word in words:
                try:
                    vectors[word] = [float(value) for value in fields[-width:]]
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {number}: expected a word and {width} numbers; {error}."
                    ) from error
    if not vectors:
        raise ValueError(f"{path} has none of the words of the replies: expected lines such as 'word 0.1 0.2 ...'.")
    return vectors


# ---- two reports -> differences ----


def compare(a: Sequence[str | Path], b: Sequence[str | Path], seed: int = 0) -> dict[str, Any]:
    """
    Compares two systems on the same dialogues, paired.

    With several training runs of a system a dialogue's values are averaged over them first.

    Args:
        a: files that `vikdf evaluate` wrote for system A, one per training run.
        b: the same for system B.
        seed: of the statistics.

    Returns:
        `a`, `b`: the evaluated models; `num_dialogues`; `metrics`: for each common metric except perplexity (see
        `nll`) its values `a` and `b`, the `difference` a minus b, its paired interval `confidence_95` by bootstrap
        over dialogues (BLEU and Distinct by jackknife), the `p_value` of approximate randomisation, and
        `p_value_holm`, corrected for the number of metrics.

    Raises:
        OSError: if a report cannot be read.
        ValueError: if a file is not a report, or the reports are not on the same data.
    """
    sides = [[_read_report(path) for path in paths] for paths in (a, b)]
    reports = [report for side in sides for report in side]
    for name in (*SAME, *SAME_IF_ANY):
        settings = {path: report.get(name) for path, report in zip([*a, *b], reports, strict=True)}
        if len({value for value in settings.values() if value is not None or name in SAME}) > 1:
            values = ", ".join(f"{path}: {value}" for path, value in settings.items())
            raise ValueError(f"The reports are not on the same data: {name} differs ({values}).")
    seeds = [sorted({report.get("seed") for report in side}) for side in sides]
    if seeds[0] != seeds[1]:
        raise ValueError(
            f"A was evaluated with the seeds {seeds[0]} and B with {seeds[1]}, which draw different distractors."
        )
    dialogues = [[{record["key"]: record for record in report["dialogues"]} for report in side] for side in sides]
    keys = [key for key in dialogues[0][0] if all(key in records for side in dialogues for records in side)]
    if not keys:
        raise ValueError("The reports have no dialogue in common.")
    metrics = {}
    for name, (value, weight) in RATIOS.items():
        if not all(value in records[keys[0]] for side in dialogues for records in side):
            continue
        pairs = [[_sums([records[key] for key in keys], value, weight) for records in side] for side in dialogues]
        weights = pairs[0][0][1]  # [N]
        if any((other != weights).any() for side in pairs for _, other in side):
            raise ValueError(
                f"The reports count {weight} differently, so their models have different tokenizers, and likelihoods "
                "of different tokens cannot be compared."
            )
        if weights.sum() == 0:
            continue
        ours, theirs = (torch.stack([values for values, _ in side]).mean(0) for side in pairs)  # [N]
        metrics[name] = {
            "a": (ours.sum() / weights.sum()).item(),
            "b": (theirs.sum() / weights.sum()).item(),
            "difference": ((ours - theirs).sum() / weights.sum()).item(),
            "confidence_95": list(bootstrap_interval(ours - theirs, weights, seed=seed)),
            "p_value": paired_randomisation(ours - theirs, seed=seed),
        }
    if all("bleu" in records[keys[0]] for side in dialogues for records in side):
        corpora = [[[records[key] for key in keys] for records in side] for side in dialogues]
        metrics |= _compare_corpora(corpora, seed)
    corrected = holm([figures["p_value"] for figures in metrics.values()])
    for figures, p_value in zip(metrics.values(), corrected, strict=True):
        figures["p_value_holm"] = p_value
    described = [
        [{name: report.get(name) for name in ("model", "weights_sha256", "knowledge", "seed")} for report in side]
        for side in sides
    ]
    return {"a": described[0], "b": described[1], "num_dialogues": len(keys), "metrics": metrics}


def _compare_corpora(sides: list[list[list[dict[str, Any]]]], seed: int) -> dict[str, dict[str, Any]]:
    """Compares the corpus metrics BLEU and Distinct.

    Args:
        sides: for A and B, the N records of each report.
        seed: of the randomisation.
    """
    from ..metrics import bleu_from_statistics, distinct_from_statistics, distinct_statistics, tokenize

    pairs = []
    for number in range(math.lcm(*map(len, sides))):  # each report of a side has equal weight
        records = [record for side in sides for record in side[number % len(side)]]  # [2N]
        replies = [" ".join(tokenize(record["reply"])) for record in records]
        pairs.append((np.array([record["bleu"] for record in records]), distinct_statistics(replies, tokenized=True)))

    def measure(chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics [R] of the chosen replies [R, 2N] (bool) among those of both sides."""
        values = [
            bleu_from_statistics(chosen @ bleu) | distinct_from_statistics(ngrams, chosen) for bleu, ngrams in pairs
        ]
        return {name: np.mean([metrics[name] for metrics in values], axis=0) for name in values[0]}

    def measure_sides(dialogues: np.ndarray, swapped: np.ndarray) -> tuple[dict[str, np.ndarray], ...]:
        """Metrics [R] of A and B on the masked dialogues [R, N], with replies exchanged in the swapped ones [R, N]."""
        own, others = dialogues & ~swapped, dialogues & swapped
        return measure(np.concatenate([own, others], axis=1)), measure(np.concatenate([others, own], axis=1))

    everything = np.ones((1, len(sides[0][0])), dtype=bool)
    a, b = measure_sides(everything, ~everything)
    left_a, left_b = measure_sides(leave_groups_out(everything.size), ~everything)
    rng, extreme = np.random.default_rng(seed), dict.fromkeys(a, 0)
    for rows in torch.arange(RANDOMISATIONS).split(CHUNK):
        other_a, other_b = measure_sides(everything, rng.random((len(rows), everything.size)) < 0.5)
        for name in a:  # ties may differ by rounding
            bound = abs(a[name] - b[name]) * (1 - 1e-9)
            extreme[name] += int((abs(other_a[name] - other_b[name]) >= bound).sum())
    return {
        name: {
            "a": a[name].item(),
            "b": b[name].item(),
            "difference": (a[name] - b[name]).item(),
            "confidence_95": jackknife_interval((a[name] - b[name]).item(), left_a[name] - left_b[name]),
            "p_value": (1 + extreme[name]) / (1 + RANDOMISATIONS),
        }
        for name in a
    }


def _read_report(path: str | Path) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a report of an evaluation: {error}") from error
    # for a comparison the dialogues suffice
    if kind_of(report, path) not in ("dialogues", None) or not isinstance(report, dict) or not report.get("dialogues"):
        raise ValueError(f"{path} is not a report of an evaluation: expected a JSON object with dialogues.")
    return report


__all__ = [
    "METRICS",
    "REPORT_VERSION",
    "Metric",
    "compare",
    "kind_of",
    "load_word_vectors",
    "metric_label",
    "summarise",
    "versions",
]
