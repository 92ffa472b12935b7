"""Where the noise of a mean comes from: items, repeated samples of an item, clusters of items.

`contrast` is the one piece of algebra behind every difference of this room: a weighted sum of cell means with the
cluster-robust variance, which is the paired test where the cells share items and the unpaired one where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moonbase.evals.statistics.distributions import critical, t_two_sided
from moonbase.evals.statistics.intervals import clustered_mean, codes_of, observed


@dataclass(frozen=True)
class TwoLevel:
    """Miller 2024 §3: Var(mean) = (variance between items + variance within items / samples) / items."""

    mean: float | None
    between: float | None
    """Variance of the items' true scores: what more items help against."""
    within: float | None
    """Mean variance of repeated samples of one item: what more samples help against. None: one sample each."""
    standard_error: float | None
    items: int
    samples: float
    """Samples per item; the harmonic-like n0 of the analysis of variance where items differ in it."""
    missing: int = 0

    def standard_error_at(self, items: int, samples: float) -> float | None:
        """What the standard error would be with other numbers of items and samples."""
        if self.between is None or self.within is None:
            return None
        return math.sqrt((self.between + self.within / samples) / items)


def two_level(values: np.ndarray, items: np.ndarray) -> TwoLevel:
    """Components of variance by one-way analysis of variance (Searle, Casella & McCulloch 1992 §3.6).

    values, items: (n,); NaN values are counted in `missing`. A negative component is reported as 0.
    """
    there, kept = observed(values)
    missing = len(there) - len(kept)
    if not len(kept):
        return TwoLevel(None, None, None, None, 0, 0.0, missing)
    groups, count = codes_of(np.asarray(items)[there])
    n, sizes = len(kept), np.bincount(groups).astype(float)
    means = np.bincount(groups, kept) / sizes
    mean = float(kept.mean())
    error = clustered_mean(kept, groups).standard_error
    if count < 2:
        return TwoLevel(mean, None, None, error, count, n / count, missing)
    samples = float((n - (sizes @ sizes) / n) / (count - 1))
    between_square = float(sizes @ (means - mean) ** 2) / (count - 1)
    if n == count:
        return TwoLevel(mean, between_square, None, error, count, 1.0, missing)
    within = float(((kept - means[groups]) ** 2).sum()) / (n - count)
    return TwoLevel(mean, max((between_square - within) / samples, 0.0), within, error, count, samples, missing)


def design_effect(values: np.ndarray, clusters: np.ndarray) -> float | None:
    """Clustered variance of the mean over the variance as if values were independent (Kish 1965 §8.2).

    None where there is no variance to speak of. 49 items asked 10 times each are worth 490 / design effect items.
    """
    kept = observed(values)[1]
    clustered = clustered_mean(values, clusters).standard_error
    plain = clustered_mean(values, np.arange(len(np.asarray(values)))).standard_error
    if not len(kept) or not plain or clustered is None:
        return None
    return (clustered / plain) ** 2


@dataclass(frozen=True)
class Contrast:
    value: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    p_value: float | None
    """Two-sided, of no difference."""
    n: int
    clusters: int
    degrees: float
    means: tuple[float | None, ...]
    missing: int
    method: str


def contrast(values: np.ndarray, cells: np.ndarray, clusters: np.ndarray, weights: Sequence[float],
             confidence: float = 0.95, span: float | None = None) -> Contrast:
    """Σ_c weights[c] · mean of cell c, with the cluster-robust variance of that sum.

    values (n,), cells (n,) numbers from 0, clusters (n,) of any kind. Each value pulls on the sum by
    u_i = w_c (x_i - mean_c) / n_c, and Var = G/(G-1) · Σ_g (Σ_{i in g} u_i)² (the linearised variance of a sum of
    ratios, Liang & Zeger 1986). With weights 1, -1 and one value a side for every cluster this is the paired
    t-test to the last digit; with cells that share no cluster it is Welch's up to the factor. `span`: the distance
    between the smallest and largest possible value; with it, an interval is given even where no cluster differs.
    """
    there, kept = observed(values)
    missing = len(there) - len(kept)
    cell, weight = np.asarray(cells)[there], np.asarray(weights, float)
    sizes = np.bincount(cell, minlength=len(weight)).astype(float)
    sums = np.bincount(cell, kept, len(weight))
    means = tuple(float(total / size) if size else None for total, size in zip(sums, sizes, strict=True))
    if any(mean is None and part for mean, part in zip(means, weight, strict=True)):
        return Contrast(None, None, None, None, None, len(kept), 0, 0.0, means, missing, "a side has no observation")
    value = float(sum(part * mean for part, mean in zip(weight, means, strict=True) if part))
    groups, count = codes_of(np.asarray(clusters)[there])
    pull = weight[cell] * (kept - np.array([mean or 0.0 for mean in means])[cell]) / sizes[cell]
    totals = np.bincount(groups, pull, count)
    degrees = float(max(count - 1, 1))
    if count < 2:
        return Contrast(value, None, None, None, None, len(kept), count, degrees, means, missing,
                        "one cluster has no variance")
    error = math.sqrt(count / (count - 1) * float(totals @ totals))
    if error <= 1e-12 * max((abs(mean) for mean in means if mean is not None), default=0.0):
        if span is None:
            return Contrast(value, None, None, 0.0, None, len(kept), count, degrees, means, missing,
                            "no cluster differs from another: no variance")
        # Of G clusters none was otherwise, so at most this share of all clusters is; each moves the sum by a span.
        share = 1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / count)
        reach = share * (span * float(np.abs(weight).sum()) / 2.0 + abs(value))
        return Contrast(value, value - reach, value + reach, 0.0, 1.0 if value == 0.0 else None, len(kept), count,
                        degrees, means, missing, "bound on the share of other clusters")
    half = critical(confidence, degrees) * error
    return Contrast(value, value - half, value + half, error, t_two_sided(value / error, degrees), len(kept), count,
                    degrees, means, missing, "t, cluster-robust")
