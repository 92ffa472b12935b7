"""The items of public sets against the verifier's own copies of them: what a record says was asked, was it?

A suite names a set by its SHA-256, which proves nothing to whoever does not have the set. Whoever has it makes the
items again here, as the evaluation made them, twins with other numbers among them, and compares the digests of question
and answer of every record, and what it is filed under: condition, group, cluster. Sets of our own everybody has. Texts
are neither printed nor kept: of an item its digests stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.folder import safe_name
from moonbase.evals.proof.levels import Sources
from moonbase.evals.records import ModelCall, Record, digest
from moonbase.evals.suite import Suite, TaskSpec

if TYPE_CHECKING:
    from moonbase.evals.proof.rescoring import Rescorer
    from moonbase.evals.providers.stored import StoredAnswer

SETS = ("builtin:bfcl", "builtin:benign-tools", "builtin:choices", "builtin:gsm8k", "builtin:humaneval",
        "builtin:mmlu-pro", "builtin:paired-politics", "builtin:public-twins")
"""Tasks of ours whose items are made of files, besides every `file:` one."""
OURS = ("builtin:alarming-words", "builtin:paired-states")
"""Sets that come with moonbase."""
LONGEST_SALT = 4096


def of_a_set(spec: TaskSpec) -> bool:
    """Whether a task's items come from a file that a verifier can have, or has."""
    return spec.source.startswith("file:") or spec.source in SETS + OURS


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


@dataclass(frozen=True, slots=True)
class Item:
    """What stays of one: the digests of question and answer, each plain and with the salt."""

    question: tuple[str, str]
    answer: tuple[str, str]
    group: str | None
    cluster: str
    key: str | None
    """Of stored answers to it."""


class Copies:
    """Checks one record at a time; `compared` counts those of each task that were."""

    def __init__(self, suite: Suite, plan: dict[str, Any], data: Path | None, salt: bytes = b"",
                 rescorer: Rescorer | None = None) -> None:
        """`rescorer`: which counts what is scored again here, too: stored answers whose texts are withheld."""
        from moonbase.evals.proof.rescoring import Rescorer  # It needs `settled`, which needs what is here.

        self.compared: Counter[str] = Counter()
        self.salted: Counter[str] = Counter()
        """Records whose digests have a salt that was not given."""
        self.missing: dict[str, str] = {}
        """Task to why its set was not read, in one line."""
        self.unstored: dict[str, dict[str, str]] = {}
        """Task to the models that repeat stored answers which the reader has no copy of, and why."""
        self.tasks = {spec.name for spec in suite.tasks if of_a_set(spec)}
        self.ours = {spec.name for spec in suite.tasks if spec.source in OURS}
        self._data, self._salt = data, salt
        self._judged: dict[str, bool] = {}
        """Whether the first answer of a replayed model has stored votes."""
        self._known: dict[str, dict[tuple[Any, ...], Item]] = {}
        self._questions: Counter[tuple[str, bool]] = Counter()
        """Of a task, and whether they are those of which answers were stored."""
        self._samples = suite.samples
        self._rescorer = rescorer or Rescorer(Sources(plan))
        for spec in suite.tasks:
            if spec.source in OURS or (data is not None and of_a_set(spec)):
                try:
                    known: dict[tuple[Any, ...], Item] = {}
                    for stored, key, item in _digests(suite, spec, plan, data, salt):
                        known[key] = item
                        self._questions[spec.name, stored] += 1
                    self._known[spec.name] = known
                except ImportError:
                    self.missing[spec.name] = 'making its items again needs Inspect (pip install "moonbase[evals]")'
                except UserError as error:
                    self.missing[spec.name] = str(error)

    def check(self, record: Record) -> list[str]:
        """What is wrong with a record's question and answer, each in one line."""
        known, salted = self._known.get(record.task), record.input_digest.startswith("hmac-")
        unreadable = salted and not self._salt
        self.salted[record.task] += unreadable
        if known is None:
            return []
        item = known.get(_key(record.item, record.condition))
        if item is None:
            return [f"its item is not, under its condition, in {self._whose(record.task)} of {clean(record.task, 60)}"]
        problems = [f"{name} {clean(stated, 60)!r} is not the item's" for name, stated, found in (
            ("group", record.group, item.group), ("cluster", record.cluster, item.cluster)) if stated != found]
        if unreadable:
            return problems
        self.compared[record.task] += 1
        if record.input_digest != item.question[salted]:
            problems.append(f"it was asked something else than {self._whose(record.task)} has")
        if record.target_digest != item.answer[salted]:
            problems.append(f"its right answer is not the one of {self._whose(record.task)}")
        if record.model.startswith("replay/") and self._data is not None:
            problems += self._stored(record, item, self._salt if salted else b"")
        return problems

    def _stored(self, record: Record, item: Item, salt: bytes) -> list[str]:
        """An answer that was stored earlier, and what was said of it then, against the reader's own copy of them."""
        from moonbase.evals.providers.stored import find_answers, find_verdicts

        try:
            answers = find_answers(record.model.removeprefix("replay/"), self._data)
            verdicts = find_verdicts(answers.dataset, answers.model, self._data)
        except UserError as error:
            self.unstored.setdefault(record.task, {}).setdefault(record.model, str(error))
            return []
        try:
            answer = None if item.key is None else answers.of_key(item.key)
        except UserError:
            answer = None
        if answer is None:
            failed = record.status == "error" and record.output_digest == digest("", salt)
            return [] if failed else ["your copy has no stored answer to it"]
        if record.output_digest not in {digest(text, salt) for text in (answer.text, _logged(answer.text))}:
            return ["its answer is not the stored one of your copy"]
        problems = _other_call(record, answer) + self._verdicts(record, item.key, verdicts)
        # Nobody else can score what is withheld; of what is not, the text is in the record.
        if record.output is None and record.status != "error":
            problems += self._rescorer.check_answer(record, answer.text, item.answer[0])
        return problems

    def _verdicts(self, record: Record, key: str, verdicts: dict[str, dict[str, str]]) -> list[str]:
        from moonbase.evals.proof.settled import without_answer
        from moonbase.evals.providers.stored import ANSWER_FAILED

        votes = dict.fromkeys(judge for said in verdicts.values() for judge in said) | verdicts.get(key, {})
        stated = {name: vote for name, vote in record.votes.items() if name.startswith("stored:")}
        # The publisher may have had the answers and not the verdicts; then no answer of that model has any.
        if not self._judged.setdefault(record.model, bool(stated) or record.status == "error"):
            votes = {}
        if ANSWER_FAILED in votes.values():
            return [] if record.status == "error" else ["its stored answer is the failure of a host"]
        if without_answer(record):
            named = "an error" if record.status == "error" else "too long"
            return [f"it is called {named}, but its stored answer is none"]
        return [] if stated == votes else ["the stored votes are not those of your copy"]

    def said(self, task: str) -> tuple[str, str]:
        """What level 2 of a task rests on: `ok` or `note`, and a line."""
        name = clean(task, 60)
        if absent := self.unstored.get(task):
            # The error names the model.
            return "note", f"{name}: the answers of {len(absent)} of its models are not compared with stored ones: " \
                           f"{clean(min(absent.values()), 300)}"
        if self.compared[task]:
            whose = "our own set" if task in self.ours else "your own copy of the set"
            return "ok", f"{self.compared[task]} records of {name} ask what {whose} asks"
        if self.salted[task]:
            return "note", f"{name}: not compared with the set: its digests are salted (--data and --salt)"
        if task in self.missing:
            return "note", f"{name}: not compared with the set: {clean(self.missing[task], 300)}"
        return "note", f"{name}: not compared with the set; whoever has a copy of it can (--data)"

    def asked(self, task: str, model: str) -> int | None:
        """How many samples the set asks of a model, each question under every condition; None where nobody knows."""
        stored = model.startswith("replay/")
        questions = self._questions.get((task, stored)) if task in self._known else None
        return None if questions is None else questions * (1 if stored else self._samples)

    def _whose(self, task: str) -> str:
        return "our own set" if task in self.ours else "your copy of the set"


