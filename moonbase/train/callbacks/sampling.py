"""Continuations of a few prompts while training, written to samples.txt. The sampler is handed in by the verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from moonbase.errors import UserError
from moonbase.train.run_folder import RunFolder
from moonbase.train.trainer import Callback, Trainer

Sampler = Callable[[list[str]], list[str]]


class Sampling(Callback):
    """Every `sample_every` steps and after the last one. A prompt that cannot be continued (an empty one, one longer
    than the context) is told through `note`: no sample is worth a run."""

    def __init__(self, folder: RunFolder, make_sampler: Callable[[Trainer], Sampler],
                 note: Callable[[str], None]) -> None:
        self.folder, self.make_sampler, self.note = folder, make_sampler, note

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.size > 1 and trainer.recipe.sample_prompts:
            self.note("no samples while several processes train: each holds only a part of the model")

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        recipe = trainer.recipe
        due = recipe.sample_every is not None and record["step"] % recipe.sample_every == 0
        if (due or record["step"] == recipe.steps) and recipe.sample_prompts and trainer.world.size == 1:
            prompts = list(recipe.sample_prompts)
            try:
                texts = self.make_sampler(trainer)(prompts)
            except UserError as error:
                self.note(f"step {record['step']}: no samples: {error}")
                return
            lines = [f">>> {json.dumps(prompt)}\n... {json.dumps(text)}\n"
                     for prompt, text in zip(prompts, texts, strict=True)]
            self.folder.append_samples(f"=== step {record['step']} | temperature 0.0\n" + "".join(lines))
