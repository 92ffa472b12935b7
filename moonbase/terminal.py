"""Talking to a model in the terminal. A base model continues the text it is given; the stream appears as it is made."""

from __future__ import annotations

import math
import re
import sys

from rich.console import Console
from rich.markup import escape

from moonbase.engine import Engine, Sampling
from moonbase.errors import UserError
from moonbase.loading import load, load_tokenizer_of

HELP = "/temperature X   /tokens N   /help   /quit   (end a line with \\ to go on in the next)"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat(model: str) -> None:
    """A prompt loop on standard input. Ends at /quit, Ctrl-D or the end of the input."""
    console = Console(highlight=False)
    console.print(f"loading {escape(model)} …", style="dim")
    tokenizer = load_tokenizer_of(model)
    engine = Engine(load(model), tokenizer, stop_ids=tokenizer.eos_ids)
    console.print(f"[bold]{escape(model)}[/bold] is a base model: it continues what you write.  "
                  f"[dim]{escape(HELP)}[/dim]")
    settings = {"temperature": 0.8, "tokens": 128}
    turn = 0
    while (text := _read(console)) is not None:
        if text.startswith("/"):
            if not _command(text, settings, console):
                return
            continue
        if not text:
            continue
        turn += 1
        try:
            sampling = Sampling(max_tokens=int(settings["tokens"]), temperature=settings["temperature"], top_p=0.95,
                                seed=turn)
            # `out` breaks no lines and turns no `:name:` of a program into a picture.
            console.out(text, style="bold", end="")
            for piece in engine.stream(text, sampling):
                # As it is, tabs too, but without what would drive the terminal.
                console.file.write(_CONTROL.sub("", piece))
                console.file.flush()
            console.print()
        except UserError as error:
            console.out(str(error), style="red")
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim")


def _read(console: Console) -> str | None:
    """One entry, or None at the end; lines that end in a backslash are joined."""
    lines = []
    while True:
        try:
            prompt = "… " if lines else "› "
            line = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            console.print()
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _command(text: str, settings: dict[str, float], console: Console) -> bool:
    """Apply a slash command; False ends the session."""
    name, _, value = text[1:].partition(" ")
    if name in ("quit", "exit", "q"):
        return False
    if name in settings:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not (1 if name == "tokens" else 0) <= number < math.inf:
            console.print(f"/{name} wants a number, for example /{name} {settings[name]:g}", style="red", markup=False)
        else:
            settings[name] = number
    else:
        console.print(HELP, style="dim", markup=False)
    return True
