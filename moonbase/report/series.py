"""Thinning and smoothing of curves, so that a run of a million steps still makes a small page.

All arrays are one-dimensional NumPy arrays of equal length; a NaN is a value that was not recorded or not finite.
"""

from __future__ import annotations

import numpy as np

MAX_POINTS = 600


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points that keep the first, the last and, of every stretch, the lowest and highest value.

    A spike of a single step therefore survives. A stretch without any finite value leaves one NaN: a gap in the line.
    """
    assert len(x) == len(y) and limit >= 4
    if len(x) <= limit:
        return x, y
    kept = [0]
    for stretch in np.array_split(np.arange(1, len(x) - 1), (limit - 2) // 2):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite) == 0:
            kept.append(int(stretch[0]))
            continue
        kept.extend(sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}))
    kept.append(len(x) - 1)
    return x[kept], y[kept]


def smooth(y: np.ndarray, half_window: int | None = None) -> np.ndarray:
    """Centred moving average over the finite values; the window shrinks towards both ends, so that they do not lag.

    The default window is about a fortieth of the run. A gap shorter than the window is bridged.
    """
    n = len(y)
    if half_window is None:
        half_window = max(2, n // 80)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(n)
    reach = np.minimum(half_window, np.minimum(index, n - 1 - index))
    total = sums[index + reach + 1] - sums[index - reach]
    number = counts[index + reach + 1] - counts[index - reach]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def bin_max(values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest value of each of at most `columns` stretches of equal length.

    `values` is [steps, layers]; returns (first index of each stretch [columns], maxima [columns, layers], NaN where a
    stretch has no finite value).
    """
    stretches = np.array_split(np.arange(len(values)), max(1, min(columns, len(values))))
    filled = np.where(np.isfinite(values), values, -np.inf)
    maxima = np.stack([filled[stretch].max(axis=0) for stretch in stretches])
    return np.array([stretch[0] for stretch in stretches]), np.where(np.isinf(maxima), np.nan, maxima)


def first_finite(y: np.ndarray) -> int | None:
    """Index of the first finite value."""
    index = np.flatnonzero(np.isfinite(y))
    return int(index[0]) if len(index) else None


def last_finite(y: np.ndarray) -> int | None:
    """Index of the last finite value."""
    index = np.flatnonzero(np.isfinite(y))
    return int(index[-1]) if len(index) else None
