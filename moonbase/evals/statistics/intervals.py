"""Intervals for rates, means and differences of two rates.

Rates near 0 and 1 are where evaluations end up, and there the textbook interval (estimate ± 1.96 standard errors) is
empty or leaves [0, 1]. Wilson's does neither (Brown, Cai & DasGupta 2001 recommend it, and Jeffreys' for small n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moonbase.evals.statistics.distributions import critical


@dataclass(frozen=True)
class Interval:
    value: float | None
    """None: nothing was observed."""
    low: float | None
    high: float | None
    """None: an interval cannot be computed from these observations, and `method` says why."""
    n: int
    clusters: int
    method: str
    standard_error: float | None = None
    degrees: float = math.inf
    missing: int = 0
    """Values that were NaN: counted here, not part of `n`."""
    effective_n: float | None = None


def wilson(events: float, n: float, confidence: float = 0.95) -> Interval:
    """Score interval of a rate (Wilson 1927). `events` and `n` may be fractions: an effective sample size.

    Raises ValueError unless 0 <= events <= n.
    """
    if not 0 <= events <= n:
        raise ValueError(f"{events} events of {n}")
    if n == 0:
        return Interval(None, None, None, 0, 0, "Wilson: no observation")
    z = critical(confidence)
    rate = events / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the formula gives 0 and 1 up to rounding; say so exactly.
    low = 0.0 if events == 0 else min(max(centre - half, 0.0), rate)
    high = 1.0 if events == n else max(min(centre + half, 1.0), rate)
    return Interval(rate, low, high, math.floor(n), math.floor(n), "Wilson", math.sqrt(rate * (1 - rate) / n),
                    effective_n=n)


def beta_interval(events: int, n: int, confidence: float = 0.95, prior: float = 0.5) -> Interval:
    """Equal-tailed interval of the Beta(events + prior, n - events + prior) posterior; `prior` 0.5 is Jeffreys'.

    The end at an extreme is set to it, as Brown, Cai & DasGupta 2001 §4.1.2 advise: the interval holds the estimate.
    For few observations (below about 40), where Wilson's is too short next to 0 and 1.
    """
    from scipy.special import betaincinv

    if not 0 <= events <= n:
        raise ValueError(f"{events} events of {n}")
    if n == 0:
        return Interval(None, None, None, 0, 0, "Beta: no observation")
    tail = (1.0 - confidence) / 2.0
    first, second = events + prior, n - events + prior
    low = 0.0 if events == 0 else float(betaincinv(first, second, tail))
    high = 1.0 if events == n else float(betaincinv(first, second, 1.0 - tail))
    rate = events / n
    name = "Beta (Jeffreys)" if prior == 0.5 else f"Beta({prior})"
    return Interval(rate, min(low, rate), max(high, rate), n, n, name, math.sqrt(rate * (1 - rate) / n))


def observed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which values are there, and those values as floats. Infinity is no score either."""
    values = np.asarray(values, float)
    there = np.isfinite(values)
    return there, values[there]


