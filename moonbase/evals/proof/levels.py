"""How far a stranger can check a figure. Each level needs the ones below it.

| level | name | a record has it when |
|---|---|---|
| 0 | reported | it is there |
| 1 | re-scorable | its output is kept, and the output's digest is of that text and has no salt |
| 2 | re-generable | and its item can be made or fetched again and compared: the digest of its input has no salt, and the suite names the seed of its generator or the digest of its data set |
| 3 | re-runnable | and the weights that answered are named by their digest, with the decoding |
| 4 | independently replicated | and somebody else ran a random part again, agreed, and signed that (`challenge`) |

A figure has the lowest level of any record that it selects. Levels 0 to 3 follow from the records and are written into
results.json when a bundle is sealed; `verify` computes them again. That a set has the digest which the suite names is
shown to those who have it (`verify --data`); a digest counts only of sources that compare it before they read the set.
Level 4 comes later and from others, so no sealed file can hold it: `verify` gives it to the figures of a model when a
counter-statement in `challenges/` holds.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moonbase.evals.records import Record, digest, read_records
from moonbase.evals.suite import read_plan

FRESH_ITEM = re.compile(r"(?P<family>[a-z]+)-(?P<tag>[0-9a-f]{8})-(?P<difficulty>[1-5])-(?P<index>\d{5,9})")
"""The id of an item that was invented for the run."""
DIGESTED = {"builtin:alarming-words": ("digest",), "builtin:choices": ("sha256",), "builtin:gsm8k": ("sha256",),
            "builtin:humaneval": ("sha256",), "builtin:mmlu-pro": ("sha256",),
            "builtin:paired-politics": ("sha256", "benign"), "builtin:paired-states": ("digest",),
            "builtin:public-twins": ("sha256",)}
"""Sources whose sets are read only where they have the digests of these params; besides, `sha256` of every `file:`."""
_SHA256, _DIGEST = re.compile("[0-9a-fA-F]{64}"), re.compile("sha256:[0-9a-f]{64}")
REPORTED, RE_SCORABLE, RE_GENERABLE, RE_RUNNABLE, REPLICATED = range(5)
NAMES = ("reported", "re-scorable", "re-generable", "re-runnable", "independently replicated")


def output_kept(record: Record) -> bool:
    return record.output is not None and record.output_digest == digest(record.output)


def fresh_tag(seed: Any) -> str:
    """What the ids of fresh items carry of their seed."""
    return hashlib.sha256(f"moonbase fresh seed {seed}".encode()).hexdigest()[:8]


class Sources:
    """Where the items of a suite come from, as far as suite.json says."""

    def __init__(self, suite_json: dict[str, Any]) -> None:
        suite = suite_json.get("suite")
        listed = suite.get("tasks") if isinstance(suite, dict) else None
        tasks = [task for task in listed if isinstance(task, dict)] if isinstance(listed, list) else []
        params = [task["params"] for task in tasks if isinstance(task.get("params"), dict)]
        own = [suite_json.get("seed"), *(each.get("seed") for each in params)]
        self.seeds = tuple(seed for seed in own if isinstance(seed, int | str) and not isinstance(seed, bool))
        """Of fresh items, as far as they are revealed."""
        self._tags = {fresh_tag(seed) for seed in self.seeds}
        self._sources = {str(task.get("name")): str(task.get("source", "")) for task in tasks}
        named = suite.get("name") if isinstance(suite, dict) else None
        self._name = named if isinstance(named, str) else None
        models = suite_json.get("models")
        self._models = {str(model) for model in models} if isinstance(models, list) else set()
        self._with_digest = {str(task.get("name")) for task in tasks if _has_digest(task)}
        self._scores = {str(task.get("name")): task["scores"] for task in tasks if isinstance(task.get("scores"), dict)}

    def source(self, task: str) -> str:
        return self._sources.get(task, "")

    def scored_as(self, task: str) -> str:
        """The suite's word for the score `accuracy` of a task of ours."""
        from moonbase.evals.proof.settled import scored_as

        return scored_as(self._scores.get(task, {}))

    def outside(self, record: Record) -> list[str]:
        """Why a record cannot be of this suite: a task or a model that it does not name."""
        problems = []
        if self._name is not None and record.suite != self._name:
            problems.append(f"its suite {record.suite[:60]!r} is another")
        if self._sources and record.task not in self._sources:
            problems.append(f"its task {record.task[:60]!r} is not in the suite")
        if self._models and record.model not in self._models:
            problems.append(f"its model {record.model[:60]!r} is not in the suite")
        return problems

    def regenerable(self, record: Record) -> bool:
        """Whether the item comes from the revealed seed, or from a set whose digest the suite names."""
        if not record.input_digest.startswith("sha256:"):
            return False
        if record.task in self._with_digest:
            return True
        # An id alone makes no item of a set an invented one.
        source, fresh = self.source(record.task), FRESH_ITEM.fullmatch(record.item)
        invented = source == "builtin:fresh" or source.startswith("builtin:fresh/")
        return invented and fresh is not None and fresh["tag"] in self._tags

    def by_digest(self, task: str) -> bool:
        """Whether a task's items are regenerable because the suite names their set by its digest."""
        return task in self._with_digest


def _has_digest(task: dict[str, Any]) -> bool:
    """A SHA-256 of the set's file, or one of each of its files, where whoever reads the set compares it."""
    source, params = str(task.get("source", "")), task.get("params")
    names = ("sha256",) if source.startswith("file:") else DIGESTED.get(source, ())
    return isinstance(params, dict) and bool(names) and all(_is_digest(params.get(name), name) for name in names)


def _is_digest(stated: Any, name: str) -> bool:
    if isinstance(stated, dict):
        return name == "sha256" and bool(stated) and all(
            isinstance(each, str) and _SHA256.fullmatch(each) for each in stated.values())
    return isinstance(stated, str) and (_SHA256 if name == "sha256" else _DIGEST).fullmatch(stated) is not None


def level_of(record: Record, sources: Sources) -> int:
    """The level of one record."""
    if not output_kept(record):
        return REPORTED
    if not sources.regenerable(record):
        return RE_SCORABLE
    if not _DIGEST.fullmatch(record.call.weights_digest or "") or not record.call.decoding:
        return RE_GENERABLE
    return RE_RUNNABLE


def levels_of(folder: Path, records: str = "records.jsonl") -> array[int]:
    """The level of every record of an evaluation or a bundle, in their order: what sealing it would write."""
    sources = Sources(read_plan(folder))
    return array("b", (level_of(record, sources) for record in read_records(folder / records)))


def figure_level(figure: Any, table: Any, record_levels: Sequence[int]) -> int:
    """The lowest level of the records that a figure rests on, its controls among them; `record_levels` in the order of
    the table."""
    rows = _rows(figure, table)
    return int(np.frombuffer(record_levels, np.int8)[rows].min()) if len(rows) else REPORTED


def figure_models(figure: Any, table: Any) -> set[str]:
    """Whose records a figure is computed from."""
    return set(table.present("model", _rows(figure, table)))


def levelled(figures: Sequence[Any], table: Any, record_levels: Sequence[int]) -> list[Any]:
    """The figures, each with its level."""
    return [figure.model_copy(update={"level": figure_level(figure, table, record_levels)}) for figure in figures]


def _rows(figure: Any, table: Any) -> np.ndarray:
    from moonbase.evals.figure_functions import sides_of

    return np.unique(np.concatenate([table.rows(side) for side in sides_of(figure.spec)]))
