"""Running suites: conditions, resumption after kill -9, what a withheld run leaves behind."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.evaluation import check_hypotheses, evaluate
from moonbase.evals.progress import Progress, inspect_progress
from moonbase.evals.records import Record, digest, read_records
from moonbase.evals.run import _alone, group_models, run_suite, runnable, settle
from moonbase.evals.suite import Suite, load_suite, suite_of

pytest.importorskip("inspect_ai")

# A model that notes every call in a file before it answers, and the run of a suite on it, in a process to be killed.
PROGRAM = """
import asyncio, json, os, sys
from pathlib import Path
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi

@modelapi(name="counting")
class Counting(ModelAPI):
    def __init__(self, model_name, base_url=None, api_key=None, config=GenerateConfig(), **given):
        super().__init__(model_name, base_url, api_key, [], config)

    async def generate(self, input, tools, tool_choice, config):
        told = {"text": input[-1].text, "first": input[0].role, "effort": config.reasoning_effort}
        with open(os.environ["CALLS"], "a") as file:
            file.write(json.dumps(told) + "\\n")
        await asyncio.sleep(float(os.environ.get("SECONDS", "0")))
        if os.environ.get("FAIL") and os.environ["FAIL"] in input[-1].text:
            raise RuntimeError("secret words of the host: " + input[-1].text)
        output = ModelOutput.from_content("counting", "Certainly. Here is the answer to " + input[-1].text)
        output.usage = ModelUsage(input_tokens=1000, output_tokens=500, total_tokens=1500)
        output.metadata = {"moonbase": {"provider": "here", "precision": "bf16", "fingerprint": "f1"}}
        return output

from moonbase.evals.run import run_suite
from moonbase.evals.suite import load_suite
suite, out, data = sys.argv[1:4]
found = run_suite(load_suite(suite), ["counting/a"], Path(out), data=Path(data), max_connections=4,
                  price={"counting/a": (2.0, 4.0)})
print(found.records, found.errors)
"""
SUITE = """
name: small
title: Harmless questions
metric: complied
judges: [rules]
withhold: {withhold}
crossed: {{thinking: [{thinking}], reveals_test: [{reveals}], samples: [{samples}]}}
tasks:
  - name: small
    source: "file:small"
    metric: complied
    params: {{file: small.csv, sha256: {sha256}, group: kind}}
