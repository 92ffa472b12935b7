"""One episode in a folder: what was asked, all that happened, and what came of it.

    SESSION/events.jsonl    as it happens; what a killed session goes on from
    SESSION/episode.jsonl   the trace, one line
    SESSION/trace.html      the trace as a page
    SESSION/answer.md       the answer
    SESSION/work/           where python and shell work, unless they were given another folder

The last four are written when the episode ends, each whole or not at all, and also when it is interrupted (then without
an answer). The settings stand in the first event, so a folder is all that resuming needs. Keys are never written.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moonbase.agents.budget import Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.episodes import read_events, write_episodes
from moonbase.agents.folding import fold
from moonbase.agents.journal import EVENTS, Event, Journal
from moonbase.agents.models.base import CallOptions, ChatModel, Price
from moonbase.agents.models.pool import Pool
from moonbase.agents.page import write_page
from moonbase.agents.swarm import ORCHESTRATOR, Swarm
from moonbase.agents.toolsets import open_tools
from moonbase.agents.trace import Episode
from moonbase.errors import UserError
from moonbase.files import write_text

ALONE = "You solve the user's task with your tools. When you have what you need, answer the user in full."
BEGIN_TOGETHER = 8


class Settings(BaseModel):
    """All that a session needs to be run again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    model: str
    sub_model: str | None = None
    tools: tuple[str, ...] = ()
    context: str = "keep-all"
    single: bool = False
    allow_unsafe: bool = False
    limits: Limits = Limits(steps=100)
    sub_limits: Limits = Limits(steps=100)
    options: CallOptions = CallOptions()
    concurrency: int = 64
    price: Price = Price()
    sub_price: Price | None = None
    context_tokens: int | None = None
    """Of the models' contexts, for those that do not say it."""
    sub_context_tokens: int | None = None


class Session:
    """A session that is being worked on: its folder is locked until `close`."""

    def __init__(self, folder: Path, settings: Settings, journal: Journal) -> None:
        self.folder, self.settings, self.journal = folder, settings, journal
        self.events: list[Event] = list(journal.events)
        journal.listeners.append(self.events.append)
        self.pools: list[Pool] = []

    @staticmethod
    def create(folder: Path, settings: Settings) -> Session:
        """In a folder without a session, or with one that was killed before its first event. Raises UserError."""
        begun = folder / EVENTS
        empty = begun.is_file() and begun.stat().st_size == 0
        return Session(folder, settings, Journal.open(folder, resume=empty))

    @staticmethod
    def resume(folder: Path, **changes: Any) -> Session:
        """With the settings that it was created with, less `changes`. Raises UserError."""
        settings = read_settings(folder).model_copy(update=changes)
        return Session(folder, settings, Journal.open(folder, resume=True))

    @property
    def finished(self) -> bool:
        """Whether there is an answer already."""
        return any(event["type"] == "episode_finished" and event.get("status") == "finished" for event in self.events)

    async def run(
        self, model: ChatModel, sub_model: ChatModel | None = None, *,
        listeners: tuple[Callable[[Event], None], ...] = (), report: Callable[[str], None] | None = None,
    ) -> Episode:
        """Work on the task to its end; a finished session is only written out again. Closes the models. Raises
        UserError for tools that cannot be opened and for a full disk; whatever it raises, the trace is written."""
        settings = self.settings
        self.pools = [_pool(one, settings.concurrency) for one in (model, sub_model) if one is not None]
        try:
            if not self.finished:
                tools = await open_tools(settings.tools, self.folder / "work", allow_unsafe=settings.allow_unsafe,
                                         report=report)
                self.journal.listeners += listeners
                swarm = Swarm(
                    self.pools[0], tools, sub_model=self.pools[-1], limits=settings.limits,
                    sub_limits=settings.sub_limits, context=STRATEGIES[settings.context],
                    sub_context=STRATEGIES[settings.context], options=settings.options, journal=self.journal,
                    delegate=not settings.single, system=ALONE if settings.single else ORCHESTRATOR,
                    episode_id=self.folder.name, details={"settings": settings.model_dump(mode="json")})
                await swarm.run(settings.task)
        finally:
            for pool in self.pools:
                await pool.close()
            episode = self.write()
        assert episode is not None
        return episode

    def write(self) -> Episode | None:
        """The files that are made of the events; None where there are no events yet."""
        if not self.events:
            return None
        episode = fold(self.events)
        write_episodes(self.folder / "episode.jsonl", [episode])
        write_page([episode], self.folder / "trace.html")
        if episode.status == "finished":
            write_text(self.folder / "answer.md", episode.text.encode(errors="replace").decode() + "\n")
        return episode

    def close(self) -> None:
        """Give the folder free; one in which nothing has happened is as if it had never been."""
        if not self.events:
            # What lies there besides is not ours to remove, and an empty folder harms nobody.
            with contextlib.suppress(OSError):
                (self.folder / EVENTS).unlink()
                self.folder.rmdir()
        self.journal.close()


def read_settings(folder: Path) -> Settings:
    """Of a session that was begun. Raises UserError."""
    path = folder / EVENTS
    if not path.is_file():
        raise UserError(f"{folder}: no session to resume here ({EVENTS} is missing)")
    events = read_events(path)
    if not events:
        raise UserError(f"{folder}: the session was ended before it began; start it again with --session {folder}")
    found = events[0].get("settings")
    if not isinstance(found, dict):
        raise UserError(f"{folder}: its {EVENTS} names no settings: not a session of moonbase swarm")
    try:
        return Settings.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: settings.{where}: {first['msg']}: written by another version of moonbase?") from None


def new_folder(parent: Path = Path("runs/swarm")) -> Path:
    """A name by the time, which nobody has."""
    name = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    number = 1
    while os.path.lexists(folder := parent / (name if number == 1 else f"{name}-{number}")):
        number += 1
    return folder


def _pool(model: ChatModel, concurrency: int) -> Pool:
    return Pool(model, concurrency=min(BEGIN_TOGETHER, concurrency), most=concurrency)
