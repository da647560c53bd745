"""Metrics of dialogue replies: BLEU, ROUGE-L and embedding similarity against references, and Distinct.

Texts are lower-cased and tokenised; with `tokenized=True` they are tokens joined by spaces and only split, which saves
time if several metrics read the same texts. ValueError is raised for empty lists, lists of different lengths, items
that are not strings, and items without a reference or with one that has no tokens.

`bleu_statistics`, `rouge_l_items` and `embedding_similarity_items` return each item's contribution: bootstrap
resamples are then sums or means over rows of these arrays, and no text is read twice. `distinct_statistics` gives
Distinct of any subset of the items.
"""

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from functools import reduce
from itertools import chain
from operator import or_

import numpy as np
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer


Texts = Sequence[str]
References = Sequence[str | Sequence[str]]
WordVectors = Mapping[str, Sequence[float] | np.ndarray] | tuple[Sequence[str], np.ndarray]

MAX_ORDER = 4  # of BLEU's n-grams
BETA = 1.2  # of ROUGE-L's F-measure: weight of recall relative to precision
ARTICLES = {"a", "an", "the"}
PUNCTUATION = set(string.punctuation + "‘’“”«»–—…")

# As NLTK's word_tokenize, but without its trained abbreviations, which are a download. The word tokenizer alone
# separates a full stop only at the end of the text.
SENTENCES, WORDS = PunktSentenceTokenizer(), NLTKWordTokenizer()


def tokenize(text: str) -> list[str]:
    """Lower-case NLTK tokens: `"I don't."` -> `["i", "do", "n't", "."]`. Nothing is downloaded."""
    return [word for sentence in SENTENCES.tokenize(text.lower()) for word in WORDS.tokenize(sentence)]


# ---- BLEU ----


def bleu(predictions: Texts, references: References, tokenized: bool = False) -> dict[str, float]:
    """
    Corpus BLEU (Papineni et al. 2002).

    The geometric mean of the clipped precisions of 1- to n-grams over all items, times the brevity penalty against
    the reference closest in length, of two equally close ones the shorter. Not smoothed: 0 if no n-gram matches, as in
    texts of fewer than n tokens.

    Args:
        predictions: N texts.
        references: for each item a text or several.
        tokenized: whether the texts are tokens joined by spaces.

    Returns:
        `bleu_1` to `bleu_4`, from 0 to 1.

    Raises:
        ValueError: see the module.
    """
    statistics = bleu_statistics(predictions, references, tokenized).sum(0)
    return {name: value.item() for name, value in bleu_from_statistics(statistics).items()}


def bleu_statistics(predictions: Texts, references: References, tokenized: bool = False) -> np.ndarray:
    """
    Each item's contribution to corpus BLEU; arguments and errors as for [`bleu`].

    Returns:
        [N, 9], int64: closest reference length; matching n-grams, n = 1 to 4; n-grams of the prediction, n = 1 to 4.
    """
    rows = []
    for prediction, alternatives in _tokens(predictions, references, tokenized):
        length = min((abs(len(tokens) - len(prediction)), len(tokens)) for tokens in alternatives)[1]
        matches, totals = [], []
        for n in range(1, MAX_ORDER + 1):
            ngrams = _ngrams(prediction, n)
            clip = reduce(or_, (_ngrams(tokens, n) for tokens in alternatives))  # largest count in any one reference
            matches.append((ngrams & clip).total())
            totals.append(ngrams.total())
        rows.append([length, *matches, *totals])
    return np.array(rows)


def bleu_from_statistics(statistics: np.ndarray) -> dict[str, np.ndarray]:
    """Sums [..., 9] of rows of `bleu_statistics` -> `bleu_1` to `bleu_4` [...]."""
    length, matches, totals = np.split(statistics, [1, 1 + MAX_ORDER], axis=-1)
    with np.errstate(divide="ignore"):  # no match or an empty prediction: exp(-inf) = 0
        log_precisions = np.log(matches / np.maximum(totals, 1))  # [..., 4]
        log_penalty = np.minimum(1 - length / totals[..., :1], 0)  # [..., 1]
    scores = np.exp(log_precisions.cumsum(-1) / np.arange(1, MAX_ORDER + 1) + log_penalty)
    return {f"bleu_{n + 1}": scores[..., n] for n in range(MAX_ORDER)}


# ---- ROUGE-L ----


