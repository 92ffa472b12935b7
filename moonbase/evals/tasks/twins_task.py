"""Public questions and fresh twins of them in one task, so that what a model has learned by heart shows as a gap.

Both halves of a pair have one item id and differ in the condition `origin` (public, fresh) alone; every report pairs
them by it and shows public minus fresh with its interval.
"""

from __future__ import annotations

from pathlib import Path

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.solver import generate

from moonbase.errors import UserError
from moonbase.evals.fresh.number_twins import make_twin
from moonbase.evals.fresh.problem import Draw
from moonbase.evals.short_answers import as_target, number_in
from moonbase.evals.sources import find_copy, read_rows, source_of
from moonbase.evals.suite import Suite, TaskSpec
from moonbase.evals.tasks.exact import WORD_PROBLEM, exact_scorer

COUNT = 200
"""Pairs, where the suite does not say how many."""


def public_twins(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """GSM8K questions that have a twin, in an order that the seed draws, each beside its twin. An item's id is its
    line.

    `params`: file, sha256, count, and `leave_out`, the lines that have no twin because their published steps are wrong.
    `limit`: pairs. Raises UserError.
    """
    rows = list(read_rows(find_copy(source_of(spec.params, f"suite {suite.name}, task {spec.name}"), data)))
    order = list(range(len(rows)))  # Whole, so that what is left out changes nothing else.
    Draw.of("public-twins", seed).shuffle(order)
    left_out = frozenset(spec.params.get("leave_out", ()))
    wanted = min(one for one in (int(spec.params.get("count", COUNT)), limit) if one is not None)
    samples: list[Sample] = []
    try:
        for place in order:
            if len(samples) == 2 * wanted:
                break
            if place + 1 in left_out:
                continue
            question, worked = str(rows[place]["question"]), str(rows[place]["answer"])
            twin = make_twin(question, worked, Draw.of("public-twins", seed, place))
            if twin is not None:
                samples += [_sample(place + 1, "public", question, worked.rpartition("####")[2].strip()),
                            _sample(place + 1, "fresh", twin.question, str(twin.answer))]
    except KeyError as error:
        raise UserError(f"{spec.params['file']}: no field {error}; it is not the set that {spec.name} needs") from None
    return Task(name=spec.name, dataset=MemoryDataset(samples, name=spec.name), solver=generate(),
                scorer=exact_scorer("number"), epochs=Epochs(suite.samples, reducer=[]))


def _sample(line: int, origin: str, question: str, answer: str) -> Sample:
    return Sample(id=f"{line}/{origin}", input=WORD_PROBLEM.format(question=question),
                  target=as_target(f"#### {answer}", number_in), metadata={
                      "item": str(line), "group": None, "cluster": "",
                      "condition": {"language": "en", "origin": origin}})
