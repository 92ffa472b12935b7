"""From events to an episode and back: beside what the story knows to have happened."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.episodes import read_episodes, read_events, write_episodes
from moonbase.agents.folding import fold
from moonbase.agents.trace import Episode
from moonbase.errors import UserError
from tests.agents import trace_documentation
from tests.agents.trace_events import Story, big_story


@pytest.mark.parametrize("seed", range(24))
def test_the_fold_finds_what_happened(seed: int) -> None:
    story = Story(seed, steps=5, fan=3, depth=2)
    episode = fold(json.loads(json.dumps(story.events)))
    assert {agent.id for agent in episode.agents} == story.truth.keys()
    position = {agent.id: number for number, agent in enumerate(episode.agents)}
    for agent in episode.agents:
        truth = story.truth[agent.id]
        assert agent.messages == truth.messages
        assert agent.parent is None or position[agent.parent] < position[agent.id]
        assert (agent.status, agent.started, agent.ended) == (truth.status, *truth.span)
        assert (agent.spent.tokens, agent.spent.steps) == (truth.tokens, truth.steps)
        assert agent.spent.money == pytest.approx(truth.money)
        models = [call for call in agent.calls if call.kind == "model"]
        assert [[at for start, stop in call.sees for at in range(start, stop)] for call in models] == truth.sees
        for call in models:
            assert (call.message is None) == (call.error is not None)
            assert call.message is None or agent.messages[call.message]["role"] == "assistant"
        assert [call.waited for call in models] == truth.waited
        tools = [call for call in agent.calls if call.kind == "tool"]
        assert [call.stage for call in tools] == [next(one.stage for one in models if one.step == call.step)
                                                  for call in tools]
        assert {call.id: agent.messages[call.message]["content"] for call in tools} == truth.results
        children = {name: call.id for call in tools for name in call.children}
        assert children == {name: other.parent_call for name, other in story.truth.items()
                            if other.parent_call is not None and other.parent_call.partition("#")[0] == agent.id}
    assert episode.spent.tokens == sum(truth.tokens for truth in story.truth.values())
    assert episode.spent.subagents == len(story.truth) - 1
    assert episode.rewards == {"item_f1": 0.875} and episode.text == story.events[-1]["text"]


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_may_stop_anywhere(seed: int) -> None:
    story = Story(seed, steps=4, fan=3, depth=2)
    ended = {event["agent"]: number for number, event in enumerate(story.events) if event["type"] == "agent_finished"}
    for stop in range(1, len(story.events)):
        episode = fold(story.events[:stop])
        assert episode.status == "unfinished"
        for agent in episode.agents:
            assert (agent.status == "unfinished") == (ended[agent.id] >= stop) == (agent.ended is None)
            whole = story.truth[agent.id].messages
            models = [call for call in agent.calls if call.kind == "model"]
            read = max((call.sees[-1][1] + (call.message is not None) for call in models), default=0)
            assert agent.messages[:read] == whole[:read]
            # Results that no model had read yet: some of those that were to come.
            assert all(message["role"] == "tool" and message in whole[read:] for message in agent.messages[read:])
            for call in agent.calls:
                if call.kind == "tool" and call.ended is None:
                    assert agent.status == "unfinished" and call.message is None and not call.error
                    assert call.name in ("search", "open", "assign_task")
            started = {name for call in agent.calls if call.kind == "tool" for name in call.children}
            assert started == {other.id for other in episode.agents if other.parent == agent.id}
        assert Episode.model_validate_json(episode.model_dump_json()) == episode


def test_repeated_events_count_once() -> None:
    """A resumed session may tell again what is known; an agent's reply may come back among its messages."""
    story = Story(5, steps=5)
    twice = [copy for event in story.events for copy in (event, event)]
    assert fold(twice) == fold(story.events)
    last: dict[str, dict] = {}
    again = []
    for event in json.loads(json.dumps(story.events)):
        if event["type"] == "model_call":
            if event["agent"] in last:
                event["messages_added"].insert(0, last[event["agent"]])
            if event["completion"]:
                last[event["agent"]] = event["completion"]
        again.append(event)
    assert fold(again) == fold(story.events)


