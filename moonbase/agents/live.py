"""What a swarm is doing, for a terminal while it runs: from the events of a session, and nothing else.

An event tells of something that has ended. What goes on now follows: an agent whose last reply asked for tools is busy
with those that have not answered, and any other waits for its model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live as RichLive
from rich.text import Text

from moonbase.agents.journal import Event
from moonbase.report.words import compact, duration, plural, visible

REFRESH_SECONDS = 0.1
PLAIN_SECONDS = 5.0
WORKING = "working"
_SIGNS = {"working": "●", "finished": "✓", "other": "✗"}
_ASCII_SIGNS = {"working": "*", "finished": "+", "other": "x"}
_STYLES = {"working": "cyan", "finished": "green", "other": "red"}
_SWARM_TOOLS = ("assign_task", "assign_tasks")


@dataclass
class AgentState:
    """One agent as far as the events tell."""

    id: str
    name: str
    task: str
    parent: str | None
    call: str | None
    """Its parent's call that started it."""
    started: float
    status: str = WORKING
    steps: int = 0
    tokens: int = 0
    ended: float | None = None
    doing: dict[str, str] = field(default_factory=dict)
    """Calls that have not been answered, with what they are."""
    said: str = ""
    reason: str = ""

    @property
    def now(self) -> str:
        """What it does, in a few words."""
        if self.status != WORKING:
            return self.said if self.status == "finished" else f"{self.status}: {self.reason or self.said}"
        calls = list(self.doing.values())
        if not calls:
            return "waits for the model"
        return calls[0] if len(calls) == 1 else f"{calls[0]} and {len(calls) - 1} more"


