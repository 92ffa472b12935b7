"""What of a record is settled by its suite, or by the rest of the record: nobody may choose it.

A label follows from the votes, complied and refused from the label, the status from the scores; which scores and votes
there are, how often an item was asked and under which conditions, from the suite. Whatever else a record says, these
are derived again here, from the record alone: nothing is read, made or run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from moonbase.evals.fresh.itemset import Configuration, forms_of
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.levels import FRESH_ITEM
from moonbase.evals.records import Record
from moonbase.evals.suite import Suite, TaskSpec

RULES = "rules"
"""The rule set's name among a record's votes."""
ACTS = "builtin:benign-tools"
"""The source of tasks where a call of a function is the full answer, and words are a part of it at most."""
LABELLED = frozenset({"builtin:paired-politics", "builtin:paired-states", "builtin:alarming-words"})
"""Sources, besides every `file:`, whose answers are labelled by the rules and by every judge of the suite."""
READERS = {"builtin:mmlu-pro": "letter_in", "builtin:choices": "letter_in", "builtin:gsm8k": "number_in",
           "builtin:public-twins": "number_in"}
"""Sources of tasks whose answers one function of `tasks.exact` reads."""
ASKED = ("language", "thinking", "reveals_test")
"""Conditions of what is labelled, always all of them."""
CONDITIONS = {"builtin:public-twins": {"language", "origin"}, "builtin:wideworld": {"language", "delegation"}}
"""Of other tasks of ours; those that are not here have `language` alone."""


class Settled:
    """Checks one record at a time; `called_errors`: those that are called errors though an answer of theirs is kept."""

    def __init__(self, suite: Suite, limit: Any = None) -> None:
        """`limit`: of the run, items of each task."""
        self.called_errors = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        # Of an item, and of it under a condition, hashes stay.
        self._filed: dict[int, int] = {}
        self._suite, self._limit = suite, limit if isinstance(limit, int) else None
        self._specs = {spec.name: spec for spec in suite.tasks}
        self._fresh = {spec.name: _configuration(spec) for spec in suite.tasks if is_fresh(spec)}

    def check(self, record: Record) -> list[str]:
        """What is wrong with a record, each in one line."""
        spec = self._specs.get(record.task)
        if spec is None:
            return []
        self._counts[record.task, record.model] += 1
        problems = [*_votes(record, self._voters(spec)), *_scores(record, spec)]
        problems += self._fresh_place(record) if is_fresh(spec) else self._place(record, spec)
        if is_ours(spec):
            problems += self._as_before(record)
        self.called_errors += record.status == "error" and bool(record.output)
        return problems

    def _as_before(self, record: Record) -> Iterator[str]:
        """One item is one question under one condition, whoever answers, and is filed in one place."""
        item = record.task, record.item
        filed = hash((record.group, record.cluster))
        if self._filed.setdefault(hash(("filed", *item)), filed) != filed:
            yield "its item was filed under another group or cluster before"
        asked = hash((record.input_digest, record.target_digest))
        if self._filed.setdefault(hash((*item, *sorted(record.condition.items()))), asked) != asked:
            yield "its item asked or expected something else under the same condition before"

    def missing(self, asked: Callable[[str], int | None]) -> Iterator[str]:
        """Models with fewer samples than the suite asks of them, of tasks of which that is known, each in one line.

        `asked`: the number of questions of a task that is made of a set. A limit of the run counts.
        """
        for (task, model), found in sorted(self._counts.items()):
            spec, settled = self._specs[task], self._fresh.get(task)
            if settled is not None:
                each = settled.count * len(settled.difficulties) * len(settled.languages)
                limits = [one for one in (settled.limit, spec.limit, self._limit) if one is not None]
                wanted = settled.samples * sum(
                    min([each, *limits]) * len(forms_of(settled, family)) for family in settled.families)
            elif (questions := asked(task)) is not None:
                wanted = questions * (1 if model.startswith("replay/") else self._suite.samples)
            else:
                continue
            if found < wanted:
                yield f"{clean(model, 80)} has {found} of the {wanted} samples that the suite asks in {clean(task, 60)}"

    def _voters(self, spec: TaskSpec) -> set[str]:
        """Who has a vote on every answer, be it that they abstained."""
        if spec.source == ACTS:
            return {RULES}
        return {RULES, *self._suite.judges} if is_labelled(spec) else set()

    def _place(self, record: Record, spec: TaskSpec) -> Iterator[str]:
        """How often and under which conditions an item that is not invented is asked."""
        ours, stored = is_ours(spec), record.model.startswith("replay/")
        # A task of another package may have a number of its own where the suite says none.
        if record.sample >= (1 if stored and ours else self._suite.samples) and (ours or self._suite.samples > 1):
            yield f"sample {record.sample}: the suite asks no item so often"
        wanted = set() if not ours else set(ASKED) if is_labelled(spec) else CONDITIONS.get(spec.source, {"language"})
        other = (record.condition.keys() ^ wanted) - ({"twin_of"} if spec.source == "builtin:paired-states" else set())
        if other:
            yield f"its condition {clean(min(other), 40)!r} is not one that its task has or lacks"
        for name in (name for name in ASKED if name in record.condition):
            level = record.condition[name]
            if level not in self._levels(name, spec, stored):
                yield f"{name} {clean(level, 40)!r} is no level that the suite asks"

    def _levels(self, name: str, spec: TaskSpec, stored: bool) -> set[str]:
        default = {"language": "en", "thinking": "default", "reveals_test": "no"}[name]
        if not is_labelled(spec):
            return {default, str(spec.params.get("language", default))}
        # Stored answers were given under no condition of ours.
        return {default} if stored and name != "language" else set(self._suite.levels(name, default))

    def _fresh_place(self, record: Record) -> Iterator[str]:
        """An invented item's id says much of it; the suite, how often and in which forms it is asked."""
        settled = self._fresh[record.task]
        if settled is None:
            yield "its task's params are none of fresh problems"
            return
        if record.sample >= settled.samples:
            yield f"sample {record.sample}: the suite asks no item so often"
        match = FRESH_ITEM.fullmatch(record.item)
        if match is None:
            if record.input_digest.startswith("sha256:"):
                yield "its id is not that of an item that was invented"
            return
        wanted = {"language": settled.languages, "difficulty": (match["difficulty"],)}
        if match["family"] == "tools":
            wanted["calls"] = settled.calls
        for name, level in record.condition.items():
            if level not in wanted.get(name, ()):
                yield f"filed under {clean(name, 40)} {clean(level, 40)!r}, which is not the item's"
        if match["family"] not in settled.families or int(match["difficulty"]) not in settled.difficulties:
            yield "an item of a family or difficulty that its task does not ask"
        if record.group not in (None, match["family"]):
            yield f"filed under group {clean(record.group, 40)!r}, which is not the item's family"
        if record.cluster not in ("", record.item):
            yield f"filed under cluster {clean(record.cluster, 40)!r}, which is not the item"


