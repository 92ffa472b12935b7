"""The training loop: one optimizer step after another, with small callbacks around it.

A step reads one global batch, cut into micro-batches and over processes; sums losses, gradients, expert loads and logit
maxima over all of them; lets the guard look; updates weights (MuonClip), clips attention heads (QK-Clip) and moves the
router's biases. Everything that must survive a restart is in `state`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moonbase.data.stream import Batch
from moonbase.model import Transformer
from moonbase.model.transformer import LayerStatistics
from moonbase.ops.attention import Documents
from moonbase.ops.cross_entropy import IGNORE
from moonbase.optim import (
    MuonClip,
    attention_weights,
    clip_gradients_,
    grad_norm,
    learning_rate,
    qk_clip_,
    reduce_load,
    reduce_max_logits,
    update_router_bias_,
)
from moonbase.optim.gradients import may_clip
from moonbase.recipe import Recipe
from moonbase.sizes import train_flops_per_token
from moonbase.train.early import EarlyUpdates
from moonbase.train.guard import Guard
from moonbase.train.parallel import World
from moonbase.train.precision import Masters
from moonbase.train.speed import peak_flops


class Callback:
    """What happens around steps. `record` is the step's line of metrics.jsonl; callbacks may add to it."""

    def on_start(self, trainer: Trainer) -> None: ...

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None: ...

    def on_end(self, trainer: Trainer) -> None:
        """The last step is done, or the run was asked to stop."""

    def on_close(self) -> None:
        """However the run ended, by an error too."""


