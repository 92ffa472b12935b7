"""Learning rate over a run: warm-up, then one of three shapes."""

from __future__ import annotations

import math

from moonbase.recipe import ScheduleConfig


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` (1 is the first, `total_steps` the last).

    All kinds rise linearly from peak / warmup_steps to the peak at step `warmup_steps`. Then
    - wsd: constant, and over the last `decay_fraction` of the run a half cosine down to peak · final_lr_ratio, reached
      at the last step (Kimi K2 §2.5 decays so; the warm-up is never cut short by the decay);
    - cosine: that half cosine over all the rest;
    - constant: the peak.
    """
    assert step >= 1, "steps count from 1"
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    start = warmup
    if schedule.kind == "wsd":
        start = max(warmup, total_steps - round(schedule.decay_fraction * total_steps))
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    final = schedule.final_lr_ratio
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
