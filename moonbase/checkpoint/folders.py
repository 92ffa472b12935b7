"""Finding the checkpoint that a path means: a run folder's newest, or the checkpoint folder itself."""

from __future__ import annotations

import re
from pathlib import Path

from moonbase.config import read_json
from moonbase.errors import CheckpointError, UserError

_STEP = re.compile(r"step-(\d+)")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder has a config.json, weights, and every shard that its index names."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return False
    try:
        shards = set(read_json(index)["weight_map"].values())
    except (UserError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def list_checkpoints(run_folder: str | Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in (Path(run_folder) / "checkpoints").glob("step-*"):
        match = _STEP.fullmatch(folder.name)
        if match and is_checkpoint(folder):
            found.append((int(match[1]), folder))
    return sorted(found)


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(run_folder)
    return found[-1][1] if found else None


def resolve_model_folder(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run folder. Raises CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; give a checkpoint folder or a run folder")
    newest = latest_checkpoint(path) or latest_checkpoint(path.parent if path.name == "checkpoints" else path)
    if newest is not None:
        return newest
    if (path / "config.json").is_file():
        # Incomplete folders come back too: the reader says exactly what is missing.
        return path
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has no complete checkpoint yet")
    raise CheckpointError(f"{path}: neither a checkpoint (no config.json) nor a run folder (no checkpoints/)")
