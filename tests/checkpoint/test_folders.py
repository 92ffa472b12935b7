"""Which checkpoint a path means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moonbase.checkpoint import latest_checkpoint, list_checkpoints, read_config, resolve_model_folder, save_weights
from moonbase.errors import CheckpointError


@pytest.fixture
def run(written, tmp_path: Path) -> Path:
    """A run folder with steps 5, 20 and 100, and what a crash can leave."""
    model, source = written("k2")
    run = tmp_path / "run"
    save_weights(model, run / "checkpoints" / "step-000005", read_config(source))
    for name in ("step-000020", "step-000100", "step-000200", "step-000300", ".partial-step-000400-1", "best"):
        shutil.copytree(run / "checkpoints" / "step-000005", run / "checkpoints" / name)
    next((run / "checkpoints" / "step-000200").glob("*.safetensors")).unlink()
    (run / "checkpoints" / "step-000300" / "config.json").unlink()
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


def test_a_spoiled_index_is_not_complete(run: Path) -> None:
    (run / "checkpoints" / "step-000100" / "model.safetensors.index.json").write_text("{")
    (run / "checkpoints" / "step-000020" / "model.safetensors.index.json").unlink()
    assert latest_checkpoint(run) == run / "checkpoints" / "step-000005"


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
