"""A rate that an imperfect judge counted, corrected by the errors it makes on labels that people gave."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moonbase.evals.statistics.distributions import critical


@dataclass(frozen=True)
class Corrected:
    value: float | None
    """Within [0, 1]; None: the judge is no better than chance, or its errors cannot be those on these answers."""
    low: float | None
    high: float | None
    standard_error: float | None
    sensitivity: float
    specificity: float
    clipped: bool
    """The formula left [0, 1]: the judge's error rates do not fit this sample well."""
    method: str = "Rogan-Gladen, Lang-Reiczigel"


def corrected_rate(rate: float, effective_n: float, true_positives: int, positives: int, true_negatives: int,
                   negatives: int, confidence: float = 0.95) -> Corrected:
    """(rate + specificity - 1) / (sensitivity + specificity - 1) (Rogan & Gladen 1978).

    rate: share that the judge called positive, of `effective_n` answers (the design effect taken out); the other
    counts are the judge's on human labels. The interval is that of Lang & Reiczigel 2014: pseudo-observations
    on all three rates, and a shift, so that it covers for small calibration sets and for rates near 0 and 1.
    """
    if min(positives, negatives) < 1:
        raise ValueError("both kinds of answers are needed among the human labels")
    sensitivity, specificity = true_positives / positives, true_negatives / negatives
    youden = sensitivity + specificity - 1
    if youden <= 0 or effective_n <= 0:
        return Corrected(None, None, None, None, sensitivity, specificity, False, "the judge is no better than chance")
    z = critical(confidence)
    raw = (rate + specificity - 1) / youden
    value = min(max(raw, 0.0), 1.0)
    # Agresti-Coull style: z²/2 successes and failures on the rate, one of each on the judge's.
    n = effective_n + z * z
    rate_ = (effective_n * rate + z * z / 2) / n
    sensitivity_ = (positives * sensitivity + 1) / (positives + 2)
    specificity_ = (negatives * specificity + 1) / (negatives + 2)
    youden_ = sensitivity_ + specificity_ - 1
    if youden_ <= 0:
        return Corrected(value, 0.0, 1.0, None, sensitivity, specificity, not 0 <= raw <= 1)
    prevalence = (rate_ + specificity_ - 1) / youden_
    part_sensitivity = sensitivity_ * (1 - sensitivity_) / (positives + 2)
    part_specificity = specificity_ * (1 - specificity_) / (negatives + 2)
    variance = (rate_ * (1 - rate_) / n + prevalence**2 * part_sensitivity
                + (1 - prevalence) ** 2 * part_specificity) / youden_**2
    shift = 2 * z * z * (prevalence * part_sensitivity - (1 - prevalence) * part_specificity)
    error = math.sqrt(max(variance, 0.0))
    if prevalence + shift + z * error < 0 or prevalence + shift - z * error > 1:
        return Corrected(None, None, None, None, sensitivity, specificity, True,
                         "the judge's errors on human labels do not fit these answers")
    low = min(max(prevalence + shift - z * error, 0.0), 1.0)
    high = min(max(prevalence + shift + z * error, 0.0), 1.0)
    return Corrected(value, min(low, value), max(high, value), error, sensitivity, specificity, not 0 <= raw <= 1)
