"""Replies of scripted models, and what they were shown."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

from moonbase.agents.models.base import CallOptions, Completion, ModelError, Price, Usage, estimate_tokens

_numbers = itertools.count()


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A tool call with an id of its own."""
    return {"id": f"call:{next(_numbers)}", "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}


def asks(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def says(text: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Script:
    """Says its lines one after the other, the last for ever, and keeps what it was shown. A line is a message, a
    ModelError, (message, finish reason, usage), or a function of the messages that returns one of these."""

    name = "script"

    def __init__(self, *lines: Any, price: Price = Price(), context_tokens: int | None = None) -> None:
        self.lines, self.price, self.context_tokens = list(lines), price, context_tokens
        self.shown: list[list[dict[str, Any]]] = []
        self.tools: list[list[str]] = []
        self.options: list[CallOptions] = []
        self.count: Callable[[Any, Any], int] = estimate_tokens

    def count_tokens(self, messages: Any, tools: Any) -> int:
        return self.count(messages, tools)

    async def complete(self, messages: Any, tools: Any, options: CallOptions) -> Completion:
        self.shown.append(copy.deepcopy(messages))
        self.tools.append([one["function"]["name"] for one in tools])
        self.options.append(options)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        line = line(messages) if callable(line) else line
        if hasattr(line, "__await__"):
            line = await line
        if isinstance(line, BaseException):
            raise line
        message, reason, usage = line if isinstance(line, tuple) else (line, None, None)
        reason = reason or ("tool_calls" if message.get("tool_calls") else "stop")
        usage = usage or Usage(self.count_tokens(messages, tools), 10)
        return Completion(copy.deepcopy(message), reason, usage, self.name)

    async def close(self) -> None:
        pass


def error(kind: str) -> ModelError:
    return ModelError(kind, f"it was {kind}")


def roles(messages: list[dict[str, Any]]) -> str:
    """One letter a message: s, u, a, t."""
    return "".join(message["role"][0] for message in messages)
