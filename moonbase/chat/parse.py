"""From what the model wrote to content, reasoning and tool calls, whole or as it streams in.

There is one implementation: `parse` feeds `StreamParser` at once, and every way of cutting a text gives the same reply.
Nothing raises and no text is lost. A marker that is unknown, repeated or out of place stays where it stands, as text,
and `Reply.notes` says so:

- inside arguments, reasoning or a call's id it stays in there (arguments keep their bytes), elsewhere it is content;
- a call that is not finished (end of text or turn, or the next call or section marker comes first) is content, marker
  and all. It was already announced to whoever listens: `ToolCallAborted` takes it back and carries that text;
- what stands in a tool section outside of calls is content, and so is a section without a call;
- after `<|im_end|>` everything is content.

Reasoning ends at `</think>` or at a tool section.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import groupby

from moonbase.chat.render import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, IM_END, SECTION_BEGIN, SECTION_END
from moonbase.chat.styles import END_THINK, NO_THINKING, THINK, find_style
from moonbase.errors import UserError

# The singular is not in the vocabulary, but models that saw both write it out.
_SINGULAR = {"<|tool_call_section_begin|>": SECTION_BEGIN, "<|tool_call_section_end|>": SECTION_END}

_MARKER = re.compile(r"<\|[a-z0-9_]{1,48}\|>|</?think>")
# What a marker may look like while its end has not arrived.
_BEGUN = re.compile(r"<(?:\|(?:[a-z0-9_]{1,48}\|?)?|/?(?:t(?:h(?:i(?:nk?)?)?)?)?)\Z")
_WELL_FORMED = re.compile(r"functions\.[^<\s]+:\d+")
_NUMBERED = re.compile(r"(.*):\d+", re.DOTALL)
_MOST_NOTES = 50


@dataclass
class ToolCall:
    """A call as generated: `id` "functions.NAME:IDX", `arguments` the JSON text untouched."""

    id: str
    name: str
    arguments: str


@dataclass
class Reply:
    """What an assistant's turn says. `notes`: what was odd about it, each oddity once."""

    content: str = ""
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call's name is known and its arguments follow. `index` counts the starts of a turn from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    index: int


