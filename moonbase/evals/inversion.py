"""P-values that are read off intervals: the smallest α at which the interval decides.

A verdict made this way never contradicts the interval that is printed beside it: of Wilson's it is the score test, of
Student's the t-test, of Newcombe's what no textbook has a name for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from moonbase.errors import UserError
from moonbase.evals.figures import Figure, compute
from moonbase.evals.statistics import newcombe_paired
from moonbase.evals.statistics.distributions import critical
from moonbase.evals.table import Table

Interval = Callable[[float], tuple[float, float] | None]
"""Ends of an interval at a confidence; None where there is none."""
WIDEST = 1e-12
"""The smallest α that is looked at, and thus the smallest p-value."""


def interval_at(figure: Figure, confidence: float) -> tuple[float, float] | None:
    """The figure's own interval at another confidence; None where it has none."""
    details, value = figure.details, figure.value
    if value is None or figure.low is None:
        return None
    if figure.method.startswith("Newcombe, paired"):
        one, two = int(details["only_first"]), int(details["only_second"])
        both = round(details["first"] * figure.n) - one
        found = newcombe_paired(both, one, two, figure.n - both - one - two, confidence)
        return found.low, found.high
    if figure.standard_error:
        half = critical(confidence, float(details.get("degrees") or max(figure.clusters - 1, 1)))
        return value - half * figure.standard_error, value + half * figure.standard_error
    if figure.unit == "points" and figure.clusters > 1:
        differs = figure.spec.function == "difference_in_differences"
        reach = 4.0 if differs and "second" in figure.spec.params else 2.0 if differs else 1.0
        half = (1.0 - ((1.0 - confidence) / 2.0) ** (1.0 / figure.clusters)) * (reach + abs(value))
        return value - half, value + half
    return None


def smallest_alpha(figure: Figure, sign: float, margin: float, both_sides: bool,
                   interval: Interval | None = None) -> float | None:
    """P-value of non-inferiority (or equivalence): the smallest α at which the 1 - 2α interval keeps the margin.

    For Student's intervals this is the p-value of the one-sided test(s); for Newcombe's it is its inversion, which
    stays honest where no pair disagrees. `interval`: where another than the figure's own is meant. None: it has none.
    """
    ends_at = interval or partial(interval_at, figure)

    def kept(alpha: float) -> bool | None:
        ends = ends_at(1.0 - 2.0 * alpha)
        if ends is None:
            return None
        low, high = ends if sign > 0 else (-ends[1], -ends[0])
        return low > -margin and (high < margin or not both_sides)

    return smallest_that(kept, 0.4999)


def smallest_that(holds: Callable[[float], bool | None], most: float) -> float | None:
    """The smallest α up to `most` for which something holds that holds for all larger ones; 1 where it never does.

    `holds` may be None from some α on: the narrow intervals of a corrected rate may lie outside of [0, 1], and are
    none. The search begins at the largest α that has an answer; None where none has.
    """
    if holds(most) is None:
        if holds(WIDEST) is None:
            return None
        most = edge(lambda alpha: holds(alpha) is None, WIDEST, most)[0]
    if not holds(most):
        return 1.0
    return WIDEST if holds(WIDEST) else edge(lambda alpha: bool(holds(alpha)), WIDEST, most)[1]


def edge(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Two neighbours, a billionth apart: at the first it does not hold, as at `low`; at the other it does, as at
    `high`."""
    while high > low * (1.0 + 1e-9):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def against_reference(figure: Figure, table: Table) -> tuple[Figure, Interval | None]:
    """A rate with `params.reference` as the difference from it, and its interval at any confidence; others as they are.

    The p-value is the smallest α at which the figure's own 1 - α interval leaves the reference out, so the verdict
    never contradicts the interval that is printed: of Wilson's it is the score test, of Student's the t-test. Raises
    UserError for a reference that is no number, or of a figure that is no rate or mean.
    """
    spec, reference = figure.spec, figure.spec.params.get("reference")
    if reference is None:
        return figure, None
    if isinstance(reference, bool) or not isinstance(reference, int | float) or not math.isfinite(reference):
        raise UserError(f"hypothesis figure {spec.id!r}: reference {reference!r} is no number")
    if spec.function not in ("mean", "corrected_rate"):
        raise UserError(f"hypothesis figure {spec.id!r}: a reference belongs to mean or corrected_rate, "
                        f"not to {spec.function}")

    def interval(confidence: float) -> tuple[float, float] | None:
        found = compute(replace(spec, params=spec.params | {"confidence": confidence}), table)
        return None if found.low is None or found.high is None else (found.low - reference, found.high - reference)

    def left_out(alpha: float) -> bool | None:
        ends = interval(1.0 - alpha)
        return None if ends is None else ends[0] > 0.0 or ends[1] < 0.0

    if figure.value is None or figure.low is None or figure.high is None:
        return figure, interval
    return figure.model_copy(update={
        "value": figure.value - reference, "low": figure.low - reference, "high": figure.high - reference,
        "p_value": smallest_that(left_out, 1.0 - 1e-6), "note": f"against {reference}; {figure.text}"}), interval
