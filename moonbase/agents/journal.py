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
from typing import Any

from moonbase.errors import UserError

Event = dict[str, Any]
EVENTS = "events.jsonl"


class Journal:
    """Events of one episode. Times are seconds since its start, those of its earlier lives included."""

    def __init__(self, path: Path | None = None, events: list[Event] | None = None, file: int | None = None) -> None:
        self.path, self._file = path, file
        self.events: list[Event] = events or []
        """Those of earlier lives at first; later ones are only kept in memory where there is no file."""
        self.listeners: list[Callable[[Event], None]] = []
        self._calls = {event["call"]: event for event in self.events
                       if event["type"] in ("model_call", "tool_call") and not _failed(event)}
        self._started = {event["agent"] for event in self.events if event["type"] == "agent_started"}
        self._before = max((event["time"] for event in self.events), default=0.0)
        self._origin: float | None = None

    @staticmethod
    def open(folder: Path, resume: bool = False) -> Journal:
        """In a session folder. Raises UserError where one is there already and is not resumed, where there is none to
        resume, where another process is at it, and for a file that is no journal."""
        path = folder / EVENTS
        if resume and not path.is_file():
            raise UserError(f"{folder}: no session to resume here ({EVENTS} is missing)")
        if not resume and path.exists():
            raise UserError(f"{folder}: a session is here already; go on with --resume {folder}, or choose another")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise UserError(f"{folder}: another process is working on this session") from None
        try:
            events, good_bytes = read_events(path)
            os.ftruncate(file, good_bytes)  # a line that a crash cut short
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

    def write(self, event: Event) -> None:
        """Note something. Raises UserError where the disk is full."""
        if event["type"] == "agent_started" and event["agent"] in self._started:
            return
        event.setdefault("time", round(self.now(), 6))
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

    def _append(self, line: bytes) -> None:
        """Straight to the system: what was written survives the end of this process."""
        start = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, start)
            raise UserError(f"{self.path}: cannot be written: {error.strerror}; nothing is lost, make room and resume"
                            ) from None


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events of a session, and how many bytes of the file are whole lines. Raises UserError naming a bad line."""
    events: list[Event] = []
    good_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = json.loads(line)
                assert isinstance(event, dict) and isinstance(event["type"], str) and event["time"] >= 0
            except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
                raise UserError(f"{path}: line {number} is no event: not a session, or an altered one") from None
            events.append(event)
            good_bytes += len(line)
    return events, good_bytes


def _failed(event: Event) -> bool:
    """A call that a new life should try again."""
    return event["type"] == "model_call" and event.get("error") is not None
