"""Metrics against nlg-eval's values, cases worked by hand and the COCO caption evaluation; their `evaluate` modules.

The texts that nlg-eval's values are of are in a folder named by VIKDF_METRICS_ORACLE_DIR.
"""

import doctest
import json
import math
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import RepoCard
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vikdf.metrics import (
    bleu,
    bleu_from_statistics,
    bleu_statistics,
    distinct,
    distinct_from_statistics,
    distinct_statistics,
    embedding_similarity,
    embedding_similarity_items,
    rouge_l,
    rouge_l_items,
    tokenize,
)


ROOT = Path(__file__).parents[1]
ORACLE = Path(os.environ.get("VIKDF_METRICS_ORACLE_DIR", ROOT.parent / "shared" / "data" / "metrics_oracle"))

PREDICTIONS = ["the dog runs on the beach"]
REFERENCES = [["the dog runs along the beach", "the dog runs"]]
VECTORS = {"dog": [1, 0], "cat": [0.8, 0.6], "runs": [0, -1]}

# tokens of few kinds, so that texts have some in common
words = st.lists(st.sampled_from(["the", "dog", "cat", "runs", "?", "a", "beach"]), min_size=1, max_size=7)
texts = words.map(" ".join)
corpora = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


def scores(predictions: list[str], references: list[list[str]], **kwargs) -> dict[str, float]:
    """All metrics that there are."""
    return {
        **bleu(predictions, references, **kwargs),
        **rouge_l(predictions, references, **kwargs),
        **distinct(predictions, **kwargs),
        **embedding_similarity(predictions, references, VECTORS, **kwargs),
    }


# ---- values ----


@pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no oracle folder at {ORACLE} (set VIKDF_METRICS_ORACLE_DIR)")
@pytest.mark.parametrize("tokenized", [False, True])
def test_values_are_those_of_nlg_eval(tokenized):
    predictions, *references = (
        (ORACLE / name).read_text(encoding="utf-8").splitlines() for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    found = scores(predictions, list(zip(*references, strict=True)), tokenized=tokenized)
    expected = {"bleu_1": 0.55, "bleu_2": 0.428174, "bleu_3": 0.284043, "bleu_4": 0.201143, "rouge_l": 0.522104}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@given(corpora)
@settings(max_examples=30)
def test_values_are_those_of_the_coco_caption_evaluation(corpus):
    coco_bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    coco_rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    predictions, references = zip(*corpus, strict=True)
    truth, found = dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}
    theirs, _ = coco_bleu.compute_score(truth, found, verbose=0)
    for expected, value in zip(theirs, bleu(predictions, references, tokenized=True).values(), strict=True):
        assert value == pytest.approx(expected) if value else expected < 0.05  # theirs adds a little to what is 0
    _, expected = coco_rouge.compute_score(truth, found)
    np.testing.assert_allclose(rouge_l_items(predictions, references, tokenized=True), expected, atol=1e-9)


def test_bleu_worked_by_hand():
    # of 6 unigrams all but "on" are in a reference, "the" twice; of bigrams "the dog", "dog runs", "the beach"; of
    # trigrams "the dog runs"; the closest reference has 6 tokens as well
    assert bleu_statistics(PREDICTIONS, REFERENCES).tolist() == [[6, 5, 3, 1, 0, 6, 5, 4, 3]]
    expected = {
        "bleu_1": 5 / 6,
        "bleu_2": (5 / 6 * 3 / 5) ** (1 / 2),
        "bleu_3": (1 / 2 * 1 / 4) ** (1 / 3),
        "bleu_4": 0,
    }
    assert bleu(PREDICTIONS, REFERENCES) == pytest.approx(expected)


def test_bleu_counts_an_ngram_as_often_as_a_single_reference_has_it():
    assert bleu(["the the the"], [["the dog the", "the cat"]])["bleu_1"] == pytest.approx(2 / 3)


def test_bleu_takes_off_for_brevity_against_the_closest_length():
    # 2 tokens; lengths 3 and 1 are as close, and the shorter counts; 4 does not
    assert bleu(["the dog"], [["the dog runs", "dog", "the dog runs fast"]])["bleu_2"] == 1
    # over the corpus 2 + 3 tokens for 4 + 3: what one item has too few is not made good by another's score
    found = bleu(["the dog", "it is fun"], ["the dog runs fast", "it is fun"])
    assert found["bleu_1"] == pytest.approx(math.exp(1 - 7 / 5))


