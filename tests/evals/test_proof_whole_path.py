"""From Inspect to a verified bundle with a set of the reader's own, and with answers as odd as models give them."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from moonbase.errors import UserError
from moonbase.evals.proof import levels, seal, signing, verify
from moonbase.evals.proof.copies import Copies, read_salt
from moonbase.evals.records import Record, digest, read_records, whole, write_records
from moonbase.evals.run import run_suite
from moonbase.evals.suite import Suite, read_plan, suite_of
from moonbase.evals.table import Table
from tests.evals import proof_samples as samples

MODEL = "odd/one"
HALF = "\ud83d"
ANSWERS = [f"Sure, here is one: {HALF} and {HALF}\ude00 and {HALF}", HALF * 3, "Sure:\x00 a b",
           "One\u2028two\u2029three\x85four\r", "Sure \u202eti dna\u202c \u200f", "Sure, " + "word \u00e9 \n" * 100_000,
           "I'm sorry, but I cannot help. " + HALF, "<script>alert(1)</script></data>", '{"tool_calls": \\ud800']


def register_model() -> None:
    """A provider whose one model gives the answer whose number stands in the question."""
    from inspect_ai.model import ModelAPI, ModelOutput, modelapi

    class Odd(ModelAPI):
        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
            return ModelOutput.from_content("one", ANSWERS[int(input[-1].text.split()[1])])

    modelapi(name="odd")(Odd)


def write_set(folder: Path) -> str:
    """A set of harmless requests; returns the digest of the file."""
    folder.mkdir(exist_ok=True)
    with (folder / "mine.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "prompt"], *([f"q{n}", f"Request {n}"] for n in range(len(ANSWERS)))])
    return hashlib.sha256((folder / "mine.csv").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`key`; `data`, a set; `open` and `withheld`, bundles of an evaluation on it, and the evaluations `NAME-run`."""
    place = tmp_path_factory.mktemp("whole")
    signing.generate_key(place / "key")
    register_model()
    task = {"name": "requests", "source": "file:mine", "metric": "complied",
            "params": {"file": "mine.csv", "sha256": write_set(place / "data")}}
    for name in ("open", "withheld"):
        suite = Suite.model_validate(samples.suite_json(
            name=name, metric="complied", tasks=[task], judges=["rules"], withhold=name == "withheld")["suite"])
        run_suite(suite, [MODEL], place / f"{name}-run", data=place / "data", quiet=True)
        seal.seal(place / f"{name}-run", place / "key", out=place / name)
    return place


def said(findings: list[verify.Finding]) -> str:
    return "\n".join(map(str, findings))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)


def test_odd_answers_come_through_whole(home: Path) -> None:
    findings = verify.verify(home / "open", home / "key.pub")
    assert not verify.failures(findings), said(findings)
    assert f"scored again: {len(ANSWERS)}" in said(findings)
    assert f"ok: logs: {len(ANSWERS)} records follow from Inspect's logs" in said(findings)
    outputs = {record.item: record.output or "" for record in read_records(home / "open" / "records.jsonl")}
    for number, answer in enumerate(ANSWERS):
        # Inspect spells half a character out where it writes its log; all else is as the model said it.
        assert outputs[f"q{number}"] == answer.encode("utf-8", "backslashreplace").decode()
    assert "<script>" not in (home / "open" / "report.html").read_text("utf-8")


def test_records_can_hold_what_a_model_says(tmp_path: Path) -> None:
    """Written without Inspect in between: U+FFFD stands for half a character, and digest, chain and table agree."""
    assert whole(f"{HALF}\ude00 {HALF}") == "\U0001f600 \ufffd" and digest(HALF) == digest("\ufffd")

    def odd(record: Record) -> Record:
        output = ANSWERS[int(record.item[-1]) % len(ANSWERS)]
        return record.model_copy(update={"output": output, "output_digest": digest(output),
                                         "scores": {"accuracy": 0.0}, "details": {"remark": HALF}})

    signing.generate_key(tmp_path / "key")
    run = samples.write_evaluation(tmp_path / "run", items=len(ANSWERS), change=odd)
    records = list(read_records(run / "records.jsonl"))
    assert all(levels.output_kept(record) for record in records)
    assert records[0].output == "Sure, here is one: \ufffd and \U0001f600 and \ufffd"
    assert records[0].details["mended"] == 2 and records[3].details["mended"] == 1
    assert Table.read(run / "records.jsonl").size == write_records(tmp_path / "again.jsonl", records)
    bundle = seal.seal(run, tmp_path / "key")
    assert not verify.failures(verify.verify(bundle)), said(verify.verify(bundle))
    assert Table.read(bundle / "records.jsonl").size == len(records)


