"""The items of public sets against the verifier's own copies of them: what a record says was asked, was it?

A suite names a set by its SHA-256, which proves nothing to whoever does not have the set. Whoever has it makes the
items again here, as the evaluation made them, and compares the digests of question and answer of every record. Texts
are neither printed nor kept: of an item its digests stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.folder import safe_name
from moonbase.evals.records import Record, digest
from moonbase.evals.suite import Suite, TaskSpec

SETS = ("builtin:bfcl", "builtin:benign-tools", "builtin:choices", "builtin:gsm8k", "builtin:humaneval",
        "builtin:mmlu-pro", "builtin:paired-politics")
"""Tasks of ours whose items are read from files, besides every `file:` one."""
LONGEST_SALT = 4096


def of_a_set(spec: TaskSpec) -> bool:
    """Whether a task's items come from a file that a verifier can have, too."""
    return spec.source.startswith("file:") or spec.source in SETS


def read_salt(path: Path) -> bytes:
    """The salt of withheld digests, where the publisher gave it (private/salt of the evaluation). Raises UserError."""
    try:
        with path.open("rb") as file:
            salt = file.read(LONGEST_SALT + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not 16 <= len(salt) <= LONGEST_SALT:
        raise UserError(f"{path}: not the salt of an evaluation (private/salt in its folder)")
    return salt


class Copies:
    """Checks one record at a time; `compared` and `other` count the records of each task."""

    def __init__(self, suite: Suite, plan: dict[str, Any], data: Path | None, salt: bytes = b"") -> None:
        self.compared: Counter[str] = Counter()
        self.salted: Counter[str] = Counter()
        """Records whose digests have a salt that was not given."""
        self.missing: dict[str, str] = {}
        """Task to why its set was not read, in one line."""
        self.tasks = {spec.name for spec in suite.tasks if of_a_set(spec)}
        self._salt = salt
        self._known: dict[str, dict[tuple[Any, ...], tuple[str, str, str, str]]] = {}
        for spec in suite.tasks if data is not None else ():
            if of_a_set(spec):
                try:
                    self._known[spec.name] = dict(_digests(suite, spec, plan, data, salt))
                except ImportError:
                    self.missing[spec.name] = 'making its items again needs Inspect (pip install "moonbase[evals]")'
                except UserError as error:
                    self.missing[spec.name] = str(error)

    def check(self, record: Record) -> list[str]:
        """What is wrong with a record's question and answer, each in one line."""
        known, salted = self._known.get(record.task), record.input_digest.startswith("hmac-")
        if salted and not self._salt:
            self.salted[record.task] += 1
            return []
        if known is None:
            return []
        found = known.get(_key(record.item, record.condition)) or known.get(_key(record.item, {}))
        if found is None:
            return [f"its item is not in your copy of the set of {clean(record.task, 60)}"]
        self.compared[record.task] += 1
        question, answer = (found[1], found[3]) if salted else (found[0], found[2])
        problems = []
        if record.input_digest != question:
            problems.append("it was asked something else than your copy of the set has")
        if record.target_digest is not None and record.target_digest != answer:
            problems.append("its right answer is not the one of your copy of the set")
        return problems


def _digests(suite: Suite, spec: TaskSpec, plan: dict[str, Any], data: Path, salt: bytes,
             ) -> Iterator[tuple[tuple[Any, ...], tuple[str, str, str, str]]]:
    """Item and condition, and the digests of question and answer, each plain and with the salt. Raises UserError."""
    from moonbase.evals.collect import input_of
    from moonbase.evals.tasks import build_tasks

    _refuse_paths(spec)
    # Who judges and how stored answers are found is nothing that the items depend on.
    params = {name: value for name, value in spec.params.items() if name != "replay_key"}
    spec = spec.model_copy(update={"params": params})
    suite = suite.model_copy(update={"judges": ("rules",), "tasks": (spec,)})
    limit = plan.get("limit") if isinstance(plan.get("limit"), int) else None
    models = plan.get("models") if isinstance(plan.get("models"), list) else []
    for stored in sorted({str(model).startswith("replay/") for model in models}):
        if stored and spec.stored is None:
            continue
        try:
            tasks = build_tasks(suite, data, plan.get("seed", 0), limit, stored=spec.stored if stored else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"its items cannot be made by what the suite says ({type(error).__name__})") from None
        for sample in (sample for task in tasks for sample in task.dataset):
            asked = sample.input if isinstance(sample.input, str) else input_of({"input": [
                message.model_dump(mode="json", exclude_none=True) for message in sample.input]})
            facts = sample.metadata or {}
            yield (_key(str(facts.get("item", sample.id)), facts.get("condition") or {}),
                   (digest(asked), digest(asked, salt), digest(sample.target), digest(sample.target, salt)))


def _refuse_paths(spec: TaskSpec) -> None:
    """Raises UserError where a stranger's suite names files outside of the folder of sets."""
    names = [spec.params.get(name) for name in ("file", "folder")]
    names += [name for name in spec.params.get("sha256", {}) if isinstance(spec.params["sha256"], dict)]
    for name in names:
        if name is not None and not (isinstance(name, str) and safe_name(name)):
            raise UserError(f"the suite names a file outside of the data folder: {clean(name, 60)!r}")


def _key(item: str, condition: dict[str, Any]) -> tuple[Any, ...]:
    return item, tuple(sorted((name, str(value)) for name, value in condition.items()))
