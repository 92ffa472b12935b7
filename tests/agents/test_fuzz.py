"""Random trees, limits and faults: no call over budget, nothing lost, nothing hung; and the accountant is awake."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from moonbase.agents.agent import Agent
from moonbase.agents.budget import Budget, Spent
from tests.agents import fuzz

SECONDS = 3.0


def test_as_many_episodes_as_there_is_time_for() -> None:
    began, seed, agents = time.process_time(), 10**6, 0
    while time.process_time() - began < SECONDS or seed - 10**6 <= 100:
        outcome = fuzz.play(seed)
        assert not outcome.complaints, f"seed {seed}: {outcome.complaints[:3]}"
        seed, agents = seed + 1, agents + outcome.agents
    assert agents > 100


def test_the_same_seed_is_the_same_episode() -> None:
    for seed in range(40):
        first, second = fuzz.play(seed), fuzz.play(seed)
        for event in (*first.events, *second.events):
            event.pop("started_at", None)
            event.pop("episode", None)
        assert first.events == second.events and first.calls == second.calls


FINISH, CHILD = Agent._finish, Budget.child


@pytest.mark.parametrize(("owner", "name", "broken"), [
    (Budget, "count_step", lambda budget: None),
    (Budget, "check_seconds", lambda budget, now: None),
    (Budget, "end_stage", lambda budget: budget._cohort.clear()),
    (Budget, "_of", lambda budget, node, limit: limit),
    (Budget, "_output_left", lambda budget, tokens, most, price, in_flight=True: most),
    (Budget, "child", lambda budget, limits, started, known=None: CHILD(budget, limits, started, known or Spent())),
    (Agent, "_finish", lambda agent, status, reason: FINISH(agent, status, reason) if status != "cancelled" else None),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_broken_rule_is_noticed(
    owner: type, name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert any(fuzz.play(seed).complaints for seed in range(300))
