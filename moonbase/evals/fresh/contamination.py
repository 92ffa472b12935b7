"""The contamination index: how much better a model is on public questions than on fresh twins of them.

    index = mean over pairs of (score on the public item − score on its fresh twin)

A pair is one question: the public item and a twin of it that was invented after the model was made, in the same words
with other numbers (`number_twins.py`), or, named by the caller, an item of the same kind and difficulty. A model that
has seen the public set does better on it than on the twins; one that has not does as well on both, if the twins are as
hard: that is what the pairing cannot guarantee and the report has to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moonbase.errors import UserError
from moonbase.evals.records import Record


@dataclass(frozen=True)
class Contamination:
    """`low` to `high`: the interval of the index at `confidence`."""

    public: float | None
    fresh: float | None
    index: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n: int
    """Pairs with a score on both sides."""
    unpaired: int
    """Public items without a twin, or twins without a score: not in the index."""
    confidence: float
    method: str

    @property
    def suspicious(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low is not None and self.low > 0


def contamination_index(
    public: Mapping[str, float | None], fresh: Mapping[str, float | None], twins: Mapping[str, str] | None = None, *,
    clusters: Mapping[str, str] | None = None, confidence: float = 0.95,
) -> Contamination:
    """Scores (0 to 1, None: not scored) by item on both sides; `twins`: the fresh item of a public one (else the same
    id); `clusters`: public items that go together. Raises UserError where nothing is paired."""
    import numpy as np

    from moonbase.evals.statistics.paired import paired_difference

    twin_of = twins if twins is not None else {item: item for item in public}
    pairs = [(item, twin_of[item]) for item in public if twin_of.get(item) in fresh]
    if not pairs:
        raise UserError("contamination index: no public item has a fresh twin; name the pairs")
    first = np.array([_number(public[item]) for item, _ in pairs])
    second = np.array([_number(fresh[twin]) for _, twin in pairs])
    groups = np.array([clusters.get(item, item) for item, _ in pairs]) if clusters else None
    found = paired_difference(first, second, groups, confidence)
    return Contamination(found.first, found.second, found.difference, found.low, found.high, found.p_value, found.n,
                         len(public) - found.n, confidence, found.method)


def index_of(records: Iterable[Record], metric: str = "accuracy", confidence: float = 0.95) -> Contamination:
    """Of one model's records in which both halves of a pair have one item id and differ in the condition `origin`.

    Raises UserError where there are none.
    """
    sides: dict[str, list[Record]] = {"public": [], "fresh": []}
    for record in records:
        sides.get(record.condition.get("origin", ""), []).append(record)
    public, fresh = (scores_of(side, metric) for side in sides.values())
    return contamination_index(public, fresh, confidence=confidence)


def _number(score: float | None) -> float:
    return float("nan") if score is None else float(score)


def scores_of(records: Iterable[Record], metric: str = "accuracy") -> dict[str, float | None]:
    """The mean score of each item over its samples; None where a sample has none: it is counted, never dropped."""
    found: dict[str, list[float | None]] = {}
    for record in records:
        found.setdefault(record.item, []).append(record.scores.get(metric))
    return {item: _mean(scores) for item, scores in found.items()}


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None
