"""Scoring again what needs no judge and runs nothing: the rule set, letters and numbers read out of answers, the
verifiers of fresh items. What needs no answer either, such as the panel's count, is in `settled`.

Answers of the family `code` are programs, and no program out of a bundle is run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof.levels import FRESH_ITEM, Sources, fresh_tag, output_kept
from moonbase.evals.proof.settled import ACTS, READERS, RULES, without_answer
from moonbase.evals.records import Record, digest

RUNS_ANSWERS = frozenset({"code"})
"""Families whose verifier executes the answer."""
_ESCAPED = re.compile(r"\\u(d[89a-f][0-9a-f]{2})")


class Rescorer:
    """Checks one record at a time; counts what it could check."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.rescored = 0
        self.regenerated = 0
        self._readers: dict[str, Callable[[str], Any] | None] = {}

    def check(self, record: Record) -> list[str]:
        """What is wrong with a record, each in one line; nothing: as far as it can be checked it is right."""
        problems: list[str] = []
        if record.output is not None and not output_kept(record):
            problems.append("the output is not the text that its digest is of")
        elif record.output is not None and record.status != "error":
            problems += self._rules(record) + self._reading(record)
        if FRESH_ITEM.fullmatch(record.item) and self.sources.seeds:
            problems += self._fresh(record)
        return problems

    def _rules(self, record: Record) -> list[str]:
        if RULES not in record.votes:
            return []
        from moonbase.evals.refusal.rules import label

        found = [label(text, record.condition.get("language", "en"), record.call.api_signal,
                       record.call.stop_reason).label for text in spellings(answer_text(record))]
        if self.sources.source(record.task) == ACTS:
            called = record.output is not None and answer_text(record) != record.output
            found = ["full"] if called else ["partial" if one == "full" else one for one in found]
        self.rescored += 1
        if record.votes[RULES] not in found:
            return [f"the rules say {found[0]!r} of this output, the record {record.votes[RULES]!r}"]
        return []

    def _reading(self, record: Record) -> list[str]:
        """The letter or number that was read out of the answer, and whether it is the right one."""
        reader = self._reader(self.sources.source(record.task))
        if reader is None or without_answer(record):
            return []
        if "extracted" not in record.details:
            return ["what was read out of its answer is missing"]
        read, stated = [reader(text) for text in spellings(answer_text(record))], record.details["extracted"]
        found = next((one for one in read if stated == (None if one is None else str(one))), read[0])
        self.rescored += 1
        if stated != (None if found is None else str(found)):
            return [f"read again, the answer is {found}, the record says {stated}"]
        if record.target_digest is None:
            return ["the digest of its right answer is missing"]
        if not record.target_digest.startswith("sha256:"):
            return []
        right = record.target_digest in {digest(target) for target in targets(found)}
        score = record.scores.get(self.sources.scored_as(record.task))
        if score != float(right):
            return [f"scored again, accuracy is {right:d}, the record says {score}"]
        return []

    def _reader(self, source: str) -> Callable[[str], Any] | None:
        if source not in self._readers:
            self._readers[source] = None
            if source in READERS:
                try:
                    from moonbase.evals.tasks import exact
                except ImportError:  # Inspect is not installed: such answers are not read again.
                    return None
                self._readers[source] = getattr(exact, READERS[source])
        return self._readers[source]

    def _fresh(self, record: Record) -> list[str]:
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
        scores = [verify(problem, text)[0] for text in spellings(answer_text(record))]
        stated = record.scores.get(self.sources.scored_as(record.task))
        self.rescored += 1
        if all(score is not None and (stated is None or abs(score - stated) > 1e-9) for score in scores):
            return [f"scored again, accuracy is {scores[0]:g}, the record says {stated}"]
        return []


def targets(found: str | Decimal | None) -> list[str]:
    """How a set can have written the right answer where `found` is it; nothing is right where nothing was found."""
    if found is None:
        return []
    if isinstance(found, str):
        return [f"The answer is ({found})."]
    whole = found == found.to_integral_value()
    numbers = [f"{found:{form}}" for form in ("f", ",f", ".1f", ".2f", ",.2f")[: 5 if whole else 2]]
    numbers += [] if whole else [f"{found:.{places}f}" for places in range(1, 7) if round(found, places) == found]
    return [f"#### {sign}{number}" for number in dict.fromkeys(numbers) for sign in ("", "$")]


def answer_text(record: Record) -> str:
    """The words of an answer; one that also called tools is kept as a JSON object of both."""
    output = record.output or ""
    if output.startswith("{") and '"tool_calls"' in output:
        try:
            value = json.loads(output)
        except (ValueError, RecursionError):
            return output
        if isinstance(value, dict) and value.keys() == {"text", "tool_calls"} and isinstance(value["text"], str):
            return value["text"]
    return output


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


@lru_cache(maxsize=4096)
def _generate(family: str, seed: Any, difficulty: int, index: int, language: str) -> Any:
    from moonbase.evals.fresh import generate

    return generate(family, seed, difficulty, index, language)
