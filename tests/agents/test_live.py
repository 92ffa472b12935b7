"""The live view: what it says is what the trace says afterwards, it fits the terminal, and nothing drives the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from moonbase.agents.baselines.methods import OPTIONS, endpoint, slow
from moonbase.agents.baselines.policies import Wide
from moonbase.agents.budget import Limits
from moonbase.agents.folding import fold
from moonbase.agents.live import LiveView, PlainLog, show
from moonbase.agents.simulation import simulate
from moonbase.agents.swarm import Swarm, SwarmResult
from moonbase.agents.trace import Episode
from moonbase.agents.worlds.wideworld import make_tasks, make_world
from moonbase.agents.worlds.world import world_tools

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    """A swarm of 16 on a wide task."""
    world = make_world(seed=1, pages=2000, grammar="test")
    task = make_tasks(world, "wide", 1, 0, rows=16, columns=3)[0]
    seen: list[dict[str, Any]] = []

    async def play() -> SwarmResult:
        return await Swarm(endpoint(Wide(), ()), slow(world_tools(world)), options=OPTIONS, on_event=seen.append,
                           limits=Limits(steps=100, subagents=100, money=1.0, critical_steps=40)).run(task.prompt)

    assert simulate(play()).status == "finished"
    return seen


def test_at_every_moment_it_agrees_with_the_trace(events: list[dict[str, Any]]) -> None:
    view = LiveView()
    for count, event in enumerate(events, 1):
        view.take(event)
        if event["type"] == "episode_started":
            continue
        episode: Episode = fold(events[:count])
        assert view.spent["tokens"] == episode.spent.tokens
        assert view.spent["money"] == pytest.approx(episode.spent.money)
        assert view.critical_steps == episode.critical.steps
        for agent in episode.agents:
            shown = view.agents[agent.id]
            assert shown.steps == sum(call.kind == "model" for call in agent.calls)
            assert (shown.status == "working") == (agent.status == "unfinished")
            open_calls = {call.id for call in agent.calls if call.kind == "tool" and call.ended is None}
            assert set(shown.doing) == (open_calls if shown.status == "working" else set())


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 133, 200])
def test_it_fits(width: int, events: list[dict[str, Any]]) -> None:
    view = LiveView(lambda: (8, 3))
    for event in events:
        view.take(event)
        for height in (3, 8, 24, 60):
            for ascii_only in (False, True):
                lines = view.render(width, height, view.time + 0.5, ascii_only).plain.split("\n")
                assert len(lines) <= height
                assert all(cell_len(line) <= width for line in lines)
                if width >= 60 and ascii_only:
                    assert all(line.isascii() for line in lines[-2:])


def test_what_a_reader_sees(events: list[dict[str, Any]]) -> None:
    view = LiveView(lambda: (8, 3))
    stream = iter(events)
    for event in stream:
        view.take(event)
        if len(view.agents) == 17 and view.agents["main/4.0.0"].steps == 2:
            break
    lines = view.render(120, 12).plain.split("\n")
    assert "critical steps 6/40" in lines[1] and "sub-agents 0 done, 16 at work of 100" in lines[1]
    assert "model calls 8, 3 in line" in "".join(lines[:4])
    assert any(line.startswith("● main") and "waits for 16 sub-agents (helper)" in line for line in lines)
    assert any(line.startswith("● 4.0.0 helper") and "open https://gazetteer.example/" in line for line in lines)
    assert lines[-1].strip() == f"and {17 - (len(lines) - 4)} more at work"
    for event in stream:
        view.take(event)
    lines = view.render(120, 30).plain.split("\n")
    assert sum(line.startswith("✓") for line in lines) == 17


HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202eevil\n\n\ud800 [bold]not markup[/bold] 汉字😀 " + "x" * 5000


def hostile_events() -> list[dict[str, Any]]:
    base = {"agent": "main", "time": 0.0}
    call = {"id": "1", "type": "function", "function": {"name": HOSTILE, "arguments": HOSTILE}}
    return [
        base | {"type": "episode_started", "task": HOSTILE, "model": HOSTILE, "limits": {"tokens": 10}},
        base | {"type": "agent_started", "name": HOSTILE, "task": HOSTILE, "parent": None},
        base | {"type": "model_call", "call": "main#1", "step": 1, "usage": None, "price_paid": 0.0,
                "completion": None, "error": {"kind": "server", "message": HOSTILE}},
        base | {"type": "model_call", "call": "main#2", "step": 2, "usage": {}, "price_paid": 0.0, "error": None,
                "completion": {"content": HOSTILE, "tool_calls": [
                    call, {"function": {"name": "assign_tasks", "arguments": '{"items": 3}'}},
                    {"function": {"name": "assign_task", "arguments": "[1]"}}]}},
        base | {"type": "something_new"},
        base | {"type": "agent_finished", "status": "failed", "text": HOSTILE, "reason": HOSTILE},
    ]


def test_nothing_that_a_model_says_drives_the_terminal() -> None:
    view, lines = LiveView(), []
    log = PlainLog(view, lines.append)
    for event in hostile_events():
        view.take(event)
        log.take(event)
        for width in (20, 60, 200):
            text = view.render(width, 20).plain
            assert not CONTROL.search(text)
            assert all(cell_len(line) <= width for line in text.split("\n"))
            text.encode()
    assert lines and not any(CONTROL.search(line) or "\n" in line for line in lines)
    assert "[bold]not markup[/bold]" in lines[-1]


def test_drawing_on_a_terminal_leaves_nothing_behind(events: list[dict[str, Any]]) -> None:
    view, screen = LiveView(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=12)
    for event in events:
        view.take(event)

    async def draw() -> None:
        drawing = asyncio.create_task(show(view, console, lambda: 100.0))
        async with asyncio.timeout(60):
            while "4.0.15 helper" not in screen.getvalue():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.35)  # several pictures
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drawing

    asyncio.run(draw())
    drawn = screen.getvalue()
    assert "critical steps" in drawn and "4.0.15 helper" in drawn
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1, "the cursor comes back"
    assert drawn.rstrip().endswith("\x1b[2K"), "its lines are gone"


def test_plain_lines_say_who_has_ended(events: list[dict[str, Any]]) -> None:
    view, lines = LiveView(), []
    log = PlainLog(view, lines.append)
    for event in events:
        view.take(event)
        log.take(event)
    assert sum(" finished, " in line for line in lines) == 17
    assert re.match(r"\[\d+s\] main finished, 5 steps, .* tokens: \| Name", lines[-1])
