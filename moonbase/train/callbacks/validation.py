"""Loss and bits per byte on held-out documents. Evaluation touches neither expert loads nor router biases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moonbase.data.stream import Batch
from moonbase.ops.attention import Documents
from moonbase.ops.cross_entropy import IGNORE
from moonbase.train.trainer import Callback, Trainer

FINAL_BYTES = 8_000_000
"""Of held-out text that a run's result is measured on: a fixed amount, minutes at most, and the same for any recipe."""


class Validation(Callback):
    """Every `validate_every` steps, and at the last one, on the first batches; `measure_final` gives a run's result.

    make_batches(max_bytes): opens this process's share of the held-out batches afresh, over all documents or the first
    `max_bytes` of their text; all processes get equally many.
    byte_lengths [V]: how many bytes each token stands for, so that losses of different tokenizers compare.
    """

    def __init__(self, make_batches: Callable[[int | None], Iterator[Batch]], byte_lengths: Tensor) -> None:
        self.make_batches, self.byte_lengths = make_batches, byte_lengths

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        recipe = trainer.recipe
        if record["step"] % recipe.validate_every and record["step"] != recipe.steps:
            return
        batches = itertools.islice(self.make_batches(None), recipe.validation_batches)
        sums = sum((self._sums(trainer, batch) for batch in batches), torch.zeros(3, dtype=torch.float64))
        record["validation_loss"], record["validation_bits_per_byte"] = self._result(trainer, sums)
        record["expert_share"] = trainer.expert_share

    def measure_final(self, trainer: Trainer, progress: Callable[[str, int], object]) -> tuple[float, float] | None:
        """Mean loss per token (nats) and bits per byte over the first FINAL_BYTES of held-out text, or None if the run
        is asked to stop meanwhile. A collective call."""
        world = trainer.world
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self.make_batches(FINAL_BYTES):
            if world.agree(trainer.stop_reason is not None):
                return None
            sums += self._sums(trainer, batch)
            progress("measuring on held-out text, bytes", world.size * int(sums[2]))
        return self._result(trainer, sums)

    def _result(self, trainer: Trainer, sums: Tensor) -> tuple[float, float]:
        world = trainer.world
        if world.size > 1:
            sums = world.sum(sums.to(world.device)).cpu()
        nats, tokens, num_bytes = sums.tolist()
        return nats / max(tokens, 1), nats / math.log(2) / max(num_bytes, 1)

    @torch.no_grad()
    def _sums(self, trainer: Trainer, batch: Batch) -> Tensor:
        """Nats, tokens and bytes of this process's rows, float64 [3]."""
        device, nats = trainer.world.device, 0.0
        for start in range(0, batch.tokens.shape[0], trainer.micro_batch_size):
            rows = slice(start, start + trainer.micro_batch_size)
            documents = Documents.from_ids(batch.documents[rows], device)
            nats += trainer.model.loss(batch.tokens[rows].to(device), batch.targets[rows].to(device),
                                       documents).loss_sum.item()
        kept = batch.targets[batch.targets != IGNORE]
        return torch.tensor([nats, kept.numel(), self.byte_lengths[kept].sum().item()], dtype=torch.float64)
