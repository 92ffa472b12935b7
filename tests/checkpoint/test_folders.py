"""Which checkpoint a path means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moonbase.checkpoint import (
    damaged_newest,
    latest_checkpoint,
    list_checkpoints,
    read_config,
    resolve_model_folder,
    save_weights,
)
from moonbase.errors import CheckpointError


@pytest.fixture
def run(written, tmp_path: Path) -> Path:
    """A run folder with steps 5, 20 and 100, what a crash can leave, and what is no checkpoint at all."""
    model, source = written("k2")
    run = tmp_path / "run"
    save_weights(model, run / "checkpoints" / "step-000005", read_config(source))
    for name in ("step-000020", "step-000100", ".partial-step-000400-1", "best"):
        shutil.copytree(run / "checkpoints" / "step-000005", run / "checkpoints" / name)
    (run / "checkpoints" / "step-000500").write_text("a file")
    return run


def test_newest_complete_checkpoint(run: Path) -> None:
    assert [step for step, _ in list_checkpoints(run)] == [5, 20, 100]
    assert latest_checkpoint(run) == run / "checkpoints" / "step-000100"
    assert resolve_model_folder(run) == run / "checkpoints" / "step-000100"
    assert resolve_model_folder(run / "checkpoints") == run / "checkpoints" / "step-000100"


def test_steps_are_numbers_not_words(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-000005", run / "checkpoints" / "step-1000000")
    assert latest_checkpoint(run).name == "step-1000000"


def test_a_checkpoint_is_itself(run: Path, folder: Path) -> None:
    assert resolve_model_folder(run / "checkpoints" / "step-000020") == run / "checkpoints" / "step-000020"
    assert resolve_model_folder(folder) == folder


def spoil(folder: Path, what: str) -> str:
    """Damage a checkpoint and return what is to be said of it."""
    index, shard = folder / "model.safetensors.index.json", next(folder.glob("*.safetensors"))
    if what == "spoiled":
        index.write_text("{")
        return f"{index.name} is damaged"
    gone = {"index": index, "shard": shard, "config": folder / "config.json"}[what]
    gone.unlink()
    return f"{gone.name} is missing"


@pytest.mark.parametrize("what", ["spoiled", "index", "shard", "config"])
def test_an_older_checkpoint_never_takes_the_place_of_a_damaged_one_in_silence(run: Path, what: str) -> None:
    newest, before = run / "checkpoints" / "step-000100", run / "checkpoints" / "step-000020"
    reason = spoil(newest, what)
    assert latest_checkpoint(run) == before and damaged_newest(run) == [(newest, reason)]
    for path in (run, run / "checkpoints"):
        with pytest.raises(CheckpointError) as refused:
            resolve_model_folder(path)
        assert str(newest) in str(refused.value) and reason in str(refused.value)
        assert str(refused.value).endswith(str(before))
    assert resolve_model_folder(before) == before
    shutil.rmtree(newest)
    assert resolve_model_folder(run) == before and damaged_newest(run) == []
    spoil(run / "checkpoints" / "step-000005", "config")
    assert resolve_model_folder(run) == before, "what is older than a complete one is nobody's concern"


def test_where_all_are_damaged(run: Path) -> None:
    for step in (5, 20, 100):
        reason = spoil(run / "checkpoints" / f"step-{step:06d}", "config")
    assert latest_checkpoint(run) is None and len(damaged_newest(run)) == 3
    with pytest.raises(CheckpointError, match=rf"no complete checkpoint \(step-000100: {reason}\)"):
        resolve_model_folder(run)


@pytest.mark.parametrize("name", ["pico", "preset:pico"])
def test_a_preset_has_no_trained_weights(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: a preset has no trained weights.*moonbase quickstart.*"
                                              r"moonbase train pico data=FOLDER.*'preset:pico'"):
        resolve_model_folder(name)


def test_clear_errors(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        resolve_model_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model_folder(tmp_path / "file")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        resolve_model_folder(run)
    assert latest_checkpoint(run) is None