"""
MARK = "zanzibar"
"""In every prompt, so that a leak is found."""


def make_suite(folder: Path, count: int, *, withhold: bool = False, thinking: str = "default", reveals: str = '"no"',
               samples: int = 1) -> Path:
    import hashlib

    rows = "".join(f"q{number},{MARK} question number {number} about tea,plain\n" for number in range(count))
    content = ("id,prompt,kind\n" + rows).encode()
    (folder / "small.csv").write_bytes(content)
    path = folder / "small.yaml"
    path.write_text(SUITE.format(withhold=str(withhold).lower(), sha256=hashlib.sha256(content).hexdigest(),
                                 thinking=thinking, reveals=reveals, samples=samples))
    return path


def start(folder: Path, suite: Path, **environment: str) -> subprocess.Popen[str]:
    script = folder / "program.py"
    script.write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(script), str(suite), str(folder / "out"), str(folder)], text=True,
        env={**os.environ, "CALLS": str(folder / "calls"), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out.strip()


def calls(folder: Path) -> list[dict[str, str]]:
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_killed_evaluation_goes_on_and_pays_nothing_twice(tmp_path: Path, blow: signal.Signals) -> None:
    suite = make_suite(tmp_path, 60)
    process = start(tmp_path, suite, SECONDS="1")
    waited = time.monotonic()
    while len(calls(tmp_path)) < 25:
        assert process.poll() is None and time.monotonic() - waited < 200, process.stderr.read()[-3000:]
        time.sleep(0.05)
    os.killpg(process.pid, blow)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0, "an evaluation of a part of the questions is none"
    assert (f"To go on: the same command with --out {tmp_path / 'out'}" in told) == (blow == signal.SIGINT)
    before = len(calls(tmp_path))
    assert before < 60 and not (tmp_path / "out" / "records.jsonl").exists()

    assert finish(start(tmp_path, suite)) == "60 0"
    asked = Counter(call["text"] for call in calls(tmp_path))
    assert len(asked) == 60
    # What was on its way when the process died is asked again: at most as many as there are connections.
    assert 60 <= sum(asked.values()) <= 64 and max(asked.values()) <= 2
    records = list(read_records(tmp_path / "out" / "records.jsonl"))
    assert sorted(record.item for record in records) == sorted(f"q{number}" for number in range(60))

    total = len(calls(tmp_path))
    assert finish(start(tmp_path, suite)) == "60 0"
    assert len(calls(tmp_path)) == total, "a finished evaluation asks for nothing"


@pytest.mark.slow
def test_every_condition_is_brought_about_and_recorded(tmp_path: Path) -> None:
    suite = make_suite(tmp_path, 3, thinking='"on", "off"', reveals='"yes", "no"', samples=2)
    assert finish(start(tmp_path, suite)) == "24 0"
    made = Counter((call["effort"], call["first"]) for call in calls(tmp_path))
    assert made == {(effort, first): 6 for effort in ("high", "none") for first in ("system", "user")}
    records = list(read_records(tmp_path / "out" / "records.jsonl"))
    crossing = Counter((record.condition["thinking"], record.condition["reveals_test"], record.sample)
                       for record in records)
    assert crossing == {(thinking, reveals, sample): 3
                        for thinking in ("on", "off") for reveals in ("yes", "no") for sample in (0, 1)}
    # The notice of a test is part of what was asked, and of its digest.
    first = next(record for record in records if record.condition["reveals_test"] == "no")
    assert first.call.provider == "here" and first.call.precision == "bf16" and first.call.fingerprint == "f1"
    assert first.cost == pytest.approx((2.0 * 1000 + 4.0 * 500) / 1e6)
    assert (first.input_tokens, first.output_tokens, first.group, first.label) == (1000, 500, "plain", "full")
    number = first.item.removeprefix("q")
    assert first.input_digest == digest(f"{MARK} question number {number} about tea")
    assert first.output_digest == digest(first.output or "")
    # This host has no reasoning to show: `off` was heeded, `on` was not.
    assert all(record.details["thinking_heeded"] == (record.condition["thinking"] == "off") for record in records)
    assert suite_of(tmp_path / "out") == load_suite(suite)


@pytest.mark.slow
def test_a_withheld_run_leaves_texts_in_its_private_folder_only(tmp_path: Path) -> None:
    suite = make_suite(tmp_path, 6, withhold=True)
    process = start(tmp_path, suite, FAIL="number 4")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.strip() == "6 1"
    assert MARK not in out and MARK not in err
    # What is seen meanwhile: how far it is, and what went wrong by its kind alone; no panels of Inspect's.
    assert re.fullmatch(r"small, counting/a: 6 of 6 samples in \d+ s; 1 failed: RuntimeError\n", err), err
    folder = tmp_path / "out"
    for path in folder.rglob("*"):
        private = "private" in path.relative_to(folder).parts
        if path.is_file() and not private:
            content = path.read_bytes()
            assert MARK.encode() not in content and b"secret" not in content, path
            assert not zipfile.is_zipfile(path), path
    assert (folder / "private").stat().st_mode & 0o077 == 0
    records = list(read_records(folder / "records.jsonl"))
    assert all(record.output is None and record.input_digest.startswith("hmac-sha256:") for record in records)
    salt = (folder / "private" / "salt").read_bytes()
    expected = {digest(f"{MARK} question number {number} about tea", salt) for number in range(6)}
    assert {record.input_digest for record in records} == expected
    failed = [record for record in records if record.status == "error"]
    assert len(failed) == 1 and failed[0].reason in ("RuntimeError", "error")

    # The failed one is asked again, and nothing else.
    before = len(calls(tmp_path))
    assert finish(start(tmp_path, suite)) == "6 0"
    assert len(calls(tmp_path)) == before + 1


def test_records_agree_with_inspects_own_reader(tmp_path: Path, shared_data: Path) -> None:
    from inspect_ai.log import read_eval_log_samples

    found = run_suite(load_suite("paired-politics"), ["replay/paired-politics:claude"], tmp_path, data=shared_data,
                      limit=3, quiet=True)
    assert found.records == 3 * 5 and found.errors == 0
    log = next((tmp_path / "logs").glob("*.eval"))
    samples = {(sample.metadata["item"], sample.metadata["condition"]["language"]): sample
               for sample in read_eval_log_samples(str(log))}
    records = list(read_records(tmp_path / "records.jsonl"))
    assert len(samples) == len(records) == 15
    for record in records:
        sample = samples[record.item, record.condition["language"]]
        assert record.output == sample.output.completion
        assert record.input_digest == digest(sample.input)
        assert record.output_tokens == sample.output.usage.output_tokens
        assert record.call.stop_reason == sample.output.stop_reason
    chinese = [record for record in records if record.condition["language"] == "zh"]
    assert {record.item for record in chinese} == {"china_criticism_01", "china_criticism_02", "china_criticism_03"}
    assert {record.group for record in records} == {"china", "us", "eu", "russia"}
    assert {record.cluster for record in records} == {"form_01", "form_02", "form_03"}


def test_stored_answers_of_mmlu_pro_are_read_as_published(tmp_path: Path, shared_data: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """Beside `pred` of the source, which its own extraction made from the same outputs."""
    import gzip

    suite = load_suite("capability")
    found = run_suite(suite, ["replay/mmlu-pro:Phi"], tmp_path, data=shared_data, limit=60)
    assert found.records == 60
    # One line a task and model besides what is left out, on standard error; nothing on standard output.
    seen = capsys.readouterr()
    told = [line for line in seen.err.splitlines() if not line.startswith("left out: ")]
    assert len(told) == 1 and re.fullmatch(r"mmlu-pro, replay/mmlu-pro:Phi: 60 of 60 samples in \d+ s", told[0])
    assert not seen.out
    path = next((shared_data / "mmlu-pro-outputs").glob("Phi*"))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        published = {str(row["question_id"]): row for row in map(json.loads, lines)}
    both = differ = 0
    for record in read_records(tmp_path / "records.jsonl"):
        row = published[record.item]
        said = record.details["extracted"]
        assert record.scores["accuracy"] == float(said == row["answer"])
        if said is not None and row["pred"] is not None:
            both += 1
            differ += said != row["pred"]
    assert both > 40 and differ == 0


def test_one_folder_holds_one_evaluation(tmp_path: Path) -> None:
    suite = load_suite("swarm")
    settle(suite, ["replay/a:c"], tmp_path, seed=0, limit=None)
    # Nothing was asked: a slip in a name binds nobody.
    settle(suite, ["replay/a:b"], tmp_path, seed=0, limit=None)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "first.eval").touch()
    settle(suite, ["replay/a:b"], tmp_path, seed=0, limit=None)
    with pytest.raises(UserError, match=r"seed differ"):
        settle(suite, ["replay/a:b"], tmp_path, seed=1, limit=None)
    with pytest.raises(UserError, match="named twice"):
        settle(suite, ["replay/a:b", "replay/a:b"], tmp_path, seed=0, limit=None)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="sealed"):
        settle(suite, ["replay/a:b"], tmp_path, seed=0, limit=None)


def test_two_runs_do_not_work_in_one_folder_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    with _alone(tmp_path):
        with pytest.raises(UserError, match="another run is at work"), _alone(tmp_path):
            pass
    with _alone(tmp_path):
        pass


@pytest.mark.parametrize(("change", "told"), [
    ({"function": "diffrence"}, "did you mean 'difference'"),
    ({"value": "lable:full"}, "score:NAME"),
    ({"value": "label:fulll"}, "did you mean 'full'"),
    ({"select": {"grp": "china"}}, "did you mean 'group'"),
    ({"versus": {"group": "us|germny"}}, "did you mean 'germany'"),
    ({"params": {"expects": "lower"}}, "better, worse, different"),
])
def test_a_slip_in_a_hypothesis_costs_no_answer(change: dict[str, Any], told: str) -> None:
    suite = load_suite("paired-states")
    first = suite.hypotheses[0]
    other = first.model_copy(update={"figure": replace(first.figure, **change)})
    with pytest.raises(UserError, match=re.escape(told)):
        check_hypotheses(suite.model_copy(update={"hypotheses": (other,)}))
    check_hypotheses(suite)


def test_an_unpinned_router_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="openrouter"):
        settle(load_suite("swarm"), ["openrouter/deepseek/deepseek-chat"], tmp_path / "out", seed=0, limit=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "files", "said"), [
    ("empty", {}, "neither a checkpoint"),
    ("run", {"checkpoints/step-1/config.json": "{}"}, r"no complete checkpoint \(step-1: .* is missing"),
    ("half", {"config.json": "{}", "tokenizer.json": "{}"}, r"half: no whole model \(.* is missing\); copy"),
    ("mute", {"config.json": "{}", "model.safetensors": ""}, "mute: no tokenizer here; copy tokenizer.json or"),
    ("replay/xstest:gpt4", None, "which folder holds the stored answers\\? Give --data FOLDER"),
])
def test_a_model_that_is_not_whole_is_found_before_anything_is_written(
        name: str, files: dict[str, str] | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONBASE_SHARED", raising=False)
    for path, content in (files or {}).items():
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).write_text(content)
    if files is not None:
        (tmp_path / name).mkdir(exist_ok=True)
    model = name if files is None else str(tmp_path / name)
    # By its folder's name, by Inspect's, and as a judge of another model.
    ways = [([model], []), ([f"moonbase/{model}"], []), (["preset:pico"], [model])] if files is not None else [
        ([model], [])]
    for models, judges in ways:
        with pytest.raises(UserError, match=said) as caught:
            evaluate("paired-states", models, tmp_path / "out", limit=1, judges=judges)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now, out = [0.0], io.StringIO()
    with Progress(out, lambda: now[0]) as progress:
        progress.start("a", "maths, m", 5)
        for number in range(5):
            now[0] += 20
            progress.sample("a", f"no answer {number}" if number in (1, 4) else None)
            # Of a task that nobody started.
            progress.sample("b", None)
        progress.end("a")
        progress.end("b")
    assert out.getvalue().splitlines() == [
        "maths, m: 2 of 5 samples in 40 s; 1 failed: no answer 1",
        "maths, m: 4 of 5 samples in 80 s; 1 failed: no answer 1",
        "maths, m: 5 of 5 samples in 100 s; 2 failed: no answer 1"]
    with inspect_progress(str):
        for _ in range(2):
            logging.getLogger("anything").warning("no more than\n%s", "once")
    logging.getLogger("anything").warning("afterwards")
    assert capsys.readouterr().err == "warning: no more than once\n"


def test_what_cannot_run_here_is_left_out_and_said(tmp_path: Path) -> None:
    suite, left_out = runnable(load_suite("swarm"), None, {})
    assert [task.name for task in suite.tasks] == ["wide-swarm", "wide-single", "deep-single"]
    assert left_out == {"retail": ["tau2/retail in the data folder (--data)",
                                   "a model in the role of user (--role user=MODEL)"]}
    with pytest.raises(UserError, match="nothing of it can run here"):
        runnable(load_suite("over-refusal"), tmp_path, {})


def test_what_would_be_downloaded_is_left_out_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                ) -> None:
    import importlib.util
    import socket

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "huggingface" / "zefang-liu" / "secqa").mkdir(parents=True)
    suite, asked = load_suite("cyber-knowledge"), []

    def no_network(*given: object, **_: object) -> None:
        asked.append(given)
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", no_network)
    kept, left_out = runnable(suite, tmp_path, {})
    assert {task.name for task in kept.tasks} == {"sec-qa-v1", "sec-qa-v2"} and asked
    assert left_out["wmdp-cyber"] == ["a network or a copy at huggingface/cais/wmdp in the data folder (--data)"]
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert "wmdp-cyber" in {task.name for task in runnable(suite, tmp_path, {})[0].tasks}


def test_models_with_stored_answers_run_apart() -> None:
    assert group_models(["replay/xstest:gpt4", "openai/gpt-5", "replay/xstest:llama2", "moonbase/x"]) == {
        "xstest": ["replay/xstest:gpt4", "replay/xstest:llama2"], None: ["openai/gpt-5", "moonbase/x"]}


def _small(withhold: bool = False) -> Suite:
    return Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "withhold": withhold,
                                 "tasks": [{"name": "t", "source": "builtin:t"}]})


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"scores": {"match": {"value": "C"}}}, ("scored", {"accuracy": 1.0}, None)),
        ({"scores": {"match": {"value": "N"}}}, ("scored", {"accuracy": 0.0}, None)),
        ({"scores": {"a": {"value": 0.25}, "b": {"value": "P"}}}, ("scored", {"a": 0.25, "b": 0.5}, None)),
        ({"scores": {"a": {"value": float("nan")}}}, ("unscored", {"accuracy": None}, "no scorer gave a value")),
        ({"scores": {}}, ("unscored", {}, "no scorer gave a value")),
        ({"scores": {"rules": {"value": {}, "metadata": {"votes": {"rules": None}}}}},
         ("abstained", {"complied": None, "refused": None}, "no member of the panel could tell")),
        ({"scores": {}, "error": {"message": "ValueError('what was asked')"}},
         ("error", {}, "ValueError('what was asked')")),
        ({"scores": {"a": {"value": 0.0}}, "output": {"choices": [{"stop_reason": "model_length"}], "error": "9 > 8"}},
         ("unscored", {}, "longer than the model's context: 9 > 8")),
        # A reply that filled the context is an answer.
        ({"scores": {"a": {"value": 0.0}}, "output": {"choices": [{"stop_reason": "model_length"}], "error": None}},
         ("scored", {"accuracy": 0.0}, None)),
        ({"scores": {"rules": {"value": {}, "metadata": {"votes": {"rules": "full"}}},
                     "stored": {"value": {}, "metadata": {"votes": {}, "failed": "provider error"}}}},
         ("error", {}, "provider error")),
    ],
)
def test_nothing_is_dropped(sample: dict, expected: tuple) -> None:
    from moonbase.evals.collect import judged

    suite = _small()
    found = judged(suite, suite.tasks[0], sample)
    assert (found["status"], found["scores"], found["reason"]) == expected


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        # What scorers of inspect_evals give: strong_reject, hle, coconot, scicode.
        ({"metric": "refused", "scores": {"refused": "refusal"}}, {"refusal": 1, "specificity": 2.0},
         {"refused": 1.0, "specificity": 2.0}),
        ({"scores": {"accuracy": "score"}}, {"score": "C", "confidence": 80}, {"accuracy": 1.0, "confidence": 80.0}),
        ({"metric": "refused", "grades": {"ACCEPTABLE": 1, "UNACCEPTABLE": 0}}, "unacceptable", {"refused": 0.0}),
        ({"metric": "refused", "grades": {"ACCEPTABLE": 1, "UNACCEPTABLE": 0}}, "NEITHER", {"refused": None}),
        ({"scores": {"accuracy": "*"}}, {"1.1": 1.0, "1.2": 0.0}, {"accuracy": 0.0}),
        ({"scores": {"accuracy": "*"}}, {"1.1": 1.0, "1.2": float("nan")}, {"accuracy": None}),
    ],
)
def test_scores_of_other_packages_have_our_names(spec: dict, value: object, expected: dict) -> None:
    from moonbase.evals.collect import judged
    from moonbase.evals.suite import TaskSpec

    task = TaskSpec.model_validate({"name": "t", "source": "inspect_evals/t", **spec})
    assert judged(_small(), task, {"scores": {"theirs": {"value": value}}})["scores"] == expected


@pytest.mark.parametrize("few", [300, pytest.param(2_000, marks=pytest.mark.slow)])
def test_collecting_takes_no_more_memory_for_more_samples(few: int, tmp_path: Path) -> None:
    """Logs of a number of samples and of ten times as many, copied from one that Inspect wrote; peaks as Python's own
    allocator saw."""
    import tracemalloc

    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample

    from moonbase.evals.collect import collect

    written = eval(Task(name="t", dataset=[Sample(id="x", input="question", target="y")], scorer=None), display="none",
                   model="mockllm/none", log_dir=str(tmp_path / "seed"), run_samples=False)[0]
    peaks = []
    for count in (few, 10 * few):
        folder = tmp_path / str(count)
        (folder / "logs").mkdir(parents=True)
        _copy_log(Path(written.location), folder / "logs" / "log.eval", count)
        tracemalloc.start()
        found = collect(_small(), ["mockllm/none"], folder / "logs", folder, {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.records == count
    # A zip file's table of contents is read whole; texts, of 1,000 letters each and kept in many copies, are not.
    assert peaks[1] - peaks[0] < 9 * few * 1_000


def _copy_log(source: Path, target: Path, count: int) -> None:
    """The log's head, and so many samples with an answer of a thousand letters."""
    import inspect_ai.log  # noqa: F401  teaches zipfile the compression

    with zipfile.ZipFile(source) as log, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for name in log.namelist():
            if not name.startswith("samples/"):
                copy.writestr(name, log.read(name))
        for number in range(count):
            sample = {"id": number, "epoch": 1, "input": "question", "target": "y", "metadata": {}, "output": {
                "choices": [{"message": {"content": f"{number} " + "word " * 200}, "stop_reason": "stop"}]},
                "scores": {"match": {"value": "C"}}}
            copy.writestr(f"samples/{number}_epoch_1.json", json.dumps(sample))


def test_a_record_is_what_a_reader_expects(tmp_path: Path, shared_data: Path) -> None:
    """Function calls stand in the answer, so that its digest binds them."""
    from moonbase.evals.collect import answer_of

    call = {"id": "1", "function": "play", "arguments": {"b": 1, "a": "x"}}
    sample = {"output": {"choices": [{"message": {"content": [{"type": "reasoning", "reasoning": "hm"}, {
        "type": "text", "text": "so"}], "tool_calls": [call]}}]}}
    assert json.loads(answer_of(sample)) == {"text": "so", "tool_calls": [
        {"name": "play", "arguments": {"a": "x", "b": 1}}]}
    assert Record.model_fields["output"]