def rouge_l(predictions: Texts, references: References, tokenized: bool = False) -> dict[str, float]:
    """
    ROUGE-L (Lin 2004), mean over items.

    The F-measure, with beta 1.2, of the longest common subsequence's length relative to the prediction and to the
    reference. With several references the best precision and the best recall count, each by itself, as in the COCO
    caption evaluation and nlg-eval.

    Args and Raises: as for [`bleu`].

    Returns:
        `rouge_l`, from 0 to 1.
    """
    return {"rouge_l": rouge_l_items(predictions, references, tokenized).mean().item()}


def rouge_l_items(predictions: Texts, references: References, tokenized: bool = False) -> np.ndarray:
    """ROUGE-L of each item [N], float64; `rouge_l` is their mean. Arguments and errors as for [`bleu`]."""
    scores = []
    for prediction, alternatives in _tokens(predictions, references, tokenized):
        common = [_common_subsequence(prediction, tokens) for tokens in alternatives]
        precision = max(common) / max(len(prediction), 1)
        recall = max(length / len(tokens) for length, tokens in zip(common, alternatives, strict=True))
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0)
    return np.array(scores)


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # of the tokens of `first` so far with each prefix of `second`
    for token in first:
        above, lengths = lengths, [0]
        for i, other in enumerate(second):
            lengths.append(above[i] + 1 if token == other else max(above[i + 1], lengths[i]))
    return lengths[-1]


# ---- Distinct ----


def distinct(predictions: Texts, tokenized: bool = False) -> dict[str, float]:
    """
    Distinct-n (Li et al. 2016): the fraction of n-grams that are distinct.

    Punctuation and articles (a, an, the) are removed, and no n-gram spans two items. Distinct falls as a corpus grows,
    so compare corpora of the same size.

    Args:
        predictions: N texts.
        tokenized: whether the texts are lower-case tokens joined by spaces.

    Returns:
        `distinct_1`, `distinct_2`, from 0 to 1; 0 where there is no n-gram.

    Raises:
        ValueError: if `predictions` is not a list of at least one string.
    """
    statistics = distinct_statistics(predictions, tokenized)
    scores = distinct_from_statistics(statistics, np.ones(len(predictions), dtype=bool))
    return {name: value.item() for name, value in scores.items()}


