"""A resumed run is the uninterrupted one, bit for bit: weights, optimizer, position, metrics."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moonbase.checkpoint import latest_checkpoint, load_state
from moonbase.cli import main
from moonbase.errors import UserError
from moonbase.recipe import Recipe
from tests.train.tiny import MODEL, checkpoints, content, facts, go_on, metrics, run, stop_after, tensors

ROOT = Path(__file__).resolve().parents[2]
Recipes = Callable[..., Recipe]


def cut_back(whole: Path, copy: Path, step: int) -> Path:
    """The folder as it would be had the run been killed after this checkpoint, its later metrics already written."""
    shutil.copytree(whole, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resuming_from_any_checkpoint_gives_the_same_bits(step: int, whole: Path, tmp_path: Path) -> None:
    folder = cut_back(whole, tmp_path / "run", step)
    result = go_on(folder)
    assert (result["status"], result["step"]) == ("finished", 12)
    assert metrics(folder) == metrics(whole)
    for name in checkpoints(whole):
        assert content(folder / "checkpoints" / name) == content(whole / "checkpoints" / name), name
    assert facts(folder)["results"] == facts(whole)["results"]


@pytest.mark.parametrize("fields", [
    {"precision": "bf16"},
    {"optimizer__name": "adamw"},
    {"batch_size": 6, "micro_batch_size": 2, "schedule__kind": "cosine", "optimizer__per_head": True},
    {"model": "mtp", "balance__bias_rule": "deepseek"},
], ids=["bf16", "adamw", "micro-batches", "mtp"])
def test_resuming_gives_the_same_bits_whatever_the_recipe(fields: dict, recipe: Recipes, tmp_path: Path) -> None:
    if fields.get("model") == "mtp":
        fields = {**fields, "model": {**MODEL, "num_nextn_predict_layers": 1}}
    plan = recipe(steps=7, checkpoint__keep_last=9, **fields)
    run(plan, tmp_path / "whole")
    stopped = run(plan, tmp_path / "cut", on_ready=stop_after(4))
    assert (stopped["status"], stopped["step"], stopped["reason"]) == ("stopped", 4, "asked by a test")
    assert facts(tmp_path / "cut")["next_commands"] == [f"moonbase train {tmp_path / 'cut'} --resume"]
    go_on(tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    last = Path("checkpoints/step-000007")
    assert content(tmp_path / "cut" / last) == content(tmp_path / "whole" / last)


def test_a_finished_run_goes_on_with_more_steps(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    """The schedule is another one then; what was done stays as it was."""
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    assert go_on(folder, "steps=14")["step"] == 14
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 15)) and lines[:12] == metrics(whole)
    assert facts(folder)["status"] == "finished" and checkpoints(folder)[-1] == "step-000014"
    last = metrics(folder, timed=True)[-1]["seconds"]
    assert facts(folder)["seconds"] == round(last, 1) > metrics(whole, timed=True)[5]["seconds"], "of both lives"


def test_resuming_a_finished_run_changes_nothing_but_measures_again(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    result = go_on(folder)
    assert metrics(folder, timed=True) == metrics(whole, timed=True)
    assert checkpoints(folder) == checkpoints(whole)
    assert result["validation_bits_per_byte"] == facts(whole)["results"]["validation_bits_per_byte"]


def test_the_corpus_of_a_run_stays_its_own(recipe: Recipes, texts: Path, tmp_path: Path) -> None:
    """Files that changed or went away after the run began are no reason to lose it."""
    own = Path(shutil.copytree(texts, tmp_path / "own"))
    source = {"path": str(own)}
    plan = recipe(steps=4, data__sources=[source])
    run(plan, tmp_path / "whole")
    run(plan, tmp_path / "cut", on_ready=stop_after(2))
    (own / "000.txt").write_text("something else entirely", encoding="utf-8")
    shutil.rmtree(tmp_path / "own")
    go_on(tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_start_that_never_reached_a_checkpoint_leaves_no_lines_behind(recipe: Recipes, tmp_path: Path) -> None:
    """Metrics, samples and facts of an attempt that died early are not mixed with the next one's."""
    folder, plan = tmp_path / "run", recipe(steps=3, sample_every=1)

    def die(trainer) -> None:
        trainer.callbacks.append(Bomb())

    class Bomb:
        on_start = on_end = lambda self, trainer: None
        on_close = lambda self: None  # noqa: E731

        def on_step(self, trainer, record) -> None:
            if record["step"] == 2:
                raise RuntimeError("the disk fell off")

    sampler = lambda model, tokenizer: lambda prompts: ["?" for _ in prompts]  # noqa: E731
    with pytest.raises(RuntimeError, match="fell off"):
        run(plan, folder, on_ready=die, make_sampler=sampler)
    assert (facts(folder)["status"], facts(folder)["reason"]) == ("failed", "the disk fell off")
    assert (folder / "report.html").is_file()
    assert len(metrics(folder)) == 2 and latest_checkpoint(folder) is None
    first_start = facts(folder)["started"]
    run(plan, folder, make_sampler=sampler)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    headings = [line for line in (folder / "samples.txt").read_text(encoding="utf-8").splitlines() if line[0] == "="]
    assert [line.split()[2] for line in headings] == ["1", "2", "3"]
    assert facts(folder)["status"] == "finished" and facts(folder)["reason"] is None
    assert facts(folder)["started"] >= first_start


