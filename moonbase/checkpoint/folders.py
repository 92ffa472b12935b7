"""Finding the checkpoint that a path means: a run folder's newest, or the checkpoint folder itself.

A checkpoint appears under its name whole, so one that is not whole has been damaged since. An older one never takes its
place in silence: a path that means a damaged checkpoint is refused, and who resumes a run says what it passes over.
"""

from __future__ import annotations

import re
from pathlib import Path

from moonbase.config import read_json
from moonbase.errors import CheckpointError, UserError
from moonbase.presets import preset_names

_STEP = re.compile(r"step-(\d+)")


def damage(folder: str | Path) -> str | None:
    """What keeps a folder from being a checkpoint: it needs a config.json, weights, and every shard that its index
    names. None where it has them."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if (folder / "model.safetensors").is_file():
        return None
    if not index.is_file():
        return f"{index.name} is missing"
    try:
        shards = set(read_json(index)["weight_map"].values())
    except (UserError, KeyError, TypeError, AttributeError):
        return f"{index.name} is damaged"
    missing = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    return f"{missing[0]} is missing" if missing else None


def list_checkpoints(run_folder: str | Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    return [(step, folder) for step, folder in _step_folders(run_folder) if damage(folder) is None]


def _step_folders(run_folder: str | Path) -> list[tuple[int, Path]]:
    folders = (Path(run_folder) / "checkpoints").glob("step-*")
    matches = [(_STEP.fullmatch(folder.name), folder) for folder in folders if folder.is_dir()]
    return sorted((int(match[1]), folder) for match, folder in matches if match)


def damaged_newest(run_folder: str | Path) -> list[tuple[Path, str]]:
    """Checkpoints that are newer than the newest complete one, and what each lacks; the newest first."""
    found = []
    for _, folder in reversed(_step_folders(run_folder)):
        reason = damage(folder)
        if reason is None:
            break
        found.append((folder, reason))
    return found


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(run_folder)
    return found[-1][1] if found else None


def resolve_model_folder(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run folder.

    Raises CheckpointError where there is none, and where the newest of a run is damaged.
    """
    name, path = str(path), Path(path)
    if not path.exists():
        preset = name.removeprefix("preset:")
        if preset in preset_names():
            raise CheckpointError(f"{name}: a preset has no trained weights. Make some (moonbase quickstart, or "
                                  f"moonbase train {preset} data=FOLDER) and name their run folder; in Python "
                                  f"moonbase.load('preset:{preset}') gives random ones")
        raise CheckpointError(f"{path}: no such folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; give a checkpoint folder or a run folder")
    run = path.parent if path.name == "checkpoints" and not (path / "checkpoints").is_dir() else path
    newest = latest_checkpoint(run)
    if damaged := damaged_newest(run):
        folder, reason = damaged[0]
        if newest is None:
            raise CheckpointError(f"{run}: this run has no complete checkpoint ({folder.name}: {reason})")
        raise CheckpointError(f"{folder}: damaged ({reason}). Remove this folder, or name the checkpoint before it: "
                              f"{newest}")
    if newest is not None:
        return newest
    if (path / "config.json").is_file():
        # Incomplete folders come back too: the reader says exactly what is missing.
        return path
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: this run has no complete checkpoint yet")
    raise CheckpointError(f"{path}: neither a checkpoint (no config.json) nor a run folder (no checkpoints/)")
