"""What to do when an agent's messages outgrow its model's context (facts of DeepSeek-V3.2 and Kimi K2.5).

A strategy looks at the messages that are visible and says which to hide; nothing is ever deleted, so a trace still has
everything. Assistant messages with calls are hidden together with their results: no call stands without its answer.

Messages 0 … `fixed` - 1, the system prompt and the task, are never hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moonbase.agents.models.base import Message

HIDDEN = "[An earlier result, hidden to save room.]"


@dataclass(frozen=True)
class Room:
    """How full the context is."""

    tokens: int
    """Of the prompt as it stands."""
    limit: int | None
    """Of the model's context; None where nobody knows."""

    def fuller_than(self, share: float) -> bool:
        """Whether the prompt takes more than this share of the context."""
        return self.limit is not None and self.tokens > share * self.limit


@dataclass
class View:
    """Which messages the model sees: some as they are, some tool results by a line instead."""

    visible: list[int]
    shortened: set[int]


class ContextStrategy(Protocol):
    """Decides before a call, and again until the prompt fits or nothing changes."""

    name: str

    def manage(self, messages: Sequence[Message], view: View, fixed: int, room: Room) -> View:
        """The new view, or an equal one where nothing changes."""
        ...

    @property
    def summarises(self) -> bool:
        """Whether the agent has to ask the model for a summary of what `manage` hides."""
        ...


def rounds(messages: Sequence[Message], visible: Sequence[int], fixed: int) -> list[list[int]]:
    """The visible messages behind the fixed ones, an assistant's with the results of its calls."""
    grouped: list[list[int]] = []
    for index in visible:
        if index >= fixed:
            if messages[index]["role"] != "tool" or not grouped:
                grouped.append([])
            grouped[-1].append(index)
    return grouped


@dataclass(frozen=True)
class KeepAll:
    """Nothing is hidden; a prompt that does not fit ends the agent."""

    name: str = "keep-all"
    summarises: bool = False

    def manage(self, messages: Sequence[Message], view: View, fixed: int, room: Room) -> View:
        """As it is."""
        return view


@dataclass(frozen=True)
class Discard:
    """Past a share of the context, hide the oldest part of the history: all of it, or three quarters."""

    part: float = 1.0
    threshold: float = 0.8
    summarises: bool = False

    @property
    def name(self) -> str:
        """discard-all, or discard-75%."""
        return "discard-all" if self.part >= 1 else f"discard-{self.part:.0%}"

    def manage(self, messages: Sequence[Message], view: View, fixed: int, room: Room) -> View:
        """Hide whole rounds."""
        if not room.fuller_than(self.threshold):
            return view
        history = rounds(messages, view.visible, fixed)
        gone = {index for group in history[: max(1, round(self.part * len(history)))] for index in group}
        return View([index for index in view.visible if index not in gone], view.shortened - gone)


@dataclass(frozen=True)
class HideToolResults:
    """Past a share of the context, only the latest round's tool results stay; all that the model said itself stays."""

    threshold: float = 0.8
    keep_rounds: int = 1
    name: str = "hide-tool-result"
    summarises: bool = False

    def manage(self, messages: Sequence[Message], view: View, fixed: int, room: Room) -> View:
        """Shorten results."""
        if not room.fuller_than(self.threshold):
            return view
        old = rounds(messages, view.visible, fixed)[: -self.keep_rounds]
        results = {index for group in old for index in group if messages[index]["role"] == "tool"}
        return View(view.visible, view.shortened | results)


@dataclass(frozen=True)
class Summarise:
    """Past a share of the context, the model sums up what it has found, and starts again with that."""

    threshold: float = 0.8
    name: str = "summary"
    summarises: bool = True
    request: str = ("Your context is nearly full and everything but the task will be removed. Write down all that you "
                    "have found out so far and what remains to be done, so that you can go on from it alone.")

    def manage(self, messages: Sequence[Message], view: View, fixed: int, room: Room) -> View:
        """Hide everything behind the task."""
        history = sum(index >= fixed for index in view.visible) if room.fuller_than(self.threshold) else 0
        # A single message is a summary already.
        return View([index for index in view.visible if index < fixed], set()) if history > 1 else view


STRATEGIES = {
    "keep-all": KeepAll(), "discard-all": Discard(), "discard-75%": Discard(part=0.75),
    "hide-tool-result": HideToolResults(), "summary": Summarise(),
}