class LiveView:
    """Takes events, draws lines. `loads`: tells how many calls run and wait (see `Pool`), if known."""

    def __init__(self, loads: Callable[[], tuple[int, int]] | None = None) -> None:
        self.loads = loads
        self.agents: dict[str, AgentState] = {}
        self.task = self.model = ""
        self.limits: dict[str, Any] = {}
        self.spent = {"tokens": 0, "money": 0.0}
        self.time = 0.0
        self.status: str | None = None
        self._critical_before = 0
        self._cohort: dict[str, int] = {}
        self._alike: dict[str | None, tuple[int, str]] = {}
        """Call -> how many characters the tasks that it gave have in common, and the first of them."""

    # --- what is known ------------------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        """The next event; kinds that are not known are passed over."""
        self.time = max(self.time, event.get("time", 0.0))
        take = getattr(self, f"_{event['type']}", None) if event["type"] in _KINDS else None
        if take is not None:
            take(event)

    @property
    def critical_steps(self) -> int:
        """Σ over stages of (own step + most steps of a sub-agent), the running stage as far as it is."""
        return self._critical_before + max(self._cohort.values(), default=0)

    def _episode_started(self, event: Event) -> None:
        self.task, self.model = str(event.get("task") or ""), str(event.get("model") or "")
        self.limits = event.get("limits") or {}

    def _agent_started(self, event: Event) -> None:
        self.agents[event["agent"]] = AgentState(
            event["agent"], str(event.get("name") or ""), str(event.get("task") or ""), event.get("parent"),
            event.get("parent_call"), event["time"])
        agent = self.agents[event["agent"]]
        if agent.call is not None:
            # Tasks from one template differ behind its beginning only.
            length, first = self._alike.get(agent.call, (0, agent.task))
            if first is not agent.task:
                pairs = enumerate(zip(first, agent.task, strict=False))
                same = next((place for place, (ours, theirs) in pairs if ours != theirs), 0)
                length = min(length, same) if length else same
            self._alike[agent.call] = (length, first)

    def _model_call(self, event: Event) -> None:
        agent = self.agents[event["agent"]]
        agent.steps, agent.status, agent.ended = event["step"], WORKING, None
        usage = event.get("usage") or {}
        tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
        agent.tokens += tokens
        self.spent["tokens"] += tokens
        self.spent["money"] += event.get("price_paid") or 0.0
        reply = event.get("completion") or {}
        calls = reply.get("tool_calls") or ()
        agent.doing = {f"{event['call']}.{place}": _call_in_words(call["function"]) for place, call in enumerate(calls)}
        agent.said = _text(reply) or agent.said
        if agent.parent is None:
            spent = (event.get("budget") or {}).get("spent") or {}
            self._critical_before = spent.get("critical_steps", agent.steps)
            self._cohort = {}
        else:
            self._cohort[agent.id] = agent.steps

    def _tool_call(self, event: Event) -> None:
        self.agents[event["agent"]].doing.pop(event["call"], None)

    def _agent_finished(self, event: Event) -> None:
        agent = self.agents[event["agent"]]
        agent.status, agent.ended, agent.doing = event["status"], event["time"], {}
        agent.said, agent.reason = event.get("text") or agent.said, event.get("reason") or ""

    def _episode_finished(self, event: Event) -> None:
        self.status = event["status"]

    # --- what is drawn ------------------------------------------------------------------------------------------------

    def render(self, width: int, height: int, now: float | None = None, ascii_only: bool = False) -> Text:
        """At most `height` lines of at most `width` cells. `now`: seconds since the episode began."""
        now = self.time if now is None else max(now, self.time)
        lines = [_cut(Text(_flat(self.task), style="bold"), width, ascii_only), *self._figures(width, now, ascii_only)]
        room = max(1, height - len(lines))
        shown, left_out = self._choose(room)
        lines += [self._agent_line(agent, width, now, ascii_only) for agent in shown]
        if left_out:
            lines.append(_cut(Text(f"  and {left_out}", style="dim"), width, ascii_only))
        return Text("\n").join(lines[:height])

    def _figures(self, width: int, now: float, ascii_only: bool) -> list[Text]:
        """Who is at work, and what has been spent of what may be."""
        subs = [agent for agent in self.agents.values() if agent.parent is not None]
        ended = sum(agent.status != WORKING for agent in subs)
        parts = [f"{duration(now)}{self._of('seconds', duration)}",
                 f"critical steps {self.critical_steps}{self._of('critical_steps')}"]
        if "main" in self.agents:
            parts.append(f"steps {self.agents['main'].steps}{self._of('steps')}")
        if subs or self.limits.get("subagents"):
            parts.append(f"sub-agents {ended} done, {len(subs) - ended} at work{self._of('subagents', some=' of ')}")
        parts.append(f"tokens {compact(self.spent['tokens'])}{self._of('tokens')}")
        if self.spent["money"] or self.limits.get("money"):
            parts.append(f"${self.spent['money']:.4f}{self._of('money', lambda value: f'${value:g}')}")
        if self.loads is not None:
            running, waiting = self.loads()
            parts.append(f"model calls {running}" + (f", {waiting} in line" if waiting else ""))
        lines: list[str] = []
        between = " - " if ascii_only else " · "
        for part in parts:
            if lines and cell_len(lines[-1]) + 3 + len(part) <= width:
                lines[-1] += between + part
            else:
                lines.append(part)
        return [_cut(Text(line, style="dim"), width, ascii_only) for line in lines]

    def _of(self, limit: str, write: Callable[[float], str] = compact, some: str = "/") -> str:
        value = self.limits.get(limit)
        return "" if value is None else f"{some}{write(value)}"

    def _choose(self, room: int) -> tuple[list[AgentState], str]:
        """The main agent, who is at work, who went wrong, who is done, the latest first; and words for the rest."""
        agents = list(self.agents.values())
        if len(agents) <= room:
            return agents, ""
        main, subs = agents[:1], agents[1:]
        order = [*(agent for agent in subs if agent.status == WORKING),
                 *(agent for agent in reversed(subs) if agent.status not in (WORKING, "finished")),
                 *(agent for agent in reversed(subs) if agent.status == "finished")]
        kept = {agent.id for agent in order[: max(0, room - 2)]}
        rest = [agent for agent in subs if agent.id not in kept]
        kinds = {"at work": WORKING, "finished": "finished"}
        counts = {words: sum(agent.status == status for agent in rest) for words, status in kinds.items()}
        counts["ended otherwise"] = len(rest) - sum(counts.values())
        words = ", ".join(f"{count} more {what}" for what, count in counts.items() if count)
        return [*main, *(agent for agent in subs if agent.id in kept)], words

    def _agent_line(self, agent: AgentState, width: int, now: float, ascii_only: bool) -> Text:
        """● 3.0.12 helper     4 steps  2.1k  3.2s  search {"query": …}"""
        kind = agent.status if agent.status in _SIGNS else "other"
        sign = (_ASCII_SIGNS if ascii_only else _SIGNS)[kind]
        place = agent.id.removeprefix("main/")
        name = _flat(place if agent.parent is None else f"{place} {agent.name}")
        name_width = max(8, min(28, width // 4))
        seconds = (now if agent.ended is None else agent.ended) - agent.started
        figures = f"{plural(agent.steps, 'step'):>9} {compact(agent.tokens):>6}"
        if width >= 76:
            figures += f" {duration(max(0.0, seconds)):>6}"
        line = Text(f"{sign} ", style=_STYLES[kind])
        line.append(set_cell_size(_shortened(name, name_width, ascii_only), name_width), style="none")
        line.append(f" {figures}  ", style="dim")
        line.append(_flat(agent.now), style="none" if agent.status == WORKING else "dim")
        if agent.parent is not None and agent.status == WORKING and width >= 100:
            line.append(f"  ({_flat(agent.task[self._alike.get(agent.call, (0, ''))[0] :])})", style="dim")
        return _cut(line, width, ascii_only)


_KINDS = ("episode_started", "agent_started", "model_call", "tool_call", "agent_finished", "episode_finished")


def _call_in_words(function: dict[str, Any]) -> str:
    """search "Vebpum Rareko": the tool and the first of its arguments."""
    name, text = str(function.get("name")), str(function.get("arguments") or "")
    try:
        values = json.loads(text)
        if name in _SWARM_TOOLS:
            count = len(values.get("items") or ())
            return f"waits for {plural(count, 'sub-agent') if count else 'a sub-agent'} ({values.get('agent')})"
        first = next(iter(values.values()), "") if isinstance(values, dict) else values
        text = first if isinstance(first, str) else json.dumps(first, ensure_ascii=False)
    except (ValueError, AttributeError, TypeError, RecursionError):
        # No arguments of a tool: its model hears of that from the toolset. Here they stand as they were written.
        pass
    return f"{name[:64]} {text[:200]}".strip()


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _flat(text: str) -> str:
    """Any text as one harmless line."""
    return " ".join(visible(text[:2000]).split())


def _shortened(text: str, width: int, ascii_only: bool) -> str:
    if cell_len(text) <= width:
        return text
    end = "..." if ascii_only else "…"
    return set_cell_size(text, max(0, width - len(end))).rstrip() + end


def _cut(line: Text, width: int, ascii_only: bool) -> Text:
    """A line of at most so many cells."""
    if cell_len(line.plain) > width:
        line = line.copy()
        end = "..." if ascii_only else "…"
        line.truncate(max(0, width - len(end)))
        line.append(end)
    line.no_wrap, line.end = True, ""
    return line


async def show(view: LiveView, console: Console, now: Callable[[], float]) -> None:
    """Draw until cancelled, below whatever else is written; nothing is left on the screen afterwards."""
    with RichLive(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        while True:
            width, height = console.size
            live.update(view.render(width, max(2, height - 1), now(), console.options.ascii_only), refresh=True)
            await asyncio.sleep(REFRESH_SECONDS)


class PlainLog:
    """A line for every agent that ends, and every few seconds one for all, where nothing can be drawn."""

    def __init__(self, view: LiveView, write: Callable[[str], None]) -> None:
        self.view, self.write = view, write
        self._written = 0.0

    def take(self, event: Event) -> None:
        """After the view has taken it."""
        view, time = self.view, event.get("time", 0.0)
        if event["type"] == "agent_finished":
            agent = view.agents[event["agent"]]
            self._line(time, f"{agent.id} {agent.status}, {plural(agent.steps, 'step')}, "
                             f"{compact(agent.tokens)} tokens: {_flat(agent.reason or agent.said)[:160]}")
        elif event["type"] == "model_call" and event.get("error"):
            error = event["error"]
            self._line(time, f"{event['agent']}: {error.get('kind')}: {_flat(str(error.get('message')))[:160]}")
        elif time - self._written >= PLAIN_SECONDS:
            self._line(time, summary(view))

    def _line(self, time: float, text: str) -> None:
        self._written = time
        self.write(f"[{duration(time)}] {text}")


def summary(view: LiveView) -> str:
    """One line on where an episode stands."""
    subs = [agent for agent in view.agents.values() if agent.parent is not None]
    at_work = sum(agent.status == WORKING for agent in subs)
    parts = [f"{plural(view.critical_steps, 'critical step')}", f"{compact(view.spent['tokens'])} tokens"]
    if subs:
        parts.insert(1, f"{plural(len(subs), 'sub-agent')}, {at_work} at work")
    if view.spent["money"]:
        parts.append(f"${view.spent['money']:.4f}")
    return ", ".join(parts)