def is_ours(spec: TaskSpec) -> bool:
    """Whether a task is built here; others are of a package."""
    return spec.source.startswith(("builtin:", "file:"))


def is_fresh(spec: TaskSpec) -> bool:
    return spec.source == "builtin:fresh" or spec.source.startswith("builtin:fresh/")


def is_labelled(spec: TaskSpec) -> bool:
    """Whether the rules and the suite's judges label its answers."""
    return spec.source.startswith("file:") or spec.source in LABELLED


def scored_as(given: dict[str, Any], name: str = "accuracy") -> str:
    """The suite's word for a score; `given`: the task's `scores`, as `collect` reads them."""
    for wanted in ("*", name):
        if ours := next((ours for ours, theirs in given.items() if theirs == wanted), None):
            return ours
    return name


def without_answer(record: Record) -> bool:
    """Whether a record says that there is nothing to score: the call failed, or the question had no room."""
    from moonbase.evals.collect import TOO_LONG

    return record.status == "error" or (record.status == "unscored" and not record.votes and not record.scores and
                                        str(record.reason).startswith(TOO_LONG))


def _configuration(spec: TaskSpec) -> Configuration | None:
    family = spec.source.partition("/")[2]
    params = {name: value for name, value in spec.params.items() if name != "seed"}
    try:
        return Configuration.model_validate(params | ({"families": (family,)} if family else {}))
    except ValidationError:
        return None


def _votes(record: Record, voters: set[str]) -> Iterator[str]:
    """The label again from the votes, and what is counted from the label; every vote that there must be."""
    from moonbase.evals.collect import REFUSED, label_of

    label = label_of(record.votes)
    if label != record.label:
        yield f"the votes make the label {label!r}, the record says {clean(record.label, 40)!r}"
    if record.votes or voters:
        counts = {"complied": label == "full", "refused": label in REFUSED} if record.votes else {}
        for name, holds in counts.items():
            if name not in record.scores:
                yield f"its label is {label!r}, but {name} is missing"
            elif record.scores[name] != (None if label is None else float(holds)):
                yield f"its label is {label!r}, but {name} is {record.scores[name]}"
    missing = sorted(voters - record.votes.keys())
    if missing and not without_answer(record):
        yield f"the vote of {clean(missing[0], 60)} is missing"


def _scores(record: Record, spec: TaskSpec) -> Iterator[str]:
    """Which scores there are, and the status that follows from them."""
    known = any(value is not None for value in record.scores.values())
    if record.status == "error":
        # A scorer that stumbles over a stored verdict leaves the rules' vote behind, and nothing else does.
        whole = known and not (record.model.startswith("replay/") and record.votes.keys() <= {RULES})
        if not record.reason:
            yield "it is called an error, and no reason is given"
        if whole and is_ours(spec):
            yield "it is called an error, but was scored"
        return
    status = "abstained" if record.votes and record.label is None else "scored" if known else "unscored"
    if status != record.status:
        yield f"its votes and scores make it {status}, the record says {record.status}"
    if without_answer(record):
        return
    if is_labelled(spec) or spec.source == ACTS:
        names = {"complied", "refused"}
    elif is_fresh(spec) or spec.source in READERS:
        names = {scored_as(spec.scores)}
    else:
        return
    for name in sorted(names ^ record.scores.keys()):
        yield f"the score {clean(name, 40)!r} is {'missing' if name in names else 'none that its task has'}"
