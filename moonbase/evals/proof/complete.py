"""Samples that the suite asks and that are not there: told when a bundle is sealed, or left out of it.

Sealing writes under `missing` of the manifest what it knows to be missing: a run was killed, or a host gave up. Whoever
verifies counts again. What is missing and was not told was dropped after the run, or the run was never whole: no figure
passes for one over all that was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moonbase.evals.fresh.itemset import forms_of
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.settled import STORED, configuration_of, dataset_of, is_fresh
from moonbase.evals.suite import Suite


class Shortfall(NamedTuple):
    """Samples of a task by a model: there are fewer than the suite asks."""

    task: str
    model: str
    found: int
    wanted: int

    @property
    def words(self) -> str:
        return (f"{clean(self.model, 80)} has {self.found} of the {self.wanted} samples that the suite asks in "
                f"{clean(self.task, 60)}")


def shortfalls(suite: Suite, plan: Mapping[str, Any], counts: Mapping[tuple[str, str], int],
               asked: Callable[[str, str], int | None]) -> Iterator[Shortfall]:
    """Tasks and models with fewer samples than the suite asks of them, as far as that is known.

    `counts`: records by task and model. `asked`: samples that a task asks of a model where its items are not invented;
    None where nobody knows. A limit of the run counts. Stored answers are to some of the tasks only.
    """
    limit, models = plan.get("limit"), plan.get("models")
    named = [str(model) for model in models] if isinstance(models, list) else []
    for spec in suite.tasks:
        settled = configuration_of(spec) if is_fresh(spec) else None
        for model in sorted({*named, *(model for task, model in counts if task == spec.name)}):
            found = counts.get((spec.name, model), 0)
            if not found and model.startswith(STORED):
                continue
            if settled is not None:
                each = settled.count * len(settled.difficulties) * len(settled.languages)
                limits = [one for one in (settled.limit, spec.limit, limit) if isinstance(one, int)]
                wanted = settled.samples * sum(
                    min([each, *limits]) * len(forms_of(settled, family)) for family in settled.families)
            else:
                wanted = asked(spec.name, model)
            if wanted is not None and found < wanted:
                yield Shortfall(spec.name, model, found, wanted)


def absent(suite: Suite, plan: Mapping[str, Any], counts: Mapping[tuple[str, str], int],
           known: Container[tuple[str, str]]) -> Iterator[str]:
    """Models that the plan names, and tasks that it asks of them, without any record, in words: how many there should
    be nobody knows. `known`: task and model of what is missing anyway."""
    models = plan.get("models")
    for spec in suite.tasks:
        for model in map(str, models if isinstance(models, list) else ()):
            asked = not model.startswith(STORED) or dataset_of(model) == spec.stored
            if asked and not counts.get((spec.name, model)) and (spec.name, model) not in known:
                yield (f"{clean(model, 80)} has no record at all in {clean(spec.name, 60)}, which the suite asks of "
                       "it: that it was never run, or why it was left out, is the publisher's word")


def as_told(shortfalls: Iterable[Shortfall]) -> dict[str, dict[str, list[int]]]:
    """As the manifest tells them: model to task to how many samples there are, and how many were asked."""
    found: dict[str, dict[str, list[int]]] = {}
    for one in shortfalls:
        found.setdefault(one.model, {})[one.task] = [one.found, one.wanted]
    return found


def compared(told: Mapping[str, Mapping[str, Any]], known: Mapping[tuple[str, str], Shortfall],
             counts: Mapping[tuple[str, str], int]) -> tuple[list[str], list[str]]:
    """(what the manifest tells and is so, what is wrong), each in one line. `known`: found again, by task and model."""
    stated = {(task, model): Shortfall(task, model, *numbers) for model, tasks in told.items()
              for task, numbers in tasks.items()}
    right, wrong = [], []
    for key, one in sorted(stated.items()):
        there = known.get(key, Shortfall(*key, counts.get(key, 0), one.wanted))
        if one == there and one.found < one.wanted:
            right.append(f"{one.words}: the manifest says so")
        else:
            wrong.append(f"the manifest says that {one.words}, but it has {there.found} of {there.wanted}")
    wrong += [f"{one.words}, and the manifest does not say so: they were left out"
              for key, one in sorted(known.items()) if key not in stated]
    return right, wrong
