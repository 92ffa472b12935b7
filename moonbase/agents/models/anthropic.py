"""Any endpoint of Anthropic's API: /v1/messages, spoken to over httpx.

Messages here are OpenAI's; theirs are turns of blocks. Thinking blocks with their signatures must come back as they
were, so a reply carries them in a key of its own, `thinking_blocks`, beside the `reasoning_content` that people read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from moonbase.agents.models.base import CallOptions, Completion, Message, ModelError, Price, Usage
from moonbase.agents.models.endpoint import (
    Endpoint,
    EndpointModel,
    as_arguments,
    as_count,
    as_dict,
    as_list,
    as_text,
    is_object,
)

VERSION = "2023-06-01"
THINKING_KEY = "thinking_blocks"
OPTIONAL = ("top_p", "temperature", "cache_control")
"""Fields of a request without which a reply is still one. Some models take one of the first two, not both."""
_FOREIGN = re.compile(r"[^a-zA-Z0-9_-]")
_STOP_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "tool_use": "tool_calls",
                 "max_tokens": "length", "model_context_window_exceeded": "length"}  # fmt: skip


class AnthropicModel(EndpointModel):
    """A model behind an Anthropic-compatible URL."""

    path = "/v1/messages"

    def __init__(
        self, name: str, url: str = "https://api.anthropic.com", *, api_key: str | None = None, price: Price = Price(),
        context_tokens: int | None = None, extra: Mapping[str, Any] = {},
    ) -> None:
        """`url`: with or without its `/v1`. `extra`: more fields of every request, such as
        `{"thinking": {"type": "enabled", "budget_tokens": 8000}}`. Raises UserError for an address or a key that cannot
        be one."""
        headers = {"anthropic-version": VERSION} | ({"x-api-key": api_key} if api_key else {})
        super().__init__(name, Endpoint(url.rstrip("/").removesuffix("/v1"), headers), price, context_tokens)
        self.extra = dict(extra)

    def _body(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> dict[str, Any]:
        system, turns = turns_of(messages)
        body: dict[str, Any] = {"model": self.name, "max_tokens": options.max_tokens, "stream": True,
                                "messages": turns}
        # Theirs ends at 1; above they would refuse it.
        body["temperature"] = min(options.temperature, 1.0)
        if options.top_p < 1:
            body["top_p"] = options.top_p
        thinking = as_dict(self.extra.get("thinking")).get("type", "disabled")
        if thinking != "disabled":
            # Thinking has a temperature of its own.
            del body["temperature"]
        choice = options.tool_choice
        declared = [_declared(tool) for tool in tools]
        if not declared and (called := _called(turns)):
            # A history with calls is refused without tools; these are not to be called.
            declared, choice = [{"name": name, "input_schema": {"type": "object"}} for name in called], "none"
        if declared:
            kinds = {"auto": "auto", "none": "none", "required": "any"}
            body["tools"] = declared
            body["tool_choice"] = {"type": kinds[choice]} if choice in kinds else {"type": "tool", "name": choice}
        marks = "cache_control" not in self.endpoint.refused
        if system:
            body["system"] = [_marked({"type": "text", "text": system}, marks)]
        if turns and turns[-1]["role"] == "user":
            # Everything up to here is asked for again in the next step.
            turns[-1]["content"][-1] = _marked(turns[-1]["content"][-1], marks)
        body |= self.extra
        return {name: value for name, value in body.items() if name not in self.endpoint.refused}

    def _answer(self) -> _Answer:
        return _Answer()

    def _optional(self, error: ModelError, body: Mapping[str, Any]) -> list[str]:
        return [name for name in OPTIONAL if name in body or name == "cache_control"]

    def _read(self, answer: _Answer) -> Completion:
        return read_message(answer.whole(), self.name)


def turns_of(messages: list[Message]) -> tuple[str, list[dict[str, Any]]]:
    """The system's text, and the dialogue as alternating turns of blocks.

    What follows one another on the user's side is one turn, the results of tools before all else. A system message
    amid the dialogue is said by the user: this API has no place for it.
    """
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] in ("system", "developer") and not turns:
            system.append(as_text(message.get("content")))
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        blocks = _assistant_blocks(message) if role == "assistant" else _user_blocks(message)
        if not blocks:
            continue
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        content = turns[-1]["content"]
        if message["role"] == "tool":
            place = next((i for i, block in enumerate(content) if block["type"] != "tool_result"), len(content))
            content[place:place] = blocks
        else:
            content += blocks
    return "\n\n".join(filter(None, system)), turns


def _assistant_blocks(message: Message) -> list[dict[str, Any]]:
    """Reasoning without a signature is left out: nothing could be checked by it."""
    blocks = [dict(block) for block in as_list(message.get(THINKING_KEY)) if isinstance(block, dict)]
    blocks += _text_blocks(message.get("content"))
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        # An input is an object; a model that wrote something else sees what it wrote.
        value = json.loads(arguments or "{}") if is_object(arguments or "{}") else {"arguments": arguments}
        blocks.append({"type": "tool_use", "id": _own_id(call["id"]), "name": call["function"]["name"],
                       "input": value})
    return blocks


def _user_blocks(message: Message) -> list[dict[str, Any]]:
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": _own_id(message["tool_call_id"])}
        text = as_text(message.get("content"))
        return [result | ({"content": text} if text.strip() else {})]
    return _text_blocks(message.get("content"))


def _text_blocks(content: Any) -> list[dict[str, Any]]:
    """Text as blocks; one of white space alone would be refused. Blocks of other kinds stay as they are."""
    if isinstance(content, list):
        blocks = [part if isinstance(part, dict) else {"type": "text", "text": as_text(part)} for part in content]
    else:
        blocks = [{"type": "text", "text": as_text(content)}]
    return [dict(block) for block in blocks if block.get("type") != "text" or as_text(block.get("text")).strip()]


def _own_id(id: str) -> str:
    """An id as this API spells them: Kimi's `functions.search:0` has signs that it refuses."""
    return _FOREIGN.sub("_", id)


