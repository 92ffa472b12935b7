"""Do judges agree beyond chance? Labels are small integers; a negative number is an abstention and is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moonbase.evals.statistics.bootstrap import RESAMPLES, Draws
from moonbase.evals.statistics.distributions import critical


@dataclass(frozen=True)
class Agreement:
    value: float | None
    """None: fewer than two judges spoke on any unit, or all of them always said the same one word."""
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    """Units on which at least two judges spoke."""
    abstained: int
    """Single votes that are missing."""
    method: str


def cohen_kappa(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Agreement:
    """Two judges (Cohen 1960), with the large-sample variance of Fleiss, Cohen & Everitt 1969."""
    first, second = np.asarray(first), np.asarray(second)
    both = (first >= 0) & (second >= 0)
    abstained = int((first < 0).sum() + (second < 0).sum())
    n = int(both.sum())
    if not n:
        return Agreement(None, None, None, None, 0, abstained, "Cohen κ: no unit with two votes")
    size = int(max(first[both].max(), second[both].max())) + 1
    share = np.bincount(first[both] * size + second[both], minlength=size * size).reshape(size, size) / n
    rows, columns = share.sum(1), share.sum(0)
    agreed, chance = float(np.trace(share)), float(rows @ columns)
    if chance >= 1.0:
        return Agreement(None, None, None, None, n, abstained, "Cohen κ: only one label was used")
    kappa = (agreed - chance) / (1 - chance)
    diagonal = np.diag(share) @ ((1 - chance) - (rows + columns) * (1 - agreed)) ** 2
    cross = (columns[:, None] + rows[None, :]) ** 2
    off = (1 - agreed) ** 2 * float((share * cross).sum() - np.diag(share) @ np.diag(cross))
    variance = (float(diagonal) + off - (agreed * chance - 2 * chance + agreed) ** 2) / (n * (1 - chance) ** 4)
    # Below what rounding leaves of nothing.
    error = math.sqrt(variance) if variance > 1e-14 else 0.0
    if error == 0.0:
        return Agreement(kappa, None, None, 0.0, n, abstained, "Cohen κ: no variance")
    half = critical(confidence) * error
    return Agreement(kappa, max(kappa - half, -1.0), min(kappa + half, 1.0), error, n, abstained, "Cohen κ")


def _counts(votes_JU: np.ndarray) -> np.ndarray:
    """How many judges gave a unit each label, (units, labels)."""
    _, units = votes_JU.shape
    size = max(int(votes_JU.max(initial=-1)) + 1, 1)
    there = votes_JU >= 0
    places = (np.arange(units)[None, :] * size + votes_JU)[there]
    return np.bincount(places, minlength=units * size).reshape(units, size)


def _alpha(disagreements: np.ndarray, margins_L: np.ndarray) -> np.ndarray:
    """1 - observed over expected disagreement for nominal labels; disagreements (...), margins (..., L)."""
    total = margins_L.sum(-1)
    expected = total**2 - (margins_L**2).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 - (total - 1) * disagreements / expected


def krippendorff_alpha(votes_JU: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES,
                       confidence: float = 0.95) -> Agreement:
    """Any number of judges, some votes missing, nominal labels (Krippendorff 2019 §12.3), votes (judges, units).

    α = 1 - (n - 1) Σ_u (disagreeing ordered pairs of u / (m_u - 1)) / (n² - Σ_c n_c²). The interval resamples units.
    """
    votes_JU = np.asarray(votes_JU)
    abstained = int((votes_JU < 0).sum())
    counts_UL = _counts(votes_JU).astype(float)
    counts_UL = counts_UL[counts_UL.sum(1) >= 2]
    n = len(counts_UL)
    if not n:
        return Agreement(None, None, None, None, 0, abstained, "Krippendorff α: no unit with two votes")
    # Units with equal votes count alike, and there are few kinds of them: resample the kinds.
    kinds_KL, inverse = np.unique(counts_UL, axis=0, return_inverse=True)
    sizes = kinds_KL.sum(1)
    disagreements_K = (sizes**2 - (kinds_KL**2).sum(1)) / (sizes - 1)
    tally = np.bincount(inverse.reshape(-1), minlength=len(kinds_KL)).astype(float)
    value = float(_alpha(tally @ disagreements_K, tally @ kinds_KL))
    method = f"Krippendorff α, bootstrap over units, {resamples} resamples, seed {seed}"
    if not math.isfinite(value):
        return Agreement(None, None, None, None, n, abstained, "Krippendorff α: only one label was used")
    sorted_kinds, draws = np.sort(inverse.reshape(-1)), Draws(seed)
    estimates, step = np.empty(resamples), max(1, (1 << 21) // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = sorted_kinds[draws.below(n, rows * n)].reshape(rows, n)
        places = drawn + np.arange(rows)[:, None] * len(tally)
        tally_RK = np.bincount(places.reshape(-1), minlength=rows * len(tally)).reshape(rows, len(tally))
        estimates[start : start + rows] = _alpha(tally_RK @ disagreements_K, tally_RK @ kinds_KL)
    # A resample with one label only has no α; perfect agreement is what it shows.
    estimates = np.where(np.isfinite(estimates), estimates, 1.0)
    tail = (1.0 - confidence) / 2.0
    low, high = (float(edge) for edge in np.quantile(estimates, [tail, 1.0 - tail]))
    error = float(estimates.std(ddof=1))
    if error == 0.0:
        return Agreement(value, None, None, 0.0, n, abstained, f"{method}: no variance")
    return Agreement(value, min(low, value), max(high, value), error, n, abstained, method)


def raw_agreement(votes_JU: np.ndarray, confidence: float = 0.95) -> Agreement:
    """Share of units on which all judges that spoke (two at least) said the same, with Wilson's interval."""
    from moonbase.evals.statistics.intervals import wilson

    votes_JU = np.asarray(votes_JU)
    counts_UL = _counts(votes_JU)
    counts_UL = counts_UL[counts_UL.sum(1) >= 2]
    same = int((counts_UL.max(1) == counts_UL.sum(1)).sum()) if len(counts_UL) else 0
    shape = wilson(same, len(counts_UL), confidence)
    return Agreement(shape.value, shape.low, shape.high, shape.standard_error, len(counts_UL),
                     int((votes_JU < 0).sum()), "share that agrees, Wilson")
