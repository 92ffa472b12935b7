"""Scripted baselines: they find what is true in the world, see only what is visible, and take the time they should."""

from __future__ import annotations

import math

import pytest

from moonbase.agents.baselines.methods import (
    CONTEXT_TOKENS,
    ENDPOINT,
    METHODS,
    PRICE,
    TOOL_SECONDS,
    Method,
    Outcome,
)
from moonbase.agents.baselines.policies import Wide, batches
from moonbase.agents.baselines.reading import look, read_question
from moonbase.agents.trace import Episode, ModelCall
from moonbase.agents.worlds.wideworld import WideWorld, make_tasks, make_world
from moonbase.agents.worlds.world import Task
from moonbase.bench import swarm as bench

METHOD = {method.name: method for method in METHODS}


@pytest.fixture(scope="module")
def world() -> WideWorld:
    return make_world(seed=1, pages=5000, grammar="test")


def wide(world: WideWorld, rows: int, count: int = 1, seed: int = 0, **knobs: object) -> list[Task]:
    return make_tasks(world, "wide", count, seed, rows=rows, **{"columns": 3, **knobs})


@pytest.fixture(scope="module")
def at_64(world: WideWorld) -> dict[str, Outcome]:
    (_, task) = wide(world, 64, 2)
    return {name: method.run(world, task) for name, method in METHOD.items()}


@pytest.mark.parametrize("name", ["single, keep-all", "single, 8 calls a turn", "fan-out by hand", "swarm"])
def test_every_way_finds_the_truth_where_the_context_suffices(name: str, world: WideWorld) -> None:
    """Disagreeing pages, values on other pages and lists that are asked for in part included."""
    for rows in (1, 2, 3, 7, 16):
        for task in wide(world, rows, 2, seed=rows, columns=4, contested=True, second_page=True):
            assert METHOD[name].run(world, task).item_f1 == 1.0, task.id


def test_other_worlds(world: WideWorld) -> None:
    for seed, grammar in ((2, "train"), (3, "test")):
        other = make_world(seed=seed, pages=2000, grammar=grammar)
        for task in make_tasks(other, "wide", 4, seed, rows=12):
            assert METHOD["swarm"].run(other, task).item_f1 == 1.0, task.id


def test_the_targets_at_64_rows(at_64: dict[str, Outcome]) -> None:
    swarm = at_64["swarm"]
    assert swarm.item_f1 == 1.0
    alone = [at_64[method.name] for method in METHODS if method.alone]
    fastest = min(outcome.seconds for outcome in alone if outcome.item_f1 >= swarm.item_f1)
    assert fastest >= 4.5 * swarm.seconds
    assert swarm.episode.spent.subagents == 64


@pytest.mark.parametrize("rows", [1, 2])
def test_the_swarm_is_not_slower_where_there_is_nothing_to_share(rows: int, world: WideWorld) -> None:
    tasks = wide(world, rows, 4)
    made = bench.compare(rows, world, tasks, METHODS)
    assert min(row["ratio"] for row in made if row["peer_name"] in {one.name for one in METHODS if one.alone}) >= 1.0
    # With parallel calls of its own a single agent does the same; three more tools in the prompt cost less than 1%.
    assert next(row["ratio"] for row in made if row["peer_name"] == "single, 8 calls a turn") >= 0.99
    assert METHOD["swarm"].run(world, tasks[0]).episode.spent.subagents == 0


def test_strategies_have_their_effect(at_64: dict[str, Outcome]) -> None:
    """64 rows do not fit into the context."""
    assert "the context is full" in at_64["single, keep-all"].episode.agents[0].reason
    for name in ("single, hide-tool-result", "single, summary"):
        assert at_64[name].item_f1 == 1.0
    # What is thrown away has to be looked up again, without end.
    for name in ("single, discard-all", "single, discard-75%"):
        assert at_64[name].item_f1 < 0.9
        assert at_64[name].critical_steps == 100 + 5 * 64, "every step that it may take"
    for outcome in at_64.values():
        for call in model_calls(outcome.episode) if outcome.episode else ():
            assert call.usage.input_tokens + call.usage.output_tokens <= CONTEXT_TOKENS


def model_calls(episode: Episode) -> list[ModelCall]:
    return [call for agent in episode.agents for call in agent.calls if call.kind == "model" and call.error is None]


