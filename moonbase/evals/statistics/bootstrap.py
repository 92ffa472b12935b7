"""Bootstrap that keeps together what belongs together, from a seed that is published with the figure.

The stream of numbers is the raw output of PCG64, which numpy promises never to change (its generators' methods may),
so that a stranger with another numpy draws the same resamples.
"""

from __future__ import annotations

import numpy as np

from moonbase.evals.statistics.intervals import Interval, codes_of, observed

RESAMPLES = 2000
CHUNK = 1 << 19
"""Draws held at a time: memory does not grow with the number of resamples."""


class Draws:
    """Indices drawn from a seed, the same in every version of numpy."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def below(self, bounds: np.ndarray | int, count: int) -> np.ndarray:
        """(count,) integers from 0 to bounds - 1: the upper 32 bits of a word times the bound, shifted (Lemire 2019).

        Without his rejection step: the bias is at most bound / 2³², nothing beside the noise of a resample.
        """
        words = self.bits.random_raw(count) >> np.uint64(32)
        words *= np.asarray(bounds, np.uint64)
        words >>= np.uint64(32)
        return words.astype(np.intp)


def _resample(numerators_G: np.ndarray, denominators_G: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Σ numerators / Σ denominators of whole clusters drawn with replacement, (resamples,)."""
    draws, count = Draws(seed), len(numerators_G)
    estimates, step = np.empty(resamples), max(1, CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = draws.below(count, rows * count).reshape(rows, count)
        with np.errstate(divide="ignore", invalid="ignore"):
            estimates[start : start + rows] = numerators_G[drawn].sum(1) / denominators_G[drawn].sum(1)
    return estimates


def _resample_within(values: np.ndarray, groups: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """As `_resample`, and the members of each drawn cluster are drawn with replacement, too."""
    order = np.argsort(groups, kind="stable")
    values, sizes = values[order], np.bincount(groups)
    starts, draws, count = np.cumsum(sizes) - sizes, Draws(seed), len(sizes)
    estimates, step = np.empty(resamples), max(1, CHUNK // (4 * max(len(values), count)))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = draws.below(count, rows * count)
        lengths = sizes[drawn]
        members = np.repeat(starts[drawn], lengths) + draws.below(np.repeat(lengths, lengths), int(lengths.sum()))
        owner = np.repeat(np.repeat(np.arange(rows), count), lengths)
        estimates[start : start + rows] = np.bincount(owner, values[members], rows) / np.bincount(owner, None, rows)
    return estimates


def percentile_interval(estimates: np.ndarray, value: float, confidence: float) -> tuple[float | None, float | None]:
    """Percentile interval (Efron 1979), widened to hold the estimate; None where resamples had no value."""
    if not np.isfinite(estimates).all():
        return None, None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(estimates, [tail, 1.0 - tail])
    return min(float(low), value), max(float(high), value)


def hierarchical(values: np.ndarray, clusters: np.ndarray, *, seed: int, resamples: int = RESAMPLES,
                 confidence: float = 0.95, within: bool = False, denominators: np.ndarray | None = None) -> Interval:
    """Mean (or Σ values / Σ denominators) with a percentile interval over resampled clusters.

    values, clusters (n,); NaN values are counted in `missing`. The members of a drawn cluster stay as they are: that
    mimics the variance best (Davison & Hinkley 1997 §3.8); `within` draws them anew as well, which counts their noise
    twice and is wider. The same seed and the same clusters, in any order of rows, give the same interval.
    """
    there, kept = observed(values)
    missing = len(there) - len(kept)
    method = f"bootstrap over clusters{' and within' if within else ''}, {resamples} resamples, seed {seed}"
    if not len(kept):
        return Interval(None, None, None, 0, 0, "no observation", missing=missing)
    groups, count = codes_of(np.asarray(clusters)[there])
    below = np.ones(len(kept)) if denominators is None else np.asarray(denominators, float)[there]
    total = float(below.sum())
    if total == 0.0:
        return Interval(None, None, None, len(kept), count, f"{method}: nothing to divide by", missing=missing)
    value = float(kept.sum()) / total
    if count < 2:
        return Interval(value, None, None, len(kept), count, f"{method}: one cluster has no variance", missing=missing)
    if within:
        if denominators is not None:
            raise ValueError("ratios are resampled by whole clusters")
        kept_order = np.lexsort((kept, groups))
        estimates = _resample_within(kept[kept_order], groups[kept_order], seed, resamples)
    else:
        estimates = _resample(np.bincount(groups, kept, count), np.bincount(groups, below, count), seed, resamples)
    low, high = percentile_interval(estimates, value, confidence)
    error = float(estimates.std(ddof=1)) if low is not None else None
    if error == 0.0:
        low = high = None
        method += ": no cluster differs from another"
    return Interval(value, low, high, len(kept), count, method, error, missing=missing)
