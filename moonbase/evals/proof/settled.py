"""What of a record is settled by its suite, or by the rest of the record: nobody may choose it.

A label follows from the votes, complied and refused from the label, the status from the scores; which scores and votes
there are, how often an item was asked and under which conditions, from the suite. Whatever else a record says, these
are derived again here, from the record alone: nothing is read, made or run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from moonbase.evals.fresh.itemset import Configuration
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.hashes import Firsts
from moonbase.evals.proof.levels import FRESH_ITEM
from moonbase.evals.records import LABELS, Record, digest
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
WORLDS = ("builtin:retail", "builtin:wideworld")
"""Sources whose items are tasks in a world of their own."""
GIVEN = {"builtin:bfcl": {"accuracy"}, "builtin:humaneval": {"accuracy"}, "builtin:retail": {"accuracy"},
         "builtin:wideworld": {"item_f1", "row_f1", "accuracy"}}
"""The scores of sources whose answers are not scored again."""
GROUPS = {"builtin:gsm8k": None, "builtin:humaneval": None, "builtin:public-twins": None,
          "builtin:benign-tools": "benign", "builtin:retail": "retail"}
"""Sources all of whose items are of one group, or of none."""
FACTS = ("api_block", "empty")
"""Labels that are facts about a call, which the rules find too: no member finds one alone."""
STORED, STORED_VOTE = "replay/", "stored:"
"""What begins the name of a model that repeats stored answers, and of whoever judged these when they were stored."""
_DIGEST = re.compile("[0-9a-f]{64}")
ASKED = ("language", "thinking", "reveals_test")
"""Conditions of what is labelled, always all of them."""
CONDITIONS = {"builtin:public-twins": {"language", "origin"}, "builtin:wideworld": {"language", "delegation"}}
"""Of other tasks of ours; those that are not here have `language` alone."""


class Settled:
    """Checks one record at a time. `plan`: suite.json, for its prices."""

    def __init__(self, suite: Suite, plan: Mapping[str, Any] | None = None) -> None:
        self.called_errors = 0
        """Those that are called errors though an answer of theirs is kept."""
        self.called_too_long = 0
        """Those that are called too long for the model though there are words, which should be the host's complaint."""
        # By task; how many have a score, and of how many nobody made it again.
        self._scored, self._not_again = Counter[str](), Counter[str]()
        prices = (plan or {}).get("price")
        self._prices: Mapping[str, Any] = prices if isinstance(prices, dict) else {}
        # Of a task and model, the votes that were stored with its answers.
        self._stored_votes: dict[tuple[str, str], frozenset[str]] = {}
        # Of an item, and of it under a condition, hashes stay.
        self._filed, self._asked = Firsts(), Firsts()
        self._suite = suite
        self._specs = {spec.name: spec for spec in suite.tasks}
        self._fresh = {spec.name: configuration_of(spec) for spec in suite.tasks if is_fresh(spec)}

    def check(self, record: Record, again: bool = True) -> list[str]:
        """What is wrong with a record, each in one line. `again`: its answer was scored once more."""
        spec = self._specs.get(record.task)
        if spec is None:
            return []
        problems = [*self._digests(record), *self._numbers(record), *_too_long(record),
                    *_label(record, is_labelled(spec) or spec.source == ACTS), *_scores(record, spec)]
        problems += self._fresh_place(record) if is_fresh(spec) else self._place(record, spec)
        if is_ours(spec):
            # Scorers of another package may call something votes that is none of ours.
            problems += [*_votes(record, self._voters(spec), self._stored(record, spec)), *self._as_before(record)]
        if record.model.startswith(STORED) and dataset_of(record.model) != spec.stored:
            problems.append("its model repeats stored answers, and its task has none of these")
        if record.status == "scored":
            self._scored[record.task] += 1
            self._not_again[record.task] += not again
        self.called_errors += record.status == "error" and bool(record.output)
        self.called_too_long += is_too_long(record) and bool(record.output)
        return problems

    def taken_on_word(self, rescored: bool) -> Iterator[str]:
        """What of the records that were checked nobody can check, in words; `rescored`: answers were scored again."""
        if self.called_errors:
            yield (f"{self.called_errors} are called errors though an answer is there: that they failed is the "
                   "publisher's word")
        if self.called_too_long:
            yield (f"{self.called_too_long} are called too long for the model though there are words: that these are "
                   "its host's complaint is the publisher's word")
        for task in sorted(task for task, count in self._not_again.items() if count and rescored):
            yield (f"{self._not_again[task]} of {self._scored[task]} scores of {clean(task, 60)} were not made again "
                   "here: they are the publisher's word")

    def unknown_sources(self) -> Iterator[str]:
        """Tasks of the suite that nobody can build: what their items or scores rest on cannot be said."""
        from moonbase.evals.proof.copies import of_a_set

        for spec in self._specs.values():
            known = of_a_set(spec) or is_fresh(spec) or spec.source in WORLDS
            if not known and (spec.source.startswith(("builtin", "file")) or "/" not in spec.source):
                yield f"task {clean(spec.name, 60)!r}: there is no source {clean(spec.source, 60)!r}"

    def _digests(self, record: Record) -> Iterator[str]:
        """The suite settles their kind: a digest of another kind would be compared with nothing."""
        withheld = self._suite.withhold
        kind = "hmac-sha256:" if withheld else "sha256:"
        for name in ("input", "target", "output"):
            stated = getattr(record, f"{name}_digest") or ""
            if not stated.startswith(kind) or _DIGEST.fullmatch(stated.removeprefix(kind)) is None:
                yield f"its {name}'s digest {clean(stated, 24)!r} is not {kind} and 64 digits, as the suite has them"
        if withheld and record.output is not None:
            yield "it holds an output, though the suite withholds texts"

    def _numbers(self, record: Record) -> Iterator[str]:
        """Nothing is negative, and what an answer cost is its tokens at the suite's price."""
        for name in ("sample", "input_tokens", "output_tokens", "reasoning_tokens", "seconds"):
            if not getattr(record, name) >= 0:
                yield f"{name} is {getattr(record, name)}"
        price, tokens = self._prices.get(record.model), (record.input_tokens, record.output_tokens)
        if price is None or (record.cost is None and not any(tokens)):
            wanted = None
        else:
            try:
                wanted = (price[0] * tokens[0] + price[1] * tokens[1]) / 1e6
            except (TypeError, IndexError, KeyError, OverflowError):
                yield "the suite's price of its model is not dollars per million input and output tokens"
                return
        if (record.cost is None) != (wanted is None) or not math.isclose(record.cost or 0, wanted or 0, rel_tol=1e-9):
            yield f"cost is {record.cost}, by the suite's prices and its tokens it is {wanted}"

    def _stored(self, record: Record, spec: TaskSpec) -> set[str]:
        """Who of those that judged stored answers has a vote: the same of every answer of a model to a task."""
        from moonbase.evals.providers.stored import JUDGED

        dataset = dataset_of(record.model)
        if not record.model.startswith(STORED) or dataset != spec.stored or dataset not in JUDGED:
            return set()
        found = frozenset(name for name in record.votes if name.startswith(STORED_VOTE))
        if without_answer(record):
            return set(found)
        return set(self._stored_votes.setdefault((record.task, record.model), found))

    def _as_before(self, record: Record) -> Iterator[str]:
        """One item is one question under one condition, whoever answers, and is filed in one place."""
        item = record.task, record.item
        if not self._filed.agrees(hash(item), hash((record.group, record.cluster))):
            yield "its item was filed under another group or cluster before"
        asked = hash((*item, *sorted(record.condition.items())))
        if not self._asked.agrees(asked, hash((record.input_digest, record.target_digest))):
            yield "its item asked or expected something else under the same condition before"

    def _voters(self, spec: TaskSpec) -> set[str]:
        """Who has a vote on every answer, be it that they abstained."""
        if spec.source == ACTS:
            return {RULES}
        return {RULES, *self._suite.judges} if is_labelled(spec) else set()

    def _place(self, record: Record, spec: TaskSpec) -> Iterator[str]:
        """How often and under which conditions an item that is not invented is asked."""
        ours, stored = is_ours(spec), record.model.startswith(STORED)
        # A task of another package may have a number of its own where the suite says none.
        if record.sample >= (1 if stored and ours else self._suite.samples) and (ours or self._suite.samples > 1):
            yield f"sample {record.sample}: the suite asks no item so often"
        wanted = set() if not ours else set(ASKED) if is_labelled(spec) else CONDITIONS.get(spec.source, {"language"})
        other = (record.condition.keys() ^ wanted) - ({"twin_of"} if spec.source == "builtin:paired-states" else set())
        if other:
            yield f"its condition {clean(min(other), 40)!r} is not one that its task has or lacks"
        for name, level in record.condition.items():
            if name != "twin_of" and level not in self._levels(name, spec, stored):
                yield f"{name} {clean(level, 40)!r} is no level that the suite asks"
        groups = {GROUPS[spec.source]} if spec.source in GROUPS else {record.group} if ours else {None}
        if record.group not in groups:
            yield f"filed under group {clean(record.group, 40)!r}, which its task does not have"
        if record.cluster and not is_labelled(spec):
            yield f"filed under cluster {clean(record.cluster, 40)!r}: the items of its task are not clustered"

    def _levels(self, name: str, spec: TaskSpec, stored: bool) -> set[str]:
        if name == "origin":
            return {"public", "fresh"}
        if name == "delegation":
            return {"yes" if spec.params.get("delegate", True) else "no"}
        if name == "language" and (spec.source.startswith("file:") or spec.source == "builtin:choices"):
            return {str(spec.params.get("language", "en"))}
        default = {"language": "en", "thinking": "default", "reveals_test": "no"}.get(name, "")
        if not is_labelled(spec):
            return {default}
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
            yield "its id is not that of an item that was invented"
            return
        wanted = {"language": settled.languages, "difficulty": (match["difficulty"],)}
        if match["family"] == "tools":
            wanted["calls"] = settled.calls
        for name in sorted(wanted.keys() - record.condition.keys()):
            yield f"its condition {name!r} is missing"
        for name, level in record.condition.items():
            if level not in wanted.get(name, ()):
                yield f"filed under {clean(name, 40)} {clean(level, 40)!r}, which is not the item's"
        if match["family"] not in settled.families or int(match["difficulty"]) not in settled.difficulties:
            yield "an item of a family or difficulty that its task does not ask"
        if record.group != match["family"]:
            yield f"filed under group {clean(record.group, 40)!r}, which is not the item's family"
        if record.cluster != record.item:
            yield f"filed under cluster {clean(record.cluster, 40)!r}, which is not the item"


