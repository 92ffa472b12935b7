"""Which steps are thrown away: not-a-number and spikes, and when to give up."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from moonbase.errors import TrainingStopped
from moonbase.recipe import GuardConfig


class Guard:
    """Looks at loss and gradient norm before the update. A skipped step changes nothing but the position in the data.

    A spike is a gradient norm far above its running median. Early in a run norms rise several times over within a few
    steps for good reasons, so the rule waits for `WARMUP` of them; and what stays high is a new level, not a spike:
    after `MOST_SPIKES` in a row the next step is applied (clipped like any other) and the median starts afresh.
    """

    WINDOW = 64
    WARMUP = 50
    MOST_SPIKES = 3

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.bad_steps = self.spikes = 0

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why this step must not be applied, or None. Raises TrainingStopped after too many in a row."""
        reason = None
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        else:
            reason = self._spike(norm)
        self.bad_steps = self.bad_steps + 1 if reason else 0
        if self.bad_steps >= self.config.max_bad_steps:
            raise TrainingStopped(f"{self.bad_steps} steps in a row were unusable; the last because {reason}. "
                                  "Go on from the newest checkpoint with a lower optimizer.lr (moonbase train RUN "
                                  "--resume optimizer.lr=...), or from an earlier one in a new run (moonbase train "
                                  "RECIPE stage=continue init=RUN/checkpoints/step-N --out NEW).")
        return reason

    def _spike(self, norm: float) -> str | None:
        factor, usual = self.config.spike_factor, median(self.norms or [norm])
        if factor is None or len(self.norms) < self.WARMUP or norm <= factor * usual:
            self.spikes = 0
        elif self.spikes < self.MOST_SPIKES:
            self.spikes += 1
            return f"gradient norm {norm:.3g} is over {factor:g}x the usual {usual:.3g}"
        else:
            self.spikes = 0
            self.norms.clear()
        self.norms.append(norm)
        return None

    def state(self) -> dict:
        return {"norms": list(self.norms), "bad_steps": self.bad_steps, "spikes": self.spikes}

    def load_state(self, state: dict) -> None:
        self.norms = deque(state["norms"], maxlen=self.WINDOW)
        self.bad_steps, self.spikes = state["bad_steps"], state["spikes"]
