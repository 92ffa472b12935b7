"""Schedules against values worked out by hand."""

from __future__ import annotations

import pytest

from moonbase.optim.schedule import learning_rate
from moonbase.recipe import ScheduleConfig


@pytest.mark.parametrize(("step", "expected"), [
    (1, 0.1), (5, 0.5), (10, 1.0),            # warm-up: step / 10
    (11, 1.0), (60, 1.0),                     # constant until 100 - 40
    (70, 0.2 + 0.8 * 0.8535533905932737),     # a quarter of the decay: (1 + cos 45°) / 2
    (80, 0.6), (100, 0.2), (150, 0.2),        # half way, the end, beyond
])
def test_wsd(step: int, expected: float) -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.4, final_lr_ratio=0.2)
    assert learning_rate(step, 100, 1.0, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.5e-3), (2, 1e-3), (52, 0.5e-3), (102, 0.0)])
def test_cosine(step: int, expected: float) -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, final_lr_ratio=0.0)
    assert learning_rate(step, 102, 1e-3, schedule) == pytest.approx(expected, abs=1e-12)


def test_constant_and_no_warmup() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=0)
    assert [learning_rate(step, 5, 3e-4, schedule) for step in (1, 3, 5)] == [3e-4] * 3
    assert learning_rate(1, 10, 1.0, ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=0.0)) == 1.0


def test_warmup_is_not_cut_short_by_the_decay() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=8, decay_fraction=0.5, final_lr_ratio=0.0)
    rates = [learning_rate(step, 10, 1.0, schedule) for step in range(1, 11)]
    assert rates[7] == 1.0 and rates == sorted(rates[:8]) + sorted(rates[8:], reverse=True)
    assert rates[9] == pytest.approx(0.0, abs=1e-12)


def test_kimi_k2_rates() -> None:
    # K2 §2.5 in steps of 67M tokens: constant 2e-4, then cosine to 2e-5 over the last 5.5 of 15.5T tokens.
    schedule = ScheduleConfig(kind="wsd", warmup_steps=500, decay_fraction=5.5 / 15.5, final_lr_ratio=0.1)
    assert learning_rate(100_000, 231_000, 2e-4, schedule) == 2e-4
    assert learning_rate(231_000, 231_000, 2e-4, schedule) == pytest.approx(2e-5)
