"""Which steps are thrown away: not-a-number and spikes, and when to give up."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from moonbase.errors import TrainingStopped
from moonbase.recipe import GuardConfig


class Guard:
    """Looks at loss and gradient norm before the update. A skipped step changes nothing but the position in the
    data."""

    WINDOW = 64
    WARMUP = 16

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.bad_steps = 0

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why this step must not be applied, or None. Raises TrainingStopped after too many in a row."""
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        elif self.config.spike_factor and len(self.norms) >= self.WARMUP:
            usual = median(self.norms)
            if norm > self.config.spike_factor * usual:
                reason = f"gradient norm {norm:.3g} is over {self.config.spike_factor:g}x the usual {usual:.3g}"
        if math.isfinite(norm) and not (reason and len(self.norms) < self.WARMUP):
            # A lasting change of level is not a spike for ever: the running median follows it.
            self.norms.append(norm)
        self.bad_steps = self.bad_steps + 1 if reason else 0
        if self.bad_steps >= self.config.max_bad_steps:
            raise TrainingStopped(f"{self.bad_steps} steps in a row were unusable; the last because {reason}. "
                                  "Go on from the newest checkpoint with a lower optimizer.lr (moonbase train RUN "
                                  "--resume optimizer.lr=...), or from an earlier one in a new run (moonbase train "
                                  "RECIPE stage=continue init=RUN/checkpoints/step-N --out NEW).")
        return reason

    def state(self) -> dict:
        return {"norms": list(self.norms), "bad_steps": self.bad_steps}

    def load_state(self, state: dict) -> None:
        self.norms = deque(state["norms"], maxlen=self.WINDOW)
        self.bad_steps = state["bad_steps"]
