"""Loss and bits per byte on held-out documents. Evaluation touches neither expert loads nor router biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moonbase.data.stream import Batch
from moonbase.ops.attention import Documents
from moonbase.ops.cross_entropy import IGNORE
from moonbase.train.trainer import Callback, Trainer


class Validation(Callback):
    """Every `validate_every` steps on the first batches, and after the last step on all held-out documents (`final`).

    make_batches: opens this process's share of the held-out batches afresh; all processes get equally many.
    byte_lengths [V]: how many bytes each token stands for, so that losses of different tokenizers compare.
    """

    def __init__(self, make_batches: Callable[[], Iterator[Batch]], byte_lengths: Tensor) -> None:
        self.make_batches, self.byte_lengths = make_batches, byte_lengths
        self.final: tuple[float, float] | None = None

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        recipe = trainer.recipe
        if record["step"] % recipe.validate_every and record["step"] != recipe.steps:
            return
        last = record["step"] == recipe.steps
        measured = self.measure(trainer, None if last else recipe.validation_batches)
        if last:
            self.final = measured
        record["validation_loss"], record["validation_bits_per_byte"] = measured
        record["expert_share"] = trainer.expert_share

    @torch.no_grad()
    def measure(self, trainer: Trainer, most_batches: int | None) -> tuple[float, float]:
        """Mean loss per token (nats) and bits per byte over the first `most_batches` batches, or all of them."""
        world = trainer.world
        sums = torch.zeros(3, dtype=torch.float64)
        for number, batch in enumerate(self.make_batches()):
            if most_batches is not None and number >= most_batches:
                break
            sums += self._sums(trainer, batch)
        if world.size > 1:
            sums = world.sum(sums.to(world.device)).cpu()
        nats, tokens, num_bytes = sums.tolist()
        return nats / max(tokens, 1), nats / math.log(2) / max(num_bytes, 1)

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
