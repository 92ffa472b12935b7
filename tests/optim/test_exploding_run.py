"""The point of QK-Clip on a real, deliberately exploding run (the one of docs/figures/qk_clip.svg)."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "figures" / "qk_clip.py")))
STEPS = 200


def test_what_counts_as_a_spike() -> None:
    falling = [math.exp(-step / 20) for step in range(100)]
    assert SCRIPT.spikes(falling) == []
    assert SCRIPT.spikes([*falling[:50], 1.0, *falling[51:]]) == [50]
    assert SCRIPT.spikes([*falling[:98], math.nan, math.inf]) == [98, 99]
    level = [1.0, 1.5] * 30
    assert SCRIPT.spikes(level) == [] and SCRIPT.spikes([*level, 2.6]) == [60]


@pytest.mark.parametrize(
    "seed", [SCRIPT.SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SCRIPT.SEEDS[1:])])
def test_the_same_run_spikes_without_the_clip_and_not_with_it(seed: int) -> None:
    without, with_clip = SCRIPT.train(None, STEPS, seed), SCRIPT.train(SCRIPT.TAU, STEPS, seed)
    # Nothing else is different: until a logit first exceeds τ, the two are the same numbers.
    first = next(step for step, logit in enumerate(without.max_logit) if logit > SCRIPT.TAU)
    assert SCRIPT.TAU == 30.0 and 20 < first < STEPS
    assert with_clip.loss[:first + 1] == without.loss[:first + 1]

    assert all(map(math.isfinite, with_clip.loss + with_clip.max_logit))
    assert SCRIPT.spikes(with_clip.loss) == []
    assert max(with_clip.max_logit) < 1.5 * SCRIPT.TAU, "the clip acts after the step that exceeded τ"
    assert with_clip.loss[-1] < 0.01, "it learnt the task: guessing costs ln 32 = 3.5 nats"

    assert max(without.max_logit) > 4 * SCRIPT.TAU
    found = SCRIPT.spikes(without.loss)
    assert found and min(found) > first
    # Not a wobble: what one of these steps costs is far above all that the clipped run has left to learn.
    highest = max(without.loss[step] for step in found)
    assert not math.isfinite(highest) or highest > 10 * max(with_clip.loss[min(found):])