def _digests(suite: Suite, spec: TaskSpec, plan: dict[str, Any], data: Path | None, salt: bytes,
             ) -> Iterator[tuple[bool, tuple[Any, ...], Item]]:
    """Whether it is of those of which answers were stored, item with condition, and what it is. Raises UserError."""
    from moonbase.evals.collect import input_of
    from moonbase.evals.tasks import build_tasks

    _refuse_paths(spec)
    # Who judges is nothing that the items depend on.
    suite = suite.model_copy(update={"judges": ("rules",), "tasks": (spec,)})
    limit = plan.get("limit") if isinstance(plan.get("limit"), int) else None
    models = plan.get("models") if isinstance(plan.get("models"), list) else []
    for stored in sorted({str(model).startswith("replay/") for model in models} or {False}):
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
            yield (stored, _key(str(facts.get("item", sample.id)), facts.get("condition") or {}),
                   Item((digest(asked), digest(asked, salt)), (digest(sample.target), digest(sample.target, salt)),
                        facts.get("group"), str(facts.get("cluster") or ""), facts.get("replay_key")))


def _refuse_paths(spec: TaskSpec) -> None:
    """Raises UserError where a stranger's suite names files outside of the folder of sets, or would have a key of
    stored answers filled in by more than the item's id."""
    names = [spec.params.get(name) for name in ("file", "folder")]
    names += [name for name in spec.params.get("sha256", {}) if isinstance(spec.params["sha256"], dict)]
    for name in names:
        if name is not None and not (isinstance(name, str) and safe_name(name)):
            raise UserError(f"the suite names a file outside of the data folder: {clean(name, 60)!r}")
    key = spec.params.get("replay_key", "")
    if not isinstance(key, str) or {"{", "}"} & set(key.replace("{id}", "")):
        raise UserError(f"the suite finds stored answers by {clean(key, 60)!r}; {{id}} alone may stand in braces")


def _logged(text: str) -> str:
    """A text as Inspect's logs have it, which spell halves of characters out."""
    return text.encode(errors="backslashreplace").decode()


def _other_call(record: Record, answer: StoredAnswer) -> list[str]:
    """What a record says of the call that made an answer, against what was stored with it."""
    from moonbase.evals.providers.replay_api import STOP_REASONS

    told = ModelCall(provider=answer.provider or "replay", fingerprint=answer.fingerprint,
                     stop_reason=STOP_REASONS.get(answer.stop_reason, "unknown"),
                     api_signal="content_filter" if answer.stop_reason == "content_filter" else None)
    stated = record.call.model_copy(update={"decoding": {}})
    other = [name for name, value in told if getattr(stated, name) != value]
    other += [name for name in ("input_tokens", "output_tokens", "reasoning_tokens")
              if getattr(record, name) != getattr(answer, name)]
    return [f"its {other[0]} is not the one that was stored with the answer of your copy"] if other else []


def _key(item: str, condition: dict[str, Any]) -> tuple[Any, ...]:
    return item, tuple(sorted((name, str(value)) for name, value in condition.items()))
