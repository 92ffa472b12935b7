"""The published example: what anyone who has the repository can check, and see refused when it is changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from moonbase.evals.proof.verify import failures, verify

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_published_example_is_accepted_and_a_changed_one_is_not(tmp_path: Path) -> None:
    public = DOCS / "example-bundle.pub"
    assert not failures(verify(DOCS / "example-bundle", public))
    changed = tmp_path / "bundle"
    shutil.copytree(DOCS / "example-bundle", changed)
    records = changed / "records.jsonl"
    records.write_bytes(records.read_bytes().replace(b'"complied":1', b'"complied":0', 1))
    assert {one.check for one in failures(verify(changed, public))} >= {"files", "records", "figures"}
