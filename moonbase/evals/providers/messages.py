"""Inspect's messages and tools in the form of the OpenAI chat API, which everything here speaks, and replies back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inspect_ai.model import ChatMessage, ChatMessageAssistant, ContentReasoning, ContentText, Logprob, Logprobs
from inspect_ai.model import TopLogprob as InspectTopLogprob
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo

from moonbase.errors import UserError

if TYPE_CHECKING:
    from moonbase.data import Tokenizer
    from moonbase.engine.turn import Call, TokenLogprob, Turn

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As dicts. Raises UserError for what is no text."""
    return [_message(place, message) for place, message in enumerate(messages)]


def to_tools(tools: Sequence[ToolInfo]) -> list[dict[str, Any]]:
    """As dicts; what a tool keeps for the providers of other models is left out."""
    return [{"type": "function", "function": {"name": tool.name, "description": tool.description,
                                              "parameters": tool.parameters.model_dump(exclude_none=True)}}
            for tool in tools]  # fmt: skip


def to_choice(choice: ToolChoice) -> str:
    """auto, none, required, or a tool's name."""
    return CHOICES[choice] if isinstance(choice, str) else choice.name


def from_turn(turn: Turn, model: str) -> ChatMessageAssistant:
    """A reply: reasoning apart, calls apart. A call that is no JSON stays, so that its model is told and can mend it.
    """
    content: str | list[Any] = turn.content
    if turn.reasoning:
        content = [ContentReasoning(reasoning=turn.reasoning), *([ContentText(text=turn.content)] * bool(turn.content))]
    calls = [_call(call) for call in turn.said_calls]
    return ChatMessageAssistant(content=content, tool_calls=calls or None, model=model, source="generate")


def to_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> Logprobs:
    """Of tokens that were drawn. A token's text may be a part of a character: its bytes tell."""
    names = {id: name for name, id in tokenizer.special_tokens.items()}

    def told(id: int) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(id)
        return {"token": names.get(id) or spelled.decode("utf-8", "replace"), "bytes": list(spelled)}

    return Logprobs(content=[
        Logprob(**told(token.id), logprob=token.logprob,
                top_logprobs=[InspectTopLogprob(**told(id), logprob=value) for id, value in token.top] or None)
        for token in tokens])  # fmt: skip


def _message(place: int, message: ChatMessage) -> dict[str, Any]:
    reasoning, text = _texts(place, message)
    result: dict[str, Any] = {"role": message.role, "content": text}
    if message.role == "assistant":
        if reasoning:
            result["reasoning_content"] = reasoning
        if message.tool_calls:
            result["tool_calls"] = [{"id": call.id, "type": "function", "function": {
                "name": call.function, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
                for call in message.tool_calls]  # fmt: skip
    elif message.role == "tool":
        result["tool_call_id"] = message.tool_call_id
        if message.error is not None:
            result["content"] = f"Error: {message.error.message}"
    return result


def _texts(place: int, message: ChatMessage) -> tuple[str, str]:
    """Reasoning and text."""
    if isinstance(message.content, str):
        return "", message.content
    parts: dict[str, list[str]] = {"reasoning": [], "text": []}
    for part in message.content:
        if part.type not in parts:
            raise UserError(f"message {place} ({message.role}) holds content of type {part.type!r}: this engine reads "
                            "text alone; take a task without it, or another model")
        parts[part.type].append(part.reasoning if part.type == "reasoning" else part.text)
    return "".join(parts["reasoning"]), "".join(parts["text"])


def _call(call: Call) -> ToolCall:
    try:
        arguments, problem = json.loads(call.arguments), None
        if not isinstance(arguments, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        arguments, problem = {}, f"the arguments of {call.name} are no JSON object ({error}): {call.arguments}"
    return ToolCall(id=call.id, function=call.name, arguments=arguments, parse_error=problem)
