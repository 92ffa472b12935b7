"""Example dialogues for the page: turns, tool calls and results from `examples.json`, and the rates behind them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonbase.report.words import cut

EXAMPLES_BYTES = 8 << 20
MOST_DIALOGUES = 20
MOST_TURNS = 60
_TEXT_LIMIT = 1500
_SPEAKERS = {"user": "User", "assistant": "Model", "system": "System"}


@dataclass(frozen=True)
class Turn:
    """One message. `calls` are (tool, arguments) of an assistant; a tool's result has the role `tool`."""

    role: str
    speaker: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """A dialogue with its verdict: True, False, or None where nobody judged."""

    kind: str
    right: bool | None
    reason: str
    tools: tuple[str, ...]
    turns: tuple[Turn, ...] = field(default=())


def read_examples(path: Path, notes: list[str]) -> list[Dialogue]:
    """The dialogues of a run folder's `examples.json`; none where there is no such file. What is not of the expected
    form is left out, and a file that cannot be read is named in `notes`."""
    try:
        with open(path, "rb") as file:
            listed = json.loads(file.read(EXAMPLES_BYTES).decode("utf-8", "replace"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        notes.append("examples.json cannot be read: no dialogues are shown.")
        return []
    dialogues = [_dialogue(item) for item in listed[:MOST_DIALOGUES]] if isinstance(listed, list) else []
    return [dialogue for dialogue in dialogues if dialogue.turns]


def _dialogue(item: Any) -> Dialogue:
    item = item if isinstance(item, dict) else {}
    messages = item.get("messages") if isinstance(item.get("messages"), list) else []
    tools = item.get("tools") if isinstance(item.get("tools"), list) else []
    right = item.get("right")
    return Dialogue(_short(item.get("kind")), right if isinstance(right, bool) else None, _short(item.get("reason")),
                    tuple(_short(tool) for tool in tools[:20]),
                    tuple(_turn(message) for message in messages[:MOST_TURNS] if isinstance(message, dict)))


def _turn(message: dict[str, Any]) -> Turn:
    role = _short(message.get("role"))
    name = _short(message.get("name"))
    calls = []
    for call in message.get("tool_calls") if isinstance(message.get("tool_calls"), list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            calls.append((_short(function.get("name")), _short(function.get("arguments"))))
    speaker = name or "tool" if role == "tool" else _SPEAKERS.get(role, role)
    return Turn(role if role in (*_SPEAKERS, "tool") else "system", speaker, _short(message.get("content")),
                tuple(calls[:20]))


def _short(value: Any) -> str:
    return cut(value, _TEXT_LIMIT)[0] if isinstance(value, str) else ""
