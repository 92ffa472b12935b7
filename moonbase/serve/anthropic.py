"""The Anthropic surface: POST /v1/messages and /v1/messages/count_tokens, also under /anthropic/v1.

Thinking is on where the request asks for it, as this surface has it. Signatures of thinking blocks are a checksum for
the client to carry along; nothing trusts them. A tool call that the token limit cut off is no `tool_use` block of a
whole reply; in a stream its block has begun by then, and the stop reason says `max_tokens`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
)
from moonbase.engine.turn import Turn
from moonbase.serve.anthropic_types import CountRequest, MessagesRequest
from moonbase.serve.backend import Backend, Prepared, Wish
from moonbase.serve.body import parse_json, validate
from moonbase.serve.errors import RequestError, error_body
from moonbase.serve.streaming import Reply, event

RENAMES = (
    (r"^(tools\[\d+\])\.function\.parameters", r"\1.input_schema"),
    (r"^(tools\[\d+\])\.function", r"\1"), (r"^(messages\[\d+\])\.tool_call_id", r"\1.tool_use_id"),
)  # fmt: skip
"""What the dialogue calls by OpenAI's names, in error messages."""

K2_TEMPERATURE = 0.6
"""On this surface K2 is asked for a share of the usual range: its own API multiplies likewise."""


async def messages(backend: Backend, body: bytes, record: Any, deadline: float) -> Reply:
    """One request of /v1/messages. Raises RequestError."""

    def read() -> tuple[MessagesRequest, Prepared]:
        request = validate(MessagesRequest, parse_json(body))
        backend.check_model(request.model)
        return request, backend.prepare(_wish(request, backend.style))

    request, prepared = await backend.read(body, read)
    record.prompt_tokens, record.notes = prepared.prompt_tokens, prepared.notes
    return Reply(backend, prepared.jobs, MessagesAnswer(backend, request, prepared), record, deadline)


async def count_tokens(backend: Backend, body: bytes, record: Any) -> dict[str, int]:
    """The tokens that the same request would have as a prompt, exactly. Raises RequestError."""

    def read() -> int:
        request = validate(CountRequest, parse_json(body))
        backend.check_model(request.model)
        wish = _prompt_wish(request)
        prompt, _ = backend.encode(wish)
        # Not counted, but what could not be asked of the model is refused here already.
        backend.constraint(wish, prompt)
        return len(prompt.ids)

    record.prompt_tokens = await backend.read(body, read)
    return {"input_tokens": record.prompt_tokens}


def models(backend: Backend, started: float) -> dict[str, Any]:
    """The list of models as this surface has it."""
    entries = [model(backend, name, started) for name in backend.names]
    return {"data": entries, "has_more": False, "first_id": entries[0]["id"], "last_id": entries[-1]["id"]}


def model(backend: Backend, name: str, started: float) -> dict[str, Any]:
    """One entry of the list. Raises RequestError 404."""
    backend.check_model(name)
    created = datetime.fromtimestamp(int(started), UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": name, "display_name": name, "created_at": created, "lifecycle": "active",
            "max_input_tokens": backend.context_length, "max_tokens": backend.context_length}


def _prompt_wish(request: CountRequest) -> Wish:
    last = request.messages[-1]
    if last.role == "assistant" and any(block.type == "tool_use" for block in last.blocks):
        raise RequestError(400, f"messages[{len(request.messages) - 1}]: tool_use blocks must be followed by a user's "
                           "message with their tool_result blocks", "messages", "invalid_value")
    choice = request.tool_choice
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    form, place = request.form
    messages, places = request.plain_messages()
    return Wish(
        messages=messages,
        places=places,
        renames=(("^schema", f"{place}.schema"), *RENAMES),
        tools=[tool.plain() for tool in request.tools or ()],
        tool_choice="auto" if choice is None else f":{choice.name}" if choice.type == "tool" else kinds[choice.type],
        parallel=choice is None or not choice.disable_parallel_tool_use,
        thinking=request.wants_thinking,
        schema=form.schema_ if form is not None else None,
        json_only=form is not None,
        continues=last.role == "assistant",
    )