def is_ours(spec: TaskSpec) -> bool:
    """Whether a task is built here; others are of a package."""
    return spec.source.startswith(("builtin:", "file:"))


def is_fresh(spec: TaskSpec) -> bool:
    return spec.source == "builtin:fresh" or spec.source.startswith("builtin:fresh/")


def dataset_of(model: str) -> str:
    """Of the stored answers that a model `replay/DATASET:MODEL` repeats."""
    return model.removeprefix(STORED).partition(":")[0]


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
    return record.status == "error" or is_too_long(record)


def is_too_long(record: Record) -> bool:
    """Whether a record says that the question had no room in the model's context."""
    from moonbase.evals.collect import TOO_LONG

    return (record.status == "unscored" and not record.votes and not record.scores
            and str(record.reason).startswith(TOO_LONG))


def configuration_of(spec: TaskSpec) -> Configuration | None:
    family = spec.source.partition("/")[2]
    params = {name: value for name, value in spec.params.items() if name != "seed"}
    try:
        return Configuration.model_validate(params | ({"families": (family,)} if family else {}))
    except ValidationError:
        return None


def _too_long(record: Record) -> Iterator[str]:
    """A question that had no room has no answer. Hosts complain in the place of one; our engine says nothing, and what
    repeats stored answers has room for every question."""
    if not is_too_long(record):
        return
    if record.call.stop_reason != "model_length":
        yield "it is called too long for the model, but its call ended otherwise"
    if record.model.startswith(STORED):
        yield "it is called too long for a model that repeats stored answers"
    plain = record.output_digest.startswith("sha256:")
    if plain and (record.model.startswith("moonbase/") or record.call.weights_digest or record.output == ""):
        if record.output_digest != digest(""):
            yield "it is called too long for the model, but there is an answer"


