"""What the user sees. In a terminal: colours, reasoning dim, tool calls on lines of their own. In a pipe: text alone.

Nothing that a model or an endpoint says reaches the terminal but as letters: control characters, which could clear the
screen, move the cursor or turn the writing round, are left out.
"""

from __future__ import annotations

import re
import sys
import time

from rich.console import Console

from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
)
from moonbase.terminal.speakers import Finished

# All of C0 and C1 but tab and line end, and what changes the direction of writing (Unicode UAX #9).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_LONGEST_RESULT = 200


def harmless(text: str) -> str:
    """Text as it is, tabs and line ends too, but without what would drive a terminal."""
    return _CONTROL.sub("", text)


class Screen:
    """Replies go to standard output. What is said about them does too in a terminal; in a pipe, to standard error."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(highlight=False)
        self._notes = self._out if self.interactive else Console(highlight=False, stderr=True)
        self._dim = False
        self._at_line_start = True
        self._called: dict[int, str] = {}
        self._started = 0.0

    # --- words of our own ---------------------------------------------------------------------------------------------

    def note(self, text: str, style: str = "dim") -> None:
        """A line about the conversation."""
        # `out` breaks no lines and turns no `:name:` of a program into a picture.
        self._notes.out(harmless(text), style=style)

    def error(self, text: str) -> None:
        self.note(" ".join(text.split()), "red")

    def echo(self, text: str) -> None:
        """The text that is going to be continued."""
        self._out.out(harmless(text), style="bold", end="")
        self._at_line_start = False

    # --- a reply ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A reply is asked for."""
        self._dim, self._at_line_start, self._started = False, True, 0.0
        self._called.clear()

    def show(self, event: Event | Finished) -> None:
        """One event of a reply."""
        self._started = self._started or time.monotonic()
        match event:
            case ReasoningDelta():
                # Dim in a terminal; a pipe wants the answer.
                if self.interactive:
                    self._write(event.text, dim=True)
            case ContentDelta():
                self._write(event.text)
            case ToolCallStart():
                self._called[event.index] = f"{event.name}("
            case ArgumentsDelta():
                self._called[event.index] = self._called.get(event.index, "") + event.text
            case ToolCallEnd():
                self.line()
                self.note(f"  calls {self._called.pop(event.index, '')})", "cyan")
            case ToolCallAborted():
                self._called.pop(event.index, None)
                self._write(event.text)
            case Finished():
                self._finish(event)

    def result(self, text: str) -> None:
        """What a tool returned."""
        text = " ".join(text.split())
        self.note(f"  → {text[:_LONGEST_RESULT]}{'…' if len(text) > _LONGEST_RESULT else ''}", "cyan")

    def stopped(self) -> None:
        """The user ended the reply."""
        self.line()
        self.note("(stopped)")

    def line(self) -> None:
        """Begin a new line unless we are at one."""
        self._undim()
        if not self._at_line_start:
            self._out.file.write("\n")
            self._out.file.flush()
            self._at_line_start = True

    def _finish(self, finished: Finished) -> None:
        self.line()
        seconds = time.monotonic() - self._started
        facts = []
        if finished.tokens and finished.tokens > 1 and seconds > 0:
            facts = [f"{finished.tokens} tokens", f"{(finished.tokens - 1) / seconds:.3g} tokens/s"]
        if finished.reason == "length":
            facts.append("cut at the token limit, see /tokens")
        # Between two rounds of tools nobody wants to know; in a pipe only what went wrong.
        if facts and (finished.reason == "length" or (self.interactive and finished.reason != "tool_calls")):
            self.note("  " + ", ".join(facts))

    def _write(self, text: str, dim: bool = False) -> None:
        text = harmless(text)
        if not text:
            return
        if self._dim and not dim:
            # The answer begins on a line of its own.
            self.line()
            text = text.lstrip("\n")
        if dim and not self._dim and self._colours:
            self._out.file.write(_DIM)
        self._dim = dim
        self._out.file.write(text)
        self._out.file.flush()
        self._at_line_start = text.endswith("\n") if text else self._at_line_start

    def _undim(self) -> None:
        if self._dim and self._colours:
            self._out.file.write(_PLAIN)
        self._dim = False

    @property
    def _colours(self) -> bool:
        return self._out.color_system is not None
