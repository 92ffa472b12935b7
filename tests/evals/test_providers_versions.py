"""The same contract with another version of Inspect, the oldest that pyproject.toml allows:

    pip install --no-deps --target .venv/other-inspect inspect-ai==0.3.260

which `make install-dev` does; $MOONBASE_OTHER_INSPECT names another folder. Both versions run the same small suite on
both providers, found through the entry point; each reads what the other wrote, and goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from moonbase.evals.records import read_records
from moonbase.evals.suite import Suite, load_suite
from tests.agents import tiny_chat
from tests.serve.service_double import until

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / ".venv" / "other-inspect"
CONTRACT = ("test_providers_engine.py", "test_providers_replay.py", "test_providers_provenance.py")
STORED = "replay/xstest:gpt4"
DONE = "done"
"""A file in the folder of a version that has run everything."""
LEFT_OUT = {"seconds", "output"}
"""What no two runs have alike, and texts that no failed test should print: their digests are compared."""


def other_inspect() -> Path:
    """The folder of the other version. Skips where there is none."""
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    folder = Path(os.environ.get("MOONBASE_OTHER_INSPECT") or DEFAULT)
    if not (folder / "inspect_ai").is_dir():
        pytest.skip(f"no other version of Inspect in {folder} (make install-dev, or MOONBASE_OTHER_INSPECT)")
    return folder


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Every suite of the plan on its models, under the Inspect of this process; then what the other version wrote is
    read, and collected anew."""
    from inspect_ai.log import read_eval_log

    from moonbase.evals.collect import collect
    from moonbase.evals.run import run_suite

    found: dict[str, Any] = {"version": version("inspect-ai")}
    for name, models in plan["runs"].items():
        suite, out = Suite.model_validate(plan["suites"][name]), Path(plan["out"])
        done = run_suite(suite, models, out / name, data=Path(plan["data"]), quiet=True)
        found[name] = [done.records, done.errors]
    (Path(plan["out"]) / DONE).touch()
    if plan["read"]:
        until(lambda: (Path(plan["read"]) / DONE).exists(), 400)
        for name, models in plan["runs"].items():
            suite, out = Suite.model_validate(plan["suites"][name]), Path(plan["out"])
            logs = Path(plan["read"]) / name / "logs"
            found[f"read {name}"] = sum(len(read_eval_log(str(path)).samples) for path in logs.glob("*.eval"))
            (out / "read" / name).mkdir(parents=True)
            collect(suite, models, logs, out / "read" / name, {})
    return found


def start_elsewhere(plan: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """The same in a process of its own, under the version in `folder`."""
    program = ("import json, sys; from tests.evals.test_providers_versions import run; "
               "print(json.dumps(run(json.loads(sys.argv[1]))))")
    return subprocess.Popen([sys.executable, "-c", program, json.dumps(plan)], text=True, cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"})


def records_of(folder: Path) -> list[dict[str, Any]]:
    found = [record.canonical() for record in read_records(folder / "records.jsonl")]
    return [{name: value for name, value in record.items() if name not in LEFT_OUT} for record in found]


def make_plan(tmp_path: Path, shared_data: Path) -> dict[str, Any]:
    rows = "".join(json.dumps({"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"}) + "\n"
                   for number in range(3))
    (tmp_path / "sums.jsonl").write_text(rows)
    (tmp_path / "xstest").symlink_to(shared_data / "xstest")
    sums = {"name": "sums", "title": "s", "metric": "accuracy", "tasks": [
        {"name": "sums", "source": "builtin:gsm8k", "params": {
            "file": "sums.jsonl", "sha256": hashlib.sha256(rows.encode()).hexdigest()}}]}
    stored = load_suite("over-refusal").canonical() | {"withhold": False}
    stored["tasks"][0]["limit"] = 4
    model = f"moonbase/{tiny_chat.save(tmp_path / 'model')}"
    return {"runs": {"sums": [model], "stored": [STORED]}, "suites": {"sums": sums, "stored": stored},
            "data": str(tmp_path), "read": None}


@pytest.mark.slow
def test_two_versions_of_inspect_agree(tmp_path: Path, shared_data: Path) -> None:
    folder = other_inspect()
    plan = make_plan(tmp_path, shared_data)
    new, old = tmp_path / "new", tmp_path / "old"
    expected = {"sums": [3, 0], "stored": [4, 0]}

    with start_elsewhere({**plan, "out": str(old), "read": str(new)}, folder) as elsewhere:
        try:
            ours = run({**plan, "out": str(new)})
            said, problems = elsewhere.communicate(timeout=600)
        finally:
            elsewhere.kill()
    assert ours == {"version": version("inspect-ai"), **expected}
    assert elsewhere.returncode == 0, problems[-3000:]
    theirs = json.loads(said.splitlines()[-1])
    assert theirs.pop("version") != ours["version"], f"{folder} holds the installed version"
    assert theirs == {**expected, "read sums": 3, "read stored": 4}

    # Stored answers are the same under both; what the engine draws has a seed of its own each time.
    assert records_of(old / "stored") == records_of(new / "stored")
    drawn = {"output", "output_digest", "output_tokens", "scores", "details", "call", "status", "reason"}
    for one, other in zip(records_of(old / "sums"), records_of(new / "sums"), strict=True):
        assert {name for name in one if one[name] != other[name]} <= drawn
        assert one["call"]["weights_digest"] == other["call"]["weights_digest"]
        assert set(one["call"]["decoding"]) == set(other["call"]["decoding"])

    # Each reads the other's logs to the same records, and goes on with what the other began: nothing is asked again.
    assert all(records_of(old / "read" / name) == records_of(new / name) for name in expected)
    before = {name: records_of(old / name) for name in expected}
    shutil.rmtree(old / "read")
    again = run({**plan, "out": str(old), "read": str(old)})
    assert again == {"version": ours["version"], **expected, "read sums": 3, "read stored": 4}
    for name, records in before.items():
        assert records_of(old / name) == records_of(old / "read" / name) == records


@pytest.mark.slow
@pytest.mark.parametrize("file", CONTRACT)
def test_the_whole_contract_holds_with_another_inspect(file: str, tmp_path: Path) -> None:
    folder = other_inspect()
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    code = "import importlib.metadata as m; print(m.version('inspect-ai'))"
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != version("inspect-ai"), f"{folder} holds the installed version"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider",
               f"--basetemp={tmp_path / 'inner'}", str(Path(__file__).with_name(file))]  # fmt: skip
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