def distinct_statistics(predictions: Texts, tokenized: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Which items the n-grams come from; arguments and errors as for [`distinct`].

    Returns:
        For n = 1 and 2: the item index of each n-gram occurrence [M], sorted by n-gram; and the position [V] at which
        each of the V distinct n-grams begins.
    """
    texts = [
        [token for token in tokens if token not in ARTICLES and not PUNCTUATION.issuperset(token)]
        for tokens in _split(predictions, "predictions", tokenized)
    ]
    statistics = []
    for n in (1, 2):
        items: dict[tuple[str, ...], list[int]] = {}  # n-gram -> items it occurs in
        for item, tokens in enumerate(texts):
            for ngram in zip(*(tokens[i:] for i in range(n)), strict=False):
                items.setdefault(ngram, []).append(item)
        starts = np.cumsum([0, *map(len, items.values())])[:-1]
        statistics.append((np.array(list(chain(*items.values())), dtype=int), starts))
    return statistics


def distinct_from_statistics(
    statistics: list[tuple[np.ndarray, np.ndarray]], chosen: np.ndarray
) -> dict[str, np.ndarray]:
    """Distinct [...] of the `chosen` items [..., N] (bool), from the result of `distinct_statistics`."""
    scores = {}
    for n, (items, starts) in enumerate(statistics, start=1):
        present = chosen[..., items]  # [..., M]
        distinct_ngrams = np.logical_or.reduceat(present, starts, axis=-1).sum(-1) if len(starts) else 0
        scores[f"distinct_{n}"] = distinct_ngrams / np.maximum(present.sum(-1), 1)
    return scores


# ---- embedding similarity ----


def embedding_similarity(
    predictions: Texts, references: References, vectors: WordVectors, tokenized: bool = False
) -> dict[str, float]:
    """
    Cosine similarity of word vectors, mean over items; with several references the nearest counts.

    Average compares the sums of a text's vectors; Extrema (Forgues et al. 2014) the vectors of each dimension's value
    of largest magnitude; Greedy (Rus & Lintean 2012) each word with the nearest of the other text, averaged over the
    words of either text and then over both.

    Words without vector are ignored. An item whose prediction, or all of whose references, have no known word scores 0
    and is counted in `num_unknown`.

    Args:
        predictions: as for [`bleu`].
        references: as for [`bleu`].
        vectors: word -> vector [d], anything with `in` and `[]`; or a tuple (V words, matrix [V, d]). Words are looked
            up in lower case unless `tokenized`.
        tokenized: as for [`bleu`].

    Returns:
        `average`, `extrema`, `greedy`, from -1 to 1; `num_unknown`, the number of items without a known word.

    Raises:
        ValueError: see the module; also if the matrix does not have one row per word.
    """
    items = embedding_similarity_items(predictions, references, vectors, tokenized)
    known = items.pop("known")
    return {**{name: scores.mean().item() for name, scores in items.items()}, "num_unknown": int((~known).sum())}


def embedding_similarity_items(
    predictions: Texts, references: References, vectors: WordVectors, tokenized: bool = False
) -> dict[str, np.ndarray]:
    """
    Embedding similarity of each item; arguments and errors as for [`embedding_similarity`].

    Returns:
        `average`, `extrema`, `greedy` [N], whose means are the corpus's; `known` [N] (bool), whether prediction and
        references have known words.
    """
    if isinstance(vectors, tuple):
        words, matrix = vectors
        if len(words) != len(matrix):
            raise ValueError(
                f"vectors must have a row for each word, got {len(matrix)} rows for {len(words)} words. "
                "Give (words, matrix), rows in the order of the words."
            )
        vectors = dict(zip(words, matrix, strict=True))

    def embed(tokens: list[str]) -> np.ndarray:
        return np.array([vectors[token] for token in tokens if token in vectors], dtype=float)  # [T, d]

    scores, known = [], []
    for prediction, alternatives in _tokens(predictions, references, tokenized):
        own = embed(prediction)
        others = [embedded for embedded in map(embed, alternatives) if len(embedded)]
        known.append(len(own) > 0 and len(others) > 0)
        scores.append(np.max([_similarities(own, other) for other in others], axis=0) if known[-1] else np.zeros(3))
    average, extrema, greedy = np.array(scores).T
    return {"average": average, "extrema": extrema, "greedy": greedy, "known": np.array(known)}


def _similarities(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Average, Extrema, Greedy of vectors [T_1, d], [T_2, d]."""
    cosines = _unit(first) @ _unit(second).T  # [T_1, T_2]
    greedy = (cosines.max(0).mean() + cosines.max(1).mean()) / 2
    return _unit(first.sum(0)) @ _unit(second.sum(0)), _unit(_extrema(first)) @ _unit(_extrema(second)), greedy


def _extrema(vectors: np.ndarray) -> np.ndarray:
    """[T, d] -> [d]: in each dimension the value of largest magnitude, the negative one in a tie."""
    largest, smallest = vectors.max(0), vectors.min(0)
    return np.where(largest > -smallest, largest, smallest)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """[..., d] normalised to length 1; a zero vector stays zero, with cosine 0 to all."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(float).tiny)


# ---- texts ----


def _ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _tokens(
    predictions: Texts, references: References, tokenized: bool
) -> Iterable[tuple[list[str], list[list[str]]]]:
    """For each item the tokens of its prediction and of its references, none of which is empty."""
    predicted = _split(predictions, "predictions", tokenized)
    _check_list(references, "references")
    if len(references) != len(predicted):
        raise ValueError(
            f"references must have an item for each prediction, got {len(references)} for {len(predicted)}. "
            "Give each prediction a string or a list of strings."
        )
    split = []
    for i, item in enumerate(references):
        split.append(_split([item] if isinstance(item, str) else item, f"references[{i}]", tokenized))
        if not all(split[-1]):
            raise ValueError(f"references[{i}] must be texts with tokens, got {item!r}. Remove empty ones.")
    return zip(predicted, split, strict=True)


def _split(texts: Texts, name: str, tokenized: bool) -> list[list[str]]:
    """The tokens of each text; `name` is the list's name in errors."""
    _check_list(texts, name)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"{name}[{i}] must be a string, got {text!r}. "
                "Join tokens by spaces and set tokenized=True; remove items that are not texts."
            )
    return [text.split() if tokenized else tokenize(text) for text in texts]


def _check_list(values: Sized, name: str) -> None:
    if isinstance(values, str) or not isinstance(values, Sized) or not len(values):
        raise ValueError(f"{name} must be a list with at least one item, got {values!r}. Put a single text in a list.")


__all__ = [
    "bleu",
    "bleu_from_statistics",
    "bleu_statistics",
    "distinct",
    "distinct_from_statistics",
    "distinct_statistics",
    "embedding_similarity",
    "embedding_similarity_items",
    "rouge_l",
    "rouge_l_items",
    "tokenize",
]