class Stream(Protocol):
    """An endless, resumable source of this process's share of every global batch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Ahead(NamedTuple):
    """A batch that was read before its step, and where its stream stood before."""

    stream: Stream
    state: dict[str, Any]
    batch: Batch


class RepeatedBatch:
    """The same batch again and again: what a step costs does not depend on what its tokens say.

    tokens: int64 [B, T+1]; documents: int32 [B, T], one document a row unless given.
    """

    def __init__(self, tokens: Tensor, documents: Tensor | None = None) -> None:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.batch = Batch(inputs, targets, torch.zeros_like(inputs, dtype=torch.int32) if documents is None
                           else documents)

    def __iter__(self) -> RepeatedBatch:
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class Trainer:
    """Owns a run's moving parts. `steps` is where it ends; `stop()` ends it after the current step."""

    def __init__(self, recipe: Recipe, model: Transformer, masters: Masters, optimizer: MuonClip, stream: Stream,
                 world: World, callbacks: list[Callback]) -> None:
        self.recipe, self.model, self.masters, self.optimizer = recipe, model, masters, optimizer
        self.stream, self.world, self.callbacks = stream, world, callbacks
        self.guard = Guard(recipe.guard)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.stop_reason: str | None = None
        self.expert_share: list[list[float]] = []
        """Of the last step: every MoE layer's tokens per expert, their mean 1."""
        self.flops_per_token = train_flops_per_token(recipe.model, recipe.sequence_length)
        self.peak = peak_flops(world.device)
        share = recipe.batch_size // world.size
        self.micro_batch_size = min(recipe.micro_batch_size or share, share)
        self._clip_weights = attention_weights(masters.named, recipe.model)
        self.early = None
        if recipe.gradients == "freed":
            self.early = EarlyUpdates(masters, optimizer, recipe.optimizer.grad_clip)
        self._ahead: _Ahead | None = None
        self._biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the recipe's last step, or until `stop` is called."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            while self.step < self.recipe.steps and not self.world.agree(self.stop_reason is not None):
                record = self.train_step()
                for callback in self.callbacks:
                    callback.on_step(self, record)
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            for callback in self.callbacks:
                callback.on_close()

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the step in hand."""
        self.stop_reason = reason

    def train_step(self) -> dict[str, Any]:
        """One optimizer step. Returns its metrics. Raises TrainingStopped when the guard gives up."""
        started = time.perf_counter()
        recipe, config = self.recipe, self.recipe.optimizer
        batch = self._next_batch()
        self.masters.prepare(self.step)
        quantized = self.masters.quantized
        num_targets = self._count_targets(batch)
        lr = learning_rate(self.step + 1, recipe.steps, config.lr, recipe.schedule)
        if self.early is not None:
            self.early.begin(self.step, lr, config.name == "muonclip")
        totals, statistics = self._accumulate(batch, num_targets)
        self._look_ahead()
        self.masters.collect()
        masters = list(self.masters.named.values())
        norm = grad_norm(masters)
        if self.early is not None:
            norm = self.early.norm_with(norm)
        max_logits = reduce_max_logits([layer.max_logit for layer in statistics])
        loads = [layer.expert_load for layer in statistics if layer.expert_load.numel()]
        load = reduce_load(loads) if loads else None
        # The host waits for the GPU from here on.
        loss_sum, mtp_sum, balance, norm_value = torch.stack([*self.world.sum(totals), norm]).tolist()
        loss = loss_sum / num_targets
        skipped = self.guard.reason_to_skip(loss, norm_value)
        clipped = None
        if skipped is None:
            clipped = self._update(masters, norm, norm_value, lr, max_logits, load)
        elif self.early is not None:
            self.masters.publish(self.step)
        if self.early is not None:
            self.early.end(norm_value)
        self.masters.zero_gradients()
        # The host waits for the GPU here, so whatever it has to do comes before.
        update_rms = self.optimizer.update_rms().item() if skipped is None and config.name == "muonclip" else 0.0
        self.step += 1
        self.tokens += recipe.tokens_per_step
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        rate = recipe.tokens_per_step / elapsed
        record: dict[str, Any] = {
            "step": self.step, "loss": loss, "balance_loss": balance / self.world.size, "lr": lr,
            "grad_norm": norm_value, "update_rms": update_rms, "tokens": self.tokens, "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / (self.peak * self.world.size) if self.peak else None,
            "max_logit": max_logits.amax(1).tolist(),
            "clipped_heads": clipped.tolist() if clipped is not None else [0] * len(statistics),
            "expert_load": (load.amax(1) / load.mean(1)).tolist() if load is not None else [],
            "memory_bytes": memory_bytes(self.world.device), "seconds": self.seconds,
        }
        if recipe.model.num_nextn_predict_layers:
            record["mtp_loss"] = mtp_sum / num_targets
        if recipe.qat is not None:
            record["int4"] = quantized
        if skipped is not None:
            record["skipped"] = skipped
        self.expert_share = (load / load.mean(1, keepdim=True)).tolist() if load is not None else []
        return record

    def _next_batch(self) -> Batch:
        ahead, self._ahead = self._ahead, None
        return ahead.batch if ahead is not None and ahead.stream is self.stream else self._read()

    def _read(self) -> Batch:
        batch = next(self.stream)
        return batch.whole_rows_first() if self.world.device.type == "cuda" else batch

    def _look_ahead(self) -> None:
        """Read the next step's batch while the GPU is at work on this one's, into memory that it can copy from."""
        if self.world.device.type == "cuda" and self.step + 1 < self.recipe.steps:
            state, batch = self.stream.state_dict(), self._read()
            batch = Batch(batch.tokens.pin_memory(), batch.targets.pin_memory(), batch.documents.pin_memory())
            self._ahead = _Ahead(self.stream, state, batch)

    def _count_targets(self, batch: Batch) -> int:
        count = torch.tensor((batch.targets != IGNORE).sum().item(), dtype=torch.float64)
        if self.world.size > 1:
            count = self.world.sum(count.to(self.world.device))
        return max(1, int(count.item()))

    def _accumulate(self, batch: Batch, num_targets: int) -> tuple[Tensor, list[LayerStatistics]]:
        """Forward and backward over the micro-batches. Returns (loss sum, mtp loss sum, mean balance loss) and
        statistics; the mtp loss is a mean over the modules."""
        recipe, device = self.recipe, self.world.device
        starts = range(0, batch.tokens.shape[0], self.micro_batch_size)
        totals = torch.zeros(3, device=device)
        merged: list[LayerStatistics] = []
        # All at once, while the GPU has nothing to do: copies from memory that may be paged out wait until it is done,
        # so that between micro-batches it would stand still until the host has caught up.
        whole_batch = [x.to(device, non_blocking=True) for x in (batch.tokens, batch.targets)]
        ids = batch.documents.pin_memory() if device.type == "cuda" else batch.documents
        for number, start in enumerate(starts):
            rows = slice(start, start + self.micro_batch_size)
            tokens, targets = (x[rows] for x in whole_batch)
            documents = Documents.from_ids(ids[rows], device)
            if self.world.size > 1:
                self.model.set_requires_gradient_sync(number == len(starts) - 1)
            losses = self.model.loss(tokens, targets, documents, recipe.optimizer.qk_clip)
            # Processes average their gradients, so each one's share of the token sum is scaled up by their number.
            token_loss = (losses.loss_sum + recipe.mtp_loss * losses.mtp_loss_sum) * (self.world.size / num_targets)
            # A mean over sequences; the last micro-batch may be a shorter one.
            balance = losses.balance_loss * (tokens.shape[0] / batch.tokens.shape[0])
            total = token_loss + recipe.balance.sequence_loss * balance
            if self.early is None or total.isfinite():  # what is updated early cannot be taken back
                total.backward()
            totals += torch.stack([losses.loss_sum.detach(), losses.mtp_loss_sum.detach(), balance.detach()])
            merged = merge_statistics(merged, losses.statistics)
        return totals, merged

    def _update(self, masters: list[Tensor], norm: Tensor, norm_value: float, lr: float, max_logits: Tensor,
                load: Tensor | None) -> Tensor | None:
        """Weights, clipped heads, router biases. Returns the number of clipped heads per layer."""
        recipe, config = self.recipe, self.recipe.optimizer
        if config.grad_clip is not None and may_clip(config.grad_clip, norm_value):
            clip_gradients_(masters, config.grad_clip, norm)
        if self.early is None:
            self.optimizer.set_learning_rate(lr)
            self.optimizer.begin_step(self.step, measure_update=config.name == "muonclip")
        self.optimizer.step()
        clipped = None
        if config.qk_clip is not None:
            clipped = qk_clip_(self._clip_weights, max_logits, config.qk_clip, recipe.model, self.optimizer.scale_rows_)
        if load is not None and recipe.balance.bias_rate:
            update_router_bias_(self._biases, load, recipe.balance.bias_rate, recipe.balance.bias_rule)
        self.masters.publish(self.step)
        return clipped

    # --- what a restart needs -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """JSON-able facts beside weights and optimizer tensors."""
        ahead = self._ahead
        position = ahead.state if ahead is not None and ahead.stream is self.stream else self.stream.state_dict()
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "stream": position,
                "guard": self.guard.state(), "last_norm": self.early.last_norm if self.early else 0.0}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.stream.load_state_dict(state["stream"])
        self._ahead = None
        self.guard.load_state(state["guard"])
        if self.early is not None:
            self.early.last_norm = state.get("last_norm", 0.0)

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the masters and the router's biases."""
        return {**self.masters.named, **{name: b for name, b in self.model.named_buffers()}}


def merge_statistics(total: list[LayerStatistics], new: list[LayerStatistics]) -> list[LayerStatistics]:
    """Over micro-batches: the larger logit, the summed load."""
    new = [LayerStatistics(layer.max_logit, layer.expert_load, layer.balance_loss.detach()) for layer in new]
    if not total:
        return new
    # A handful of numbers per layer, all layers of them at once: the GPU would take longer to start than to add.
    (logits, loads, losses), others = ([list(field) for field in zip(*layers, strict=True)] for layers in (total, new))
    merged = (torch._foreach_maximum(logits, others[0]), torch._foreach_add(loads, others[1]),
              torch._foreach_add(losses, others[2]))
    return [LayerStatistics(*layer) for layer in zip(*merged, strict=True)]


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the GPU allocator's, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
