"""The bootstrap: its published seeds, its coverage, and the correction of an imperfect judge."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moonbase.evals import statistics
from moonbase.evals.statistics.bootstrap import Draws


def test_the_stream_is_numpy_s_raw_one() -> None:
    """PCG64's raw words for seed 42, whose stream numpy guarantees; the published generator's first outputs."""
    words = np.random.PCG64(42).random_raw(1000)
    assert Draws(42).below(7, 1000).tolist() == [(int(word) >> 32) * 7 >> 32 for word in words]


def test_draws_are_uniform() -> None:
    counts = np.bincount(Draws(3).below(6, 60_000), minlength=6)
    assert abs(counts - 10_000).max() < 5 * math.sqrt(60_000 * 5 / 36)


def test_the_order_of_rows_and_the_names_of_clusters_do_not_matter() -> None:
    random = np.random.default_rng(0)
    clusters = random.integers(0, 20, 100)
    values = random.random(100)
    order = random.permutation(100)
    for within in (False, True):
        one = statistics.hierarchical(values, clusters, seed=5, within=within)
        other = statistics.hierarchical(values[order], clusters[order], seed=5, within=within)
        assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=1e-12)
    assert statistics.hierarchical(values, clusters, seed=6).low != one.low


def test_against_all_resamples() -> None:
    """Four clusters have 4⁴ resamples: their exact mean and variance are what the drawn ones approach."""
    values, clusters = np.array([0.0, 1.0, 2.0, 4.0, 4.0, 7.0]), np.array([0, 0, 1, 2, 3, 3])
    groups = [values[clusters == group] for group in range(4)]
    exact = [np.concatenate([groups[place] for place in places]).mean()
             for places in itertools.product(range(4), repeat=4)]
    found = statistics.hierarchical(values, clusters, seed=1, resamples=40_000)
    assert found.standard_error == pytest.approx(np.std(exact), rel=0.02)
    assert (found.low, found.high) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.2)


@pytest.mark.parametrize("within", [False, True])
def test_coverage(within: bool) -> None:
    """60 items, 4 samples each: whole clusters cover as promised, drawing within them too errs on the wide side."""
    random, hits = np.random.default_rng(4), 0
    items = np.repeat(np.arange(60), 4)
    for seed in range(300):
        values = (random.random(240) < random.beta(2, 2, 60)[items]).astype(float)
        found = statistics.hierarchical(values, items, seed=seed, resamples=400, within=within)
        hits += found.low <= 0.5 <= found.high
    assert (0.95 if within else 0.9) < hits / 300 <= 1.0


def test_ratio_and_missing_values() -> None:
    cost, right = np.array([1.0, 2.0, 3.0, math.nan]), np.array([1.0, 0.0, 1.0, 1.0])
    found = statistics.hierarchical(cost, np.arange(4), seed=0, denominators=right)
    assert (found.value, found.n, found.missing) == (3.0, 3, 1)
    # A resample may hold no right answer, and then there is no interval rather than an infinite one.
    assert found.low is None and found.high is None


def test_corrected_rate_covers() -> None:
    """A judge with 90% sensitivity and 95% specificity on 10% refusals, its errors known from 200 labels."""
    random, true, hits, naive = np.random.default_rng(7), 0.1, 0, 0
    for _ in range(800):
        rate = random.binomial(300, true * 0.9 + (1 - true) * 0.05) / 300
        found = statistics.corrected_rate(rate, 300, int(random.binomial(60, 0.9)), 60,
                                          int(random.binomial(140, 0.95)), 140)
        hits += found.low <= true <= found.high
        plain = statistics.wilson(round(rate * 300), 300)
        naive += plain.low <= true <= plain.high
        assert found.low <= found.value <= found.high
    assert hits / 800 > 0.93 and naive / 800 < 0.6


def test_a_perfect_judge_changes_nothing_and_a_useless_one_has_no_say() -> None:
    assert statistics.corrected_rate(0.3, 100, 50, 50, 50, 50).value == pytest.approx(0.3)
    assert statistics.corrected_rate(0.3, 100, 25, 50, 25, 50).value is None
    assert statistics.corrected_rate(0.05, 100, 45, 50, 45, 50).clipped
    # No refusal among 2,000 answers cannot be said by a judge that wrongly sees one in ten.
    assert statistics.corrected_rate(0.0, 2000, 450, 500, 450, 500).value is None
