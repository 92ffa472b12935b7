"""Reading public sets from the user's own copy: the right file or none, and never a text in a message."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from moonbase.errors import UserError
from moonbase.evals.sources import Source, read_rows, read_source, source_of

SECRET = "a text that nobody may see"
ROWS = [{"id": str(number), "prompt": f"{SECRET} {number}", "label": "safe" if number % 2 else "unsafe"}
        for number in range(6)]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    """The file in the format of its name; its SHA-256."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        text = "id,prompt,label\n" + "".join(f'{row["id"]},"{row["prompt"]}",{row["label"]}\n' for row in rows)
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)) + "\n"
    content = gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode()
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["set.csv", "set.csv.gz", "set.jsonl", "set.jsonl.gz", "set.json", "set.json.gz"])
def test_every_format_gives_the_same_items(name: str, tmp_path: Path) -> None:
    sha256 = write(tmp_path / name, ROWS)
    found = list(read_source(Source(name, sha256, group="label", where={"label": "safe"}), tmp_path))
    assert [(item.id, item.prompt, item.group) for item in found] == [
        (row["id"], row["prompt"], "safe") for row in ROWS if row["label"] == "safe"]
    assert SECRET not in repr(found)


def complaint(source: Source, folder: Path | None) -> str:
    with pytest.raises(UserError) as raised:
        list(read_source(source, folder))
    assert SECRET not in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_one_changed_byte_is_another_set(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "set.csv", ROWS)
    content = (tmp_path / "set.csv").read_bytes()
    (tmp_path / "set.csv").write_bytes(content.replace(b"see 3", b"see 4"))
    assert "the suite means " + sha256 in complaint(Source("set.csv", sha256), tmp_path)


def test_a_set_without_a_published_digest_is_not_taken_on_trust(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "set.csv", ROWS)
    assert f"sha256: {sha256}" in complaint(Source("set.csv"), tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = Source("set.csv", "0" * 64, homepage="https://example.org/set")
    assert "--data" in complaint(source, None)
    assert "https://example.org/set" in complaint(source, tmp_path)
    sha256 = write(tmp_path / "set.csv", ROWS)
    assert "row 1: no column 'question'" in complaint(Source("set.csv", sha256, prompt="question"), tmp_path)
    with pytest.raises(UserError, match="params need `file`"):
        source_of({"sha256": "x"}, "suite s, task t")


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    sha256 = write(tmp_path / "set.jsonl", [*ROWS, ROWS[2]])
    assert "the id '2' comes twice" in complaint(Source("set.jsonl", sha256), tmp_path)


@pytest.mark.parametrize("content", [b'{"prompt": "' + SECRET.encode(), b"[1, 2]", b"\xff\xfe" + SECRET.encode()])
def test_a_broken_file_is_not_quoted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(UserError) as raised:
        list(read_rows(tmp_path / "set.json"))
    assert SECRET not in str(raised.value)


def test_xstest_is_read_whole(shared_data: Path) -> None:
    from moonbase.evals.suite import load_suite

    params = load_suite("over-refusal").tasks[0].params
    safe = list(read_source(source_of(params, "x"), shared_data))
    both = list(read_source(source_of({**params, "where": {}}, "x"), shared_data))
    assert (len(safe), len(both)) == (250, 450), "as published"
