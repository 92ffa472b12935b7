"""Several tries at an item: solved at least once, solved every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Repeated:
    values_I: np.ndarray
    """One estimate an item; NaN for an item with fewer than k tries."""
    too_few: int
    """Items with fewer than k tries."""


def _checked(correct: np.ndarray, tries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    correct, tries = np.asarray(correct, float), np.asarray(tries, float)
    if k < 1 or (correct < 0).any() or (correct > tries).any():
        raise ValueError("k is at least 1 and no item is solved more often than it was tried")
    return correct, tries


def _all_drawn_from(part: np.ndarray, whole: np.ndarray, k: int) -> np.ndarray:
    """C(part, k) / C(whole, k) as a product, which does not overflow; 0 where part < k."""
    steps = np.arange(k, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(part[:, None] - steps, 0.0) / (whole[:, None] - steps)
    return ratio.prod(axis=1)


def pass_at_k(correct: np.ndarray, tries: np.ndarray, k: int) -> Repeated:
    """Chance that at least one of k tries is right, without bias: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021).

    correct, tries: (items,) counts.
    """
    correct, tries = _checked(correct, tries, k)
    values = 1.0 - _all_drawn_from(tries - correct, tries, k)
    values[tries < k] = np.nan
    return Repeated(values, int((tries < k).sum()))


def pass_hat_k(correct: np.ndarray, tries: np.ndarray, k: int) -> Repeated:
    """Chance that all of k tries are right, without bias: C(c, k) / C(n, k) (Yao et al. 2024, τ-bench,)."""
    correct, tries = _checked(correct, tries, k)
    values = _all_drawn_from(correct, tries, k)
    values[tries < k] = np.nan
    return Repeated(values, int((tries < k).sum()))
