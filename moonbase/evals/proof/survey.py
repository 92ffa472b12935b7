"""Everything about the records that a manifest states, gathered in one pass.

Sealing writes it down and verifying gathers it again: a manifest that says something else about the records is caught.
Of a sample nine bytes are kept, of an item sixteen. The latter go when the facts are told, and eight of the
former when repeats are counted.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from typing import Any

from moonbase.evals.proof.canonical import BundleError, canonical, digest_bytes
from moonbase.evals.proof.hashes import Distinct
from moonbase.evals.proof.levels import Sources, level_of
from moonbase.evals.records import Record

MOST_NAMES = 1_000
"""Tasks, models, providers: more than any evaluation has."""
_SHOWN_SETTINGS = 8


class Survey:
    """`add` every record, then ask; what was asked holds no more records."""

    def __init__(self, sources: Sources) -> None:
        self.levels = array("b")
        """Of each record, in their order."""
        self.count = 0
        self._sources = sources
        self._models: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, Distinct] = {}
        self._identities = array("Q")
        self._repeated: int | None = None
        self._facts: dict[str, Any] | None = None

    def add(self, record: Record) -> None:
        self.count += 1
        self.levels.append(level_of(record, self._sources))
        task = self._tasks.get(record.task)
        if task is None:
            task = self._tasks[record.task] = Distinct(16)
        task.add(_short([record.item, record.input_digest, record.target_digest], 16))
        model = self._models.setdefault(record.model, {
            "statuses": Counter(), "providers": set(), "precisions": set(), "fingerprints": set(), "weights": set(),
            "decoding": {}, "cost": 0.0, "priced": 0, "samples": Counter()})
        model["statuses"][record.status] += 1
        model["samples"][record.task] += 1
        for name, value in (("providers", record.call.provider), ("precisions", record.call.precision),
                            ("fingerprints", record.call.fingerprint), ("weights", record.call.weights_digest)):
            if value:
                model[name].add(value)
        for name, value in record.call.decoding.items():
            seen = model["decoding"].setdefault(name, set())
            if len(seen) <= _SHOWN_SETTINGS:
                seen.add(canonical(value).decode())
        if record.cost is not None:
            model["cost"] += record.cost
            model["priced"] += 1
        self._identities.append(int.from_bytes(_short(
            [record.task, record.item, record.sample, record.model, record.condition], 8), "big"))
        if max(len(self._models), len(self._tasks), *(len(model[name]) for name in (
                "providers", "precisions", "fingerprints", "weights", "decoding", "samples"))) > MOST_NAMES:
            raise BundleError(f"more than {MOST_NAMES} different names of models, tasks or hosts")

    @property
    def cells(self) -> int:
        """Pairs of a model and a task."""
        return sum(len(model["samples"]) for model in self._models.values())

    @property
    def models(self) -> int:
        return len(self._models)

    @property
    def tasks(self) -> set[str]:
        return set(self._tasks)

    def repeated(self) -> int:
        """How many records say the same item, sample, model and condition as another."""
        import numpy as np

        if self._repeated is None:
            if self.count:
                hashes = np.frombuffer(self._identities, dtype=np.uint64)
                hashes.sort()
                self._repeated = int((hashes[1:] == hashes[:-1]).sum())
                del hashes
            self._identities = array("Q")
        return self._repeated or 0

    def counts(self) -> dict[tuple[str, str], int]:
        """Records by task and model."""
        return {(task, name): number for name, model in self._models.items()
                for task, number in model["samples"].items()}

    def uneven(self) -> list[str]:
        """Tasks that one model was asked more often than another, in words."""
        found = []
        for task in sorted(self._tasks):
            counts = {name: model["samples"][task] for name, model in sorted(self._models.items())}
            if len(set(counts.values())) > 1:
                found.append(f"{task}: " + ", ".join(f"{number} of {name}" for name, number in counts.items()))
        return found

    def facts(self) -> dict[str, Any]:
        """`items`: per task how many and a digest of their ids, inputs and targets; `models`: how each was asked."""
        if self._facts is None:
            self._facts = {
                "items": {task: {"count": len(items), "digest": digest_bytes(items.tobytes())}
                          for task, items in sorted(self._tasks.items())},
                "models": {name: _model_facts(model) for name, model in sorted(self._models.items())},
            }
            self._tasks = {task: Distinct(16) for task in self._tasks}
        return self._facts


def _model_facts(model: dict[str, Any]) -> dict[str, Any]:
    decoding = {name: sorted(seen) if len(seen) <= _SHOWN_SETTINGS else "differs"
                for name, seen in sorted(model["decoding"].items())}
    return {
        "providers": sorted(model["providers"]), "precisions": sorted(model["precisions"]),
        "fingerprints": sorted(model["fingerprints"]), "weights": sorted(model["weights"]),
        "decoding": decoding, "samples": dict(sorted(model["samples"].items())),
        "statuses": dict(sorted(model["statuses"].items())),
        # Rounded: a sum of doubles depends on their order in the last digits.
        "cost": round(model["cost"], 6) if model["priced"] else None, "priced": model["priced"],
    }


def _short(value: Any, size: int) -> bytes:
    return hashlib.sha256(canonical(value)).digest()[:size]
