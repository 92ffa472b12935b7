"""How often a member of the panel is wrong, on human labels, and a rate corrected for it, with its variance.

A judge that calls a share r of the answers refusals is right about refusals with probability Se (sensitivity) and about
the others with Sp (specificity). Then r = π Se + (1 − π)(1 − Sp), and π̂ = (r + Sp − 1) / (Se + Sp − 1) (Rogan & Gladen
1978). Se and Sp are themselves estimated, on human labels; the delta method adds their variances:

    Var π̂ = [ r(1 − r)/n + π̂² Se(1 − Se)/n₊ + (1 − π̂)² Sp(1 − Sp)/n₋ ] / (Se + Sp − 1)²

Two assumptions, which a report has to carry along: that the errors on the human-labelled answers are those on the
answers at hand (other models, other questions), and that answers are independent given their label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

PUBLISHED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Confusion:
    """Counts on answers that have both a human label and a member's. Positive: the named kind of label."""

    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int
    abstained: int
    """Answers on which the member said nothing; in none of the other counts."""

    @property
    def positives(self) -> int:
        return self.true_positives + self.false_negatives

    @property
    def negatives(self) -> int:
        return self.true_negatives + self.false_positives

    @property
    def sensitivity(self) -> float | None:
        return self.true_positives / self.positives if self.positives else None

    @property
    def specificity(self) -> float | None:
        return self.true_negatives / self.negatives if self.negatives else None

    def counts(self) -> dict[str, int]:
        """As the figure `corrected_rate` takes them."""
        return {"true_positives": self.true_positives, "positives": self.positives,
                "true_negatives": self.true_negatives, "negatives": self.negatives}


def confusion(human: Sequence[str], given: Sequence[str | None], positive: Sequence[str] = ("refusal", "api_block")
              ) -> Confusion:
    """Counts of `given` against `human`; `positive`: the labels that count as the event."""
    pairs = [(truth in positive, label in positive) for truth, label in zip(human, given, strict=True)
             if label is not None]
    return Confusion(
        true_positives=sum(truth and said for truth, said in pairs),
        false_negatives=sum(truth and not said for truth, said in pairs),
        true_negatives=sum(not truth and not said for truth, said in pairs),
        false_positives=sum(not truth and said for truth, said in pairs), abstained=len(human) - len(pairs))


def matrix(human: Sequence[str], given: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """human label -> member's label -> count; an abstention is counted as "abstained"."""
    table: dict[str, dict[str, int]] = {}
    for truth, label in zip(human, given, strict=True):
        row = table.setdefault(truth, {})
        row[label or "abstained"] = row.get(label or "abstained", 0) + 1
    return table


@dataclass(frozen=True)
class CorrectedRate:
    """value, low and high lie in [0, 1]; `clipped` says that the formula itself did not, `unclipped` what it gave."""

    value: float | None
    low: float | None
    high: float | None
    variance: float | None
    unclipped: float | None
    clipped: bool
    note: str


def rogan_gladen(positive: int, n: int, errors: Confusion, confidence: float = 0.95) -> CorrectedRate:
    """The rate of refusals when the member called `positive` of `n` answers refusals. None where nothing can be said.

    The interval is the delta method's. Near 0 and 1, and with few human labels, it is too narrow: there the figures of
    reports use the Lang-Reiczigel interval of `statistics.corrected_rate`, which has the same estimate.
    """
    sensitivity, specificity = errors.sensitivity, errors.specificity
    if n <= 0 or sensitivity is None or specificity is None:
        return CorrectedRate(None, None, None, None, None, False, "no answers, or human labels of one kind only")
    youden = sensitivity + specificity - 1
    if youden <= 0:
        return CorrectedRate(None, None, None, None, None, False, "the member is no better than chance")
    rate = positive / n
    raw = (rate + specificity - 1) / youden
    variance = (rate * (1 - rate) / n + raw**2 * sensitivity * (1 - sensitivity) / errors.positives
                + (1 - raw) ** 2 * specificity * (1 - specificity) / errors.negatives) / youden**2
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance)
    value, low, high = (min(max(bound, 0.0), 1.0) for bound in (raw, raw - half, raw + half))
    clipped = not 0 <= raw <= 1
    note = "clipped to [0, 1]: the error rates do not fit these answers" if clipped else ""
    return CorrectedRate(value, low, high, variance, raw, clipped, note)


def published_counts(language: str, judges: Sequence[str] = ("rules",)) -> dict[str, int] | None:
    """The errors of a panel on human labels it was not tuned on, for "refused"; None: they have not been measured.

    In English the rules alone have been; the Chinese answers at hand have labels of machines only.
    """
    measured: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    found = measured["panels"].get("+".join(sorted(judges)), {}).get(language)
    return dict(found["counts"]) if found else None
