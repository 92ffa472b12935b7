"""Two answers to the same items: the difference within the item, which needs far fewer items than two averages do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moonbase.evals.statistics.intervals import is_binary, newcombe_paired
from moonbase.evals.statistics.variance import contrast


@dataclass(frozen=True)
class Paired:
    first: float | None
    second: float | None
    """Means over the pairs."""
    difference: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    unpaired_standard_error: float | None
    """What it would be if other items had been asked on each side."""
    p_value: float | None
    n: int
    """Pairs with a value on both sides."""
    clusters: int
    only_first: int | None
    only_second: int | None
    """Pairs in which just one side is 1; None where values are not 0 and 1."""
    missing_first: int
    missing_second: int
    """Pairs that a missing value kept out, by side; both where both are missing."""
    degrees: float
    method: str


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: the discordant pairs fall to either side with probability 1/2.

    McNemar 1947; min(1, 2 · P[Binomial(b + c, 1/2) ≤ min(b, c)]).
    """
    if only_first < 0 or only_second < 0:
        raise ValueError("counts of pairs are not negative")
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2.0 * float(bdtr(min(only_first, only_second), discordant, 0.5)))


def paired_difference(first: np.ndarray, second: np.ndarray, clusters: np.ndarray | None = None,
                      confidence: float = 0.95, span: float | None = 1.0) -> Paired:
    """First minus second over pairs; first, second (n,), NaN where missing; clusters (n,) of pairs that go together.

    Standard error: s_d / √n, or cluster-robust. Values that are all 0 or 1, each pair its own cluster: Newcombe's
    paired interval and McNemar's exact p-value; else Student's t. `span`: see `contrast`; None for unbounded values.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape[0]} values on one side, {second.shape[0]} on the other")
    there_first, there_second = np.isfinite(first), np.isfinite(second)
    there = there_first & there_second
    missing = int((~there_first).sum()), int((~there_second).sum())
    one, two = first[there], second[there]
    n = len(one)
    if not n:
        return Paired(None, None, None, None, None, None, None, None, 0, 0, None, None, *missing, 0.0, "no pair")
    own = clusters is None
    groups = np.arange(n) if clusters is None else np.asarray(clusters)[there]
    own = own or len(np.unique(groups)) == n
    result = contrast(np.concatenate([one, two]), np.repeat([0, 1], n), np.concatenate([groups, groups]), (1.0, -1.0),
                      confidence, span)
    unpaired = math.sqrt((float(one.var()) + float(two.var())) / n)
    binary = is_binary(one) and is_binary(two)
    only_first = int(((one == 1) & (two == 0)).sum()) if binary else None
    only_second = int(((one == 0) & (two == 1)).sum()) if binary else None
    low, high, p_value, method = result.low, result.high, result.p_value, result.method
    if own:
        method = method.replace("t, cluster-robust", "t, paired")
    if binary and own:
        both = int(((one == 1) & (two == 1)).sum())
        score = newcombe_paired(both, only_first, only_second, n - both - only_first - only_second, confidence)
        low, high, method = score.low, score.high, "Newcombe, paired; McNemar, exact"
        p_value = mcnemar_exact(only_first, only_second)
    return Paired(float(one.mean()), float(two.mean()), result.value, low, high, result.standard_error, unpaired,
                  p_value, n, result.clusters, only_first, only_second, *missing, result.degrees, method)
