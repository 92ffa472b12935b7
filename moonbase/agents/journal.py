"""What an episode has done, on disk as it happens, and found again by the same program after a crash.

An episode is a program whose only unpredictable parts are replies of models and results of tools. Both are written down
under an id that follows from the program alone (which agent, which step, which call). A program that is started again
finds what is there, takes it as if it had just happened, and goes on where nothing is found: at most the running steps
are lost, whatever ended the process (the idea of durable execution).
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from moonbase.agents.budget import Spent
from moonbase.errors import UserError

Event = dict[str, Any]
EVENTS = "events.jsonl"
_OUTLINES = ("agent_started", "agent_finished")
"""Events that a new life tells again; what was told before is not written twice."""


class Journal:
    """Events of one episode. Times are seconds since its start, those of its earlier lives included."""

    def __init__(self, path: Path | None = None, events: list[Event] | None = None, file: int | None = None) -> None:
        self.path, self._file = path, file
        self.events: list[Event] = events or []
        """Those of earlier lives at first; later ones are only kept in memory where there is no file."""
        self.listeners: list[Callable[[Event], None]] = []
        self._calls = {event["call"]: event for event in self.events if _is_call(event) and not _is_tried_again(event)}
        self._spent, self._critical_steps = spent_before(self.events)
        self._outlines = {(event["type"], event["agent"]): event for event in self.events
                          if event["type"] in _OUTLINES}
        self._before = max((event["time"] for event in self.events), default=0.0)
        self._origin: float | None = None
        self._failure: UserError | None = None

    @staticmethod
    def open(folder: Path, resume: bool = False) -> Journal:
        """In a session folder. Raises UserError where one is there already and is not resumed, where there is none to
        resume, where another process is at it, and for a file that is no journal."""
        path = folder / EVENTS
        if resume and not path.is_file():
            raise UserError(f"{folder}: no session to resume here ({EVENTS} is missing)")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (0 if resume else os.O_CREAT | os.O_EXCL)
            file = os.open(path, flags, 0o600)
        except FileExistsError:
            raise UserError(f"{folder}: a session is here already; go on with --resume {folder}, or choose another"
                            if path.exists() else f"{folder}: cannot be made: a file is in the way") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            events, good_bytes = read_whole_lines(path)
            os.ftruncate(file, good_bytes)  # a line that a crash cut short
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{folder}: another process is working on this session") from None
        except OSError as error:
            os.close(file)
            raise UserError(f"{path}: cannot be used: {error.strerror}") from None
        except UserError:
            os.close(file)
            raise
        return Journal(path, events, file)

    def now(self) -> float:
        """Seconds since the episode began."""
        time = asyncio.get_running_loop().time()
        if self._origin is None:
            self._origin = time - self._before
        return time - self._origin

    def recorded(self, call: str) -> Event | None:
        """What an earlier life knows of a call; None where it has not come to an end there."""
        return self._calls.get(call)

    def spent(self, agent: str) -> Spent | None:
        """What an agent and those below it spent in earlier lives; None where it was not started there."""
        return self._spent.get(agent)

    def critical_steps(self, call: str) -> int:
        """The most that any sub-agent took which a recorded tool call had started."""
        return self._critical_steps.get(call, 0)

    def started(self, agent: str) -> float:
        """When an agent was started, in whichever life."""
        known = self._outlines.get(("agent_started", agent))
        return self.now() if known is None else known["time"]

    def write(self, event: Event) -> None:
        """Note something. Raises UserError where the disk is full, and from then on: nothing may follow a gap."""
        if self._failure is not None:
            raise self._failure
        event.setdefault("time", round(self.now(), 6))
        if event["type"] in _OUTLINES:
            key = (event["type"], event["agent"])
            known = self._outlines.get(key)
            if known is not None and (event["type"] == "agent_started" or known | {"time": event["time"]} == event):
                return
            if self._outlines:  # only a journal that had a life before has to compare
                self._outlines[key] = event
        if self._file is None:
            self.events.append(event)
        else:
            line = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
            self._append(line + b"\n")
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """Give the session free."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._failure = UserError(f"{self.path}: the session was closed")

    def _append(self, line: bytes) -> None:
        """Straight to the system: what was written survives the end of this process."""
        start = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, start)
            self._failure = UserError(
                f"{self.path}: cannot be written: {error.strerror}; nothing is lost, make room and resume")
            raise self._failure from None


