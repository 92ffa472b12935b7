"""Showing that nothing (much) changed: a difference that is not significant shows nothing of the kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moonbase.evals.statistics.distributions import critical, t_below


@dataclass(frozen=True)
class Equivalence:
    p_value: float
    """Of the claim's opposite: small means the claim is shown."""
    shown: bool
    low: float
    high: float
    """The interval that decides: at confidence 1 - 2α, inside ±margin exactly when the claim is shown."""
    margin: float
    method: str


def _tail(distance: float, standard_error: float, degrees: float) -> float:
    """P-value of a true distance of 0 or less."""
    if standard_error == 0.0:
        return 0.0 if distance > 0 else 1.0
    return t_below(-distance / standard_error, degrees)


def _check(standard_error: float, margin: float) -> None:
    if margin <= 0 or standard_error < 0 or not math.isfinite(standard_error):
        raise ValueError("a margin is positive and a standard error is finite and not negative")


def tost(difference: float, standard_error: float, margin: float, alpha: float = 0.05,
         degrees: float = math.inf) -> Equivalence:
    """Two one-sided tests (Schuirmann 1987): the true difference lies within ±margin."""
    _check(standard_error, margin)
    p_value = max(_tail(margin + difference, standard_error, degrees), _tail(margin - difference, standard_error,
                                                                             degrees))
    half = critical(1 - 2 * alpha, degrees) * standard_error
    return Equivalence(p_value, p_value <= alpha, difference - half, difference + half, margin, "TOST")


def non_inferiority(difference: float, standard_error: float, margin: float, alpha: float = 0.05,
                    degrees: float = math.inf) -> Equivalence:
    """One one-sided test: the true difference is above -margin, more being better."""
    _check(standard_error, margin)
    p_value = _tail(margin + difference, standard_error, degrees)
    half = critical(1 - 2 * alpha, degrees) * standard_error
    return Equivalence(p_value, p_value <= alpha, difference - half, difference + half, margin, "non-inferiority")
