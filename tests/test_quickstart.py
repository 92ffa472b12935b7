"""The whole chain with a tiny network and a little text: report, comparison, interruption, resumption."""

from __future__ import annotations

import json
import lzma
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import moonbase
from moonbase import quickstart as chain
from moonbase.data import Corpus
from moonbase.errors import UserError
from moonbase.recipe import Source, load_recipe, style_of
from moonbase.report.console import Console
from moonbase.train.trainer import Trainer
from tests.train.tiny import MODEL, checkpoints, facts, metrics, stop_after

ROOT = Path(__file__).resolve().parents[1]
TEXTS = str(Path(json.__file__).parents[1] / "email/*.py")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def preset(tmp_path: Path) -> str:
    """A recipe file in the place of a preset."""
    path = tmp_path / "tiny.yaml"
    model = {**MODEL, "max_position_embeddings": 1024}
    path.write_text(json.dumps({"name": "tiny", "model": model, "sequence_length": 256, "batch_size": 2,
                                "optimizer": {"lr": 0.01}, "data": {"workers": 1}}), encoding="utf-8")
    return str(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "installed_python_sources", lambda: [Source(path=TEXTS)])
    monkeypatch.setattr(chain, "CORPUS_BYTES", 150_000)
    monkeypatch.setattr(chain, "_MEASURED_SECONDS", 0.1)
    monkeypatch.setattr(chain, "DIALOGUES", 60)
    monkeypatch.setattr(chain, "QUESTIONS", 10)


