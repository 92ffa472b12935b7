"""Sessions that are cut off anywhere and go on: the same answer, the same spending, nothing recorded done again."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.budget import Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.episodes import read_episodes
from moonbase.agents.journal import EVENTS, Journal
from moonbase.agents.models.base import CallOptions, Price
from moonbase.agents.models.scripted import Latency, ScriptedModel
from moonbase.agents.simulation import simulate
from moonbase.agents.swarm import Swarm, SwarmResult
from moonbase.agents.tools.tool import ToolContext, Toolset, tool
from moonbase.errors import UserError


class World:
    """A swarm whose every reply is drawn by lot from what the model is shown, so that the same prompt gets the same
    reply in every life; and a list of what was really called."""

    def __init__(self, seed: int, tight: bool = False) -> None:
        """`tight`: tokens and money are short. Who gets the last of them depends on who comes first, which may be
        another after a crash."""
        dice = random.Random(seed)
        self.seed, self.called = seed, []
        self.depth, self.steps = dice.choice([1, 1, 2]), dice.choice([2, 4, 6])
        self.context = STRATEGIES[dice.choice(sorted(STRATEGIES))]
        self.limits = Limits(steps=dice.choice([4, 8]), subagents=12, critical_steps=dice.choice([None, 9, 25]),
                             tokens=dice.choice([6000, 20_000]) if tight else None,
                             money=dice.choice([0.01, 0.03]) if tight else None)

    def policy(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> dict[str, Any]:
        shown = json.dumps([messages, bool(tools)], sort_keys=True)
        self.called.append(shown)
        dice, names = random.Random(f"{self.seed} {shown}"), [one["function"]["name"] for one in tools]
        if not names or dice.random() < 0.15:
            return {"content": f"Answer {dice.randint(0, 999)}."}

        def call(name: str, /, **arguments: Any) -> dict[str, Any]:
            return {"id": f"{name}:{dice.randint(0, 10**9)}",
                    "function": {"name": name, "arguments": json.dumps(arguments)}}

        if "assign_task" in names and not any(message.get("tool_calls") for message in messages):
            return {"tool_calls": [call("create_subagent", name="helper", system_prompt="You help.")]}
        calls = []
        for _ in range(dice.choice([1, 1, 2, 3])):
            kind = dice.choice(["look", "assign_task", "assign_tasks"] if "assign_task" in names else ["look"])
            task = f"Task {dice.randint(0, 10**9)}"
            calls.append(call("look", size=dice.randint(1, 300)) if kind == "look" else
                         call(kind, agent="helper", prompt=task) if kind == "assign_task" else
                         call(kind, agent="helper", template=f"{task} {{item}}", items=["x", "y"]))
        return {"tool_calls": calls}

    def swarm(self, journal: Journal) -> Swarm:
        called = self.called

        @tool(inline=True)
        def look(size: int, context: ToolContext) -> str:
            """Look."""
            called.append(context.call_id)
            return "é" * size

        model = ScriptedModel(self.policy, Latency(per_call=1.0, per_output_token=0.01), Price(1, 5), 1500)
        return Swarm(model, Toolset([look]), limits=self.limits, sub_limits=Limits(steps=self.steps), journal=journal,
                     options=CallOptions(max_tokens=200), depth=self.depth, context=self.context,
                     sub_context=self.context)

    def live(self, folder: Path, resume: bool = False) -> tuple[SwarmResult, list[str]]:
        """One life, and what it called."""
        self.called.clear()
        journal = Journal.open(folder, resume=resume)
        try:
            return simulate(self.swarm(journal).run("The task.")), list(self.called)
        finally:
            journal.close()


def account(result: SwarmResult) -> tuple[Any, ...]:
    """All that must be equal, whatever happened on the way."""
    episode = result.episode
    return (result.text, result.status, result.reason, episode.spent.model_copy(update={"seconds": 0}),
            episode.critical.steps, sorted((agent.id, agent.status, agent.text) for agent in episode.agents))


def check_cut(world: World, folder: Path, whole: bytes, at: int) -> tuple[SwarmResult, list[str]]:
    """Cut the file there and go on: what is recorded is not called again. Returns what came of it and all calls, the
    recorded ones included, as they are known to the journal."""
    path = folder / EVENTS
    path.write_bytes(whole[:at])
    kept = [json.loads(line) for line in whole[: whole.rfind(b"\n", 0, at) + 1].splitlines()]
    before = [event["call"] for event in kept if event["type"] in ("model_call", "tool_call")]
    result, called = world.live(folder, resume=True)
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    calls = [event["call"] for event in events if event["type"] in ("model_call", "tool_call")]
    assert events[: len(kept)] == kept and calls[: len(before)] == before and len(calls) == len(set(calls))
    new = [event for event in events[len(kept) :] if event["type"] == "model_call" or event.get("name") == "look"]
    assert len(called) == len(new)
    assert [episode.id for episode in read_episodes(folder)] == [result.episode.id]
    return result, calls


@pytest.mark.slow
def test_cut_at_every_byte(tmp_path: Path) -> None:
    """What is read of a torn file is its whole lines, and the rest is cut off; some of them go on to the end."""
    world = World(3)
    truth, _ = world.live(tmp_path)
    whole = (tmp_path / EVENTS).read_bytes()
    start = whole.index(b"\n") + 1
    beginning = b"".join(whole.splitlines(keepends=True)[:6])
    for at in range(len(beginning) + 1):
        (tmp_path / EVENTS).write_bytes(beginning[:at])
        journal = Journal.open(tmp_path, resume=True)
        journal.close()
        lines = beginning[: beginning.rfind(b"\n", 0, at) + 1]
        assert journal.events == [json.loads(line) for line in lines.splitlines()]
        assert (tmp_path / EVENTS).read_bytes() == lines
    for at in range(start, len(whole), len(whole) // 60):
        assert account(check_cut(world, tmp_path, whole, at)[0]) == account(truth)


SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]


@pytest.mark.parametrize("seed", SEEDS)
def test_cut_at_every_line(seed: int, tmp_path: Path) -> None:
    world = World(seed)
    truth, _ = world.live(tmp_path)
    whole = (tmp_path / EVENTS).read_bytes()
    ids = {json.loads(line).get("call") for line in whole.splitlines()} - {None}
    for at in ends_of_lines(whole):
        result, calls = check_cut(world, tmp_path, whole, at)
        assert account(result) == account(truth) and set(calls) == ids


@pytest.mark.parametrize("seed", SEEDS)
def test_no_life_spends_what_another_has_spent(seed: int, tmp_path: Path) -> None:
    """With tokens and money short: all lives together stay within the limits."""
    world = World(seed, tight=True)
    world.live(tmp_path)
    whole = (tmp_path / EVENTS).read_bytes()
    for at in ends_of_lines(whole):
        spent = check_cut(world, tmp_path, whole, at)[0].episode.spent
        assert spent.tokens <= world.limits.tokens and spent.money <= world.limits.money * (1 + 1e-9)
        assert spent.subagents <= world.limits.subagents


def ends_of_lines(whole: bytes) -> list[int]:
    return [at + 1 for at, byte in enumerate(whole) if byte == 10]


def test_many_crashes_in_one_session(tmp_path: Path) -> None:
    """Each life gets only a little further than the one before."""
    world = World(5)
    truth, _ = world.live(tmp_path / "whole")
    dice, path = random.Random(0), tmp_path / "crashing" / EVENTS
    world.live(tmp_path / "crashing")
    lines = path.read_bytes().splitlines(keepends=True)
    done = 1
    while done < len(lines) - 1:
        path.write_bytes(b"".join(lines[:done]) + b'{"type": "tool_ca')
        result, _ = world.live(tmp_path / "crashing", resume=True)
        lines = path.read_bytes().splitlines(keepends=True)
        assert account(result) == account(truth)
        done += dice.randint(1, 5)


def test_an_episode_that_began_to_be_written_begins_anew(tmp_path: Path) -> None:
    world = World(3)
    truth, calls = world.live(tmp_path)
    whole = (tmp_path / EVENTS).read_bytes()
    for at in (0, 1, 50):
        (tmp_path / EVENTS).write_bytes(whole[:at])
        result, called = world.live(tmp_path, resume=True)
        assert account(result) == account(truth) and len(called) == len(calls)


def test_time_goes_on_where_it_was(tmp_path: Path) -> None:
    async def program() -> tuple[float, float]:
        await asyncio.sleep(1000)
        journal = Journal.open(tmp_path, resume=True)
        before = journal.now()
        await asyncio.sleep(5)
        return before, journal.now()

    started = {"type": "agent_started", "agent": "main", "time": 7.5, "parent": None, "parent_call": None}
    (tmp_path / EVENTS).write_text(json.dumps(started) + "\n")
    assert simulate(program()) == (7.5, 12.5)


def test_another_program_is_refused(tmp_path: Path) -> None:
    world = World(3)
    world.live(tmp_path)
    with pytest.raises(UserError, match="call main#1 was made of other messages; resume with the task"):
        simulate(world.swarm(Journal.open(tmp_path, resume=True)).run("Another task."))


def test_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no session to resume"):
        Journal.open(tmp_path, resume=True)
    journal = Journal.open(tmp_path / "new")
    with pytest.raises(UserError, match="a session is here already; go on with --resume"):
        Journal.open(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        Journal.open(tmp_path / "file")
    journal.close()
    Journal.open(tmp_path / "new", resume=True).close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Another process holds the session until it is killed."""
    code = ("import sys, time; from pathlib import Path; from moonbase.agents.journal import Journal; "
            "journal = Journal.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is working on this session"):
            Journal.open(tmp_path, resume=True)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    Journal.open(tmp_path, resume=True).close()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from moonbase.errors import UserError