def _called(turns: list[dict[str, Any]]) -> list[str]:
    """Names of the tools that a history calls."""
    names = [block["name"] for turn in turns for block in turn["content"] if block["type"] == "tool_use"]
    return list(dict.fromkeys(names))


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    declared = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    return declared | ({"description": function["description"]} if function.get("description") else {})


def _marked(block: dict[str, Any], marks: bool) -> dict[str, Any]:
    """A block up to which the prompt is worth keeping in the endpoint's cache."""
    return block | {"cache_control": {"type": "ephemeral"}} if marks else block


# --- replies ----------------------------------------------------------------------------------------------------------


class _Answer:
    """The events of an answer, put together to what it would be in one piece."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}
        self.blocks: dict[Any, dict[str, Any]] = {}
        self.inputs: dict[Any, list[str]] = {}
        self.streamed = self.stopped = False

    def take(self, event: dict[str, Any]) -> None:
        """The next event."""
        kind, index = event.get("type"), event.get("index")
        if not isinstance(index, int):
            index = None
        if kind == "message":
            self.body = event
        elif kind == "message_start":
            self.streamed, self.body = True, dict(as_dict(event.get("message")))
        elif kind == "content_block_start":
            self.blocks[index] = dict(as_dict(event.get("content_block")))
        elif kind == "content_block_delta":
            self._extend(index, as_dict(event.get("delta")))
        elif kind == "message_delta":
            self.body["stop_reason"] = as_dict(event.get("delta")).get("stop_reason")
            # The counts of the end replace those of the beginning, and some endpoints only then know the prompt's.
            known = {name: value for name, value in as_dict(event.get("usage")).items() if value is not None}
            self.body["usage"] = as_dict(self.body.get("usage")) | known
        elif kind == "message_stop":
            self.stopped = True

    def _extend(self, index: int | None, delta: dict[str, Any]) -> None:
        block = self.blocks.setdefault(index, {})
        kinds = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
        kind = delta.get("type")
        if kind == "input_json_delta":
            self.inputs.setdefault(index, []).append(as_text(delta.get("partial_json")))
        elif isinstance(kind, str) and kind in kinds:
            # Joined at the end.
            name = kinds[kind]
            block.setdefault("type", "text" if name == "text" else "thinking")
            block.setdefault("pieces", {}).setdefault(name, []).append(as_text(delta.get(name)))

    def whole(self) -> dict[str, Any]:
        """The answer in one piece. Raises ModelError for a stream that broke off."""
        if not self.streamed:
            return self.body
        if not self.stopped and not self.body.get("stop_reason"):
            raise ModelError("connection", "the endpoint closed the connection in the middle of the answer")
        content = []
        for index, block in self.blocks.items():
            for name, pieces in block.pop("pieces", {}).items():
                block[name] = as_text(block.get(name)) + "".join(pieces)
            if block.get("type") == "tool_use":
                block["input"] = "".join(self.inputs.get(index, ()))
            content.append(block)
        return self.body | {"content": content}


def read_message(body: dict[str, Any], name: str) -> Completion:
    """A whole message as every model here gives a reply. Raises ModelError for one that has none."""
    content = body.get("content")
    if not isinstance(content, list):
        raise ModelError("server", f"{name}: the answer has no content")
    stop = body.get("stop_reason")
    if stop == "refusal":
        raise ModelError("refused", f"{name}: the model refuses")
    notes: list[str] = []
    reason = _STOP_REASONS.get(stop, "stop") if isinstance(stop, str) else "stop"
    texts, thinking, calls = [], [], []
    for block in map(as_dict, content):
        kind = block.get("type")
        if kind == "text":
            texts.append(as_text(block.get("text")))
        elif kind in ("thinking", "redacted_thinking"):
            thinking.append(block)
        elif kind == "tool_use":
            calls += _call(block, len(calls), notes, cut=reason == "length")
        else:
            notes.append(f"a block of type {str(kind)[:40]!r} was left out")
    message: Message = {"role": "assistant", "content": "".join(texts)}
    reasoning = "".join(as_text(block.get("thinking")) for block in thinking)
    if reasoning:
        message["reasoning_content"] = reasoning
    if thinking:
        message[THINKING_KEY] = thinking
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    if reason != "length":
        reason = "tool_calls" if calls else "stop"
    model = body.get("model")
    return Completion(message, reason, _usage(body.get("usage")), model if isinstance(model, str) else name,
                      notes=notes)


def _call(block: dict[str, Any], number: int, notes: list[str], cut: bool) -> list[dict[str, Any]]:
    """The call of a block, or none where it is not whole. Its input is an object, or text where it was streamed."""
    called, id, given = as_text(block.get("name")).strip(), block.get("id"), block.get("input")
    if not called or (cut and not isinstance(given, dict) and not is_object(as_text(given))):
        notes.append(f"the call of {called} was cut off" if called else "a call without the name of a tool was left "
                     "out")
        return []
    id = id if isinstance(id, str) and id else f"call_{number}"
    return [{"id": id, "type": "function", "function": {"name": called, "arguments": as_arguments(given)}}]


def _usage(value: Any) -> Usage:
    """Theirs counts apart what was read from the cache and what was written to it; here both are input."""
    usage = as_dict(value)
    cached = as_count(usage.get("cache_read_input_tokens"))
    fresh = as_count(usage.get("input_tokens")) + as_count(usage.get("cache_creation_input_tokens"))
    return Usage(fresh + cached, as_count(usage.get("output_tokens")), cached)