def test_time_and_money_follow_from_the_tokens(at_64: dict[str, Outcome]) -> None:
    """Recomputed from the trace: a single agent never waits for anything but its calls."""
    for name in ("single, summary", "single, 8 calls a turn"):
        outcome = at_64[name]
        calls = model_calls(outcome.episode)
        fresh = sum(call.usage.input_tokens - call.usage.cached_tokens for call in calls)
        cached = sum(call.usage.cached_tokens for call in calls)
        output = sum(call.usage.output_tokens for call in calls)
        rounds = {call.step for call in outcome.episode.agents[0].calls if call.kind == "tool"}
        seconds = 0.5 * len(calls) + fresh / 5000 + cached / 50_000 + output / 50 + TOOL_SECONDS * len(rounds)
        assert outcome.seconds == pytest.approx(seconds, abs=1e-3)
        assert outcome.dollars == pytest.approx((fresh * 0.60 + cached * 0.10 + output * 3.00) / 1e6)
        assert outcome.tokens == fresh + cached + output
    assert (ENDPOINT.per_call, PRICE.cached) == (0.5, 0.10)


def test_the_swarms_critical_path_is_counted_by_hand(at_64: dict[str, Outcome]) -> None:
    """Σ over the orchestrator's steps of 1 and of the longest sub-agent of that step."""
    episode = at_64["swarm"].episode
    main, *subs = episode.agents
    by_step: dict[str, int] = {}
    for agent in subs:
        steps = sum(call.kind == "model" for call in agent.calls)
        by_step[agent.parent_call] = max(steps, by_step.get(agent.parent_call, 0))
    assert at_64["swarm"].critical_steps == sum(call.kind == "model" for call in main.calls) + sum(by_step.values())


def test_twice_is_the_same(world: WideWorld) -> None:
    task = wide(world, 16)[0]
    for method in METHODS:
        one, two = (method.run(world, task) for _ in range(2))
        assert (one.text, one.seconds, one.tokens, one.dollars) == (two.text, two.seconds, two.tokens, two.dollars)


def test_what_is_hidden_is_unknown(world: WideWorld) -> None:
    """A policy asks again for whatever is not in the messages; with it, it goes on."""
    task = wide(world, 16)[0]
    episode = METHOD["single, keep-all"].run(world, task).episode
    messages, policy, tools = episode.agents[0].messages, Wide(), [{"function": {"name": "search"}}]
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place in replies:
        said = policy(messages[:place], tools)
        assert [call["function"] for call in said.get("tool_calls") or ()] == \
            [call["function"] for call in messages[place].get("tool_calls") or ()]
    without = [messages[0], messages[1], *messages[replies[2] :]]
    (call,) = policy(without, tools)["tool_calls"]
    assert "members" in call["function"]["arguments"] or "lists.example" in call["function"]["arguments"]
    found = look(without, 4)
    assert not found.parts and found.sources


def test_questions() -> None:
    table = "\n\nAnswer with one Markdown table with these columns, one row each, no row twice: Name | Area (km²)\n\nR"
    for start, group, first in (
        ("I need an overview of the members of the Ab Cd league (all of them towns).", "Ab Cd league", None),
        ("Make a complete list of the first 12 members of the Ab Cd league, as its list numbers them.", "Ab Cd league",
         12),
        ("I need the particulars of the first member of the Ab Cd fleet, as its list numbers them (a vessel).",
         "Ab Cd fleet", 1),
    ):  # fmt: skip
        question = read_question(start + table)
        assert (question.group, question.first) == (group, first)
        assert question.columns == ("Name", "Area (km²)")


@pytest.mark.parametrize(("count", "most"), [(1, 100), (100, 100), (101, 100), (256, 100), (7, 3)])
def test_batches_lose_nothing(count: int, most: int) -> None:
    names = [f"n{number}" for number in range(count)]
    items = batches(names, most)
    assert "; ".join(items).split("; ") == names and len(items) <= most
    assert len(items) == math.ceil(count / math.ceil(count / most))


def test_the_bench_has_the_rows_of_a_bench(capsys: pytest.CaptureFixture[str]) -> None:
    chosen: list[Method] = [METHOD["single, summary"], METHOD["swarm"]]
    rows = bench.measure(tasks={2: 1, 16: 1}, methods=chosen)
    assert [(row["shape"], row["peer_name"]) for row in rows] == [
        ("R = 2", "single, summary"), ("R = 2", "swarm"), ("R = 16", "single, summary"), ("R = 16", "swarm")]
    for row in rows:
        assert {"shape", "unit", "ours", "peer", "peer_name", "ratio", "roof_share"} <= row.keys()
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        assert row["baseline"] == (row["peer_name"] == "single, summary")
    capsys.readouterr()
    bench.show({"rows": rows})
    shown = capsys.readouterr().out
    assert "3-4.5x" in shown and f"{rows[2]['ratio']:.2f}x" in shown
    assert max(map(len, shown.splitlines()[:-3])) <= 80
