"""Continuations of a few prompts while training, written to samples.txt. The sampler is handed in by the verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import Callback, Trainer

Sampler = Callable[[list[str]], list[str]]


class Sampling(Callback):
    """Every `sample_every` steps and after the last one."""

    def __init__(self, folder: RunFolder, make_sampler: Callable[[Trainer], Sampler]) -> None:
        self.folder, self.make_sampler = folder, make_sampler
        self.last: list[tuple[str, str]] = []

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        recipe = trainer.recipe
        due = recipe.sample_every is not None and record["step"] % recipe.sample_every == 0
        if (due or record["step"] == recipe.steps) and recipe.sample_prompts and trainer.world.size == 1:
            prompts = list(recipe.sample_prompts)
            self.last = list(zip(prompts, self.make_sampler(trainer)(prompts), strict=True))
            lines = [f">>> {json.dumps(prompt)}\n... {json.dumps(text)}\n" for prompt, text in self.last]
            self.folder.append_samples(f"=== step {record['step']} | temperature 0.0\n" + "".join(lines))
