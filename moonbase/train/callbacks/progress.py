"""The line that people watch: step, loss, speed, time left, largest attention logit, expert balance."""

from __future__ import annotations

from typing import Any

from moonbase.report.console import Console
from moonbase.train.trainer import Callback, Trainer


class Progress(Callback):
    """Reports every step to the console, which decides how often to draw."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rate: float | None = None
        self.first = 0

    def on_start(self, trainer: Trainer) -> None:
        self.first = trainer.step

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        # The first step warms up caches and compilers; a moving average forgets it.
        fresh = record["tokens_per_second"]
        self.rate = fresh if self.rate is None or record["step"] <= self.first + 3 else 0.9 * self.rate + 0.1 * fresh
        details = [f"loss {record['loss']:.3f}"]
        if "validation_bits_per_byte" in record:
            self.console.note(f"step {record['step']}: held-out loss {record['validation_loss']:.3f}, "
                              f"{record['validation_bits_per_byte']:.3f} bits per byte")
        details.append(f"{self.rate:,.0f} tokens/s")
        if record.get("mfu"):
            details.append(f"{record['mfu']:.0%} MFU")
        details.append(f"largest logit {max(record['max_logit']):.1f}")
        if record["expert_load"]:
            details.append(f"busiest expert {max(record['expert_load']):.2f}x")
        if "skipped" in record:
            self.console.note(f"step {record['step']} skipped: {record['skipped']}")
        self.console("training", record["step"], trainer.recipe.steps, "  ".join(details))