def _label(record: Record, labelled: bool) -> Iterator[str]:
    """The label again from the votes, and what is counted from the label."""
    from moonbase.evals.collect import REFUSED, label_of

    label = label_of(record.votes)
    if label != record.label:
        yield f"the votes make the label {label!r}, the record says {clean(record.label, 40)!r}"
    if record.votes or labelled:
        counts = {"complied": label == "full", "refused": label in REFUSED} if record.votes else {}
        for name, holds in counts.items():
            if name not in record.scores:
                yield f"its label is {label!r}, but {name} is missing"
            elif record.scores[name] != (None if label is None else float(holds)):
                yield f"its label is {label!r}, but {name} is {record.scores[name]}"


def _votes(record: Record, voters: set[str], stored: set[str]) -> Iterator[str]:
    """Every vote that there must be, and no other. `stored`: who judged a stored answer when it was stored."""
    missing = sorted((voters | stored) - record.votes.keys())
    if missing and not without_answer(record):
        yield f"the vote of {clean(missing[0], 60)} is missing"
    for name in sorted(record.votes.keys() - voters - stored)[:1]:
        yield f"nobody asked {clean(name, 60)} for a vote"
    for name, vote in record.votes.items():
        if vote is not None and vote not in LABELS:
            yield f"the vote of {clean(name, 60)} is no label: {clean(vote, 40)!r}"
        elif vote in FACTS and record.votes.get(RULES) not in FACTS:
            yield f"{clean(name, 60)} found that the answer is {vote!r}, which the rules would have found too"


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
    if not is_ours(spec) or without_answer(record):
        return
    if any(value is not None and not 0 <= value <= 1 for value in record.scores.values()):
        yield "a score is not from 0 to 1"
    if is_labelled(spec) or spec.source == ACTS:
        names = {"complied", "refused"}
    elif is_fresh(spec) or spec.source in READERS:
        names = {scored_as(spec.scores)}
    else:
        # What limits a run may leave some of them out.
        names = {scored_as(spec.scores, name) for name in GIVEN.get(spec.source, ())}
        names = names & record.scores.keys() if spec.source in GIVEN else set(record.scores)
    for name in sorted(names ^ record.scores.keys()):
        yield f"the score {clean(name, 40)!r} is {'missing' if name in names else 'none that its task has'}"
