"""One turn of a chat with the engine: what the reply must obey, and the reply as it grows.

Pieces of the engine in, chat events out, and the accounts that whoever asked wants to see.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    StreamParser,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
)
from moonbase.chat.render import SECTION_BEGIN
from moonbase.data.tokenizer import VISIBLE_SPECIALS
from moonbase.errors import UserError

if TYPE_CHECKING:
    from moonbase.chat.prompt import Prompt
    from moonbase.data import Tokenizer
    from moonbase.engine.text import Piece


def writes_calls(tokenizer: Tokenizer) -> bool:
    """Whether a vocabulary has the tokens of which tool calls are made."""
    return SECTION_BEGIN in tokenizer.special_tokens


def turn_constraint(
    tokenizer: Tokenizer, vocab_size: int, prompt: Prompt, tools: Sequence[dict[str, Any]], *, choice: str = "auto",
    parallel: bool = True, json_only: bool = False, schema: dict[str, Any] | None = None, strict: bool = True,
) -> Callable[[], Any] | None:
    """A factory of what each reply to `prompt` must obey; None where that is nothing.

    Tool calls are constrained always, from their first marker on. `choice`, `parallel`: as of `tool_constraint`.
    `json_only`: a reply without calls is a JSON value, of `schema` where there is one. `strict` False: where the
    package for constraints is missing, a choice that asks for nothing leaves the reply free. Raises UserError.
    """
    from moonbase.engine.constraint import json_constraint, tool_constraint

    free = choice in ("auto", "none")
    calls_follow = bool(tools) and choice != "none"
    if calls_follow and not writes_calls(tokenizer):
        raise UserError("tools are unsupported: this model's vocabulary has no tool-call tokens")
    if not strict and free and not json_only and find_spec("llguidance") is None:
        return None
    if json_only and not calls_follow:
        return json_constraint(tokenizer, vocab_size, schema, **prompt.rules())
    if not writes_calls(tokenizer):
        return None
    # Where the model may choose, its answer is calls or JSON; where it must call, there is no other answer.
    either = json_only and choice == "auto"
    return tool_constraint(
        tokenizer, vocab_size, list(tools), choice=choice if calls_follow or not free else "none", parallel=parallel,
        first_index=prompt.first_call_index, json_reply=either, response_schema=schema if either else None,
        **prompt.rules())


def fewest_tokens(constraint: Any) -> int:
    """Of a reply that obeys a constraint (a factory of them, or None)."""
    return getattr(constraint, "minimum_tokens", 0)


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
    sampled: list[TokenLogprob] = field(default_factory=list)
    """All that was drawn, the end token included: who learns from replies learns when to stop."""
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

    def push(self, piece: Piece) -> list[Any]:
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

    def _events(self, piece: Piece) -> list[Any]:
        if self.parser is None:
            shown = piece.text and (not piece.special or piece.text in VISIBLE_SPECIALS)
            return [ContentDelta(piece.text)] if shown else []
        events = list(self.parser.push(piece.text, special=piece.special)) if piece.text else []
        if piece.finish_reason is not None:
            # Every marker was a token of its own, so that only a tool section that was cut off can still be open; the
            # half of a call is of no use to anyone.
            self.parser.finish()
        return events

    def _account(self, piece: Piece, events: list[Any]) -> None:
        """Whose text a token is: tokens before a character is complete belong to the piece that completes it."""
        tops = piece.top_logprobs or [()] * len(piece.ids)
        entries = [TokenLogprob(id, logprob, tuple(top))
                   for id, logprob, top in zip(piece.ids, piece.logprobs, tops, strict=False)]
        self.sampled += entries
        if piece.end_logprob is not None and isinstance(piece.stop_reason, int):
            self.sampled.append(TokenLogprob(piece.stop_reason, piece.end_logprob))
        self._undecided += entries
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
        """The calls that may be acted upon; one that was cut off is none."""
        return [call for _, call in sorted(self.calls.items()) if call.is_valid]

    @property
    def said_calls(self) -> list[Call]:
        """All that were said to their end, also those whose arguments are no JSON."""
        return [call for _, call in sorted(self.calls.items()) if call.complete]

    @property
    def finish_reason(self) -> str:
        """stop, length or tool_calls."""
        return self.reason_with(self.tool_calls)

    def reason_with(self, calls: Sequence[Call]) -> str:
        """stop, length or tool_calls, of a reply with these calls."""
        if self.ended == "length":
            return "length"
        return "tool_calls" if calls else "stop"

    def message(self, calls: Sequence[Call]) -> dict[str, Any]:
        """The reply in OpenAI's form, with these of its calls; `reasoning_content` where there is reasoning."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if calls else "")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if calls:
            message["tool_calls"] = [{"id": call.id, "type": "function",
                                      "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
        return message