def codes_of(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels of any kind as integers from 0 in sorted order, and how many differ."""
    distinct, codes = np.unique(np.asarray(labels), return_inverse=True)
    return codes.reshape(-1), len(distinct)


def is_binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean of independent values."""
    return clustered_mean(values, np.arange(len(values)), confidence)


def clustered_mean(values: np.ndarray, clusters: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean with the cluster-robust standard error (Liang & Zeger 1986; Miller 2024), t with clusters - 1.

    Var = G/(G-1) · Σ_g (Σ_{i in g} (x_i - mean))² / n²; the factor makes it s²/n where every cluster is one value.
    """
    there, kept = observed(values)
    missing = len(there) - len(kept)
    if not len(kept):
        return Interval(None, None, None, 0, 0, "no observation", missing=missing)
    groups, count = codes_of(np.asarray(clusters)[there])
    mean = float(kept.mean())
    method = "t, clustered" if count < len(kept) else "t"
    if count < 2:
        return Interval(mean, None, None, len(kept), count, f"{method}: one cluster has no variance", missing=missing)
    sums = np.bincount(groups, kept - mean, count)
    error = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(kept)
    half = critical(confidence, count - 1) * error
    # What rounding leaves of nothing is nothing.
    if error <= 1e-12 * abs(mean):
        return Interval(mean, None, None, len(kept), count, f"{method}: all values are equal", 0.0, count - 1, missing)
    return Interval(mean, mean - half, mean + half, len(kept), count, method, error, count - 1, missing)


def clustered_interval(values: np.ndarray, clusters: np.ndarray | None = None, confidence: float = 0.95) -> Interval:
    """Interval of a rate or a mean whose values come in clusters. NaN values are counted in `missing`.

    Rates (all values 0 or 1): Wilson's interval at the effective sample size p(1-p)/Var, scaled by (z/t)² for the few
    clusters that the variance is estimated from, and never above n (Korn & Graubard 1998; Dean & Pacheco 2014). Where
    no variance is seen (all 0 or all 1), a cluster counts as one observation: the safe end. Means of values within
    [0, 1] that are all equal: the same, for the share of clusters that could differ. Other means: `clustered_mean`.
    """
    values = np.asarray(values, float)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    plain = clustered_mean(values, clusters, confidence)
    kept = observed(values)[1]
    if plain.value is None:
        return plain
    if not is_binary(kept):
        if plain.low is None and kept.min() >= 0.0 and kept.max() <= 1.0:
            bound = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / plain.clusters)
            low, high = plain.value * (1.0 - bound), plain.value + (1.0 - plain.value) * bound
            return Interval(plain.value, low, high, plain.n, plain.clusters, "bound on the share of other clusters",
                            plain.standard_error, plain.degrees, plain.missing)
        return plain
    rate, n, count = plain.value, plain.n, plain.clusters
    events = float(kept.sum())
    if count == n:
        effective, method = float(n), "Wilson"
    elif events in (0.0, float(n)) or count < 2 or not plain.standard_error:
        # Nothing tells how alike the members of a cluster are: as if one of each had been asked.
        effective, method = float(count), "Wilson, clusters counted"
    else:
        scale = critical(confidence) / critical(confidence, count - 1)
        effective = min(float(n), rate * (1 - rate) / plain.standard_error**2 * scale**2)
        method = "Wilson, clustered"
    shape = wilson(events * (effective / n) if events < n else effective, effective, confidence)
    return Interval(rate, min(shape.low, rate), max(shape.high, rate), n, count, method, plain.standard_error,
                    max(count - 1, 1), plain.missing, effective)


def newcombe(events_1: int, n_1: int, events_2: int, n_2: int, confidence: float = 0.95) -> Interval:
    """Difference of two independent rates, first minus second (Newcombe 1998b, method 10: hybrid of Wilson's)."""
    first, second = wilson(events_1, n_1, confidence), wilson(events_2, n_2, confidence)
    if first.value is None or second.value is None:
        return Interval(None, None, None, 0, 0, "Newcombe: no observation")
    difference = first.value - second.value
    low = difference - math.hypot(first.value - first.low, second.high - second.value)
    high = difference + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(difference, max(low, -1.0), min(high, 1.0), n_1 + n_2, n_1 + n_2, "Newcombe",
                    math.hypot(first.standard_error or 0.0, second.standard_error or 0.0))


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95) -> Interval:
    """Difference of two rates on the same items, first minus second (Newcombe 1998c, method 10).

    Wilson's intervals of both rates, joined through the correlation φ with its continuity correction. Works where no
    pair disagrees, where the usual interval has no width.
    """
    n = both + only_first + only_second + neither
    if min(both, only_first, only_second, neither) < 0:
        raise ValueError("counts of pairs are not negative")
    if n == 0:
        return Interval(None, None, None, 0, 0, "Newcombe, paired: no pair")
    first, second = wilson(both + only_first, n, confidence), wilson(both + only_second, n, confidence)
    difference = (only_first - only_second) / n
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    product = both * neither - only_first * only_second
    if product > 0:
        product = max(product - n / 2.0, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2.0 * phi * one * other + other * other, 0.0))

    low = difference - distance(first.value - first.low, second.high - second.value)
    high = difference + distance(first.high - first.value, second.value - second.low)
    spread = only_first + only_second - (only_first - only_second) ** 2 / n
    error = math.sqrt(max(spread, 0.0) / (n * (n - 1))) if n > 1 else None
    return Interval(difference, max(low, -1.0), min(high, 1.0), n, n, "Newcombe, paired", error, max(n - 1, 1))