def test_the_whole_chain(preset: str, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = tmp_path / "run", tmp_path / "run" / "pretrain"
    result = chain.quickstart(preset, folder, minutes=0.02)
    output = capsys.readouterr()
    assert result["status"] == "finished" and result["step"] >= 20 and result["step"] % 10 == 0

    corpus = Corpus.open(base / "corpus")
    held_out = corpus.validation_text()
    assert result["held_out_bytes"] == len(held_out) > 1000
    assert result["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(held_out, preset=9)) / len(held_out))
    assert 0 < result["validation_bits_per_byte"] < 8
    assert b"calculator" not in held_out, "measured on Python alone"
    found = facts(base)
    assert found["status"] == "finished" and found["results"]["xz_bits_per_byte"] == result["xz_bits_per_byte"]
    assert found["results"]["validation_bits_per_byte"] == result["validation_bits_per_byte"]
    assert metrics(base)[-1]["validation_bits_per_byte"] == result["validation_bits_per_byte"], "the chart's last"
    assert metrics(base)[-1]["step"] >= 20

    page = Path(result["report"]).read_text(encoding="utf-8")
    assert result["report"] == str(folder / "report.html") and len(page) > 10_000
    assert f"{result['validation_bits_per_byte']:.2f}" in page and 'class="turn user"' in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!#|data:)[^"'>\s]+""", page), "nothing is fetched"
    assert "url(" not in page.replace("url(#", "").replace("url(data:", "")
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))

    for part in ("held out, never seen", "bits per byte", "xz -9", "some completions", "report: ",
                 "held-out questions that need a tool: 10", f"moonbase chat {folder}", f"moonbase serve {folder}",
                 f"moonbase info {folder}", f"moonbase convert {folder}"):
        assert part in output.out, part
    assert output.out.count(" → ") == len(chain.PROMPTS)
    for stage in ("measuring this machine", "reading a sample for the tokenizer", "training", "xz -9",
                  "fine-tuning on 60 dialogues", "asking 10 questions"):
        assert stage in output.err, stage
    assert moonbase.load(folder).config.hidden_size == 32 and style_of(folder) == "kimi-k2"
    recipe = load_recipe(str(folder / "config.yaml"))
    assert recipe.stage == "sft" and recipe.init == str(base)
    questions = facts(folder)["results"]["tool_questions"]
    assert questions == result["tool_questions"] and questions["questions"] == 10
    assert 0 <= questions["right"] <= questions["right_calls"] <= 1

    with pytest.raises(UserError, match="a finished quickstart is here"):
        chain.quickstart(preset, folder, minutes=0.02)


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.slow), "."])
def test_an_interrupted_one_goes_on(
    stage: str, preset: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    folder, train = tmp_path / "run", chain.train
    run = folder / stage

    def interrupted(recipe: Any, path: Path, **options: Any) -> dict[str, Any]:
        return train(recipe, path, **options, on_ready=stop_after(7) if path == run else None)

    monkeypatch.setattr(chain, "train", interrupted)
    result = chain.quickstart(preset, folder, minutes=0.02)
    err = capsys.readouterr().err
    assert (result["status"], result["step"]) == ("stopped", 7) and checkpoints(run) == ["step-000007"]
    assert f"to go on: moonbase quickstart --preset {preset} --out {folder}" in err
    steps = load_recipe(str(run / "config.yaml")).steps
    monkeypatch.setattr(chain, "train", train)
    with pytest.raises(UserError, match="an interrupted run is here that is no quickstart of pico"):
        chain.quickstart("pico", folder, minutes=0.02)
    result = chain.quickstart(preset, folder, minutes=0.02 if stage == "pretrain" else 99)
    assert result["status"] == "finished" and "xz_bits_per_byte" in result and "tool_questions" in result
    assert [line["step"] for line in metrics(run)] == list(range(1, steps + 1))


@pytest.mark.slow
def test_one_that_only_lacks_its_questions_is_asked(
    preset: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, evaluate = tmp_path / "run", chain.evaluate

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        chain.quickstart(preset, folder, minutes=0.02)
    before = metrics(folder)
    monkeypatch.setattr(chain, "evaluate", evaluate)
    result = chain.quickstart(preset, folder, minutes=0.02)
    assert result["tool_questions"]["questions"] == 10 and metrics(folder) == before


def test_the_vocabulary_keeps_digits_apart_and_has_seen_dialogues(preset: str, small: None, tmp_path: Path) -> None:
    chain.quickstart(preset, tmp_path / "run", minutes=0.02)
    tokenizer = Corpus.open(tmp_path / "run" / "pretrain" / "corpus").tokenizer
    assert len(tokenizer.encode("90123")) == 5
    assert len(tokenizer.encode("calculator")) <= 4


def test_the_corpus_is_real_files_that_every_machine_has() -> None:
    recipe = chain._recipe("pico")
    assert recipe.name == "quickstart" and recipe.data.max_bytes and recipe.sample_prompts == chain.PROMPTS
    assert all(Path(source.path.split("*")[0]).is_dir() for source in recipe.data.sources)
    assert any(Path(json.__file__).is_relative_to(source.path.split("*")[0]) for source in recipe.data.sources)


@pytest.mark.parametrize(("seconds", "minutes", "steps"), [(0.5, 3.0, 300), (0.01, 0.02, 100), (30.0, 1.0, 20)])
def test_the_number_of_steps_is_the_time_over_a_steps_median_and_a_fifth(
    seconds: float, minutes: float, steps: int, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy moment (every fifth step takes ten times as long) does not shorten the run."""
    clock = {"now": 0.0, "count": 0}

    def train_step(self: Trainer) -> dict[str, Any]:
        clock["count"] += 1
        clock["now"] += seconds * (10 if clock["count"] % 5 == 0 else 1)
        return {}

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(chain.time, "perf_counter", lambda: clock["now"])
    assert chain._steps_for(load_recipe(preset), minutes, Console(quiet=True)) == steps


def test_what_would_take_hours_on_a_cpu_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"one step .* about .* on a CPU: it needs a GPU; use --preset pico"):
        chain.quickstart("nano", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="quickstart runs in one process"):
        chain.quickstart("pico", tmp_path / "run")


@pytest.mark.parametrize("minutes", [float("inf"), float("nan"), 0.0, -1.0])
def test_a_time_that_is_none_is_refused(minutes: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"minutes=.*: a number of minutes is needed"):
        chain.quickstart("pico", tmp_path / "run", minutes)
    assert not (tmp_path / "run").exists()


def test_the_model_that_was_measured_is_gone(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    make = chain.make_trainer

    def watched(*arguments: Any) -> Trainer:
        trainer = make(*arguments)
        trainer.model.itself = [trainer.model]  # a cycle, as compiled blocks make
        alive.append(weakref.ref(trainer.model))
        return trainer

    monkeypatch.setattr(chain, "make_trainer", watched)
    monkeypatch.setattr(chain, "_MEASURED_SECONDS", 0.0)
    chain._steps_for(load_recipe(preset), 0.02, Console(quiet=True))
    assert [reference() for reference in alive] == [None]


def test_a_run_without_samples_has_none_to_show(tmp_path: Path) -> None:
    assert chain._last_samples(tmp_path) == []
    (tmp_path / "samples.txt").write_text('=== step 1 | t\n>>> "a"\n... "b"\n=== step 2 | t\n>>> "c"\n... "d"\n')
    assert chain._last_samples(tmp_path) == [("c", "d")]


def test_only_a_checkpoint_that_exists_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = {"reason": "stopped by SIGINT", "step": 0}
    chain._say_stopped(Console(), Path("no/such"), Path("no/such/run"), outcome, "pico")
    err = capsys.readouterr().err
    assert "stopped by SIGINT at step 0." in err and "checkpoint" not in err


def test_ctrl_c_saves_and_says_how_to_go_on(preset: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"""
from moonbase import cli, quickstart
from moonbase.recipe import Source
quickstart.installed_python_sources = lambda: [Source(path={TEXTS!r})]
quickstart.CORPUS_BYTES, quickstart._MEASURED_SECONDS = 150_000, 0.1
quickstart.DIALOGUES, quickstart.QUESTIONS = 60, 10
cli.main(["quickstart", "--preset", {preset!r}, "--out", {str(folder)!r}, "--minutes", "60"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    run = folder / "pretrain"
    path = run / "metrics.jsonl"
    while process.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    step = len(metrics(run))
    assert checkpoints(run) == [f"step-{step:06d}"] and facts(run)["reason"] == "stopped by SIGINT", err
    assert "stopping after this step" in err and "Traceback" not in err
    assert f"stopped by SIGINT at step {step}; a checkpoint is saved in {run}/checkpoints." in err
    assert f"to go on: moonbase quickstart --preset {preset} --out {folder}" in err
    assert process.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_trainings_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(chain, "_steps_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chain.quickstart("pico", tmp_path / "my run")
    assert capsys.readouterr().err.splitlines()[-1] == f"to go on: moonbase quickstart --out '{tmp_path}/my run'"


def test_a_folder_that_cannot_be_made_is_known_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "_steps_for", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: a part of this path is a file"):
        chain.quickstart("pico", tmp_path / "file" / "run")