from tests.agents.test_journal import World
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    World(3).live(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_a_full_disk_stops_it_and_loses_nothing(tmp_path: Path) -> None:
    world = World(3)
    truth, _ = world.live(tmp_path / "whole")
    whole = (tmp_path / "whole" / EVENTS).read_bytes()
    for share in (0.2, 0.5, 0.9):
        folder, room = tmp_path / str(share), int(share * len(whole))
        answer = subprocess.run([sys.executable, "-c", FULL_DISK, str(folder), str(room)], text=True,
                                capture_output=True, cwd=Path(__file__).resolve().parents[2], check=True)
        assert answer.stdout.endswith("nothing is lost, make room and resume\n")
        assert len(answer.stdout.splitlines()) == 1
        left = (folder / EVENTS).read_bytes()
        assert len(left) <= room and left.endswith(b"\n")
        result, _ = world.live(folder, resume=True)
        assert account(result) == account(truth)


def test_after_a_failed_write_nothing_is_written(tmp_path: Path) -> None:
    """Room that comes back must not leave a gap in the middle."""
    async def program() -> None:
        journal = Journal.open(tmp_path)
        size = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, size[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                journal.write({"type": "tool_call", "agent": "main", "result": "x" * 200})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
            signal.signal(signal.SIGXFSZ, before)
        with pytest.raises(UserError, match="cannot be written"):
            journal.write({"type": "note", "agent": "main"})
        journal.close()

    simulate(program())
    assert (tmp_path / EVENTS).read_bytes() == b""


@pytest.mark.parametrize("change", [
    lambda line: b"hello", lambda line: line[:-5], lambda line: b"[]", lambda line: b'{"type":"model_call","time":1}',
    lambda line: b"\xff" + line, lambda line: line.replace(b'"time":', b'"when":'), lambda line: b"",
    lambda line: line.replace(b'"result":"', b'"outcome":"').replace(b'"completion":{', b'"reply":{'),
    lambda line: b"[" * 100_000, lambda line: line[:-1] + b',"time":NaN}',
])
def test_an_altered_file_is_named_with_its_line(change: Any, tmp_path: Path) -> None:
    World(3).live(tmp_path)
    path = tmp_path / EVENTS
    lines = path.read_bytes().splitlines()
    number = next(at for at, line in enumerate(lines) if b'"type":"model_call"' in line)
    lines[number] = change(lines[number])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=f"line {number + 1} is no event") as caught:
        Journal.open(tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):  # and it was given free
        Journal.open(tmp_path, resume=True)


def test_half_characters_survive(tmp_path: Path) -> None:
    async def program() -> None:
        journal = Journal.open(tmp_path)
        journal.write({"type": "note", "agent": "main", "text": "a\ud800b\0é\u2028"})
        journal.close()

    simulate(program())
    assert Journal.open(tmp_path, resume=True).events[0]["text"] == "a\ud800b\0é\u2028"