def read_whole_lines(path: Path) -> tuple[list[Event], int]:
    """The events of a session, and how many bytes of the file are whole lines: a crash may have cut the last one short.

    Raises UserError naming a bad line, OSError.
    """
    events: list[Event] = []
    good_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not _is_event(event):
                raise UserError(f"{path}: line {number} is no event: not a session, or an altered one")
            events.append(event)
            good_bytes += len(line)
    return events, good_bytes


_NUMBER = (int, float)
_FIELDS: dict[str, dict[str, Any]] = {
    "agent_started": {"parent": (str, NoneType), "parent_call": (str, NoneType)},
    "model_call": {"call": str, "step": int, "messages_added": list, "error": (dict, NoneType)},
    "tool_call": {"call": str, "result": str, "error": bool},
}
_REPLY_FIELDS = {"completion": dict, "finish_reason": str, "model": str, "usage": dict, "price_paid": _NUMBER}
"""Of a model call without error."""


def _is_event(event: Any) -> bool:
    """Whether it has what a resumed episode reads of it."""
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        return False
    if not (_has(event, {"time": _NUMBER, "agent": str}) and 0 <= event["time"] < float("inf")):
        return False
    if not _has(event, _FIELDS.get(event["type"], {})):
        return False
    if event["type"] != "model_call":
        return True
    if event["error"] is not None:
        return _has(event["error"], {"kind": str, "message": str})
    return _has(event, _REPLY_FIELDS) and _has(event["usage"], dict.fromkeys(("input_tokens", "output_tokens"), int))


def _has(found: Event, fields: dict[str, Any]) -> bool:
    return all(name in found and isinstance(found[name], kind) for name, kind in fields.items())


def _is_call(event: Event) -> bool:
    return event["type"] in ("model_call", "tool_call")


def _is_tried_again(event: Event) -> bool:
    """A call that a new life should make once more: one that failed, unless it would fail again."""
    return event["type"] == "model_call" and event["error"] is not None and event["error"]["kind"] != "context_length"


def spent_before(events: list[Event]) -> tuple[dict[str, Spent], dict[str, int]]:
    """Agent id -> what it and those below it spent; tool call id -> the most critical steps of an agent that it
    started. An agent's steps are its model calls, the failed ones included."""
    agents = {event["agent"]: event for event in events if event["type"] == "agent_started"}
    spent = {agent: Spent() for agent in agents}
    steps: dict[str, set[str]] = {agent: set() for agent in agents}
    paid: set[str] = set()
    for event in events:
        if event["type"] != "model_call" or event["agent"] not in agents:
            continue
        steps[event["agent"]].add(event["call"])
        if event["error"] is None and event["call"] not in paid:
            paid.add(event["call"])
            own = spent[event["agent"]]
            own.tokens += event["usage"]["input_tokens"] + event["usage"]["output_tokens"]
            own.money += event["price_paid"]
    of_call: dict[str, int] = {}
    stages: dict[str, dict[str, int]] = {agent: {} for agent in agents}
    # Children start after their parents.
    for agent, event in reversed(agents.items()):
        own, parent, call = spent[agent], event["parent"], event["parent_call"]
        own.critical_steps = len(steps[agent]) + sum(stages[agent].values())
        if parent not in agents or call is None:
            continue
        above, longest, stage = spent[parent], stages[parent], call.rpartition(".")[0]
        above.tokens += own.tokens
        above.money += own.money
        above.subagents += own.subagents + 1
        of_call[call] = max(of_call.get(call, 0), own.critical_steps)
        longest[stage] = max(longest.get(stage, 0), own.critical_steps)
    return spent, of_call
