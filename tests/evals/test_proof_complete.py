"""Samples that are missing: told when a bundle is sealed, or refused by whoever verifies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from moonbase.errors import UserError
from moonbase.evals import report
from moonbase.evals.proof import manifest, seal, signing, verify
from moonbase.evals.proof.levels import Sources
from moonbase.evals.proof.survey import Survey
from moonbase.evals.records import Record
from tests.evals import proof_samples as samples

COUNT = 3
TASK = {"name": "sums", "source": "builtin:fresh/maths", "params": {"difficulties": [1], "count": COUNT}}
WANTED = 2 * COUNT
"""Of each model: two languages."""


def all_but_one(record: Record) -> Record | None:
    dropped = record.model == "weak" and record.item.endswith("1") and record.condition["language"] == "en"
    return None if dropped else record


def test_sealing_again_throws_no_signature_of_others_away(bundles: Path, tmp_path: Path) -> None:
    bundle = samples.copy_of(bundles / "whole", tmp_path / "bundle")
    (bundle / "challenges").mkdir()
    (bundle / "challenges" / "somebody.dsse.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds 1 signatures of others, such as challenges/somebody.dsse.json"):
        seal.seal(bundles / "run-whole", bundles / "key", out=bundle)
    assert (bundle / "challenges" / "somebody.dsse.json").is_file()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a whole evaluation, and one of which a sample was dropped before it was sealed."""
    place = tmp_path_factory.mktemp("complete")
    signing.generate_key(place / "key")
    for name, change in (("whole", None), ("dropped", all_but_one)):
        with pytest.MonkeyPatch.context() as patch:
            # Reports are none of this test's business.
            patch.setattr(report, "write_report", lambda folder, language: None)
            seal.seal(samples.write_evaluation(place / f"run-{name}", COUNT, change, tasks=[TASK]), place / "key",
                      out=place / name)
    return place


def findings(bundle: Path) -> list[str]:
    checking = verify.Verification(bundle, None)
    checking._check_records()
    checking._check_manifest()
    with checking._checking("complete"):
        checking._check_complete()
    return [str(line) for line in checking.findings if line.status == "failed" or line.check == "complete"]


def test_a_whole_evaluation_says_nothing(bundles: Path) -> None:
    assert findings(bundles / "whole") == []
    assert "missing" not in json.loads((bundles / "whole" / "manifest.json").read_bytes())


@pytest.mark.parametrize(("said", "words"), [
    ({"weak": {"sums": [5, WANTED]}}, "note: complete: weak has 5 of the 6 samples that the suite asks in sums: the "
                                      "manifest says so"),
    ({}, "failed: complete: weak has 5 of the 6 samples that the suite asks in sums, and the manifest does not say so"),
    ({"weak": {"sums": [4, WANTED]}}, "failed: complete: the manifest says that weak has 4 of the 6"),
    ({"weak": {"sums": [5, 9]}}, "failed: complete: the manifest says that weak has 5 of the 9"),
    ({"weak": {"sums": [5, 5]}}, "failed: complete: the manifest says that weak has 5 of the 5"),
    ({"weak": {"sums": [5, WANTED]}, "strong": {"sums": [6, 8]}}, "note: complete: strong has 6 of the 8"),
    ({"weak": {"sums": [5, WANTED]}, "strong": {"sums": [7, 8]}}, "failed: complete: the manifest says that strong"),
    ({"weak": 7}, "failed: complete: could not be checked"),
    ({"weak": {"sums": ["5"]}}, "failed: complete: could not be checked"),
])
def test_what_is_missing_is_told_or_refused(said: dict[str, Any], words: str, bundles: Path, tmp_path: Path) -> None:
    """What else the publisher may say of the sample that he dropped."""
    bundle = samples.copy_of(bundles / "dropped", tmp_path / "bundle")
    facts = json.loads((bundle / "manifest.json").read_bytes())
    assert facts.pop("missing") == {"weak": {"sums": [5, WANTED]}}
    samples.write_canonical(bundle / "manifest.json", facts | ({"missing": said} if said else {}))
    found = findings(bundle)
    assert any(line.startswith(words) for line in found), found


@pytest.mark.parametrize(("commit", "words"), [
    (None, "not made from a commit"), ("c" * 40 + "-dirty", f"of commit {'c' * 40} with changes that are in no commit"),
    ("c" * 40, "")])
def test_the_note_says_whether_there_is_a_commit(commit: str | None, words: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonbase.report.git_commit", lambda: commit)
    checking = verify.Verification(tmp_path, None)
    checking._suite = samples.suite_json()
    checking._survey = Survey(Sources(checking._suite))
    samples.write_canonical(tmp_path / "manifest.json", manifest.build(
        checking._suite, checking._survey, publish=False, missing={}))
    checking._check_manifest()
    notes = [line.message for line in checking.findings if line.status == "note"]
    assert len(notes) == bool(words) and all(words in note for note in notes)
