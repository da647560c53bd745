"""Metrics over records and differences of two reports, against known values."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from modeling_vikdf.evaluation.probe_items import ProbeItem
from modeling_vikdf.evaluation.probes import _measures
from modeling_vikdf.evaluation.reports import METRICS, REPORT_VERSION, compare, kind_of, load_word_vectors, summarise
from modeling_vikdf.evaluation.retrieval import KS
from modeling_vikdf.metrics import bleu, bleu_statistics, distinct


# ---- metrics ----


def test_bland_replies_are_counted():
    replies = ["I'm not sure what that is.", "i’m NOT sure", "Well, I'm not sure.", "Sure."]
    records = [{"nll": 1.0, "tokens": 1, "mean_nll": 1.0, "examples": 1, "reply": reply} for reply in replies]
    found = summarise(records, [["Sure."]] * 4)
    assert found["metrics"]["share_im_not_sure"] == 0.5 and found["metrics"]["rouge_l"] > 0.25


def test_interval_of_distinct_is_as_wide_as_corpora_differ():
    draw = random.Random(0)

    def corpus() -> list[str]:
        return [" ".join(f"w{int(draw.paretovariate(0.7))}" for _ in range(8)) for _ in range(150)]

    spread = torch.tensor([distinct(corpus(), tokenized=True)["distinct_1"] for _ in range(60)]).std().item()
    widths = []
    for _ in range(12):
        replies = corpus()
        records = [{"nll": 1.0, "tokens": 1, "mean_nll": 1.0, "examples": 1, "reply": each} for each in replies]
        low, high = summarise(records, [["w1"]] * len(replies))["confidence_95"]["distinct_1"]
        widths.append(high - low)
    assert sum(widths) / len(widths) == pytest.approx(2 * 1.96 * spread, rel=0.3)


def test_word_vectors(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("3 2\ndog 1 2\n. . . 3 4\nsky 5 6\n", encoding="utf-8")  # as fastText; a word with spaces
    assert load_word_vectors(path, {"dog", ". . .", "sea"}) == {"dog": [1, 2], ". . .": [3, 4]}
    with pytest.raises(ValueError, match="none of the words"):
        load_word_vectors(path, {"sea"})
    path.write_text("dog 1 2\nsky 5 blue\n")
    with pytest.raises(ValueError, match="line 2: expected a word and 2 numbers"):
        load_word_vectors(path, {"sky"})


def test_the_table_has_every_metric_of_every_report(tmp_path):
    vectors, results = tmp_path / "vectors.txt", Path(__file__).parents[1] / "eval" / "results"
    vectors.write_text("dog 1 2\nsky 2 1\n")
    record = {"nll": 1.0, "tokens": 1, "mean_nll": 1.0, "examples": 1, "hits_at_1": 1.0, "mrr": 1.0, "reply": "dog"}
    record |= {f"{kind}_{key}": 1 for kind in ("visual", "other") for key in ("nll", "tokens")}
    measured = list(summarise([record], [["sky"]], vectors)["metrics"])
    assert [name for name in METRICS if name in measured] == list(METRICS)[: len(measured)]
    assert set(measured) <= set(METRICS) and {f"recall_at_{k}" for k in KS} < set(METRICS)
    for path in results.glob("*.json"):
        for arm in json.loads(path.read_text()).get("arms", {}).values():
            assert {key.split(" (")[0].replace(" ", "_") for key in arm["metrics"]} < set(METRICS), path
    ties = torch.zeros(2)
    rank = ProbeItem({"positives": [""], "random": [""], "adversarial": []}, "rank", [], [], None, ())
    share = ProbeItem({"answer": 0, "dist": [1, 0]}, "dist", [], [], None, ())
    assert {*_measures(rank, ties), *_measures(share, ties)} < set(METRICS)


# ---- kinds ----

OLD = {
    "dialogues": {"metrics", "confidence_95", "knowledge", "data", "num_dialogues"},
    "study": {"data", "reference", "arms"},
    "retrieval": {"text_to_image", "image_to_text", "confidence_95", "num_captions"},
    "probe": {"task", "subsets", "records"},
}


@pytest.mark.parametrize("kind", OLD)
def test_a_report_says_what_it_is_and_an_old_one_is_known_by_its_keys(kind):
    assert kind_of({"kind": kind, "version": REPORT_VERSION}) == kind
    assert kind_of({"kind": "study", "version": REPORT_VERSION} | dict.fromkeys(OLD[kind])) == "study"
    assert kind_of(dict.fromkeys({*OLD[kind], "more"})) == kind
    assert all(kind_of(dict.fromkeys(OLD[kind] - {key})) is None for key in OLD[kind])
    with pytest.raises(ValueError, match=f"r.json has version {REPORT_VERSION + 1}.*reads version {REPORT_VERSION}"):
        kind_of({"kind": kind, "version": REPORT_VERSION + 1}, "r.json")


@pytest.mark.parametrize("content", [[], "nll", None, {}, {"kind": "recipe"}, {"kind": ["probe"]}, {"version": 1}])
def test_what_is_no_report_is_of_no_kind(content):
    assert kind_of(content) is None


def test_results_of_studies_before_there_were_kinds_are_known():
    results = Path(__file__).parents[1] / "eval" / "results"
    kinds = {path.stem: kind_of(json.loads(path.read_text()), path) for path in results.glob("*.json")}
    assert {name for name, kind in kinds.items() if kind is None} == {"latency", "memory", "speed", "throughput"}
    assert set(kinds.values()) == {"study", None}


# ---- differences ----


def write_report(path: Path, nlls: list[float], tokens: list[int], hits: list[int], **more) -> Path:
    records = [
        {"key": f"d{i}", "nll": nll, "tokens": count, "hits_at_1": hit}
        for i, (nll, count, hit) in enumerate(zip(nlls, tokens, hits, strict=True))
    ]
    path.write_text(json.dumps({"model": path.stem, "data_sha256": "x", "seed": 0, "dialogues": records, **more}))
    return path


def test_comparison_worked_by_hand(tmp_path):
    a = write_report(tmp_path / "a.json", [10, 20, 30], [5, 10, 10], [1, 1, 0])
    b = write_report(tmp_path / "b.json", [11, 22, 33], [5, 10, 10], [0, 1, 0])
    found = compare([a], [b])
    nll, hits = found["metrics"]["nll"], found["metrics"]["hits_at_1"]
    assert (nll["a"], nll["b"], nll["difference"]) == pytest.approx((60 / 25, 66 / 25, -6 / 25))
    assert hits["difference"] == pytest.approx(1 / 3) and set(found["metrics"]) == {"nll", "hits_at_1"}
    # resamples of one dialogue alone are the extremes: -1/5 and -3/10
    assert nll["confidence_95"] == pytest.approx([-0.3, -0.2], abs=1e-6)
    assert nll["p_value"] == pytest.approx(2 / 8, abs=0.02)  # |-1 -2 -3| only if all signs agree
    assert hits["p_value"] == 1
    assert nll["p_value_holm"] == pytest.approx(2 * nll["p_value"])
    assert found["num_dialogues"] == 3 and found["a"][0]["model"] == "a"
    assert compare([b], [a])["metrics"]["nll"]["difference"] == pytest.approx(6 / 25)


def test_seeds_are_averaged_and_only_common_dialogues_compared(tmp_path):
    a = [write_report(tmp_path / f"a{i}.json", [i, 3], [1, 1], [0, 1]) for i in (1, 3)]
    b = [write_report(tmp_path / "b.json", [0, 0, 99], [1, 1, 1], [0, 0, 1])]
    found = compare(a, b)
    assert found["num_dialogues"] == 2 and len(found["a"]) == 2
    nll = found["metrics"]["nll"]
    assert (nll["a"], nll["b"], nll["difference"]) == pytest.approx((2.5, 0, 2.5))


def write_replies(path: Path, replies: list[str], references: list[str]) -> Path:
    rows = bleu_statistics(replies, references).tolist()
    records = [
        {"key": f"d{i}", "nll": 1.0, "tokens": 1, "reply": reply, "bleu": row}
        for i, (reply, row) in enumerate(zip(replies, rows, strict=True))
    ]
    path.write_text(json.dumps({"model": path.stem, "data_sha256": "x", "seed": 0, "dialogues": records}))
    return path


def test_metrics_of_all_replies_together_are_compared(tmp_path):
    references = ["i love the sea", "my dog sleeps", "what a day", "they run fast", "no it is not", "blue and red"]
    first = ["i love my dog", "my dog sleeps now", "what a dog", "they run", "no it is", "blue sea"]
    second = ["i am not sure", "my dog sleeps", "i am not sure", "they run fast", "i am", "red and blue"]

    def measure(replies):
        return bleu(replies, references) | distinct(replies)

    a, b = (write_replies(tmp_path / f"{i}.json", replies, references) for i, replies in enumerate([first, second]))
    found = compare([a], [b])["metrics"]
    ours, theirs = measure(first), measure(second)
    # all ways of giving each dialogue's replies to A and B
    ways = []
    for swaps in itertools.product([False, True], repeat=6):
        pairs = [(y, x) if swap else (x, y) for x, y, swap in zip(first, second, swaps, strict=True)]
        one, other = (measure(list(replies)) for replies in zip(*pairs, strict=True))
        ways.append({name: abs(one[name] - other[name]) for name in one})
    assert {*ours} < {*found}
    for name in ours:
        figures = found[name]
        difference = ours[name] - theirs[name]
        assert [figures[key] for key in ("a", "b", "difference")] == pytest.approx(
            [ours[name], theirs[name], difference]
        )
        extreme = sum(way[name] >= abs(difference) - 1e-9 for way in ways)
        assert figures["p_value"] == pytest.approx(extreme / 64, abs=0.02)
        without = []
        for i in range(6):
            sides = [each[:i] + each[i + 1 :] for each in (first, second, references)]
            one, other = (bleu(side, sides[2]) | distinct(side) for side in sides[:2])
            without.append(one[name] - other[name])
        error = math.sqrt(5 / 6 * sum((each - sum(without) / 6) ** 2 for each in without))
        assert figures["confidence_95"] == pytest.approx([difference - 1.96 * error, difference + 1.96 * error])

    same = compare([a], [a])["metrics"]["distinct_2"]
    assert same["difference"] == 0 and same["confidence_95"] == [0, 0] and same["p_value"] == 1
    both = compare([a, b], [b])["metrics"]  # each seed's own corpus, then the mean
    for name in ours:
        assert both[name]["difference"] == pytest.approx((ours[name] - theirs[name]) / 2)
    one = compare([write_replies(tmp_path / "one.json", first[:1], references[:1])], [b])["metrics"]["bleu_1"]
    assert one["a"] == 0.5 and one["confidence_95"] == pytest.approx([one["difference"]] * 2)


def test_reports_that_cannot_be_compared(tmp_path):
    a = write_report(tmp_path / "a.json", [1, 2], [1, 1], [0, 1])
    for name, value in (("data_sha256", "y"), ("limit", 2), ("all_references", True)):
        b = write_report(tmp_path / "b.json", [1, 2], [1, 1], [0, 1], **{name: value})
        with pytest.raises(ValueError, match=f"not on the same data: {name} differs"):
            compare([a], [b])
    words = [write_report(tmp_path / f"{w}.json", [1, 2], [1, 1], [0, 1], visual_words_sha256=w) for w in "vw"]
    with pytest.raises(ValueError, match="visual_words_sha256 differs"):
        compare(words[:1], words[1:])
    compare([a], words[:1])  # what only one has is not compared
    b = write_report(tmp_path / "b.json", [1, 2], [1, 1], [0, 1], seed=1)
    with pytest.raises(ValueError, match=r"the seeds \[0\] and B with \[1\]"):
        compare([a], [b])
    b = write_report(tmp_path / "b.json", [1, 2], [1, 2], [0, 1])
    with pytest.raises(ValueError, match="different tokenizers"):
        compare([a], [b])
    records = [{"key": "other", "nll": 1.0, "tokens": 1}]
    b = write_report(tmp_path / "b.json", [], [], [], dialogues=records)
    with pytest.raises(ValueError, match="no dialogue in common"):
        compare([a], [b])
    for text in ("[]", '{"metrics": {}}', "nll: 3", '{"kind": "probe", "version": 1, "dialogues": [{"key": "d0"}]}'):
        b.write_text(text)
        with pytest.raises(ValueError, match="b.json is not a report"):
            compare([a], [b])