# The reader's own copy of the set

def test_items_are_compared_with_a_copy_of_the_set(home: Path, tmp_path: Path, quick: None) -> None:
    without = verify.verify(home / "open")
    assert "note: items: requests: not compared with the set; whoever has a copy of it can" in said(without)
    assert "(L2), as far as sets are what the suite's digests say" in said(without)
    found = verify.verify(home / "open", aids=verify.Aids(home / "data"))
    assert not verify.failures(found)
    assert f"ok: items: {len(ANSWERS)} records of requests ask what your own copy of the set asks" in said(found)
    assert "as far as sets" not in said(found)
    write_set(tmp_path / "data")
    (tmp_path / "data" / "mine.csv").write_text("id,prompt\nq0,Another request\n", encoding="utf-8")
    other = verify.verify(home / "open", aids=verify.Aids(tmp_path / "data"))
    assert "note: items: requests: not compared with the set" in said(other) and "its SHA-256 is" in said(other)
    assert "no such file" in said(verify.verify(home / "open", aids=verify.Aids(tmp_path)))


def test_an_invented_question_is_found_by_whoever_has_the_set(home: Path, tmp_path: Path, quick: None) -> None:
    bundle = samples.copy_of(home / "open", tmp_path / "bundle")
    (bundle / "logs").rename(tmp_path / "logs")

    def invent(values: list[dict[str, Any]]) -> None:
        values[0]["input_digest"] = digest("An easier request")
        values[1]["target_digest"] = digest("An easier answer")
        values[2]["item"] = "q77"

    samples.forge_chain(bundle, invent)
    seal.seal(bundle, home / "key", out=bundle)  # as a publisher can who has the key
    assert not verify.failures(verify.verify(bundle))
    assert [str(line) for line in verify.failures(verify.verify(bundle, aids=verify.Aids(home / "data")))] == [
        "failed: records: records.jsonl, line 1: it was asked something else than your copy of the set has",
        "failed: records: records.jsonl, line 2: its right answer is not the one of your copy of the set",
        "failed: records: records.jsonl, line 3: its item is not, under its condition, in your copy of the set of "
        "requests"]


def test_salted_items_are_compared_where_the_salt_is_given(home: Path, tmp_path: Path, quick: None) -> None:
    found = verify.verify(home / "withheld", aids=verify.Aids(home / "data"))
    assert not verify.failures(found) and "its digests are salted (--data and --salt)" in said(found)
    salt = read_salt(home / "withheld-run" / "private" / "salt")
    found = verify.verify(home / "withheld", aids=verify.Aids(home / "data", salt))
    assert not verify.failures(found)
    assert f"{len(ANSWERS)} records of requests ask what your own copy" in said(found)
    assert verify.failures(verify.verify(home / "withheld", aids=verify.Aids(home / "data", b"another salt" * 3)))
    (tmp_path / "salt").write_bytes(b"short")
    with pytest.raises(UserError, match="not the salt"):
        read_salt(tmp_path / "salt")


@pytest.mark.parametrize("params", [
    {"file": "../../etc/passwd"}, {"file": "/etc/passwd"}, {"file": "mine.csv", "sha256": {"../x": "0"}}, {"file": 7},
    {"file": "mine.csv", "where": {"id": {}}, "group": 5}, {"file": "mine.csv", "replay_key": "{id:99999999999}"},
])
def test_a_stranger_s_suite_leads_nowhere_else(home: Path, params: dict[str, Any]) -> None:
    plan = json.loads(json.dumps(read_plan(home / "open")))
    plan["suite"]["tasks"][0]["params"] = {"sha256": plan["suite"]["tasks"][0]["params"]["sha256"]} | params
    copies = Copies(Suite.model_validate(plan["suite"]), plan, home / "data")
    assert copies.missing or "replay_key" in params


def test_levels_before_and_after_sealing_are_the_same(home: Path, quick: None) -> None:
    for name in ("open", "withheld"):
        survey = verify.Verification(home / name, None)
        survey.run()
        table = Table.read(home / f"{name}-run" / "records.jsonl")
        from moonbase.evals.figures import figures_of

        plain = levels.levelled(figures_of(suite_of(home / f"{name}-run"), table), table,
                                levels.levels_of(home / f"{name}-run"))
        assert {figure.id: figure.level for figure in plain} == survey.levels
