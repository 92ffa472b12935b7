"""Quantiles and tails of the few distributions that are needed.

From scipy.special: scipy.stats takes a second to load.
"""

from __future__ import annotations

import math


def normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def normal_below(value: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(value))


def t_quantile(probability: float, degrees: float) -> float:
    """Student's t; infinitely many degrees of freedom are the normal distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability)) if math.isfinite(degrees) else normal_quantile(probability)


def t_below(value: float, degrees: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(degrees, value)) if math.isfinite(degrees) else normal_below(value)


def t_two_sided(statistic: float, degrees: float) -> float:
    """Probability of a statistic at least as far from 0, on either side."""
    return min(1.0, 2.0 * t_below(-abs(statistic), degrees))


def critical(confidence: float, degrees: float = math.inf) -> float:
    """The quantile of a two-sided interval: 1.96 for 0.95 and many degrees of freedom."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    return t_quantile(0.5 + confidence / 2.0, degrees)
