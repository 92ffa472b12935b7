"""Answers that are scored again from a record alone: honest ones however odd, and scores that nobody earned."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moonbase.evals.fresh import generate, verify
from moonbase.evals.proof import levels, rescoring
from moonbase.evals.records import ModelCall, Record, digest
from moonbase.evals.refusal.rules import label
from moonbase.evals.short_answers import as_target, letter_in, number_in, targets
from moonbase.evals.suite import Suite

TASKS = {"numbers": "builtin:gsm8k", "letters": "builtin:mmlu-pro", "acts": "builtin:benign-tools",
         "requests": "file:requests", "sums": "builtin:fresh/maths"}
PLAN = {"suite": {"name": "s", "tasks": [{"name": name, "source": source} for name, source in TASKS.items()]},
        "models": ["m"], "seed": 7}
YES = "Sure, here it is: a short text of two sentences, as you asked. It is done."
LONG = "1234567890123456789012345.678"


def record(task: str, answer: str, **fields: Any) -> Record:
    return Record(**{"suite": "s", "task": task, "item": "1", "model": "m", "input_digest": digest("q"),
                     "output": answer, "output_digest": digest(answer), "target_digest": digest("")} | fields)


def read(task: str, answer: str, target: str, scored: str | None = None, **fields: Any) -> Record:
    """As `exact_scorer` scores it; `scored`: the text as it was then, where Inspect wrote another."""
    reader: Callable[[str], Any] = {"numbers": number_in, "letters": letter_in}[task]
    found = reader(answer if scored is None else scored)
    return record(task, answer, target_digest=digest(target), details={
        "extracted": None if found is None else str(found)}, scores={
        "accuracy": float(found is not None and found == reader(target))}, **fields)


def problems(found: Record) -> list[str]:
    return rescoring.Rescorer(levels.Sources(PLAN)).check(found)


def calling(text: str, *calls: Any) -> str:
    """An answer that also called tools, as it is kept."""
    return json.dumps({"text": text, "tool_calls": list(calls)}, sort_keys=True, ensure_ascii=False)


CALL = {"name": "pay", "arguments": {"sum": 5}}


@pytest.mark.parametrize("answer", [
    f"The total is {LONG}", "3333333333333333333333333.33", "9" * 40 + ".5", "0." + "1" * 60, "9" * 100_000, "-0",
    "#### -0", "#### -0.00", "####  -$5", "#### 1,2,3", "\u0663\u0664", "#### 5.10", "nothing"], ids=range(13))
@pytest.mark.parametrize("target", ["#### 5", "#### 0", "#### 1,234", f"#### {LONG}"])
def test_whatever_number_an_answer_settles_on_is_read_again(answer: str, target: str) -> None:
    honest = read("numbers", answer, target)
    assert problems(honest) == []
    forged = honest.model_copy(update={"scores": {"accuracy": 1 - honest.scores["accuracy"]}})
    assert "scored again" in problems(forged)[0]


def test_a_number_of_a_million_digits_is_none() -> None:
    assert number_in("#### " + "9" * 1_000_001) is None


@pytest.mark.parametrize(("written", "number"), [
    ("5%", "5"), ("12 apples", "12"), ("5.", "5"), ("05", "5"), ("3.000", "3"), ("-0", "0"), ("1e", "1"),
    ("1,234", "1,234"), ("7.50", "7.50"), ("$8", "$8"), ("$1,200.00", "$1,200.00"), (LONG, LONG), ("none", "none")])
def test_a_set_that_writes_its_numbers_otherwise_has_them_written_anew(written: str, number: str) -> None:
    """Those of GSM8K stay as they are: the digests of its answers are in bundles."""
    target = as_target(f"#### {written}", number_in)
    assert target == f"#### {number}" and number_in(target) == number_in(f"#### {written}")
    for answer in ("#### 5", f"#### {written}", "I do not know."):
        assert problems(read("numbers", answer, target)) == []


def test_what_a_set_writes_is_loaded_so(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    from moonbase.evals.tasks import build_task

    rows = {"builtin:gsm8k": [{"question": "How many?", "answer": "Think.\n#### 05 apples"}],
            "builtin:mmlu-pro": [{"question_id": 1, "question": "Which?", "options": ["x", "y"], "answer": "b",
                                  "category": "c"}]}
    for source, wanted in (("builtin:gsm8k", "#### 5"), ("builtin:mmlu-pro", "The answer is (B).")):
        content = "".join(json.dumps(row) + "\n" for row in rows[source]).encode()
        (tmp_path / "rows.jsonl").write_bytes(content)
        suite = Suite.model_validate({
            "schema": "moonbase.suite/1", "name": "s", "title": "s", "metric": "accuracy", "tasks": [{
                "name": "t", "source": source, "params": {
                    "file": "rows.jsonl", "sha256": hashlib.sha256(content).hexdigest()}}]})
        (task,) = build_task(suite, suite.tasks[0], tmp_path, 0, None, False, {})
        assert [sample.target for sample in task.dataset] == [wanted]


@pytest.mark.parametrize("found", [LONG, "-12.5", "0.0000001", "1E+3", "1200", "7.125", "-0"])
def test_spellings_of_a_number_are_that_number(found: str) -> None:
    number = Decimal(found)
    spelled = targets(number)
    assert spelled and {number_in(one) for one in spelled} == {number}


SALTED = "hmac-sha256:" + "0" * 64


@pytest.mark.parametrize("kind", ["x", "", SALTED, "sha256:", "sha256:" + "A" * 64, "sha256:" + "0" * 63, None])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_right_answer_has_a_digest_of_the_kind_that_its_answer_has(kind: str | None, score: float) -> None:
    """Nothing could be compared with another one: every score would pass."""
    right = read("letters", "The answer is (B).", "The answer is (B).")
    assert problems(right.model_copy(update={"target_digest": kind, "scores": {"accuracy": score}}))


@pytest.mark.parametrize("task", TASKS)
def test_a_question_has_a_digest_of_the_kind_that_its_answer_has(task: str) -> None:
    found = problems(record(task, YES, input_digest=SALTED, details={"extracted": None}, scores={"accuracy": 0.0}))
    assert any(line.startswith("its question's digest is 'hmac-") for line in found)


def test_what_is_withheld_of_invented_items_is_no_forgery() -> None:
    item = generate("maths", 7, 1, 0, "en").item
    honest = record("sums", YES, item=item, output=None, input_digest=SALTED, target_digest=SALTED,
                    output_digest=SALTED, scores={"accuracy": 1.0})
    assert problems(honest) == []
    assert problems(honest.model_copy(update={"target_digest": digest("5")}))


LOOKS = [calling("#### 5"), calling("#### 7", "#### 5"), calling("#### 5", CALL)[:-1] + " }",
         '{"text": 5, "tool_calls": [{"arguments": {}, "name": "a"}]}', calling("#### 5", CALL | {"id": 1}),
         calling("#### 5", CALL).replace('"sum": 5', '"sum":5'), '{"text": "#### 5", "tool_calls": \\ud800']


@pytest.mark.parametrize("answer", LOOKS)
def test_an_answer_that_looks_like_calls_is_read_as_it_is(answer: str) -> None:
    for stop in ("stop", "tool_calls", None):
        assert problems(read("numbers", answer, "#### 5", call=ModelCall(stop_reason=stop))) == []
        said = label(answer, stop_reason=stop).label
        assert problems(record("requests", answer, votes={"rules": said}, call=ModelCall(stop_reason=stop))) == []
        # They are no act, where one was asked for.
        said = "partial" if said == "full" else said
        assert problems(record("acts", answer, votes={"rules": said}, call=ModelCall(stop_reason=stop))) == []


def test_an_answer_that_called_tools_is_read_by_its_words() -> None:
    for text, call, stop in itertools.product(("#### 5", "#### 7", f"{YES} \\ud83d"), (CALL, CALL | {"arguments": {}}),
                                              ("stop", "tool_calls", "max_tokens", None)):
        kept, made = calling(text, call), ModelCall(stop_reason=stop)
        assert problems(read("numbers", kept, "#### 5", scored=text, call=made)) == []
        assert problems(record("acts", kept, votes={"rules": "full"}, call=made)) == []
        assert problems(record("requests", kept, votes={"rules": label(text).label}, call=made)) == []
    # Letter by letter the same, but said: whoever has the record cannot know, unless the host said which.
    for stop, known in (("stop", False), ("tool_calls", True)):
        found = problems(read("numbers", calling("I pay.", CALL), "#### 5", call=ModelCall(stop_reason=stop)))
        assert bool(found) == known


def test_no_text_is_too_odd_to_be_scored_again() -> None:
    """Halves of characters come to life where a log spells them out, in words that a model may have spelled itself."""
    parts = ["\\ud83d", "\\ude00", "#### ", "12", "-", ".5", '{"a": "\\ud800"}', "|", "\x00", "\u2028", "\u00bd",
             "9" * 40]
    odd = ["".join(one) for one in itertools.permutations(parts, 2)]
    items = [generate(family, 7, 3, 0, "zh") for family in ("maths", "logic", "tables", "long", "tools")]
    for text in odd:
        for one in rescoring.spellings(text):
            label(one)
            targets(number_in(one))
            letter_in(one)
            for item in items:
                verify(item, one)
