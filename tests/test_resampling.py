"""Intervals that cover what they should, and p-values worked by hand."""

import math

import pytest
import torch

from modeling_vikdf.evaluation.statistics import bootstrap_counts, bootstrap_interval, holm, paired_randomisation


def test_interval_of_a_mean():
    values = (torch.arange(900) % 3 == 0).float()  # a third
    low, high = bootstrap_interval(values)
    error = 1.96 * math.sqrt(2 / 9 / 900)
    assert (low, high) == pytest.approx((1 / 3 - error, 1 / 3 + error), abs=0.004)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)


def test_rows_of_a_cluster_are_drawn_together():
    values, names = torch.randn(100, generator=torch.Generator().manual_seed(0)), [f"d{i}" for i in range(100)]
    alone = bootstrap_interval(values)
    assert bootstrap_interval(values.repeat(4), clusters=names * 4) == pytest.approx(alone)
    low, high = bootstrap_interval(values.repeat(4))
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.15)


def test_intervals_of_ratios_cover_what_they_should():
    """Tokens of dialogues with a mean of their own: 95 of 100 intervals should hold the true mean of all tokens."""
    generator, covered, trials = torch.Generator().manual_seed(0), 0, 300
    for trial in range(trials):
        tokens = torch.randint(1, 20, (80,), generator=generator).double()
        means = 3 + torch.randn(80, generator=generator).double()
        low, high = bootstrap_interval(tokens * means, tokens, resamples=300, seed=trial)
        covered += low <= 3 <= high
    assert 0.91 <= covered / trials <= 0.98


def test_several_ratios_at_once():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(40, 3, generator=generator), torch.rand(40, 3, generator=generator)
    weights[:, 2] = 0
    low, high = bootstrap_interval(values, weights, list(range(20)) * 2)
    for column in range(2):
        alone = bootstrap_interval(values[:, column], weights[:, column], list(range(20)) * 2)
        assert (low[column], high[column]) == pytest.approx(alone)
    assert math.isnan(low[2]) and math.isnan(high[2])
    assert bootstrap_interval(values, weights[:, 0])[0][1] == pytest.approx(
        bootstrap_interval(values[:, 1], weights[:, 0])[0]
    )


def test_chunks_are_parts_of_the_same_resamples():
    counts = list(bootstrap_counts(7, resamples=600))
    assert [len(each) for each in counts] == [250, 250, 100] and (torch.cat(counts).sum(1) == 7).all()
    assert not torch.equal(counts[0], counts[1])


def test_randomisation_worked_by_hand():
    assert paired_randomisation(torch.tensor([1.0, 1, 1, 1])) == pytest.approx(2 / 16, abs=0.01)
    # of the eight signs of (3, 1, 1), four reach |3 + 1 - 1|, two of these |5|
    assert paired_randomisation(torch.tensor([3.0, 1, -1])) == pytest.approx(6 / 8, abs=0.015)
    assert paired_randomisation(torch.zeros(5)) == 1
    assert paired_randomisation(torch.ones(60)) == 1 / 10_001
    with pytest.raises(ValueError, match="no differences"):
        paired_randomisation(torch.zeros(0))
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap_interval(torch.zeros(0))


def test_randomisation_finds_nothing_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    found = [paired_randomisation(torch.randn(30, generator=generator), R=500, seed=i) < 0.1 for i in range(300)]
    assert 0.06 <= sum(found) / len(found) <= 0.14


def test_holm_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1] and holm([]) == []