def test_resuming_without_a_checkpoint_starts_from_the_first_step(recipe: Recipes, tmp_path: Path) -> None:
    plan = recipe(steps=3)
    run(plan, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    before = metrics(tmp_path / "whole")
    go_on(tmp_path / "whole")
    assert metrics(tmp_path / "whole") == before


@pytest.mark.parametrize(("overrides", "words"), [
    (["model.hidden_size=64"], "a run cannot change model"),
    (["batch_size=8", "seed=2"], "a run cannot change batch_size, seed"),
    (["data.max_bytes=1000"], "a run cannot change data"),
    (["optimizer.name=adamw"], "a run cannot change optimizer.name"),
])
def test_what_a_resumed_run_cannot_change(overrides: list[str], words: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        go_on(folder, *overrides)
    assert before == {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}


def test_workers_may_change_and_the_original_recipe_resumes_too(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    folder = cut_back(whole, tmp_path / "run", 9)
    plan = recipe(checkpoint__every_steps=3, checkpoint__keep_last=9, data__workers=2)
    assert plan.model.eos_token_id is None
    run(plan, folder, resume=True)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("name", ["optimizer-00001-of-00001.safetensors", "trainer_state.json"])
def test_a_corrupt_checkpoint_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    path = folder / "checkpoints" / "step-000012" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"{name}.* Remove the folder {path.parent} to resume from the one before"):
        go_on(folder)
    assert facts(folder)["status"] == "failed" and name in facts(folder)["reason"]
    shutil.rmtree(path.parent)
    go_on(folder)
    assert metrics(folder) == metrics(whole)


# --- signals ----------------------------------------------------------------------------------------------------------


def start(file: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "moonbase", "train", str(file), "--out", str(folder)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    while process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.is_file() and path.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.01)
    pytest.fail(f"ended early: {process.communicate()[1]}")


@pytest.fixture
def long_run(recipe_file: Callable[..., Path]) -> Path:
    """More steps than any test waits for, and a checkpoint every 20."""
    return recipe_file(steps=100_000, checkpoint__every_steps=20, schedule__kind="constant", validate_every=10**6)


def test_ctrl_c_saves_and_kill_9_loses_only_what_came_after_the_last_checkpoint(
    long_run: Path, recipe: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = start(long_run, folder)
    wait_for_steps(first, folder, 30)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130 and "the checkpoint comes first" in err and "--resume" in out, err
    done = len(metrics(folder))
    assert checkpoints(folder)[-1] == f"step-{done:06d}"
    assert (facts(folder)["status"], facts(folder)["reason"]) == ("stopped", "stopped by SIGINT")

    # The second life ends without warning, in the middle of whatever it is doing.
    second = subprocess.Popen([sys.executable, "-m", "moonbase", "train", str(folder), "--resume"], cwd=ROOT,
                              stderr=subprocess.DEVNULL)
    wait_for_steps(second, folder, done + 45)
    with pytest.raises(SystemExit) as refused:
        main(["train", str(folder), "--resume"])
    words = capsys.readouterr()
    assert refused.value.code == 2 and words.out == "" and words.err.count("\n") == 1
    assert f"in use by another moonbase process (pid {second.pid})" in words.err
    second.kill()
    second.wait()
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 99')  # what a kill in the middle of a write leaves
    (folder / "checkpoints" / ".partial-step-000999-1-dead").mkdir()

    saved = latest_checkpoint(folder)
    assert saved is not None
    step = load_state(saved)[1]["step"]
    written = len([line for line in (folder / "metrics.jsonl").read_bytes().split(b"\n") if line.endswith(b"}")])
    assert step > done and written - step <= 21
    end = step + 10
    result = go_on(folder, f"steps={end}")
    assert result["status"] == "finished" and not list((folder / "checkpoints").glob(".*"))
    assert [line["step"] for line in metrics(folder)] == list(range(1, end + 1))

    straight = tmp_path / "straight"
    run(recipe(steps=end, checkpoint__every_steps=20, schedule__kind="constant", validate_every=10**6), straight)
    assert metrics(straight) == metrics(folder)
    last = f"checkpoints/step-{end:06d}"
    for prefix in ("model", "optimizer"):
        ours, theirs = tensors(folder / last, prefix), tensors(straight / last, prefix)
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_second_ctrl_c_ends_at_once_but_not_the_same_one_told_twice(recipe: Recipes, tmp_path: Path) -> None:
    """torchrun passes the terminal's Ctrl-C on to processes that have had it already."""
    seen = []

    def ready(trainer) -> None:
        original = trainer.train_step

        def train_step():
            record = original()
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                seen.append(trainer.stop_reason)
            return record

        trainer.train_step = train_step

    before = signal.getsignal(signal.SIGINT)
    result = run(recipe(steps=5), tmp_path / "run", on_ready=ready)
    assert seen == ["stopped by SIGINT"] and (result["status"], result["step"]) == ("stopped", 2)
    assert signal.getsignal(signal.SIGINT) is before

    def impatient(trainer) -> None:
        original = trainer.train_step

        def train_step():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGINT)
            return original()

        trainer.train_step = train_step

    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path / "run", on_ready=impatient)
    assert (facts(tmp_path / "run")["status"], facts(tmp_path / "run")["reason"]) == ("stopped", "interrupted")
    assert checkpoints(tmp_path / "run") == ["step-000002"]


def test_sigterm_before_the_first_step_is_recorded(recipe: Recipes, tmp_path: Path) -> None:
    """Building and compiling a large model takes minutes; a scheduler may change its mind in them."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "run", on_ready=lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert (facts(tmp_path / "run")["status"], facts(tmp_path / "run")["reason"]) == ("stopped", "interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_works_outside_the_main_thread(recipe: Recipes, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, recipe(steps=2), tmp_path / "run").result()["status"] == "finished"


def test_a_checkpoint_may_be_killed_at_any_file(recipe: Recipes, tmp_path: Path, monkeypatch) -> None:
    """Dying between any two writes of a checkpoint leaves the earlier one, and nothing under a final name."""
    import moonbase.train.callbacks.checkpoints as module

    class Killed(BaseException):
        """Nothing in the package catches it, as nothing catches kill -9."""

    plan = recipe(steps=4, checkpoint__every_steps=2)
    for function in ("write_weights", "save_state"):
        folder = tmp_path / function
        original = getattr(module, function)

        def dying(*args, _original=original, _calls=[], **kwargs):  # noqa: B006 - counts the calls of one run
            _calls.append(1)
            _original(*args, **kwargs)
            if len(_calls) == 2:
                # As kill -9 would: no clean-up of the folder under way.
                monkeypatch.setattr("moonbase.files.shutil.rmtree", lambda *a, **k: None)
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(module, function, dying)
            with pytest.raises(Killed):
                run(plan, folder)
        monkeypatch.undo()
        left = checkpoints(folder)
        assert left[-1] == "step-000002" and left[0].startswith(".partial-step-000004"), left
        go_on(folder)
        assert checkpoints(folder) == ["step-000002", "step-000004"]
        assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]


def test_dropping_an_old_checkpoint_may_be_killed_too(recipe: Recipes, tmp_path: Path, monkeypatch) -> None:
    """Half a folder never keeps its name."""
    folder = tmp_path / "run"
    monkeypatch.setattr("moonbase.train.callbacks.checkpoints.shutil.rmtree",
                        lambda path, **_: (path / "config.json").unlink())
    run(recipe(steps=4, checkpoint__every_steps=1, checkpoint__keep_last=2), folder)
    monkeypatch.undo()
    assert [name for name in checkpoints(folder) if name.startswith("step")] == ["step-000003", "step-000004"]
    assert len(checkpoints(folder)) == 4
    go_on(folder)
    assert checkpoints(folder) == ["step-000003", "step-000004"]
    assert json.loads((folder / "checkpoints/step-000004/config.json").read_text())["hidden_size"] == 32


# --- what has been damaged since --------------------------------------------------------------------------------------


def main_code(folder: Path, *words: str) -> int | str | None:
    """The exit code of the command that resumes a run."""
    with pytest.raises(SystemExit) as left:
        main(["train", str(folder), "--resume", *words])
    return left.value.code


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(whole: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    (folder / "checkpoints" / "step-000012" / "model.safetensors.index.json").write_text("{")
    main_code(folder)
    words = " ".join(capsys.readouterr().err.split())
    assert "step-000012 is damaged (model.safetensors.index.json is damaged) and is passed over" in words
    assert f"resuming {folder} at step 9" in words
    assert metrics(folder) == metrics(whole) and checkpoints(folder) == checkpoints(whole)
    for name in checkpoints(whole):
        assert content(folder / "checkpoints" / name) == content(whole / "checkpoints" / name), name


def test_nothing_starts_afresh_over_a_damaged_checkpoint(whole: Path, recipe: Recipes, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match="already holds a run"):
        run(recipe(), folder)


def test_a_run_does_not_go_back(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    before = (folder / "config.yaml").read_bytes(), (folder / "run.json").read_bytes()
    assert main_code(folder, "steps=10") == 2
    words = capsys.readouterr().err
    assert words.count("\n") == 1 and "is at step 12 already, past steps=10. Give more steps to go on." in words
    assert before == ((folder / "config.yaml").read_bytes(), (folder / "run.json").read_bytes())
    assert main_code(folder) == 0
    assert "all 12 steps are done; measuring again" in capsys.readouterr().err
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("damage", ["tokens", "offsets", "facts", "no facts", "tokenizer", "other tokenizer", "gone"])
def test_a_damaged_corpus_is_made_again(damage: str, whole: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    folder = cut_back(whole, tmp_path / "run", 6)
    spoil_corpus(folder / "corpus", damage)
    assert main_code(folder) == 0
    words = capsys.readouterr().err
    assert ("making it again from its sources" in words) == (damage != "gone")
    assert metrics(folder) == metrics(whole), "the same texts in the same order"
    files_of = lambda corpus: {path.name: path.read_bytes() for path in corpus.rglob("*.bin")}  # noqa: E731
    assert files_of(folder / "corpus") == files_of(whole / "corpus")
    assert not list(folder.glob(".partial*")) and not list(folder.glob(".retired*"))


def spoil_corpus(corpus: Path, damage: str) -> None:
    shard = next(corpus.glob("train*.bin"))
    if damage == "tokens":
        os.truncate(shard, 6)
    elif damage == "offsets":
        path = shard.with_name(shard.name.replace(".bin", ".offsets.npy"))
        path.write_bytes(b"j" * path.stat().st_size)
    elif damage == "facts":
        (corpus / "corpus.json").write_text("junk")
    elif damage == "no facts":
        (corpus / "corpus.json").unlink()
    elif damage == "tokenizer":
        (corpus / "tokenizer" / "tokenizer.json").unlink()
    elif damage == "other tokenizer":
        facts = json.loads((corpus / "corpus.json").read_text(encoding="utf-8"))
        facts["tokenizer"]["digest"] = "0" * 64
        (corpus / "corpus.json").write_text(json.dumps(facts), encoding="utf-8")
    else:
        shutil.rmtree(corpus)


def test_a_corpus_that_cannot_be_made_again_as_it_was_ends_the_run(texts: Path, recipe: Recipes, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(texts, tmp_path / "own"))
    folder = tmp_path / "run"
    run(recipe(data__sources=[{"path": str(own)}], steps=4), folder, on_ready=stop_after(2))
    (own / "000.txt").write_text("something else entirely", encoding="utf-8")
    spoil_corpus(folder / "corpus", "tokens")
    damaged = sorted(path.stat().st_size for path in (folder / "corpus").iterdir())
    for _ in range(2):
        assert main_code(folder) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "damaged, and what its sources hold now is something else" in last and "--out" in last
        assert sorted(path.stat().st_size for path in (folder / "corpus").iterdir()) == damaged, "left as it is"
    shutil.rmtree(own)
    assert main_code(folder) == 2
    assert str(own) in capsys.readouterr().err.splitlines()[-1]