def test_bleu_of_nothing_is_nothing():
    assert set(bleu(["", "  "], ["a dog", "a cat"]).values()) == {0.0}


def test_rouge_l_worked_by_hand():
    # "the dog runs the beach" of the first: precision 5/6; "the dog runs" is all of the second: recall 1
    assert rouge_l(PREDICTIONS, REFERENCES) == pytest.approx({"rouge_l": 2.44 * 5 / 6 / (1 + 1.44 * 5 / 6)})
    # "a c" is common: precision 2/4, recall 2/3; then nothing is; then nothing is predicted
    items = rouge_l_items(["a b c d", "x", ""], ["c a c", "y", "z"])
    assert items.tolist() == pytest.approx([2.44 * 1 / 2 * 2 / 3 / (2 / 3 + 1.44 / 2), 0, 0])
    assert rouge_l(["a b c d", "x", ""], ["c a c", "y", "z"])["rouge_l"] == pytest.approx(items.sum() / 3)


def test_distinct_worked_by_hand():
    # i love beach / i love my dog: 5 of 7 words, and 4 of 5 bigrams, for none goes from "beach" to "i"
    found = distinct(["I love the beach!", "I love -- my dog..."])
    assert found == pytest.approx({"distinct_1": 5 / 7, "distinct_2": 4 / 5})
    assert distinct(["so so so so"]) == pytest.approx({"distinct_1": 1 / 4, "distinct_2": 1 / 3})
    assert distinct(["The ... “A” ?!", ""]) == {"distinct_1": 0, "distinct_2": 0}


@given(st.lists(st.tuples(texts | st.just("?"), st.booleans()), min_size=1, max_size=6))
def test_distinct_of_a_part_needs_no_second_reading(items):
    everything, chosen = zip(*items, strict=True)
    some = [text for text, there in items if there] or ["?"]
    found = distinct_from_statistics(distinct_statistics(everything), np.array([chosen, [True] * len(items)]))
    expected = zip(distinct(some).items(), distinct(everything).values(), strict=True)
    assert {name: values.tolist() for name, values in found.items()} == {name: [a, b] for (name, a), b in expected}


def test_embedding_similarity_worked_by_hand():
    # cat + runs = (.8, -.4) and dog + runs = (1, -1): cosine 1.2 / (√.8 √2). Largest: (.8, -1), as -1 beats .6, and
    # (1, -1): 1.8 / (√1.64 √2). cat is at .8 from dog and -.6 from runs, runs at 0 and 1: (.8 + 1) / 2 from both sides
    found = embedding_similarity(["The cat runs."], ["the dog runs"], VECTORS)
    assert found == pytest.approx(
        {"average": 1.2 / 1.6**0.5, "extrema": 1.8 / 3.28**0.5, "greedy": 0.9, "num_unknown": 0}
    )
    # dog = (1, 0), cat + runs = (.8, -.4), largest (.8, -1); dog finds cat at .8, cat dog at .8 and runs dog at 0
    found = embedding_similarity(["dog"], ["cat runs"], VECTORS)
    assert found == pytest.approx(
        {"average": 0.8 / 0.8**0.5, "extrema": 0.8 / 1.64**0.5, "greedy": (0.8 + 0.4) / 2, "num_unknown": 0}
    )


def test_of_several_references_the_nearest_counts_for_each_similarity():
    first, second = (embedding_similarity(["dog"], [text], VECTORS) for text in ("cat", "runs dog runs dog"))
    both = embedding_similarity(["dog"], [["cat", "runs dog runs dog", "nothing known"]], VECTORS)
    assert both == {name: max(first[name], second[name]) for name in first}
    assert first["average"] > second["average"]


