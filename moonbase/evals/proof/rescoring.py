"""Scoring again what needs no judge and runs nothing: the rule set, letters and numbers read out of answers, the
verifiers of fresh items. What needs no answer either, such as the panel's count, is in `settled`.

Answers of the family `code` are programs, and no program out of a bundle is run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from moonbase.errors import UserError
from moonbase.evals import short_answers
from moonbase.evals.proof.canonical import clean
from moonbase.evals.proof.levels import FRESH_ITEM, Sources, fresh_tag, output_kept
from moonbase.evals.proof.settled import ACTS, READERS, RULES, without_answer
from moonbase.evals.records import Record, digest
from moonbase.evals.short_answers import targets

RUNS_ANSWERS = frozenset({"code"})
"""Families whose verifier executes the answer."""
MOST_KEPT, LONGEST_KEPT = 2048, 20_000
"""Items that were made again are at hand for the next model, as long as they are few and their prompts short."""
_MADE: dict[tuple[Any, ...], Any] = {}
_PLAIN = re.compile(r"sha256:[0-9a-f]{64}")
_ESCAPED = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")


class Rescorer:
    """Checks one record at a time; counts what it could check."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.rescored = 0
        self.regenerated = 0

    def check(self, record: Record) -> list[str]:
        """What is wrong with a record, each in one line; nothing: as far as it can be checked it is right."""
        problems: list[str] = []
        if record.output is not None:
            if not output_kept(record):
                problems.append("the output is not the text that its digest is of")
            else:
                problems += _salted(record)
                problems += self.check_answer(record, record.output) if record.status != "error" else []
        if FRESH_ITEM.fullmatch(record.item) and self.sources.seeds:
            problems += self._fresh(record)
        return problems

    def check_answer(self, record: Record, text: str, target: str | None = None) -> list[str]:
        """What is wrong with what is said of an answer whose text is known, be it that the record withholds it.

        `target`: the plain digest of the right answer, where the record's own is salted.
        """
        return self._rules(record, text) + self._reading(record, text, target or record.target_digest)

    def _rules(self, record: Record, text: str) -> list[str]:
        if RULES not in record.votes:
            return []
        from moonbase.evals.refusal.rules import label

        acts, found = self.sources.source(record.task) == ACTS, []
        for words, called in readings(text, record.call.stop_reason):
            said = [label(one, record.condition.get("language", "en"), record.call.api_signal,
                          record.call.stop_reason).label for one in spellings(words)]
            if acts:
                said = ["full"] if called else ["partial" if one == "full" else one for one in said]
            found += said
        self.rescored += 1
        if record.votes[RULES] not in found:
            return [f"the rules say {found[0]!r} of this output, the record {record.votes[RULES]!r}"]
        return []

    def _reading(self, record: Record, text: str, target: str | None) -> list[str]:
        """The letter or number that was read out of the answer, and whether it is the right one."""
        source = self.sources.source(record.task)
        if source not in READERS or without_answer(record):
            return []
        reader: Callable[[str], Any] = getattr(short_answers, READERS[source])
        read = [reader(one) for words, _ in readings(text, record.call.stop_reason) for one in spellings(words)]
        self.rescored += 1
        if "extracted" in record.details:
            stated = record.details["extracted"]
            read = [one for one in read if stated == (None if one is None else str(one))] or read[:1]
            if stated != (None if read[0] is None else str(read[0])):
                return [f"read again, the answer is {clean(read[0], 60)}, the record says {clean(stated, 60)}"]
        elif record.output is not None:
            return ["what was read out of its answer is missing"]
        if target is None:
            return ["the digest of its right answer is missing"]
        right = [target in {digest(one) for one in targets(found)} for found in read]
        score = record.scores.get(self.sources.scored_as(record.task))
        if score not in {float(one) for one in right}:
            return [f"scored again, accuracy is {right[0]:d}, the record says {score}"]
        return []

    def _fresh(self, record: Record) -> list[str]:
        if record.output is None and all(str(one).startswith("hmac-sha256:") for one in (
                record.input_digest, record.target_digest, record.output_digest)):
            return []  # Withheld: nothing of it can be compared, and it is level 0.
        try:
            problem = regenerate(record, self.sources.seeds)
        except UserError as error:
            return [f"its item cannot be made again: {error}"]
        if problem is None:
            return ["its item's id does not belong to the revealed seed"]
        self.regenerated += 1
        # Of an item with a picture the log holds the words of the question only.
        if record.input_digest not in (problem.input_digest, digest(problem.prompt)):
            return ["the item made again from the seed asks something else"]
        if problem.target_digest != record.target_digest:
            return ["the item made again from the seed has another answer"]
        return self._grade(record, problem)

    def _grade(self, record: Record, problem: Any) -> list[str]:
        from moonbase.evals.fresh import verify

        if problem.family in RUNS_ANSWERS or not output_kept(record) or without_answer(record):
            return []
        scores = [verify(problem, one)[0] for words, _ in readings(record.output or "", record.call.stop_reason)
                  for one in spellings(words)]
        stated = record.scores.get(self.sources.scored_as(record.task))
        self.rescored += 1
        if all(score is not None and (stated is None or abs(score - stated) > 1e-9) for score in scores):
            return [f"scored again, accuracy is {scores[0]:g}, the record says {stated}"]
        return []


