"""The critical path beside brute force: all chains of calls from the first to the last, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from moonbase.agents.critical_path import critical
from moonbase.agents.folding import fold
from moonbase.agents.trace import AgentRecord, Episode, ModelCall, ToolCall
from tests.agents.trace_events import Story

Chain = tuple[dict[str, float], list[str]]


def chains_of(episode: Episode, agent: AgentRecord) -> Iterator[Chain]:
    """Every way through an agent: one tool call of each step, one sub-agent of each tool call; with its lengths.

    In seconds a chain counts what it waits for: its calls, and the time in front of them since what was before had
    ended. The next step waits for the last tool call, whichever that is, so what is left of that wait for a chain
    through another tool call is not its own.
    """
    agents = {each.id: each for each in episode.agents}
    steps: dict[int, tuple[list[Any], list[Any]]] = {}
    for call in agent.calls:
        steps.setdefault(call.step, ([], []))[call.kind == "tool"].append(call)
    parts: list[list[Chain]] = []
    before = agent.started
    for number in sorted(steps):
        models, tools = steps[number]
        for model in models:
            parts.append([({"steps": 1, "tokens": model.usage.input_tokens + model.usage.output_tokens,
                            "seconds": model.ended - before}, [model.id])])
            before = model.ended
        ways: list[Chain] = []
        for tool in tools:
            if not tool.children:
                ways.append(({"steps": 0, "tokens": 0, "seconds": tool.ended - before}, [tool.id]))
            for child in tool.children:
                waited = agents[child].started - before
                ways += [({**lengths, "seconds": lengths["seconds"] + waited}, [tool.id, *ids])
                         for lengths, ids in chains_of(episode, agents[child])]
        if ways:
            parts.append(ways)
            before = max(tool.ended for tool in tools)
    parts.append([({"steps": 0, "tokens": 0, "seconds": agent.ended - before}, [])])
    for way in itertools.product(*parts):
        yield ({name: sum(lengths[name] for lengths, _ in way) for name in ("steps", "tokens", "seconds")},
               [name for _, ids in way for name in ids])


@pytest.mark.parametrize("seed", range(60))
def test_like_the_longest_of_all_chains(seed: int) -> None:
    episode = fold(Story(seed, steps=3, fan=2, depth=2).events)
    found = critical(episode)
    every = list(chains_of(episode, episode.agents[0]))
    for measure in ("steps", "tokens", "seconds"):
        most = max(lengths[measure] for lengths, _ in every)
        assert getattr(found, measure) == pytest.approx(most, abs=1e-9)
        longest = [ids for lengths, ids in every if lengths[measure] > most - 0.02 * (measure == "seconds") - 1e-9]
        assert found.chains[measure] in longest
    marked = {call.id: call.on_critical_path for agent in episode.agents for call in agent.calls}
    assert marked == {name: [m for m in ("steps", "tokens", "seconds") if name in found.chains[m]] for name in marked}
    assert (episode.critical.steps, episode.critical.tokens) == (found.steps, found.tokens)


def model_call(name: str, step: int, started: float, ended: float, tokens: int = 10) -> ModelCall:
    return ModelCall(id=f"{name}#{step}", step=step, stage=step, started=started, ended=ended,
                     usage={"input_tokens": tokens})


def sub_agent(name: str, parent: str, started: float, lengths: list[float]) -> AgentRecord:
    calls, now = [], started
    for step, length in enumerate(lengths, 1):
        calls.append(model_call(name, step, now, now + length))
        now += length
    return AgentRecord(id=name, name=name, parent="main", parent_call=parent, started=started, ended=now, calls=calls)


def test_the_published_formula_by_hand() -> None:
    """Σ_t (S_main + max_i S_sub,i) over three stages: (1 + max(3, 2)) + (1 + 0) + (1 + 0) = 6."""
    one, two = sub_agent("main/1.0", "main#1.0", 1.0, [1, 1, 1]), sub_agent("main/1.1", "main#1.1", 1.0, [4, 4])
    main = AgentRecord(id="main", name="main", started=0, ended=14, calls=[
        model_call("main", 1, 0, 1),
        ToolCall(id="main#1.0", step=1, name="assign_task", started=1, ended=4, children=["main/1.0"]),
        ToolCall(id="main#1.1", step=1, name="assign_task", started=1, ended=9, children=["main/1.1"]),
        model_call("main", 2, 9, 11), ToolCall(id="main#2.0", step=2, name="search", started=11, ended=12),
        model_call("main", 3, 12, 14)])
    found = critical(Episode(id="by hand", seconds=14, agents=[main, one, two]))
    assert (found.steps, found.tokens, found.seconds) == (6, 60, 14)
    assert found.chains["steps"] == ["main#1", "main#1.0", "main/1.0#1", "main/1.0#2", "main/1.0#3", "main#2",
                                     "main#2.0", "main#3"]
    # Fewer steps, but what the second call of main had to wait for.
    assert found.calls == ["main#1", "main#1.1", "main/1.1#1", "main/1.1#2", "main#2", "main#2.0", "main#3"]


def test_an_item_that_queued_is_on_the_path() -> None:
    """A bulk call with room for one: the second item is short and waited long, and everything waited for it."""
    first, second = sub_agent("main/1.0.0", "main#1.0", 1.0, [5]), sub_agent("main/1.0.1", "main#1.0", 6.0, [2])
    main = AgentRecord(id="main", name="main", started=0, ended=9, calls=[
        model_call("main", 1, 0, 1),
        ToolCall(id="main#1.0", step=1, name="assign_tasks", started=1, ended=8, children=["main/1.0.0", "main/1.0.1"]),
        model_call("main", 2, 8, 9)])
    found = critical(Episode(id="queue", seconds=9, agents=[main, first, second]))
    assert found.calls == ["main#1", "main#1.0", "main/1.0.1#1", "main#2"]
    assert found.seconds == 9


def test_nothing_and_what_is_unfinished() -> None:
    assert critical(Episode(id="empty")).calls == []
    running = AgentRecord(id="main/1.0", name="x", parent="main", parent_call="main#1.0", started=1)
    main = AgentRecord(id="main", name="main", started=0, calls=[
        model_call("main", 1, 0, 1), ToolCall(id="main#1.0", step=1, name="t", started=1, children=["main/1.0"])])
    found = critical(Episode(id="cut", seconds=5, agents=[main, running]))
    assert (found.steps, found.seconds, found.calls) == (1, 5, ["main#1", "main#1.0"])
