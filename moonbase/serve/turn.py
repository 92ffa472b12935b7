"""One reply as it grows: pieces of the engine in, chat events out, and the accounts that both surfaces report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    StreamParser,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
)
from moonbase.data.tokenizer import VISIBLE_SPECIALS


class TokenLogprob(NamedTuple):
    """A token of a text, its log-probability, and the most likely (id, log-probability) of its place; None: unknown."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None = ()


@dataclass
class Call:
    """A tool call while it is being said; `complete` once its end was."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False

    @property
    def is_valid(self) -> bool:
        """Only a call that was said to its end, with a JSON object as arguments, may be acted upon."""
        if not self.complete:
            return False
        try:
            return isinstance(json.loads(self.arguments), dict)
        except ValueError:
            return False


@dataclass
class Turn:
    """Of one choice. `parser` None: plain text without chat markup (completions)."""

    parser: StreamParser | None
    content: str = ""
    reasoning: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens of `content`, not of reasoning, markers or calls."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    ended: str | None = None
    """Why the engine stopped: stop, length or cancelled."""
    stop_reason: str | int | None = None
    first_time: float | None = None
    last_time: float | None = None
    _undecided: list[TokenLogprob] = field(default_factory=list)
    """Tokens that have shown no text yet."""
    _undecided_count: int = 0

    def push(self, piece: Any) -> list[Any]:
        """The chat events of a piece; with the engine's last piece those of the end."""
        if piece.ids:
            self.last_time = time.monotonic()
            self.first_time = self.first_time or self.last_time
        self.completion_tokens += len(piece.ids)
        events = self._events(piece)
        self._account(piece, events)
        for event in events:
            self._apply(event)
        if piece.finish_reason is not None:
            self.ended, self.stop_reason = piece.finish_reason, piece.stop_reason
            self.cached_tokens = piece.cached_tokens
        return events

    def _events(self, piece: Any) -> list[Any]:
        if self.parser is None:
            shown = piece.text and (not piece.special or piece.text in VISIBLE_SPECIALS)
            return [ContentDelta(piece.text)] if shown else []
        events = list(self.parser.push(piece.text, special=piece.special)) if piece.text else []
        if piece.finish_reason is not None:
            # Every marker was a token of its own, so that only a tool section that was cut off can still be open; the
            # half of a call is of no use to anyone.
            self.parser.finish()
        return events

    def _account(self, piece: Any, events: list[Any]) -> None:
        """Whose text a token is: tokens before a character is complete belong to the piece that completes it."""
        tops = piece.top_logprobs or [()] * len(piece.ids)
        entries = zip(piece.ids, piece.logprobs, tops, strict=False)
        self._undecided += [TokenLogprob(id, logprob, tuple(top)) for id, logprob, top in entries]
        self._undecided_count += len(piece.ids)
        if not (events or piece.special or piece.finish_reason is not None):
            return
        kinds = {type(event) for event in events}
        if ReasoningDelta in kinds:
            self.reasoning_tokens += self._undecided_count
        elif self.parser is None or (ContentDelta in kinds and not piece.special):
            self.logprobs += self._undecided
        self._undecided, self._undecided_count = [], 0

    def _apply(self, event: Any) -> None:
        match event:
            case ContentDelta():
                self.content += event.text
            case ReasoningDelta():
                self.reasoning += event.text
            case ToolCallStart():
                self.calls[event.index] = Call(event.id, event.name)
            case ArgumentsDelta():
                self.calls[event.index].arguments += event.text
            case ToolCallEnd():
                self.calls[event.index].complete = True
            case ToolCallAborted():
                del self.calls[event.index]
                self.content += event.text

    @property
    def tool_calls(self) -> list[Call]:
        """The calls that are whole; one that was cut off is none."""
        return [call for _, call in sorted(self.calls.items()) if call.is_valid]

    @property
    def finish_reason(self) -> str:
        """stop, length or tool_calls."""
        if self.ended == "length":
            return "length"
        return "tool_calls" if self.tool_calls else "stop"