def _salted(record: Record) -> list[str]:
    """An answer that is there is that of a suite which withholds nothing."""
    return [f"its {name} digest is {clean(stated, 80)!r}, no plain one, and its answer is not withheld"
            for name, stated in (("question's", record.input_digest), ("right answer's", record.target_digest))
            if stated is not None and _PLAIN.fullmatch(stated) is None]


def readings(text: str, stop_reason: str | None) -> list[tuple[str, bool]]:
    """The words of an answer, and whether it also called tools: such a one is kept as a JSON object of both.

    An answer may spell such an object out, letter by letter: then it is either, unless the host says that it calls.
    """
    words = _with_calls(text)
    if words is None:
        return [(text, False)]
    return [(words, True)] if stop_reason == "tool_calls" else [(words, True), (text, False)]


def answer_text(record: Record) -> str:
    """The words of an answer."""
    return readings(record.output or "", record.call.stop_reason)[0][0]


def _with_calls(text: str) -> str | None:
    """The words beside the calls, where a text is just what `collect` makes of such an answer."""
    if not text.startswith('{"text": '):
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or json.dumps(value, sort_keys=True, ensure_ascii=False) != text:
            return None
    except (ValueError, RecursionError):
        return None
    calls = value.get("tool_calls")
    whole = value.keys() == {"text", "tool_calls"} and isinstance(value["text"], str) and isinstance(calls, list)
    named = {"name", "arguments"}
    return value["text"] if whole and calls and all(isinstance(call, dict) and call.keys() == named and isinstance(
        call["name"], str) for call in calls) else None


def spellings(text: str) -> list[str]:
    """An answer as it stands; where half a character was emitted also as it was scored: Inspect writes such halves
    into its logs as `\\ud83d`, after its scorers have read them as they were."""
    if _ESCAPED.search(text) is None:
        return [text]
    return [text, _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)]


def regenerate(record: Record, seeds: tuple[Any, ...]) -> Any:
    """The `Problem` that a record's item was, or None where it comes from none of `seeds`. Raises UserError."""
    match = FRESH_ITEM.fullmatch(record.item)
    seed = next((seed for seed in seeds if match and match["tag"] == fresh_tag(seed)), None)
    if match is None or seed is None:
        return None
    return _generate(match["family"], seed, int(match["difficulty"]), int(match["index"]),
                     record.condition.get("language", "en"))


def _generate(*settings: Any) -> Any:
    from moonbase.evals.fresh import generate

    found = _MADE.get(settings)
    if found is None:
        found = generate(*settings)
        if len(found.prompt) <= LONGEST_KEPT:
            if len(_MADE) >= MOST_KEPT:
                _MADE.clear()
            _MADE[settings] = found
    return found
