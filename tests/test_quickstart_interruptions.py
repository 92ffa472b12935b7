"""A quickstart that is interrupted in both trainings, gently and by kill -9, comes to the same as one left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moonbase.checkpoint import latest_checkpoint, load_state
from tests.train.tiny import MODEL, checkpoints, facts, metrics

ROOT = Path(__file__).resolve().parents[1]
TEXTS = str(Path(json.__file__).parents[1] / "email/*.py")
STEPS, EVERY = 80, 8
"""Of each training, and between two checkpoints."""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file in the place of a preset."""
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    model = {**MODEL, "max_position_embeddings": 1024}
    path.write_text(json.dumps({"name": "tiny", "model": model, "sequence_length": 256, "batch_size": 2,
                                "optimizer": {"lr": 0.01}, "data": {"workers": 1},
                                "checkpoint": {"every_steps": EVERY}}), encoding="utf-8")
    return path


def start(preset: Path, folder: Path) -> subprocess.Popen[str]:
    """The verb in a process of its own, on little text, with trainings of `STEPS` steps. Only the last report is drawn:
    the others would take half of the time."""
    code = f"""
from moonbase import cli, quickstart
from moonbase.train import run
from moonbase.recipe import Source
quickstart.installed_python_sources = lambda: [Source(path={TEXTS!r})]
quickstart.CORPUS_BYTES, quickstart.DIALOGUES, quickstart.QUESTIONS = 60_000, 30, 5
run.write_report = lambda folder: None
quickstart._steps_for, quickstart.CHAT_TOKENS = lambda *_: {STEPS}, {STEPS * 2 * 256}
cli.main(["quickstart", "--preset", {str(preset)!r}, "--out", {str(folder)!r}])
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def whole_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    while process.poll() is None:
        if whole_lines(run) >= steps:
            return
        time.sleep(0.005)
    pytest.fail(f"ended early: {process.communicate()[1]}")


def saved_step(run: Path) -> int:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return load_state(checkpoint)[1]["step"]


def interrupt(process: subprocess.Popen[str], run: Path, again: str) -> int:
    """Ctrl-C: the step that it stopped after, which is saved."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    step = whole_lines(run)
    assert process.returncode == 130, err
    assert f"to go on: {again}" in err
    assert saved_step(run) == step and (facts(run)["status"], facts(run)["reason"]) == ("stopped", "stopped by SIGINT")
    return step


def kill(process: subprocess.Popen[str], run: Path) -> int:
    """kill -9: the step of the newest checkpoint, which is at most one interval behind what had been done."""
    process.kill()
    process.communicate(timeout=300)
    step = saved_step(run)
    # The checkpoint of the interval's last step may be in the making; its line of metrics is already there.
    assert process.returncode == -signal.SIGKILL and 0 <= whole_lines(run) - step <= EVERY
    return step


@pytest.mark.slow
def test_many_lives_are_one_run(preset: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "run", tmp_path / "run" / "pretrain"
    process = start(preset, folder)
    for run in (base, folder):
        wait_for(process, run, EVERY + 4)
        stopped = interrupt(process, run, f"moonbase quickstart --preset {preset} --out {folder}")
        process = start(preset, folder)
        wait_for(process, run, stopped + EVERY + 4)
        saved = kill(process, run)
        assert saved >= stopped
        process = start(preset, folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert f"resuming {folder} at step {saved}" in " ".join(err.split())
    assert "held-out questions that need a tool: 5" in out and (folder / "report.html").is_file()

    straight = tmp_path / "straight"
    process = start(preset, straight)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    for place in (".", "pretrain"):
        run, other = folder / place, straight / place
        assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
        assert metrics(run) == metrics(other) and checkpoints(run)[-1] == checkpoints(other)[-1] == f"step-{STEPS:06d}"
        assert facts(run)["results"] == facts(other)["results"]
        assert not list(run.rglob(".partial*"))
