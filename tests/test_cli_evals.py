"""The verbs of evaluation, from a promise to a bundle that somebody else challenges; real model, real files."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moonbase import cli

SUITE = """
name: few
title: A few fresh problems
about: For a test.
metric: accuracy
smallest_n: 2
tasks:
  - {name: maths, source: "builtin:fresh/maths", metric: accuracy, params: {difficulties: [1], count: 1}}
"""


class Answer(NamedTuple):
    """What a command wrote."""

    stdout: str
    stderr: str


def moonbase(*arguments: object, folder: Path, code: int = 0) -> Answer:
    """The command, inside this process: to start one takes longer than most of these."""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.raises(SystemExit) as left):
        cli.main([str(argument) for argument in arguments])
    assert left.value.code == code, out.getvalue() + err.getvalue()
    assert "Traceback" not in err.getvalue()
    return Answer(out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a promise, an evaluation that keeps it, and its bundle."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "few.yaml").write_text(SUITE)
    from moonbase.evals.proof.signing import generate_key

    generate_key(folder / "my.key")
    moonbase("commit", "few.yaml", "--key", "my.key", "--out", "promise", folder=folder)
    moonbase("eval", "few.yaml", "--model", "preset:pico", "--commitment", "promise", "--out", "run", folder=folder)
    moonbase("reveal", "promise", "run", "--key", "my.key", folder=folder)
    moonbase("seal", "run", "--key", "my.key", "--out", "bundle", folder=folder)
    return folder


def test_a_bundle_is_accepted_and_challenged(promised: Path) -> None:
    found = json.loads(moonbase("verify", "bundle", "--key", "my.key.pub", "--json", folder=promised).stdout)
    assert found["ok"] and not [one for one in found["findings"] if one["status"] == "failed"]
    from moonbase.evals.proof.signing import generate_key

    generate_key(promised / "another.key")
    told = json.loads(moonbase("challenge", "bundle", "--model", "preset:pico", "--n", 2, "--key", "another.key",
                               "--nonce", "2026-beacon-17", "--json", folder=promised).stdout)
    assert "2 of 2" in told["outcome"] and not told["agrees"], "the same, but too few to raise a level"
    answer = subprocess.run([sys.executable, "-m", "moonbase", "verify", "bundle"], cwd=promised, capture_output=True,
                            text=True)
    assert answer.returncode == 0 and not answer.stderr, answer.stdout + answer.stderr


def test_what_was_tampered_with_is_refused(promised: Path) -> None:
    from moonbase.evals.proof.verify import failures, verify

    for name, before, after in (("records.jsonl", b'"accuracy":0', b'"accuracy":1'),
                                ("report.html", b">0 of", b">1 of"), ("results.csv", b"0 of", b"1 of")):
        path = promised / "bundle" / name
        content = path.read_bytes()
        assert before in content, name
        path.write_bytes(content.replace(before, after, 1))
        assert any(f"failed: files: {name}" in str(one) for one in failures(verify(promised / "bundle")))
        if name == "results.csv":
            assert "failed: files" in moonbase("verify", "bundle", folder=promised, code=1).stdout
        path.write_bytes(content)


@pytest.mark.slow
def test_a_run_goes_on_and_another_one_is_not_mixed_in(promised: Path) -> None:
    rows = json.loads(moonbase("eval", "few.yaml", "--model", "preset:pico", "--commitment", "promise", "--out", "run",
                               "--json", folder=promised).stdout)["rows"]
    assert {"metric", "value", "low", "high", "n"} <= rows[0].keys()
    answer = moonbase("eval", "few.yaml", "--model", "preset:pico", "--seed", 3, "--out", "run", folder=promised,
                      code=2)
    assert "another evaluation is there" in answer.stderr


def test_comparing_needs_two_models(promised: Path) -> None:
    assert "two models at least" in moonbase("compare", "run", folder=promised, code=2).stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (("eval",), "name a suite"),
    (("eval", "no-such-suite", "--model", "preset:pico"), "no-such-suite"),
    (("eval", "fresh"), "at least one model"),
    (("eval", "fresh", "--model", "openrouter/some/model"), "pin"),
    (("eval", "fresh", "--model", "preset:pico", "--price", "cheap"), "NAME=VALUE"),
    (("eval", "fresh", "--model", "nobody/at-all"), "nobody"),
    (("verify", "nowhere"), "no such folder"),
    (("seal", "nowhere"), "--new-key"),
    (("compare", "nowhere", "elsewhere"), "nowhere"),
    (("diff-ft", "nowhere", "elsewhere"), "nowhere"),
    (("reveal", "nowhere", "elsewhere", "--key", "no.key"), "nowhere"),
])
def test_a_mistake_is_told_in_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    answer = moonbase(*arguments, folder=tmp_path, code=2)
    assert words in answer.stderr and len(answer.stderr.strip().splitlines()) == 1


def test_the_list_says_what_is_missing(tmp_path: Path) -> None:
    rows = json.loads(moonbase("eval", "--list", "--json", folder=tmp_path).stdout)["rows"]
    assert {row["suite"] for row in rows} >= {"fresh", "over-refusal", "paired-politics", "capability"}
    assert any(row["offline"] for row in rows if row["suite"] == "fresh")