def test_items_without_a_known_word_score_nothing_and_are_counted():
    predictions, references = ["the dog", "a bird", "dog", ""], ["the dog", "dog", ["birds", "?"], "cat"]
    items = embedding_similarity_items(predictions, references, VECTORS)
    assert items["known"].tolist() == [True, False, False, False]
    assert all(items[name].tolist() == pytest.approx([1, 0, 0, 0]) for name in ("average", "extrema", "greedy"))
    found = embedding_similarity(predictions, references, VECTORS)
    assert found == pytest.approx({"average": 0.25, "extrema": 0.25, "greedy": 0.25, "num_unknown": 3})


def test_vectors_may_be_a_matrix_and_may_cancel():
    table = (list(VECTORS), np.array(list(VECTORS.values())))
    assert embedding_similarity(["cat runs"], ["dog"], table) == embedding_similarity(["cat runs"], ["dog"], VECTORS)
    found = embedding_similarity(["up down"], ["up"], {"up": [0, 1], "down": [0, -1]})
    assert found == pytest.approx({"average": 0, "extrema": -1, "greedy": 0.5 * (1 + 0), "num_unknown": 0})


# ---- properties ----


@given(corpora)
@settings(max_examples=30)
def test_what_is_said_as_the_reference_says_it_scores_one(corpus):
    predictions = [f"the dog runs {text}" for text, _ in corpus]  # four tokens and a known word at least
    references = [[text, *others] for text, (_, others) in zip(predictions, corpus, strict=True)]
    found = scores(predictions, references, tokenized=True)
    assert found.pop("num_unknown") == 0
    del found["distinct_1"], found["distinct_2"]
    assert all(value == pytest.approx(1) for value in found.values())


@given(corpora, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_scores_are_fractions_whatever_the_order(corpus, random):
    shuffled = [(text, random.sample(references, len(references))) for text, references in corpus]
    random.shuffle(shuffled)
    found = scores(*zip(*corpus, strict=True))
    assert found == pytest.approx(scores(*zip(*shuffled, strict=True)))
    similarities = {found.pop(name) for name in ("average", "extrema", "greedy")}
    assert 0 <= found.pop("num_unknown") <= len(corpus)
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in similarities)
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())


@given(corpora, st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_rows_of_statistics_resample_a_corpus(corpus, seed):
    """As a bootstrap does: many resamples at once, and each is the score of the corpus that it draws."""
    predictions, references = zip(*corpus, strict=True)
    draws = np.random.default_rng(seed).integers(len(corpus), size=(3, len(corpus)))
    resampled = bleu_from_statistics(bleu_statistics(predictions, references)[draws].sum(1))
    rouge = rouge_l_items(predictions, references)[draws].mean(1)
    similarity = embedding_similarity_items(predictions, references, VECTORS)
    for i, draw in enumerate(draws):
        found = scores([predictions[j] for j in draw], [references[j] for j in draw])
        assert {name: values[i] for name, values in resampled.items()} == pytest.approx(
            {name: found[name] for name in resampled}
        )
        assert rouge[i] == pytest.approx(found["rouge_l"])
        assert similarity["greedy"][draws].mean(1)[i] == pytest.approx(found["greedy"])
        assert (~similarity["known"])[draws].sum(1)[i] == found["num_unknown"]


# ---- texts ----


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I don't.", ["i", "do", "n't", "."]),
        ("Wow!! It rained. So we left.", ["wow", "!", "!", "it", "rained", ".", "so", "we", "left", "."]),
        ("3.5 m, J. R. R. Tolkien", ["3.5", "m", ",", "j.", "r.", "r.", "tolkien"]),
        ("  \n", []),
    ],
)
def test_tokens_are_those_of_nltk_of_lower_case_sentences(text, tokens):
    assert tokenize(text) == tokens


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
@settings(max_examples=30)
def test_raw_and_tokenized_texts_score_alike(predictions):
    references = [["The dog runs."]] * len(predictions)
    joined = [" ".join(tokenize(text)) for text in predictions]
    assert scores(predictions, references) == scores(joined, [["the dog runs ."]] * len(joined), tokenized=True)


