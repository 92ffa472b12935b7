"""Requests of the Anthropic surface as pydantic models, and what they mean in the chat's own messages.

A user turn of theirs may hold tool results beside text; in the dialogue results are messages of their own and come
first. Thinking blocks are the assistant's reasoning; their signatures are ours and are not looked at.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moonbase.serve.errors import RequestError
from moonbase.serve.openai_types import MOST_STOPS, MOST_TOOLS, ModelName, Strict

UNSUPPORTED = ("mcp_servers", "container", "context_management", "compaction", "fallbacks")
"""Fields that would change the answer; refused where they ask for something."""


class Block(Strict):
    """A content block of any supported type; which fields it must have depends on `type`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            return value
        needed = {"text": ("text",), "thinking": ("thinking",), "redacted_thinking": (),
                  "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}  # fmt: skip
        kind = value["type"]
        if kind not in needed:
            raise ValueError(f"a block of type {kind[:40]!r} is unsupported; this model reads text")
        missing = [name for name in needed[kind] if value.get(name) is None]
        if missing:
            raise ValueError(f"a block of type {kind!r} needs the field {missing[0]}")
        # Fields of other block types (documents, search results) would be checked for nothing.
        kept = {"text": ("text",), "tool_result": ("tool_use_id", "content", "is_error")}.get(kind, needed[kind])
        return {"type": kind} | {name: value[name] for name in kept if name in value}


class Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: list[Block] | str

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        allowed = {"user": ("text", "tool_result"), "system": ("text",),
                   "assistant": ("text", "thinking", "redacted_thinking", "tool_use")}[self.role]  # fmt: skip
        for number, block in enumerate(self.blocks):
            if block.type not in allowed:
                raise ValueError(f"content[{number}]: a block of type {block.type!r} does not belong into a message "
                                 f"of role {self.role}")
            inner = block.content if isinstance(block.content, list) else []
            if any(part.type != "text" for part in inner):
                raise ValueError(f"content[{number}].content: a tool result holds text")
        return self

    @property
    def blocks(self) -> list[Block]:
        return [Block(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Tool(Strict):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    """Refuse a schema that cannot be enforced to the letter, instead of leaving keywords out with a note."""

    @model_validator(mode="before")
    @classmethod
    def _is_custom(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") not in (None, "custom"):
            raise ValueError(f"type {str(value['type'])[:40]!r} is unsupported; there are tools of one's own only")
        return value

    def plain(self) -> dict[str, Any]:
        """As `moonbase.chat` takes it: an OpenAI tool."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function | {"parameters": self.input_schema}}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_name(self) -> ToolChoice:
        if self.type == "tool" and not self.name:
            raise ValueError("name is required with type tool")
        return self


class Thinking(Strict):
    """Whether to reason. `budget_tokens` is ignored: how long the model reasons is its own affair, within
    `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """What the answer must be. `effort` is ignored: these models have no such dial."""

    format: OutputFormat | None = None


class CountRequest(Strict):
    """What a prompt is made of; counting its tokens needs nothing else."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1)]
    system: list[Block] | str | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of `output_config.format`, which counts where both are given."""

    @field_validator("system")
    @classmethod
    def _is_text(cls, value: list[Block] | str | None) -> list[Block] | str | None:
        if isinstance(value, list) and any(block.type != "text" for block in value):
            raise ValueError("only blocks of type text")
        return value

    @model_validator(mode="before")
    @classmethod
    def _is_supported(cls, value: Any) -> Any:
        for name in UNSUPPORTED:
            # `{"edits": []}`, and the like, ask for nothing.
            asked = value.get(name) if isinstance(value, dict) else None
            if any(asked.values()) if isinstance(asked, dict) else asked:
                raise ValueError(f"{name} is unsupported")
        return value

    @property
    def form(self) -> tuple[OutputFormat | None, str]:
        """What the answer must be, and where the request says so."""
        if self.output_config is not None and self.output_config.format is not None:
            return self.output_config.format, "output_config.format"
        return self.output_format, "output_format"

    @property
    def wants_thinking(self) -> bool:
        """As this surface has it: only where it is asked for."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def plain_messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The dialogue as `moonbase.chat` takes it, and where each of its messages comes from."""
        messages, places = [], []
        if self.system:
            blocks = [Block(type="text", text=self.system)] if isinstance(self.system, str) else self.system
            messages, places = [{"role": "system", "content": _joined(blocks)}], ["system"]
        for number, message in enumerate(self.messages):
            place = f"messages[{number}]"
            added = [_assistant(message.blocks)] if message.role == "assistant" else _others(message, place)
            messages += added
            places += [place] * len(added)
        return messages, places


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]],
                              Field(max_length=MOST_STOPS)] | None = None


def _joined(blocks: list[Block]) -> str:
    return "".join(block.text or "" for block in blocks if block.type == "text")


def _assistant(blocks: list[Block]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _joined(blocks)}
    reasoning = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [
        {"id": block.id, "type": "function",
         "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}}
        for block in blocks if block.type == "tool_use"
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _others(message: Message, place: str) -> list[dict[str, Any]]:
    """A user's or system's turn: the results of tools first, each a message of its own, then the text."""
    messages: list[dict[str, Any]] = []
    for block in message.blocks:
        if block.type == "tool_result":
            content = block.content if isinstance(block.content, str) else _joined(block.content or [])
            # The dialogue has no other mark for a call that failed.
            text = f"Error: {content}" if block.is_error and not content.startswith("Error") else content
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    texts = [block for block in message.blocks if block.type == "text"]
    if texts:
        messages.append({"role": message.role, "content": _joined(texts)})
    if not messages:
        raise RequestError(400, f"{place}.content: there is nothing in it", f"{place}.content", "invalid_value")
    return messages
