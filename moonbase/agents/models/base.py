"""What the agent loop needs of a chat model, whatever stands behind it.

Messages and tools are the dicts of the OpenAI chat API everywhere in this room.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = dict[str, Any]

RETRYABLE = frozenset({"rate_limit", "overloaded", "timeout", "server", "connection"})
KINDS = RETRYABLE | {"context_length", "auth", "bad_request", "refused"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or many calls."""

    input_tokens: int = 0
    """The cached ones included."""
    output_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens,
                     self.cached_tokens + other.cached_tokens)


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None
    """None: cached tokens cost what others cost."""

    def of(self, usage: Usage) -> float:
        """Dollars."""
        cached_price = self.input if self.cached is None else self.cached
        fresh = usage.input_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached_price + usage.output_tokens * self.output) / 1e6


@dataclass(frozen=True)
class CallOptions:
    """How a call samples."""

    max_tokens: int = 4096
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    tool_choice: str = "auto"
    """auto, none, required, or a tool's name."""
    timeout: float = 600.0
    """Seconds without a sign of the reply after which an attempt is given up; one that goes on may take longer."""


@dataclass
class Completion:
    """One reply."""

    message: Message
    """role assistant; content, and where there are any, reasoning_content and tool_calls."""
    finish_reason: str
    """stop, tool_calls or length."""
    usage: Usage
    model: str
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None
    """All that was sampled, the end token included where one was drawn (`usage` does not count it)."""
    logprobs: list[float] | None = None
    """Of `token_ids`, where the model tells; these were sampled, the prompt was not."""
    notes: list[str] = field(default_factory=list)
    """What was odd about the reply's text."""
    attempts: int = 1
    """How often the call was tried."""
    waited: float = 0.0
    """Seconds from the call to the beginning of its last attempt: in a queue, in attempts that failed, between them."""


class ModelError(Exception):
    """A call that gave no reply."""

    def __init__(self, kind: str, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        """`kind`: one of KINDS; `retry_after`: seconds, where the other side named them."""
        assert kind in KINDS, kind
        super().__init__(message)
        self.kind, self.status, self.retry_after = kind, status, retry_after
        self.attempts, self.waited = 1, 0.0
        """As of a `Completion`."""

    @property
    def retryable(self) -> bool:
        """Whether the same call may go through later."""
        return self.kind in RETRYABLE


class ChatModel(Protocol):
    """Anything that answers chats."""

    name: str
    price: Price
    context_tokens: int | None
    """Tokens that prompt and reply may have together; None where it is not known."""

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """One reply. Raises ModelError."""
        ...

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """Tokens of a prompt: exact, or an estimate. Fast."""
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...


def count_text(text: str) -> int:
    """Tokens of a text by the rule of thumb of four bytes each, where nobody knows better."""
    return -(-(len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))) // 4)


def estimate_tokens(messages: list[Message], tools: list[dict[str, Any]]) -> int:
    """Tokens of a prompt by the same rule, four more for each message."""
    total = count_text(json.dumps(tools)) if tools else 0
    return total + sum(estimate_message(message) for message in messages)


def estimate_message(message: Message) -> int:
    """Tokens of one message by the rule of thumb."""
    count = 4 + count_text(text_of(message)) + count_text(message.get("reasoning_content") or "")
    for call in message.get("tool_calls") or ():
        count += 4 + count_text(call["function"]["name"]) + count_text(call["function"]["arguments"])
    return count


def text_of(message: Message) -> str:
    """What a message says, be it a text or parts."""
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content


def tidied(message: Any) -> Message:
    """A reply in the form that all messages have here, whatever a model or an endpoint made of it: texts are texts,
    and every call has a name, arguments as text, and an id that no other call of the reply has."""
    message = message if isinstance(message, dict) else {"content": message}
    content, calls = message.get("content"), message.get("tool_calls")
    tidy = {**message, "role": "assistant",
            "content": content if content is None or isinstance(content, (str, list)) else _as_text(content)}
    if not isinstance(message.get("reasoning_content") or "", str):
        tidy["reasoning_content"] = _as_text(message["reasoning_content"])
    tidy.pop("tool_calls", None)
    ids: set[str] = set()
    calls = [_tidied_call(call, number, ids) for number, call in enumerate(calls if isinstance(calls, list) else ())]
    return tidy | {"tool_calls": calls} if calls else tidy


def _tidied_call(call: Any, number: int, ids: set[str]) -> dict[str, Any]:
    call = call if isinstance(call, dict) else {}
    function = call.get("function") if isinstance(call.get("function"), dict) else {}
    name, arguments, id = function.get("name"), function.get("arguments"), call.get("id")
    id = id if isinstance(id, str) and id else f"call_{number}"
    while id in ids:
        id += "_"
    ids.add(id)
    return {**call, "id": id, "type": "function", "function": {
        **function, "name": name if isinstance(name, str) else "",
        "arguments": arguments if isinstance(arguments, str) else "" if arguments is None else _as_text(arguments)}}


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