@dataclass(frozen=True, slots=True)
class ToolCallAborted:
    """Call `index` broke off: it is no call of the reply, whose content goes on with `text` instead, all that was
    written of the call with its markers."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta | ToolCallEnd | ToolCallAborted


def call_name(id: str, tool_names: Collection[str] | None = None) -> str:
    """Which function an id calls; "" where it names none.

    `functions.NAME:IDX` is how ids are made, so all between is the name, dots included: `functions.a.b:3` calls `a.b`.
    In an id of another make (`tools.search:0`) the name is the last segment before the colon. Who knows the tools
    (`tool_names`) has the doubt settled: the longest ending, from a dot on, that is one of them.
    """
    text = id.strip()
    numbered = _NUMBERED.fullmatch(text)
    stem = numbered[1] if numbered else text
    if tool_names:
        segments = stem.split(".")
        for first in range(len(segments)):
            ending = ".".join(segments[first:])
            if ending in tool_names:
                return ending
    own = stem.removeprefix("functions.")
    return (own if own != stem else stem.rpartition(".")[2]).strip()


def parse(
    text: str, style: str = "kimi-k2", *, prefix: str | None = None, tool_names: Collection[str] | None = None
) -> Reply:
    """A whole assistant turn (what follows the generation prompt). Arguments and errors as of `StreamParser`."""
    parser = StreamParser(style, prefix=prefix, tool_names=tool_names)
    parser.push(text)
    parser.finish()
    return parser.reply


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        # Python reads NaN and Infinity, and refuses integers of thousands of digits; JSON is the other way round.
        json.loads(text, parse_constant=refuse, parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


class StreamParser:
    """A reply read piece by piece: `push` what arrives, `finish` at the end, then `reply` is complete.

    The events of all calls, joined, say what the reply says: content is every `ContentDelta` and the text of every
    `ToolCallAborted`, in order; the calls are those that were ended.
    """

    def __init__(
        self, style: str = "kimi-k2", *, prefix: str | None = None, tool_names: Collection[str] | None = None
    ) -> None:
        """`prefix`: what the generation prompt opened, as `generation_prefix` says. None means not known: a thinking
        style then holds back all text until a marker or the end tells whether it was reasoning, so whoever wants to
        stream says it. `tool_names`: the tools on offer, to settle what a dotted id calls.

        Raises UserError for an unknown style or prefix.
        """
        self._thinks = find_style(style).thinks
        if prefix not in (None, "", THINK, NO_THINKING):
            raise UserError(f"prefix: expected nothing, {THINK} or {NO_THINKING}, found {prefix!r}")
        self._tool_names = tool_names
        # One of undecided, reasoning, content, section, id, arguments, ended.
        self._state = "content"
        if self._thinks and prefix in (None, THINK):
            self._state = "reasoning" if prefix else "undecided"
        # Reasoning can only come before anything else.
        self._spoken = prefix == NO_THINKING
        # The last characters, where they may begin a marker.
        self._tail = ""
        # Text of which nobody knows yet whether it is reasoning; in a section, all before its first call.
        self._held: list[str] = []
        self._call = ToolCall("", "", "")
        self._written: list[str] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._num_started = 0
        self._notes: dict[str, None] = {}
        self._new: list[Event] = []
        self._finished = False

    @property
    def reply(self) -> Reply:
        """What was read so far; complete after `finish`."""
        return Reply("".join(self._content), "".join(self._reasoning) or None, list(self._calls), list(self._notes))

    def push(self, text: str, special: bool | None = None) -> list[Event]:
        """Read the next piece. `special`: None finds markers in the text, wherever it is cut; True says that `text` is
        exactly one special token; False that it is plain text, whatever it looks like."""
        assert not self._finished, "the reply is finished"
        if special is None:
            if self._tail or "<" in text:
                self._scan(self._tail + text)
            elif text:
                self._text(text)
        else:
            self._release_tail()
            if special:
                self._marker(text)
            elif text:
                self._text(text)
        return self._take_events()

    def finish(self) -> list[Event]:
        """Nothing more comes. Settles what was open; a second call does nothing."""
        if not self._finished:
            self._finished = True
            if len(self._tail) > 2:
                self._note(f"the text ends inside a marker: {self._tail}")
            self._release_tail()
            self._end("the end of the text")
        return self._take_events()

    def _scan(self, text: str) -> None:
        position = 0
        for marker in _MARKER.finditer(text):
            if marker.start() > position:
                self._text(text[position : marker.start()])
            self._marker(marker.group())
            position = marker.end()
        last = text.rfind("<", position)
        end = last if last >= 0 and _BEGUN.match(text, last) else len(text)
        self._tail = text[end:]
        if end > position:
            self._text(text[position:end])

    def _release_tail(self) -> None:
        tail, self._tail = self._tail, ""
        if tail:
            self._text(tail)

    def _text(self, text: str) -> None:
        """Plain text, in whatever state we are."""
        state = self._state
        if state == "content":
            self._say(text)
            self._spoken = self._spoken or not text.isspace()
        elif state == "arguments":
            self._written.append(text)
            self._new.append(ArgumentsDelta(self._num_started - 1, text))
        elif state == "reasoning":
            self._reasoning.append(text)
            self._new.append(ReasoningDelta(text))
        elif state == "id":
            self._written.append(text)
        elif state == "undecided" or (self._held and text.isspace()):
            self._held.append(text)
        else:
            if not text.isspace():
                self._empty_section()
                self._note(f"text after {IM_END}" if state == "ended" else "text in a tool section outside of calls")
            self._say(text)

    def _marker(self, name: str) -> None:
        kind, state = _SINGULAR.get(name, name), self._state
        if state == "ended":
            self._misplaced(name)
        elif kind == IM_END:
            self._end(name)
            self._state = "ended"
        elif state in ("id", "arguments"):
            self._marker_in_call(kind, name)
        elif state == "section" and kind == CALL_BEGIN:
            self._begin_call()
        elif state == "section" and kind == SECTION_END:
            self._end_section(name)
        elif state == "section":
            self._misplaced(name)
        elif kind == SECTION_BEGIN:
            self._settle("content")
            self._state, self._spoken, self._held = "section", True, [name]
        elif kind == END_THINK and state in ("undecided", "reasoning"):
            self._settle("reasoning")
            self._state, self._spoken = "content", True
        elif kind == THINK and state in ("undecided", "content") and self._thinks:
            self._settle("content")
            if self._spoken:
                self._misplaced(name)
            else:
                self._state = "reasoning"
        else:
            self._misplaced(name)

    def _marker_in_call(self, kind: str, name: str) -> None:
        if kind == ARGUMENT_BEGIN and self._state == "id":
            self._begin_arguments()
        elif kind == CALL_END and self._state == "arguments":
            self._end_call()
        elif kind == CALL_END:
            self._abort(name, after=name)
        elif kind in (CALL_BEGIN, SECTION_BEGIN, SECTION_END):
            self._abort(name)
            self._marker(name)
        else:
            self._misplaced(name)

    def _misplaced(self, name: str) -> None:
        """A marker that means nothing here is text like any other."""
        self._note(f"misplaced {name} kept as text")
        if self._state in ("section", "ended"):
            self._empty_section()
            self._say(name)
        else:
            self._text(name)

    def _settle(self, state: str) -> None:
        """Undecided text turns out to be content, or reasoning."""
        if self._state == "undecided":
            held, self._held, self._state = self._held, [], state
            for text in held:
                self._text(text)

    def _empty_section(self) -> None:
        """A tool section does not begin with a call: its marker, and the layout after it, was text."""
        held, self._held = self._held, []
        if held:
            self._note(f"{held[0]} without a call kept as text")
            self._say("".join(held))

    def _end_section(self, name: str) -> None:
        if self._held:
            self._empty_section()
            self._say(name)
        self._state = "content"

    def _begin_call(self) -> None:
        layout, self._held = self._held[1:], []
        if layout:
            self._say("".join(layout))
        self._state, self._written = "id", []

    def _begin_arguments(self) -> None:
        id = "".join(self._written)
        self._call = ToolCall(id, call_name(id, self._tool_names), "")
        if not self._call.name:
            self._abort(ARGUMENT_BEGIN, after=ARGUMENT_BEGIN)
            return
        if not _WELL_FORMED.fullmatch(id):
            self._note(f"the call id {id[:80]!r} is not functions.NAME:IDX")
        self._new.append(ToolCallStart(self._num_started, id, self._call.name))
        self._num_started += 1
        self._state, self._written = "arguments", []

    def _end_call(self) -> None:
        call = self._call
        call.arguments = "".join(self._written)
        if not _is_json(call.arguments):
            self._note(f"the arguments of {call.id[:80]!r} are not JSON")
        self._calls.append(call)
        self._new.append(ToolCallEnd(self._num_started - 1))
        self._state = "section"

    def _abort(self, at: str, after: str = "") -> None:
        """The call breaks off `at` something: what was written of it, and the marker `after` that, is content."""
        written = "".join(self._written) + after
        if self._state == "arguments":
            text = CALL_BEGIN + self._call.id + ARGUMENT_BEGIN + written
            self._content.append(text)
            self._new.append(ToolCallAborted(self._num_started - 1, text))
        else:
            self._say(CALL_BEGIN + written)
        self._note(f"a call breaks off at {at} and is kept as text")
        self._state = "section"

    def _end(self, at: str) -> None:
        """The turn or the text is over."""
        if self._state in ("id", "arguments"):
            self._abort(at)
        if self._state == "section" and not self._held:
            self._note(f"the tool section is still open at {at}")
        elif self._state == "section":
            self._empty_section()
        elif self._state == "reasoning":
            self._note(f"the reasoning is still open at {at}")
        self._settle("content")

    def _say(self, text: str) -> None:
        self._content.append(text)
        self._new.append(ContentDelta(text))

    def _note(self, note: str) -> None:
        if len(self._notes) < _MOST_NOTES:
            self._notes[note] = None

    def _take_events(self) -> list[Event]:
        events, self._new = self._new, []
        return events if len(events) < 2 else _merge(events)


def _merge(events: list[Event]) -> list[Event]:
    """Neighbouring deltas of one kind become one."""
    merged: list[Event] = []
    for (kind, index), group in groupby(events, lambda event: (type(event), getattr(event, "index", None))):
        run = list(group)
        if len(run) == 1 or kind not in (ContentDelta, ReasoningDelta, ArgumentsDelta):
            merged += run
        else:
            text = "".join(event.text for event in run)
            merged.append(ArgumentsDelta(index, text) if kind is ArgumentsDelta else kind(text))
    return merged
