"""Confidence intervals and p-values, by resampling clusters (dialogues, photographs, subjects) of dependent items.

Knows neither models nor metrics.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import torch


CHUNK = 250  # resamples at a time, which bounds memory to CHUNK x clusters numbers
JACKKNIFE = 20  # groups of dialogues that are left out in turn
RANDOMISATIONS = 10_000  # random assignments of two systems' results


def bootstrap_interval(
    values: torch.Tensor,
    weights: torch.Tensor | None = None,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | tuple[list[float], list[float]]:
    """
    95 % percentile bootstrap interval of sum(values) / sum(weights), for one or k such ratios over shared resamples.

    Args:
        values: [N] or [N, k].
        weights: [N] or [N, k]; default 1, which gives the interval of a mean.
        clusters: N labels; rows of the same cluster (a dialogue, a photograph) are drawn together. Default: each row
            is its own cluster.
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Returns:
        Lower and upper bound: floats, or for [N, k] lists of k. NaN if no resample has weight.

    Raises:
        ValueError: if there are no rows.
    """
    if not len(values):
        raise ValueError("There is nothing to resample.")
    values = values.double().cpu()
    weights = torch.ones(len(values)).double() if weights is None else weights.double().cpu()
    weights = weights if weights.dim() == values.dim() else weights[:, None].expand_as(values)
    cluster = number_labels(range(len(values)) if clusters is None else clusters)  # [N]
    count = int(cluster.max()) + 1
    sums = torch.zeros(2, count, *values.shape[1:]).double()  # [2, C(, k)]
    sums.index_add_(1, cluster, torch.stack([values, weights]))
    sums = sums.transpose(0, 1).flatten(1)  # [C, 2(k)]
    drawn = torch.cat([times @ sums for times in bootstrap_counts(count, resamples, seed)])  # [resamples, 2(k)]
    totals, weight = drawn.unflatten(1, (2, *values.shape[1:])).unbind(1)
    ratios = totals / weight.masked_fill(weight == 0, torch.nan)
    low, high = ratios.nanquantile(ratios.new_tensor([0.025, 0.975]), dim=0)
    return low.tolist(), high.tolist()


def bootstrap_counts(clusters: int, resamples: int = 2000, seed: int = 0) -> Iterator[torch.Tensor]:
    """Yields how often each resample draws each cluster, in chunks [up to CHUNK, clusters], float64."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.arange(resamples).split(CHUNK):
        draws = torch.randint(clusters, (len(rows), clusters), generator=generator)
        yield torch.zeros(draws.shape).double().scatter_add_(1, draws, torch.ones(draws.shape).double())


def leave_groups_out(count: int) -> np.ndarray:
    """Delete-a-group jackknife: for each group of `count` dialogues the mask of those outside it [groups, count]."""
    groups = min(JACKKNIFE, count)
    return (np.arange(count) % groups != np.arange(groups)[:, None]) | (groups == 1)


def jackknife_interval(value: float, without: np.ndarray) -> list[float]:
    """95 % jackknife interval of a statistic: `value` of all dialogues, `without` [groups] with one group left out."""
    deviations, groups = without - without.mean(), len(without)
    error = math.sqrt((groups - 1) / groups * (deviations**2).sum())
    return [value - 1.96 * error, value + 1.96 * error]


def paired_randomisation(differences: torch.Tensor, R: int = RANDOMISATIONS, seed: int = 0) -> float:
    """
    Two-sided p-value of paired approximate randomisation (Noreen 1989).

    That is the probability of a sum of differences at least as large if the sign of each difference were random.

    Args:
        differences: system A minus system B for each cluster (dialogue), [C].
        R: number of random sign assignments.
        seed: of these assignments.

    Returns:
        (1 + assignments at least as extreme) / (1 + R).

    Raises:
        ValueError: if there are no differences.
    """
    if not len(differences):
        raise ValueError("There are no differences to test.")
    differences = differences.double().cpu()
    observed = differences.sum().abs() * (1 - 1e-9)  # ties may differ by rounding
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for rows in torch.arange(R).split(CHUNK):
        signs = torch.randint(2, (len(rows), len(differences)), generator=generator).double() * 2 - 1
        extreme += int(((signs @ differences).abs() >= observed).sum())
    return (1 + extreme) / (1 + R)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple comparisons (Holm 1979), in their order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Spearman's correlation of two vectors [c], with ties at their mean rank; `None` if one is constant."""
    ranks = torch.stack([(v[:, None] > v).sum(1) - (v[:, None] < v).sum(1) for v in (x, y)]).double()  # [2, c]
    return torch.corrcoef(ranks)[0, 1].item() if ranks.any(1).all() else None


def number_labels(labels: Iterable[Hashable]) -> torch.Tensor:
    """Labels as integers in order of first appearance, [N], int64."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels])


__all__ = [
    "RANDOMISATIONS",
    "bootstrap_counts",
    "bootstrap_interval",
    "holm",
    "jackknife_interval",
    "leave_groups_out",
    "number_labels",
    "paired_randomisation",
    "rank_correlation",
]