def test_a_reference_alone_needs_no_list():
    assert scores(["the dog"], ["a dog"]) == scores(["the dog"], [["a dog"]])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], r"predictions must be a list with at least one item, got \[\]"),
        ("a dog", ["a dog"], "predictions must be a list .* got 'a dog'. Put a single text in a list"),
        (None, ["a dog"], "predictions must be a list .* got None"),
        (["a dog", 3], ["a dog", "3"], r"predictions\[1\] must be a string, got 3"),
        ([["a", "dog"]], ["a dog"], r"predictions\[0\] must be a string, .* Join tokens"),
        (["a dog"], "a", "references must be a list .* got 'a'"),
        (["a dog"], [], "references must be a list"),
        (["a dog", "a cat"], ["a dog"], "an item for each prediction, got 1 for 2"),
        (["a dog", "a cat"], ["a dog", []], r"references\[1\] must be a list with at least one item, got \[\]"),
        (["a dog"], [None], r"references\[0\] must be a list"),
        (["a dog"], [["a dog", None]], r"references\[0\]\[1\] must be a string, got None"),
        (["a dog"], [["a dog", " "]], r"references\[0\] must be texts with tokens, got \['a dog', ' '\]"),
    ],
)
@pytest.mark.parametrize("metric", [bleu, rouge_l, lambda *texts: embedding_similarity(*texts, VECTORS)])
def test_bad_texts_are_refused(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric(predictions, references)


@pytest.mark.parametrize("predictions", [[], "a dog", [None]])
def test_distinct_refuses_bad_texts(predictions):
    with pytest.raises(ValueError, match="predictions"):
        distinct(predictions)


def test_vectors_must_be_as_many_as_words():
    with pytest.raises(ValueError, match=r"a row for each word, got 2 rows for 1 words. Give \(words, matrix\)"):
        embedding_similarity(["a dog"], ["a dog"], (["dog"], np.eye(2)))


# ---- evaluate modules ----


FUNCTIONS = {
    "dialogue_bleu": bleu,
    "dialogue_rouge": rouge_l,
    "distinct_n": distinct,
    "embedding_similarity": embedding_similarity,
}


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """The library, keeping what it is given in a folder of the test's own."""
    library = pytest.importorskip("evaluate")
    monkeypatch.setattr(library.config, "HF_METRICS_CACHE", tmp_path)
    monkeypatch.chdir(ROOT)
    return library


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_compute_what_the_functions_do(evaluate, name):
    metric = evaluate.load(f"./eval/{name}")
    predictions = ["The dog runs on the beach.", "a cat"]
    options = {"vectors": VECTORS} if name == "embedding_similarity" else {}
    if name == "distinct_n":
        inputs = [{}]
    else:
        inputs = [{"references": references} for references in (["the dog.", "Cats?"], [["a", "A dog."], ["a cat"]])]
    for each in inputs:
        for tokenized in (False, True):
            expected = FUNCTIONS[name](predictions, **each, **options, tokenized=tokenized)
            found = metric.compute(predictions=predictions, **each, **options, tokenized=tokenized)
            assert found == expected == json.loads(json.dumps(found))
    with pytest.raises(ValueError, match="format|must be"):
        metric.compute(predictions=[["a", "dog"]], **({"references": ["a dog"]} if inputs[0] else {}), **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_the_documentation_run(evaluate, name):
    card = ROOT / "eval" / name / "README.md"
    failed, attempted = doctest.testfile(str(card), module_relative=False, encoding="utf-8")
    assert attempted and not failed
    space = RepoCard.load(card).data.to_dict()
    assert (space["sdk"], space["app_file"], space["license"]) == ("gradio", "app.py", "apache-2.0")
    assert space["title"] and space["description"] and space["tags"] == ["evaluate", "metric"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_spaces_compute_their_example(name, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    space = runpy.run_path(str(ROOT / "eval" / name / "app.py"))
    assert isinstance(space["demo"], gradio.Interface)
    found = space["compute"](*space["demo"].examples[0])
    expected = {  # of the examples worked above
        "dialogue_bleu": bleu(PREDICTIONS, REFERENCES),
        "dialogue_rouge": rouge_l(PREDICTIONS, REFERENCES),
        "distinct_n": {"distinct_1": 5 / 7, "distinct_2": 4 / 5},
        "embedding_similarity": embedding_similarity(["the cat runs"], ["the dog runs"], VECTORS),
    }
    assert found == pytest.approx(expected[name])
