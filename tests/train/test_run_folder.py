"""One owner at a time, nothing half-written, one clear line for what the user can mend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moonbase.cli import main
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.recipe import Recipe
from moonbase.train import run as training
from moonbase.train.run import _command, train
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import Trainer
from tests.train.tiny import facts, go_on, metrics, quiet, run


def test_one_process_owns_it_and_the_kernel_lets_go(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=rf"in use by another moonbase process \(pid {os.getpid()}\)"):
        RunFolder(tmp_path / "run")
    first.close()
    first.close()
    assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid()), "the file stays, the lock does not"
    (tmp_path / "run" / ".lock").write_text("4194305, of a process that is no more, with a long story")
    RunFolder(tmp_path / "run").close()
    assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.path == second.path and first.path.is_dir()
    first.close()
    second.close()


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    for place in (tmp_path / ".partial-corpus-1-x", tmp_path / "checkpoints" / ".partial-step-000003-1-x"):
        place.mkdir(parents=True)
    (tmp_path / ".partial-run.json-1-x").write_text("{")
    (tmp_path / "checkpoints" / "step-000001").mkdir()
    RunFolder(tmp_path).close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "checkpoints", "step-000001"]


def test_metrics_are_lines_of_json_whatever_the_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": float("nan"), "max_logit": [1.0, float("inf")], "word": "é\u2028"})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert lines.count("\n") == 1

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    assert json.loads(lines, parse_constant=refuse) == {"step": 1, "loss": None, "max_logit": [1.0, None],
                                                        "word": "é\u2028"}
    folder.flush()
    folder.close()


def test_rewinding_drops_what_comes_later_and_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff\xfe\n{"step": 2}\n[]\n{"loss": 1}\n{"step": 3}\n{"step": 2, "x": 1}\n{"ste')
    (tmp_path / "samples.txt").write_text(
        '=== step 1 | temperature 0.0\n>>> "a"\n... "b"\n=== step 2 | t\n>>> "=== step 9"\n... "\\n"\n'
        '=== step 3\n>>> "')
    folder = RunFolder(tmp_path)
    folder.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2}\n{"step": 2, "x": 1}\n'
    assert (tmp_path / "samples.txt").read_text().endswith('... "\\n"\n')
    folder.append_metrics({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text().endswith('\n{"step": 3}\n')
    folder.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "samples.txt").read_text() == ""
    folder.close()


def test_the_last_line_may_be_amended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.amend_metrics(1, x=1)
    assert not (tmp_path / "metrics.jsonl").exists()
    for step in (1, 2):
        folder.append_metrics({"step": step, "loss": 1 / 3})
    folder.amend_metrics(1, x=1)
    folder.amend_metrics(2, x=float("nan"), loss=0.1)
    folder.append_metrics({"step": 3})
    folder.close()
    assert metrics(tmp_path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 0.1, "x": None}, {"step": 3}]


def test_run_json_holds_the_command_of_one_process_and_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/moonbase", "train", "pico", "data=my texts"])
    assert _command() == "moonbase train pico 'data=my texts'"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _command() == "torchrun --nproc-per-node 8 -m moonbase train pico 'data=my texts'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _command().startswith("torchrun --nnodes 2 --nproc-per-node 4 -m moonbase")


def test_full_gpu_memory_names_the_mend(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def fill(trainer: Trainer) -> None:
        def loss(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")

        trainer.model.loss = loss

    words = r"GPU memory is full: lower micro_batch_size \(now 2\) or set recompute=selective"
    with pytest.raises(UserError, match=words):
        run(recipe(micro_batch_size=2), tmp_path / "run", on_ready=fill)
    assert "GPU memory is full" in facts(tmp_path / "run")["reason"]


def test_facts_merge_and_survive_a_broken_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.update_facts(a=1) == {"a": 1}
    assert folder.update_facts(b=tmp_path) == {"a": 1, "b": tmp_path}
    assert facts(tmp_path) == {"a": 1, "b": str(tmp_path)}
    for broken in ("[1]", "{", ""):
        (tmp_path / "run.json").write_text(broken)
        assert folder.update_facts(c=2) == {"c": 2}
    assert folder.update_facts(afresh=True, d=3) == {"d": 3}
    folder.close()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "resume", "words"), [
    ({"data__sources": []}, False, "data: nothing to train on. Name a folder or file"),
    ({"data__sources": [{"path": "no/such/folder"}]}, False, "no/such/folder"),
    ({"data__tokenizer": "no/such/tokenizer"}, False, "no/such/tokenizer"),
    ({"model": {"vocab_size": 300}}, False, "entries, but model.vocab_size=300"),
    ({}, True, "no run to resume here"),
])
def test_mistakes_are_one_line_that_names_them(
    fields: dict, resume: bool, words: str, recipe_file: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.train.tiny import MODEL

    if "model" in fields:
        fields = {"model": {**MODEL, **fields["model"]}}
    command = ["train", str(recipe_file(**fields)), "--out", str(tmp_path / "run"), *(["--resume"] if resume else [])]
    with pytest.raises(SystemExit) as left:
        main(command)
    output = capsys.readouterr()
    assert left.value.code == 2 and output.out == ""
    assert words in output.err and output.err.splitlines()[-1].startswith("moonbase: error: ")
    assert "Traceback" not in output.err
    assert not (tmp_path / "run").exists(), "a slip of the pen makes no folder"


def test_a_refused_run_leaves_folders_as_they_were(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mistaken = recipe(data__sources=[{"path": "no/such/folder"}])
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear")
    before = sorted(tmp_path.rglob("*"))
    for folder in ("mine", "notes", "new/and/deep", "mine/new"):
        with pytest.raises(UserError, match="no/such/folder"):
            run(mistaken, tmp_path / folder)
    assert sorted(path for path in tmp_path.rglob("*") if path.parent.name != "notes") == [
        path for path in before if path.parent.name != "notes"]
    assert (tmp_path / "notes" / "letter.txt").read_text() == "dear"


def test_an_existing_run_is_not_trained_over(whole: Path, recipe: Callable[..., Recipe]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match="already holds a run"):
        run(recipe(), whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}


def test_a_batch_that_cannot_be_shared_evenly(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moonbase.train.run import _enter
    from tests.train.tiny import ONE

    three = type("World", (), {"size": 3, "rank": 0, "device": ONE.device, "is_first": True})
    with pytest.raises(UserError, match="batch_size=4 cannot be shared evenly by 3 processes"):
        _enter(recipe(), tmp_path / "run", False, three())
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="a file with this name is in the way"):
        run(recipe(), tmp_path / "run")


# --- file systems that refuse -----------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted("size=100k")` -> a small file system of its own, which even root can fill or may not write to."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options: str) -> Path:
        answer = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True,
                                text=True, check=False) if shutil.which("mount") else None
        if answer is None or answer.returncode:
            pytest.skip(f"cannot mount a tmpfs here (needs root): {answer.stderr.strip() if answer else 'no mount'}")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_a_read_only_folder(
    mounted: Callable[[str], Path], recipe: Callable[..., Recipe], whole: Path
) -> None:
    place = mounted("size=4m")
    shutil.copytree(whole, place / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    for folder, resume in ((place / "new", False), (place / "run", True)):
        with pytest.raises(UserError, match="no permission to write here"):
            train(recipe(), folder, resume=resume, console=quiet())


@pytest.mark.parametrize("free", [0, 40_000, 110_000, 260_000])
def test_a_full_disk_at_any_moment_is_one_clear_line(
    free: int, mounted: Callable[[str], Path], recipe: Callable[..., Recipe], whole: Path
) -> None:
    """The disk fills while the lock, the corpus, metrics or a checkpoint is written. What was whole stays whole."""
    place = mounted("size=900k,nr_inodes=500")
    folder, plan = place / "run", recipe(steps=400, checkpoint__every_steps=2, checkpoint__keep_last=9)
    taken = place / "other"
    available = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    taken.write_bytes(b"x" * (available - free))
    with pytest.raises(UserError, match="the disk is full"):
        run(plan, folder)
    assert not list(folder.glob("checkpoints/.partial*"))
    taken.unlink()
    taken.write_bytes(b"x" * 1000)
    if (folder / "checkpoints").is_dir() and list((folder / "checkpoints").glob("step-*")):
        result = run(recipe(steps=4, checkpoint__every_steps=2, checkpoint__keep_last=9), folder, resume=True)
        assert [line["step"] for line in metrics(folder)] == list(range(1, result["step"] + 1))
    RunFolder(folder).close()


def test_metrics_that_no_longer_fit_are_told_and_the_folder_is_released(mounted: Callable[[str], Path]) -> None:
    place = mounted("size=64k")
    folder = RunFolder(place)
    with pytest.raises(UserError, match="the disk is full"):
        for step in range(10_000):
            folder.append_metrics({"step": step, "loss": 1.0})
    folder.close()
    RunFolder(place).close()


def test_a_model_that_no_memory_holds_is_refused_before_anything_is_made(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients and one moment in fp32: 12 bytes for each element of the real tensors."""
    elements = sum(tensor.numel() for tensor in Transformer(recipe().model).state_dict().values())
    monkeypatch.setattr(training, "free_memory_bytes", lambda: 12 * elements)
    run(recipe(steps=1), tmp_path / "fits")
    monkeypatch.setattr(training, "free_memory_bytes", lambda: 12 * elements - 10_000)
    with pytest.raises(UserError, match=r"model: .*B parameters need at least .* GB to train.* free memory"):
        run(recipe(steps=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_told_in_one_line(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        def loss(*_: object) -> None:
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no compiler\nin many lines"), [])

        trainer.model.loss = loss

    with pytest.raises(UserError, match=r"^compile=blocks: torch cannot compile .*Set compile=off\.$") as caught:
        run(recipe(compile="blocks"), tmp_path / "run", on_ready=fail)
    assert "\n" not in str(caught.value)
    assert facts(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("junk", ["{", "[" * 100_000, "[1]"])
def test_a_broken_run_json_does_not_stop_a_run(junk: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "run.json").write_text(junk)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("[" * 100_000 + "\n")
    assert go_on(folder)["status"] == "finished"
    assert metrics(folder) == metrics(whole)
