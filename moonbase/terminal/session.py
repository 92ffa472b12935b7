"""The loop: a line from the user, a command or a reply, rounds of tools until the model has answered."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moonbase import files
from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
    normalise_messages,
)
from moonbase.errors import TryAgain, UserError
from moonbase.terminal.screen import Screen
from moonbase.terminal.speakers import LocalSpeaker, Message, RemoteSpeaker, Speaker, Wishes

MAX_ROUNDS = 6
"""A model that still calls tools then is stopped."""
HISTORY_LINES = 1000

COMMANDS = {
    "/help": "this list",
    "/new": "forget the conversation",
    "/system TEXT": "speak under these instructions; no text: the model's own",
    "/temperature X": "0 takes the likeliest token; default: the model's own",
    "/tokens N": "longest reply",
    "/thinking on|off|default": "reason before answering",
    "/tools": "let the model call a calculator, a unit converter and a table; again: no more",
    "/retry": "answer the last message once more",
    "/save FILE": "write the conversation as a line of JSON that a model can be tuned on",
    "/load FILE": "go on with a saved one",
    "/base": "continue raw text instead of answering; again: answer",
    "/quit": "or Ctrl-D",
}
_REFUSALS = (UserError, TryAgain)


def chat(model: str) -> None:
    """A prompt loop on standard input. Ends at /quit, Ctrl-D or the end of the input.

    model: run folder, checkpoint folder, or URL of an OpenAI-compatible endpoint. Raises UserError / TryAgain where
    there is no such model.
    """
    screen = Screen()
    if screen.interactive:
        screen.note(f"loading {model} …")
    speaker: Speaker = RemoteSpeaker(model) if model.startswith(("http://", "https://")) else LocalSpeaker(model)
    session = Session(speaker, screen)
    if screen.interactive:
        session.greet()
    with _line_history(screen.interactive):
        going = True
        while going:
            try:
                text = _read(screen)
                going = text is not None and session.take(text)
            except KeyboardInterrupt:
                # Whatever it hit, the conversation goes on; a program in a pipe ends, as programs do.
                if not screen.interactive:
                    raise
                screen.stopped()


class Session:
    """One conversation. `take` gets what the user typed."""

    def __init__(self, speaker: Speaker, screen: Screen) -> None:
        self.speaker, self.screen = speaker, screen
        self.base = not speaker.chats
        self.wishes = Wishes()
        self.system = ""
        self.tools = False
        self.messages: list[Message] = []
        """Without the system message."""
        self.last_text = ""
        """What /retry continues in base mode."""
        self.turn = 0

    def greet(self) -> None:
        if self.base:
            self.screen.note(f"{self.speaker.name} is a base model: it has not been taught to chat and continues what "
                             "you write.", "bold")
        else:
            self.screen.note(f"{self.speaker.name}", "bold")
        self.screen.note("/help lists commands. Ctrl-C stops a reply. End a line with \\ to go on in the next.")

    def take(self, text: str) -> bool:
        """Obey a command or get an answer. False ends the session. KeyboardInterrupt comes through when the user stops
        a reply; the session is whole then."""
        if text.startswith("/"):
            return self._command(text)
        if text.strip():
            if self.base:
                self._continue(text)
            else:
                self._ask(text)
        return True

    # --- replies ------------------------------------------------------------------------------------------------------

    def _continue(self, text: str) -> None:
        self.last_text = text
        self.turn += 1
        try:
            self.screen.begin()
            self.screen.echo(text)
            for event in self.speaker.proceed(text, self.wishes, self.turn):
                self.screen.show(event)
        except _REFUSALS as error:
            self.screen.line()
            self.screen.error(str(error))

    def _ask(self, text: str) -> None:
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        refusal = self._answer()
        if isinstance(refusal, UserError):
            # What cannot be answered is not part of the conversation; what could not be answered now is, for /retry.
            self.messages = before

    def _answer(self) -> UserError | TryAgain | None:
        """Let the model answer the last message, through as many rounds of tools as it takes. A refusal is shown and
        given back; of the answer nothing is kept then."""
        kept = len(self.messages)
        for _ in range(MAX_ROUNDS):
            self.turn += 1
            said: Message = {"role": "assistant", "content": ""}
            try:
                self._listen(said)
            except _REFUSALS as error:
                self.screen.line()
                self.screen.error(str(error))
                del self.messages[kept:]
                return error
            except KeyboardInterrupt:
                # What had been said was said.
                said.pop("tool_calls", None)
                if said["content"]:
                    self.messages.append(said)
                raise
            self.messages.append(said)
            if said.get("tool_calls") and not self.tools:
                # Nobody offered it one, so nobody runs it.
                del said["tool_calls"]
                self.screen.note("the model called a tool, which /tools would have to allow")
            if not said.get("tool_calls"):
                return None
            self.messages += [self._run(call) for call in said["tool_calls"]]
        self.screen.note(f"still calling tools after {MAX_ROUNDS} rounds; say something to let it go on")
        return None

    def _listen(self, said: Message) -> None:
        """Show a reply while it comes and write it down in `said`."""
        from moonbase.synth.tools import TOOLS

        system = [{"role": "system", "content": self.system}] if self.system else []
        tools = list(TOOLS.values()) if self.tools else []
        calls: dict[int, dict[str, Any]] = {}
        self.screen.begin()
        for event in self.speaker.reply([*system, *self.messages], tools, self.wishes, self.turn):
            match event:
                case ContentDelta() | ToolCallAborted():
                    said["content"] += event.text
                case ReasoningDelta():
                    said["reasoning_content"] = said.get("reasoning_content", "") + event.text
                case ToolCallStart():
                    calls[event.index] = {"id": event.id, "type": "function",
                                          "function": {"name": event.name, "arguments": ""}}
                case ArgumentsDelta():
                    calls[event.index]["function"]["arguments"] += event.text
                case ToolCallEnd():
                    said.setdefault("tool_calls", []).append(calls[event.index])
            self.screen.show(event)

    def _run(self, call: dict[str, Any]) -> Message:
        """The message with a tool's result; the model is told what was wrong, as any tool would tell it."""
        from moonbase.synth.tools import run_tool

        function = call["function"]
        try:
            content = run_tool(function["name"], function["arguments"])
        except UserError as error:
            content = f"error: {error}"
        self.screen.result(content)
        return {"role": "tool", "tool_call_id": call["id"], "content": content}

    # --- commands -----------------------------------------------------------------------------------------------------

    def _command(self, text: str) -> bool:
        name, _, value = text[1:].partition(" ")
        value = value.strip()
        if name in ("quit", "exit", "q"):
            return False
        try:
            obey = getattr(self, f"_on_{name}", None) if name.isalpha() else None
            if obey is None:
                self._on_help("")
            else:
                obey(value)
        except UserError as error:
            self.screen.error(str(error))
        return True

    def _on_help(self, _: str) -> None:
        width = max(map(len, COMMANDS)) + 2
        for name, meaning in COMMANDS.items():
            self.screen.note(f"{name:<{width}}{meaning}")

    def _on_new(self, _: str) -> None:
        self.messages.clear()
        self.screen.note("a new conversation")

    def _on_system(self, value: str) -> None:
        self.system = value
        self.screen.note("from now on under these instructions" if value else "no instructions of your own")

    def _on_temperature(self, value: str) -> None:
        number = _number(value)
        if number is None or not 0 <= number < math.inf:
            raise UserError("/temperature wants a number from 0 on, for example /temperature 0.7")
        self.wishes.temperature = number

    def _on_tokens(self, value: str) -> None:
        number = _number(value)
        if number is None or not 1 <= number < 1e9:
            raise UserError("/tokens wants a whole number from 1 on, for example /tokens 256")
        self.wishes.tokens = int(number)

    def _on_thinking(self, value: str) -> None:
        choices = {"on": True, "off": False, "default": None, "": None}
        if value not in choices:
            raise UserError("/thinking wants on, off or default")
        self.wishes.thinking = choices[value]

    def _on_tools(self, value: str) -> None:
        from moonbase.synth.tools import TOOLS

        if value not in ("", "on", "off"):
            raise UserError("/tools wants on, off or nothing")
        self.tools = value == "on" if value else not self.tools
        names = ", ".join(TOOLS)
        self.screen.note(f"the model may call {names}" if self.tools else f"the model may not call {names} any more")

    def _on_base(self, _: str) -> None:
        self.base = not self.base
        told = "what you write is continued" if self.base else "what you write is answered"
        if not self.base and not self.speaker.chats:
            told += ", though this model has not been taught to"
        self.screen.note(told)

    def _on_retry(self, _: str) -> None:
        if self.base:
            if not self.last_text:
                raise UserError("there is nothing to continue once more")
            self._continue(self.last_text)
            return
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise UserError("there is no message to answer once more")
        before = list(self.messages)
        del self.messages[questions[-1] + 1 :]
        if self._answer() is not None:
            # The answer that there was is better than none.
            self.messages = before

    def _on_save(self, value: str) -> None:
        from moonbase.synth.tools import TOOLS

        if not value:
            raise UserError("/save wants a file name")
        system = [{"role": "system", "content": self.system}] if self.system else []
        saved = {"messages": [*system, *self.messages], "tools": list(TOOLS.values()) if self.tools else []}
        files.write_text(Path(value).expanduser(), json.dumps(saved, ensure_ascii=False) + "\n")
        self.screen.note(f"{len(self.messages)} messages written to {value}")

    def _on_load(self, value: str) -> None:
        if not value:
            raise UserError("/load wants a file name")
        try:
            saved = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{value}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{value}: no saved conversation (it is no JSON)") from None
        if not isinstance(saved, dict) or "messages" not in saved:
            raise UserError(f"{value}: no saved conversation (messages are missing)")
        messages = normalise_messages(saved["messages"])
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        self.system = first["content"] if first else ""
        self.messages = messages[1:] if first else messages
        self.tools = bool(saved.get("tools"))
        self.base = False
        self.screen.note(f"{len(self.messages)} messages read from {value}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# --- lines ------------------------------------------------------------------------------------------------------------


def _read(screen: Screen) -> str | None:
    """One entry, or None at the end; lines that end in a backslash are joined."""
    lines: list[str] = []
    while True:
        try:
            line = input(("… " if lines else "› ") if screen.interactive else "")
        except EOFError:
            if screen.interactive:
                print()
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            if not screen.interactive:
                raise
            # As in a shell: what was being typed is forgotten.
            screen.note("\n(Ctrl-D or /quit ends)")
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


@contextlib.contextmanager
def _line_history(wanted: bool) -> Iterator[None]:
    """Editing of lines, and what was typed in earlier sessions; kept where the system keeps such things, for the user
    alone."""
    if not wanted:
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state) / "moonbase" / "chat_history"
    # A home that cannot be read or written only costs the history.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        readline.read_history_file(path)
    words = [command.split()[0] for command in COMMANDS]
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, number: [*filter(lambda word: word.startswith(text), words), None][number])
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(path)
            path.chmod(0o600)
        sys.stdout.flush()