def _wish(request: MessagesRequest, style: str) -> Wish:
    wish = _prompt_wish(request)
    names = ("top_p", "top_k")
    sampling: dict[str, Any] = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.temperature is not None:
        sampling["temperature"] = request.temperature * (K2_TEMPERATURE if style == "kimi-k2" else 1.0)
    if request.stop_sequences:
        sampling["stop"] = tuple(request.stop_sequences)
    return wish.with_sampling(max_tokens=request.max_tokens, clamp=True, sampling=sampling)


def signature(thinking: str) -> str:
    """What a thinking block carries as its signature."""
    return base64.b64encode(hashlib.sha256(thinking.encode("utf-8", "replace")).digest()).decode()


class MessagesAnswer:
    """A message, whole or as its stream of events."""

    def __init__(self, backend: Backend, request: MessagesRequest, prepared: Prepared) -> None:
        self.backend, self.request, self.prepared = backend, request, prepared
        self.turns = prepared.turns()
        self.stream = bool(request.stream)
        self.id = f"msg_{secrets.token_hex(12)}"
        # Of the stream: what the open block is, and how many there were.
        self.open: str | None = None
        self.index = -1

    @property
    def turn(self) -> Turn:
        return self.turns[0]

    def cached_tokens(self) -> int:
        return min(self.turn.cached_tokens, self.prepared.prompt_tokens)

    def usage(self) -> dict[str, Any]:
        cached = self.cached_tokens()
        return {"input_tokens": self.prepared.prompt_tokens - cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached, "output_tokens": self.turn.completion_tokens,
                "output_tokens_details": {"thinking_tokens": self.turn.reasoning_tokens}}

    def ending(self) -> dict[str, Any]:
        """Why the message ended."""
        if self.turn.ended is None:
            return {"stop_reason": None, "stop_sequence": None}
        reason = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}[self.turn.finish_reason]
        if reason == "max_tokens" and self.prepared.clamped:
            reason = "model_context_window_exceeded"
        met = self.turn.stop_reason if reason == "end_turn" else None
        if isinstance(met, int):
            # A special token ended it: a stop sequence where the client gave its name as one.
            name = self.backend.special_name(met)
            met = name if name in (self.request.stop_sequences or ()) else None
        return {"stop_reason": "stop_sequence" if met is not None else reason, "stop_sequence": met}

    def body(self) -> dict[str, Any]:
        turn = self.turn
        content: list[dict[str, Any]] = []
        if turn.reasoning:
            content.append({"type": "thinking", "thinking": turn.reasoning, "signature": signature(turn.reasoning)})
        if turn.content:
            content.append({"type": "text", "text": turn.content})
        content += [{"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
                    for call in turn.tool_calls]
        return self._message(content)

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.request.model,
                "content": content, **self.ending(), "usage": self.usage()}

    # --- the stream ---------------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[bytes]:
        yield _event("message_start", message=self._message([]))
        yield self.ping()

    def ping(self) -> bytes:
        return _event("ping")

    def deltas(self, number: int, piece: Any, events: list[Any]) -> Iterator[bytes]:
        for happened in events:
            match happened:
                case ReasoningDelta():
                    yield from self._begin_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                    yield self._delta(type="thinking_delta", thinking=happened.text)
                case ContentDelta() | ToolCallAborted():
                    yield from self._begin_block("text", {"type": "text", "text": ""})
                    yield self._delta(type="text_delta", text=happened.text)
                case ToolCallStart():
                    yield from self._end_block()
                    block = {"type": "tool_use", "id": happened.id, "name": happened.name, "input": {}}
                    yield from self._begin_block("tool_use", block)
                case ArgumentsDelta():
                    yield self._delta(type="input_json_delta", partial_json=happened.text)
                case ToolCallEnd():
                    yield from self._end_block()

    def _begin_block(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        if self.open != kind:
            yield from self._end_block()
            self.open, self.index = kind, self.index + 1
            yield _event("content_block_start", index=self.index, content_block=block)

    def _end_block(self) -> Iterator[bytes]:
        if self.open == "thinking":
            yield self._delta(type="signature_delta", signature=signature(self.turn.reasoning))
        if self.open is not None:
            yield _event("content_block_stop", index=self.index)
        self.open = None

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self.index, delta=delta)

    def end(self) -> Iterator[bytes]:
        yield from self._end_block()
        yield _event("message_delta", delta=self.ending(), usage=self.usage())
        yield _event("message_stop")

    def failure(self, error: RequestError, request_id: str) -> Iterator[bytes]:
        yield event(error_body(error, "anthropic", request_id), "error")


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
