"""Several tests at once. A test without a p-value is a test all the same: it counts as 1 and stays None."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _as_array(p_values: Sequence[float | None]) -> np.ndarray:
    values = np.array([1.0 if value is None or np.isnan(value) else value for value in p_values], float)
    if len(values) and (values.min() < 0 or values.max() > 1):
        raise ValueError("p-values lie between 0 and 1")
    return values


def _back(adjusted: np.ndarray, p_values: Sequence[float | None]) -> list[float | None]:
    return [None if given is None or np.isnan(given) else float(value)
            for value, given in zip(adjusted, p_values, strict=True)]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values that hold the chance of any false alarm at α (Holm 1979): step down, m, m-1, ..."""
    values = _as_array(p_values)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return _back(adjusted, p_values)


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values that hold the expected share of false alarms at α (Benjamini & Hochberg 1995): step up."""
    values = _as_array(p_values)
    order = np.argsort(values, kind="stable")
    number = len(values)
    stepped = np.minimum.accumulate((values[order] * number / np.arange(1, number + 1))[::-1])[::-1]
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return _back(adjusted, p_values)