def test_events_on_disk(tmp_path: Path) -> None:
    story = Story(3, steps=4)
    lines = [json.dumps(event) for event in story.events]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(read_events(tmp_path)) == story.events
    assert list(read_episodes(tmp_path)) == list(read_episodes(path)) == [fold(story.events)]
    for cut in (1, len(lines[9]) // 2, len(lines[9]) - 1):
        path.write_text("\n".join([*lines[:9], lines[9][:cut]]), encoding="utf-8")
        assert list(read_events(path)) == story.events[:9]
    path.write_text("\n".join([*lines[:5], lines[5][:20], *lines[6:]]), encoding="utf-8")
    with pytest.raises(UserError, match=r"events\.jsonl: line 6 is no event"):
        list(read_events(path))


def test_a_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    episodes = [fold(Story(seed).events) for seed in range(3)]
    write_episodes(path, episodes)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert list(read_episodes(path)) == episodes
    lines = path.read_text(encoding="utf-8").splitlines()

    def complaint(second: str) -> str:
        path.write_text("\n".join([lines[0], second, lines[2]]), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            list(read_episodes(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "line 2: no JSON" in complaint(lines[1][:200])
    newer = complaint(lines[1].replace("moonbase.trace/1", "moonbase.trace/2"))
    assert "line 2: the trace is of schema 'moonbase.trace/2' and this moonbase reads 'moonbase.trace/1'" in newer
    assert "line 2: seconds:" in complaint(lines[1].replace('"seconds":', '"seconds":"soon","x":', 1))
    assert "line 2: no episode: JSON nested too deeply" in complaint("[" * 100_000)
    assert "no episode" in complaint('{"step": 1}') and "no episode" in complaint("[1]")
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no episode in it"):
        list(read_episodes(path))
    with pytest.raises(UserError, match="No such file"):
        list(read_episodes(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(("change", "words"), [
    (lambda events: events[0].update(schema="moonbase.trace/9"), "event 1: the trace is of schema"),
    (lambda events: events.pop(0), "event 1: it comes before episode_started"),
    (lambda events: events.pop(1), "event 2: model_call of an agent that never started, 'main'"),
    (lambda events: events[2].pop("started"), "event 3: 'started' is missing"),
    (lambda events: events[2].update(step="one"), "event 3: ModelCall.step"),
    (lambda events: events[2].update(messages_added=7), "event 3: "),
    (lambda events: events[-1].update(status="done"), "status"),
    (lambda events: events.clear(), "no episode_started"),
    (lambda events: events.append({**events[0], "episode": "another"}), "a second episode"),
])
def test_what_is_no_stream_of_events(change, words: str) -> None:
    events = json.loads(json.dumps(Story(4).events))
    change(events)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        fold(events)


ODD = (None, 7, -1, "x", [], {}, ["a"], [[5, 1]], [{}], {"a": 1}, 1.5, 10**400, float("nan"), float("inf"),
       [{"role": "assistant", "tool_calls": 7}], {"role": "assistant", "tool_calls": [1]}, {"content": [1]})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a value of JSON, three levels deep."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(item, dict | list) and len(path) < 2:
            yield from places(item, (*path, key))


def test_a_field_of_another_kind_is_told_in_one_line() -> None:
    """Whatever stands in a field: an episode that can be written and read, or one line that says what is wrong."""
    whole, dice = json.dumps(Story(4).events[:14]), random.Random(2)
    refused = 0
    for _ in range(1500):
        events = json.loads(whole)
        event = dice.choice(events)
        *path, last = dice.choice(list(places(event)))
        for key in path:
            event = event[key]
        event[last] = dice.choice(ODD)
        try:
            episode = fold(events)
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
        else:
            line = episode.model_dump_json()
            assert Episode.model_validate_json(line).model_dump_json() == line
    assert 300 < refused < 1200


def test_odd_values() -> None:
    """Half characters, infinities, equal ids in one reply, unknown kinds of events, an id given by nobody."""
    calls = [{"id": "same", "type": "function", "function": {"name": "t", "arguments": "{"}} for _ in range(2)]
    events = [
        {"type": "episode_started", "time": 0, "agent": "main", "schema": "moonbase.trace/1", "episode": "e",
         "task": [{"role": "user", "content": "half \ud800"}], "limits": {"tokens": float("inf"), "new": 1}},
        {"type": "weather", "time": 0, "sun": True},
        {"type": "agent_started", "time": 0, "agent": "main", "name": "m", "parent": None, "parent_call": None},
        {"type": "model_call", "time": 1, "agent": "main", "call": "main#1", "step": 1, "stage": 1, "started": 0,
         "ended": 1, "messages_added": [{"role": "user", "content": "x"}], "context_dropped": [],
         "completion": {"role": "assistant", "content": None, "tool_calls": calls}, "finish_reason": "tool_calls",
         "prompt_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, float("-inf")]},
        {"type": "tool_call", "time": 2, "agent": "main", "call": "main#1.1", "name": "t", "arguments": "{",
         "started": 1, "ended": 2, "result": "second \udfff", "error": True},
        {"type": "tool_call", "time": 3, "agent": "main", "call": "main#1.0", "name": "t", "arguments": "{",
         "started": 1, "ended": 3, "result": "first", "error": False},
        {"type": "agent_finished", "time": 3, "agent": "main", "status": "over_budget", "text": "", "reason": "steps"},
    ]
    episode = fold(events)
    (main,) = episode.agents
    assert episode.task == "half \ufffd" and episode.limits.tokens is None
    assert [main.messages[call.message]["content"] for call in main.calls[1:]] == ["first", "second \ufffd"]
    assert main.calls[0].logprobs == [-0.5, None] and main.calls[0].sampled == [(2, 4)]
    assert Episode.model_validate_json(episode.model_dump_json()) == episode


def test_the_mask_stands_in_the_line(tmp_path: Path) -> None:
    """Two numbers a range, whoever wrote the line; a mask of other tokens than there are is refused."""
    path = tmp_path / "t.jsonl"
    events = Story(4).events
    call = next(event for event in events if event["type"] == "model_call")
    call |= {"prompt_ids": [5, 6, 7], "token_ids": [8, 9], "logprobs": [-0.5, -1.0]}
    write_episodes(path, [fold(events)])
    line = json.loads(path.read_text(encoding="utf-8"))
    one = next(each for each in line["agents"][0]["calls"] if each["kind"] == "model")
    assert one["sampled"] == [[3, 5]]
    assert {each["sampled"] is None for agent in line["agents"] for each in agent["calls"] if each["kind"] == "model"
            and each is not one} == {True}

    def read(sampled: Any) -> Any:
        one["sampled"] = sampled
        path.write_text(json.dumps(line), encoding="utf-8")
        (episode,) = read_episodes(path)
        return next(each for each in episode.agents[0].calls if each.id == one["id"])

    # A dialogue of two turns in one call, as another writer may have it.
    assert read([[1, 2], [3, 5]]).sampled_mask == [False, True, False, True, True]
    assert read([]).sampled_mask == [False] * 5
    for wrong in ([[3, 6]], [[-1, 2]], [[2, 2]], [[3, 5], [1, 2]], [[1, 3], [2, 5]], [[1]], "all"):
        with pytest.raises(UserError, match="line 1: agents"):
            read(wrong)


def test_a_line_that_is_older_than_some_fields_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = json.loads(fold(Story(4).events).model_dump_json())
    for agent in line["agents"]:
        for call in agent["calls"]:
            for name in ("waited", "sampled") if call["kind"] == "model" else ("stage",):
                del call[name]
    path.write_text(json.dumps(line), encoding="utf-8")
    (episode,) = read_episodes(path)
    assert {call.waited for agent in episode.agents for call in agent.calls if call.kind == "model"} == {0.0}


def test_ten_megabytes_are_folded_at_once(tmp_path: Path) -> None:
    story = big_story(10)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in story.events), encoding="utf-8")
    assert path.stat().st_size > 9e6
    start = time.process_time()
    (episode,) = read_episodes(path)
    # Of this process alone, and a second on most machines: what folds every event again and again takes minutes.
    assert time.process_time() - start < 20
    assert len(episode.agents) == len(story.truth)


def test_the_documentation_says_every_field() -> None:
    """docs/traces.md has the table of each record as the models have it."""
    found = trace_documentation.shown(trace_documentation.PAGE.read_text(encoding="utf-8"))
    expected = {name: table + "\n" for name, table in trace_documentation.tables().items()}
    assert list(found) == list(trace_documentation.RECORDS)
    assert found == expected, "run: python -m tests.agents.trace_documentation"


def test_torn_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """Any byte of a trace file may be damaged: the reader says so in a line, or does not notice."""
    path, dice = tmp_path / "t.jsonl", random.Random(1)
    write_episodes(path, [fold(Story(2).events)])
    whole = path.read_bytes()
    for _ in range(200):
        torn = bytearray(whole)
        torn[dice.randrange(len(torn))] = dice.randrange(256)
        path.write_bytes(torn[: dice.randrange(len(torn))] if dice.random() < 0.5 else torn)
        try:
            list(read_episodes(path))
        except UserError as error:
            assert "\n" not in str(error)


def test_what_was_interrupted_and_made_again_counts_as_made_again() -> None:
    """After Ctrl-C and a resume: one call, with the reply and the tokens of its second life, and no message twice."""
    usage = {"input_tokens": 7, "output_tokens": 2, "cached_tokens": 0}
    events = Story(seed=3).events
    number, call = next((number, event) for number, event in enumerate(events)
                        if event["type"] == "model_call" and event["error"] is None)
    interrupted = call | {"completion": None, "usage": None, "price_paid": 0.0, "finish_reason": None,
                          "error": {"kind": "cancelled", "message": ""}}
    again = call | {"usage": usage}
    once = fold([*events[:number], again, *events[number + 1 :]])
    twice = fold([*events[:number], interrupted, again, *events[number + 1 :]])
    assert twice == once
    assert usage["input_tokens"] in [one.usage.input_tokens for agent in twice.agents for one in agent.calls
                                     if one.kind == "model" and one.usage is not None]


def test_what_a_strategy_shortened_is_kept() -> None:
    events = Story(seed=3).events
    calls = [event for event in events if event["type"] == "model_call" and event["agent"] == "main"]
    calls[-1]["context_shortened"] = [3]
    main = next(agent for agent in fold(events).agents if agent.id == "main")
    assert [call.shortened for call in main.calls if call.kind == "model"][-1] == [3]
