"""Stored answers against the reader's own copy of them: what a model that only repeats them can be made to say.

Everything is written by Inspect from sets that are made here; every forgery changes some of the records.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from moonbase.evals.proof import levels, rescoring
from moonbase.evals.proof.copies import Copies, read_salt
from moonbase.evals.proof.settled import Settled
from moonbase.evals.records import Record, digest, read_records
from moonbase.evals.run import run_suite
from moonbase.evals.suite import Suite, read_plan, suite_of

YES, NO = "Sure, here it is: a short text of two sentences, as you asked. It is done.", "I'm sorry, but I cannot help."
HALF = f"{YES} \ud83d"
STORED = {"c/1": (YES, "COMPLETE"), "c/2": (NO, "DENIAL"), "c/3": (HALF, "COMPLETE"), "c/4": ("", None),
          "c/5": ("Blocked by us.", "ERROR_ORIGINAL_MODERATION"), "c/6": (NO, "DENIAL")}
"""Key to the answer and what its judge said."""
LETTERS = {"1": ("Which is even?", ["3", "4"], "B", "The answer is (B)."),
           "2": ("Which is odd?", ["6", "7"], "b", "The answer is (A)."),
           "3": ("Which is even?", ["5", "8"], "B", "I do not know.")}
"""Id to question, options, the right letter as the set writes it, and the stored answer."""
POLITICS, EXACT, RULED = "replay/paired-politics:m", "replay/mmlu-pro:m", "replay/xstest:m"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[list[str]]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def write_data(folder: Path) -> dict[str, str]:
    """Sets and stored answers to them; returns the digests of the sets."""
    choice = {"message": {}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 9}
    files = {
        "requests.jsonl": lines([{"id": key, "prompt": f"Request {key}"} for key in STORED]),
        "letters.jsonl": lines([{"question_id": id, "question": asked, "options": options, "answer": right,
                                 "category": "sums"} for id, (asked, options, right, _) in LETTERS.items()]),
        "ruled.csv": table([["id", "prompt"], ["1", "Request 1"], ["2", "Request 2"]]),
        "xstest/completions/xstest_v2_completions_m.csv.gz": table(
            [["id", "prompt", "completion"], ["v2-1", "Request 1", YES], ["v2-2", "Request 2", NO]]),
        "mmlu-pro-outputs/m_5shots.jsonl.gz": lines([
            {"question_id": id, "question": asked, "output": said} for id, (asked, _, _, said) in LETTERS.items()]),
        "paired-politics/responses/m.jsonl.gz": lines([
            {"category": "c", "question_id": key[2:], "question": f"Request {key}", "response": {
                "provider": "Host", "usage": usage, "choices": [choice | {"message": {"content": said}}]}}
            for key, (said, _) in STORED.items()]),
        "paired-politics/analysis/m.jsonl.gz": lines([
            {"category": "c", "question_id": key[2:], "judge_model": "a/judge", "compliance": verdict}
            for key, (_, verdict) in STORED.items() if verdict])}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return {name: hashlib.sha256(files[name]).hexdigest() for name in files if "/" not in name}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`; `open` and `withheld`: evaluations of models that repeat what lies there."""
    place = tmp_path_factory.mktemp("stored")
    known = write_data(place / "data")

    def task(name: str, source: str, stored: str, file: str, **params: Any) -> dict[str, Any]:
        return {"name": name, "source": source, "stored": stored,
                "params": {"file": file, "sha256": known[file]} | params}

    tasks = [task("letters", "builtin:mmlu-pro", "mmlu-pro", "letters.jsonl"),
             task("requests", "file:requests", "paired-politics", "requests.jsonl"),
             task("ruled", "file:ruled", "xstest", "ruled.csv", replay_key="v2-{id}", prefix="r")]
    for name, models in (("open", [POLITICS, EXACT]), ("withheld", [EXACT, RULED])):
        suite = Suite.model_validate({
            "schema": "moonbase.suite/1", "name": name, "title": name, "metric": "accuracy", "tasks": tasks,
            "judges": ["rules"], "withhold": name == "withheld"})
        run_suite(suite, models, place / name, data=place / "data", quiet=True)
    return place


Change = Callable[[dict[str, Any]], Any]


def checked(home: Path, name: str, change: Change | None = None, data: bool = True) -> tuple[Copies, list[str]]:
    """What is said of the records of an evaluation after each was changed, by all that checks records."""
    suite, plan, salt = suite_of(home / name), read_plan(home / name), b""
    if name == "withheld":
        salt = read_salt(home / name / "private" / "salt")
    copies = Copies(suite, plan, home / "data" if data else None, salt if data else b"")
    checks = (copies.check, rescoring.Rescorer(levels.Sources(plan)).check, Settled(suite).check)
    found = []
    for record in read_records(home / name / "records.jsonl"):
        values = record.canonical()
        if change is not None:
            change(values)
        found += [line for check in checks for line in check(Record.model_validate(values))]
    return copies, found


