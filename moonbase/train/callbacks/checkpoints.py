"""Checkpoints in Hugging Face layout with the optimizer's state beside the weights; the newest few are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moonbase import files
from moonbase.checkpoint import list_checkpoints, load_state, load_weights, save_state, write_weights
from moonbase.checkpoint.safetensors_file import read_header
from moonbase.errors import CheckpointError, UserError
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import Callback, Trainer


class Checkpoints(Callback):
    """Saves every N minutes or steps, at the end, and when asked to stop. A folder appears whole or not at all."""

    def __init__(self, folder: RunFolder | None, path: Path, tokenizer_files: dict[str, Path]) -> None:
        self.folder, self.path, self.tokenizer_files = folder, path, tokenizer_files
        self.saved_at = time.monotonic()
        self.saved_step = -1

    def on_start(self, trainer: Trainer) -> None:
        self.saved_at, self.saved_step = time.monotonic(), trainer.step

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        config = trainer.recipe.checkpoint
        due = time.monotonic() - self.saved_at > config.every_minutes * 60
        due = due or (config.every_steps is not None and record["step"] % config.every_steps == 0)
        if trainer.world.agree(due):
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved_step != trainer.step:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write `checkpoints/step-N`, then drop the oldest beyond `keep_last`. A collective call."""
        path, world = self.path / "checkpoints" / f"step-{trainer.step:06d}", trainer.world
        tensors, scalars = trainer.optimizer.named_state()
        facts = {**trainer.state(), "optimizer": scalars}
        with contextlib.ExitStack() as stack:
            # The first process alone writes, the others help to gather; each part says so to all if it fails.
            partial = world.on_first(lambda: self._begin(stack, path)) or path
            write_weights(trainer.weights(), partial, trainer.recipe.model, extra_files=self.tokenizer_files)
            # Before the first update there is no state, and nothing to gather.
            if trainer.recipe.checkpoint.optimizer and (tensors or world.is_first):
                save_state(partial, tensors, facts)
            world.on_first(stack.close)
        if world.is_first:
            self._drop_old(trainer.recipe.checkpoint.keep_last)
        self.saved_at, self.saved_step = time.monotonic(), trainer.step
        return path

    def _begin(self, stack: contextlib.ExitStack, path: Path) -> Path:
        if self.folder is not None:
            self.folder.flush()
        return stack.enter_context(files.write_folder(path))

    def _drop_old(self, keep_last: int) -> None:
        for _, old in list_checkpoints(self.path)[:-keep_last]:
            # Renamed first: a kill while files go must not leave half a checkpoint under its name.
            with contextlib.suppress(OSError):
                doomed = files.partial_sibling(old)
                os.rename(old, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def resume(trainer: Trainer, checkpoint: Path) -> None:
    """Continue from a checkpoint, written by any number of processes. Raises CheckpointError; optimizer state that
    does not fit is found only after the weights have been filled."""
    if not (checkpoint / "trainer_state.json").is_file() and not trainer.recipe.checkpoint.optimizer:
        raise CheckpointError(f"{checkpoint} holds weights alone (checkpoint.optimizer=false): train them further in a "
                              f"new run with stage=continue init={checkpoint}")
    try:
        tensors, facts = load_state(checkpoint, into=_room_for_state(trainer, checkpoint))
        load_weights(trainer.weights(), checkpoint, trainer.recipe.model)
        trainer.optimizer.load_named_state(tensors, facts["optimizer"])
    except UserError as error:
        raise CheckpointError(f"{error}. Remove the folder {checkpoint} to resume from the one before it") from None
    trainer.load_state(facts)
    trainer.masters.publish(trainer.step - 1)


def _room_for_state(trainer: Trainer, checkpoint: Path) -> dict[str, Tensor] | None:
    """Empty tensors, sharded as the parameters are, for all that the checkpoint holds of the optimizer: so no process
    reads more than its part and one tensor. One process alone reads as it is."""
    if trainer.world.size == 1:
        return None
    room: dict[str, Tensor] = {}
    for path in checkpoint.glob("optimizer-*.safetensors"):
        for key, stored in read_header(path).items():
            name, _, item = key.rpartition("/")
            like = None if item == "step" else trainer.masters.named.get(name)
            room[key] = torch.empty(stored.shape) if like is None else torch.empty_like(like)
    return room
