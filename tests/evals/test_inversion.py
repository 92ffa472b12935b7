"""P-values read off intervals: a corrected rate, whose interval need not exist, against a reference, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from moonbase.evals.comparison import hypotheses_of
from moonbase.evals.figures import FigureSpec, Table, compute
from moonbase.evals.inversion import smallest_that
from moonbase.evals.statistics import corrected_rate, wilson
from moonbase.evals.suite import Hypothesis, Suite, TaskSpec
from tests.evals.figure_samples import record

ANSWERS = 60
JUDGE = {"true_positives": 209, "positives": 224, "true_negatives": 212, "negatives": 226}
GRID = np.concatenate([np.geomspace(1e-9, 0.4, 25), np.linspace(0.41, 0.999, 15)])
"""α at which intervals are looked at."""


def ends_at(refused: int, confidence: float) -> tuple[float, float] | None:
    """Straight from the statistics: Lang and Reiczigel's, no surer than Wilson's where the judge fits ill."""
    found = corrected_rate(refused / ANSWERS, ANSWERS, *JUDGE.values(), confidence)
    plain = wilson(refused, ANSWERS, confidence)
    if found.value is None:
        return None
    return (min(found.low, plain.low), max(found.high, plain.high)) if found.clipped else (found.low, found.high)


def test_a_corrected_rate_against_a_reference_is_its_own_interval_inverted() -> None:
    wide_only = 0
    for refused in (0, 1, 2, 3, 4, 5, 7, 12, 20, 55, 56, 57, 58, 60):
        table = Table.of([record(f"i{item}", label="refusal" if item < refused else "full", votes={"rules": "x"})
                          for item in range(ANSWERS)])
        figure = {"id": "f", "function": "corrected_rate", "value": "label:refusal",
                  "params": JUDGE | {"reference": 0.2}}
        suite = Suite(name="s", title="s", tasks=(TaskSpec(name="t", source="builtin:t"),), metric="refusal",
                      smallest_n=1, hypotheses=tuple(
                          Hypothesis(id=kind, statement=kind, kind=kind, margin=0.1, figure=figure)
                          for kind in ("superiority", "non_inferiority", "equivalence")))
        printed = compute(FigureSpec("f", "corrected_rate", value="label:refusal", params=JUDGE), table)
        two, above, within = hypotheses_of(suite, table)
        if ends_at(refused, 0.95) is None:
            assert printed.value is None and (two.p_value, above.p_value, within.p_value) == (None,) * 3
            continue
        assert (printed.low, printed.high) == pytest.approx(ends_at(refused, 0.95), rel=1e-9)
        wide_only += ends_at(refused, 0.0002) is None
        for alpha in GRID:
            if (ends := ends_at(refused, 1 - alpha)) is not None:
                assert (two.p_value <= alpha) == (not ends[0] <= 0.2 <= ends[1]), (refused, alpha)
            if alpha < 0.4999 and (ends := ends_at(refused, 1 - 2 * alpha)) is not None:
                assert (above.p_value <= alpha) == (ends[0] > 0.1), (refused, alpha)
                assert (within.p_value <= alpha) == (ends[0] > 0.1 and ends[1] < 0.3), (refused, alpha)
    assert wide_only >= 4


@pytest.mark.parametrize(("holds", "most", "found"), [
    (lambda alpha: alpha > 0.03, 0.5, 0.03), (lambda alpha: False, 0.5, 1.0), (lambda alpha: True, 0.5, 1e-12),
    # No answer above 0.3; what holds above 0.3 only was never seen to hold.
    (lambda alpha: None if alpha > 0.3 else alpha > 0.03, 0.5, 0.03),
    (lambda alpha: None if alpha > 0.3 else False, 0.5, 1.0), (lambda alpha: None, 0.5, None)])
def test_the_smallest_alpha(holds, most: float, found: float | None) -> None:
    assert smallest_that(holds, most) == (found if found is None else pytest.approx(found, rel=1e-8))