@pytest.mark.parametrize("name", ["open", "withheld"])
def test_honest_stored_answers_are_the_stored_ones(home: Path, name: str) -> None:
    """Half a character, an answer that is empty, one that is its host's failure, a letter that the set writes small."""
    copies, found = checked(home, name)
    assert found == []
    assert copies.compared == ({"letters": 3, "requests": 6} if name == "open" else {"letters": 3, "ruled": 2})
    for task in copies.compared:
        assert copies.said(task)[0] == "ok"
    assert checked(home, name, data=False)[1] == []


def test_the_runs_are_what_the_tests_take_them_for(home: Path) -> None:
    records = {(record.task, record.item): record for record in read_records(home / "open" / "records.jsonl")}
    assert "\\ud83d" in str(records["requests", "c/3"].output), "Inspect spells half a character out"
    assert [records["letters", id].scores["accuracy"] for id in LETTERS] == [1, 0, 0]
    assert records["requests", "c/5"].status == "error" and records["requests", "c/1"].call.provider == "Host"
    assert all(record.output is None for record in read_records(home / "withheld" / "records.jsonl"))


def failing(values: dict[str, Any], **fields: Any) -> None:
    """Called an error, where the answer was wrong or a refusal."""
    if values["scores"].get("accuracy") == 0 or values["label"] == "refusal":
        values.update({"status": "error", "reason": "down", "scores": {}, "votes": {}, "label": None} | fields)


def flipping(values: dict[str, Any]) -> None:
    """The rules' label turned round, and all that follows from it."""
    if values["label"]:
        label = "refusal" if values["label"] == "full" else "full"
        votes = dict.fromkeys(values["votes"], label)
        values.update(votes=votes, label=label, scores={"complied": float(label == "full"),
                                                        "refused": float(label == "refusal")})


def calling(**fields: Any) -> Change:
    return lambda values: values["call"].update(fields)


def right(values: dict[str, Any], **fields: Any) -> None:
    if "accuracy" in values["scores"]:
        values.update({"scores": {"accuracy": 1.0}} | fields)


TOO_LONG = {"status": "unscored", "reason": "longer than the model's context"}
FORGERIES: dict[str, tuple[str, Change, str]] = {
    "wrong answers called errors": ("open", failing, "called an error, but its stored answer is none"),
    "the same, withheld": ("withheld", failing, "called an error, but its stored answer is none"),
    "wrong answers called too long": ("open", lambda values: failing(values, **TOO_LONG), "too long, but its stored"),
    "the same, withheld, too long": ("withheld", lambda values: failing(values, **TOO_LONG), "too long, but its"),
    "errors without an answer": ("open", lambda values: failing(values, output="", output_digest=digest("")),
                                 "not the stored one"),
    "withheld labels turned round": ("withheld", flipping, "the rules say"),
    "withheld letters called right": ("withheld", right, "scored again, accuracy is 0, the record says 1"),
    "outputs left out": ("open", lambda values: right(values, output=None, details={}), "scored again, accuracy is 0"),
    "a filter of one's own": ("withheld", calling(api_signal="content_filter"), "its api_signal is not the one"),
    "a stop of one's own": ("open", calling(stop_reason="refusal"), "its stop_reason is not the one"),
    "another host": ("open", calling(provider="Other"), "its provider is not the one"),
    "weights of one's own": ("open", calling(weights_digest="sha256:" + "ab" * 32), "its weights_digest is not the"),
    "other tokens": ("open", lambda values: values.update(output_tokens=1), "its output_tokens is not the one"),
    "a verdict turned round": ("open", flipping, "the stored votes are not those of your copy"),
    "a failed answer that counts": ("open", lambda values: values["status"] == "error" and values.update(
        status="scored", reason=None, votes={"rules": "full", "stored:judge": "full"}, label="full",
        scores={"complied": 1.0, "refused": 0.0}), "the failure of a host"),
    "another dataset's model": ("open", lambda values: values["task"] == "letters" and values.update(model=RULED),
                                "your copy has no stored answer to it"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forgery_of_stored_answers_is_named(home: Path, what: str) -> None:
    name, change, words = FORGERIES[what]
    _, found = checked(home, name, change)
    assert any(words in line for line in found), found[:5]


def test_answers_that_the_reader_has_no_copy_of_are_told(home: Path) -> None:
    copies, found = checked(home, "open", lambda values: values.update(model=values["model"] + "-other"))
    assert not any("stored one" in line for line in found)
    status, words = copies.said("letters")
    assert status == "note" and "1 of its models are not compared with stored ones" in words and "is no model" in words


@pytest.mark.parametrize("key", ["{id:>99999999}", "{id.__class__}", "{0}", 7])
def test_a_key_of_stored_answers_is_filled_in_by_the_id_alone(home: Path, key: Any) -> None:
    suite, plan = suite_of(home / "withheld"), read_plan(home / "withheld")
    task = suite.tasks[-1]
    odd = task.model_copy(update={"params": task.params | {"replay_key": key}})
    copies = Copies(suite.model_copy(update={"tasks": (odd,)}), plan, home / "data")
    assert "alone may stand in braces" in copies.missing["ruled"]
