"""What a comparison of this size can and cannot see, and how many items would be needed."""

from __future__ import annotations

import math

import numpy as np

from moonbase.evals.statistics.distributions import normal_below, normal_quantile


def power(difference: float, standard_deviation: float, n: int, alpha: float = 0.05) -> float:
    """Probability that a two-sided test of n differences with this spread finds a true mean of `difference`.

    Normal approximation (Cohen 1988 §2.3; Miller 2024 §5): both tails are counted. For two separate groups of n the
    spread is √(σ₁² + σ₂²).
    """
    if n < 1 or standard_deviation < 0:
        raise ValueError("n is at least 1 and a standard deviation is not negative")
    if standard_deviation == 0:
        return 1.0 if difference else alpha
    shift = abs(difference) * math.sqrt(n) / standard_deviation
    z = normal_quantile(1 - alpha / 2)
    return normal_below(shift - z) + normal_below(-shift - z)


def detectable(standard_error: float, alpha: float = 0.05, target: float = 0.8) -> float:
    """Smallest true difference that is found with probability `target`: (z_{1-α/2} + z_target) · standard error."""
    return (normal_quantile(1 - alpha / 2) + normal_quantile(target)) * standard_error


def n_needed(difference: float, standard_deviation: float, alpha: float = 0.05, target: float = 0.8) -> int:
    """Fewest differences with which `difference` is found with probability `target`. Raises ValueError for 0."""
    if difference == 0:
        raise ValueError("no number of items finds a difference of 0")
    size = (normal_quantile(1 - alpha / 2) + normal_quantile(target)) * standard_deviation / abs(difference)
    # The far tail makes the closed form at most one too many.
    n = max(1, math.ceil(min(size * size, 1e300) - 1e-9))
    # Beyond so many one less is the same floating-point number.
    while 1 < n < 2**50 and power(difference, standard_deviation, n - 1, alpha) >= target:
        n -= 1
    return n


def power_two_level(difference: float, between: float, within: float, items: int, samples: int,
                    alpha: float = 0.05) -> float:
    """`power` of paired item means: variance of the items' differences plus that of their samples over their number."""
    return power(difference, math.sqrt(between + within / samples), items, alpha)


def mcnemar_power(only_first: float, only_second: float, n: int, alpha: float = 0.05) -> float:
    """Exact power of McNemar's exact test for n pairs, of which these shares are discordant to either side.

    Sum over the number of discordant pairs and of those for the first side (Duffy 1984); no approximation.
    """
    from scipy.special import bdtr, bdtrc, gammaln

    share = only_first + only_second
    if not (only_first >= 0 and only_second >= 0 and share <= 1):
        raise ValueError("shares of discordant pairs lie between 0 and 1")
    if share == 0:
        return 0.0
    discordant = np.arange(1, n + 1, dtype=float)
    log_choose = gammaln(n + 1) - gammaln(discordant + 1) - gammaln(n - discordant + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_rest = np.where(discordant == n, 0.0, (n - discordant) * np.log1p(-share) if share < 1 else -np.inf)
    chance = np.exp(log_choose + discordant * math.log(share) + log_rest)
    total = 0.0
    for number, weight in zip(range(1, n + 1), chance, strict=True):
        if weight < 1e-14:
            continue
        counts = np.arange(number // 2 + 1, dtype=float)
        rejected = np.flatnonzero(2.0 * bdtr(counts, number, 0.5) <= alpha)
        if len(rejected):
            edge = float(rejected[-1])
            probability = only_first / share
            total += float(weight) * float(bdtr(edge, number, probability)
                                           + bdtrc(number - edge - 1, number, probability))
    return min(total, 1.0)
