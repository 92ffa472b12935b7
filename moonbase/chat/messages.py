"""OpenAI chat messages: what is accepted, and the one form that everything behind this door sees.

Tool-call ids are the model's own notation, `functions.NAME:IDX` with one counter over the whole dialogue. Ids of
another make (`call_abc123`, `search:0`) would teach the model a wrong notation from its own history, so they are
rewritten, and tool results follow the call that they answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moonbase.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

# Nine digits: nobody makes a billion calls, and an integer of any length would cost time.
_OWN_ID = re.compile(r"functions\.(.+):([0-9]{1,9})", re.DOTALL)


def call_id(name: str, index: int) -> str:
    """The id of call number `index` (from 0, over the whole dialogue) to the function `name`."""
    return f"functions.{name}:{index}"


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the renderer takes them; normalising twice changes nothing.

    Content becomes one string (parts of a list are joined, None is ""), `arguments` a JSON text, the role `developer`
    its older name `system`; fields that are empty or that no prompt shows are left out. An id that already is
    `functions.NAME:IDX` stays where it names its function and counts on; any other takes the next free number. A tool
    result may come any time after its call; where an id was used twice it answers the last such call that is open.
    Raises UserError naming `messages[i].field` and what is allowed there.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages: expected a list, found {_kind(messages)}")
    calls = _Calls()
    return [_message(f"messages[{i}]", message, calls) for i, message in enumerate(messages)]


def next_call_index(messages: Sequence[Mapping[str, Any]]) -> int:
    """The number that the dialogue's next tool call gets. Raises UserError like `normalise_messages`."""
    last = -1
    for message in normalise_messages(messages):
        for call in message.get("tool_calls", ()):
            last = int(call["id"].rpartition(":")[2])
    return last + 1


class _Calls:
    """The calls of a dialogue so far: foreign id to own ids, and which of them are still without a result."""

    def __init__(self) -> None:
        self.next_index = 0
        self.open: dict[str, list[str]] = {}
        self.last: dict[str, str] = {}

    def add(self, given: str, name: str) -> str:
        own = _OWN_ID.fullmatch(given)
        index = self.next_index
        if own and own[1] == name:
            index = max(index, int(own[2]))
        self.next_index = index + 1
        self.last[given] = call_id(name, index)
        self.open.setdefault(given, []).append(self.last[given])
        return self.last[given]

    def answer(self, where: str, given: str) -> str:
        if given not in self.last:
            known = ", ".join(repr(id) for id in list(self.last)[-4:])
            raise UserError(f"{where}.tool_call_id: {given!r} answers no earlier tool call "
                            f"({'the last ones are ' + known if known else 'there is none'})")
        waiting = self.open[given]
        return waiting.pop() if waiting else self.last[given]


def _message(where: str, message: Any, calls: _Calls) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object with role and content, found {_kind(message)}")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        found = "nothing" if role is None else repr(role) if isinstance(role, str) else _kind(role)
        raise UserError(f"{where}.role: expected one of {', '.join(ROLES)}, found {found}")
    if message.get("function_call") is not None:
        raise UserError(f"{where}.function_call: this older form is not supported; use tool_calls")
    result: dict[str, Any] = {"role": role, "content": _content(where, role, message)}
    name = _text(where, message, "name")
    if name:
        result["name"] = name
    if role == "assistant":
        reasoning = _text(where, message, "reasoning_content")
        if reasoning:
            result["reasoning_content"] = reasoning
        tool_calls = _tool_calls(where, message, calls)
        if tool_calls:
            result["tool_calls"] = tool_calls
    elif message.get("tool_calls"):
        raise UserError(f"{where}.tool_calls: only an assistant calls tools, this is a {role} message")
    if role == "tool":
        given = _text(where, message, "tool_call_id")
        if not given:
            raise UserError(f"{where}.tool_call_id: a tool message needs the id of the call that it answers")
        result["tool_call_id"] = calls.answer(where, given)
    return result


def _content(where: str, role: str, message: Mapping[str, Any]) -> str:
    if "content" not in message and role != "assistant":
        raise UserError(f"{where}.content: a {role} message needs one: a string or a list of text parts")
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise UserError(f"{where}.content: expected a string, a list of text parts or null, found {_kind(content)}")
    texts = []
    for j, part in enumerate(content):
        place = f"{where}.content[{j}]"
        if not isinstance(part, Mapping):
            raise UserError(f'{place}: expected {{"type": "text", "text": "..."}}, found {_kind(part)}')
        kind = part.get("type")
        if kind != "text":
            found = "nothing" if kind is None else repr(kind) if isinstance(kind, str) else _kind(kind)
            raise UserError(f'{place}.type: expected "text", found {found}')
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}.text: expected a string, found {_kind(part.get('text'))}")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(where: str, message: Mapping[str, Any], calls: _Calls) -> list[dict[str, Any]]:
    given = message.get("tool_calls")
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        raise UserError(f"{where}.tool_calls: expected a list, found {_kind(given)}")
    result, seen = [], set()
    for j, call in enumerate(given):
        place = f"{where}.tool_calls[{j}]"
        if not isinstance(call, Mapping):
            raise UserError(f"{place}: expected an object with id, type and function, found {_kind(call)}")
        if call.get("type", "function") != "function":
            raise UserError(f'{place}.type: expected "function", found {call["type"]!r}')
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise UserError(f"{place}.function: expected an object with name and arguments, found {_kind(function)}")
        name = _text(f"{place}.function", function, "name")
        if not name or not name.strip():
            raise UserError(f"{place}.function.name: a call needs the name of its function")
        arguments = _arguments(place, function.get("arguments"))
        id = _text(place, call, "id")
        if not id:
            raise UserError(f"{place}.id: a call needs an id, its result refers to it")
        if id in seen:
            raise UserError(f"{place}.id: {id!r} is used twice in this message")
        seen.add(id)
        result.append({
            "id": calls.add(id, name), "type": "function", "function": {"name": name, "arguments": arguments},
        })
    return result


def _arguments(place: str, arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    if not isinstance(arguments, Mapping):
        raise UserError(f"{place}.function.arguments: expected a string of JSON or an object, found {_kind(arguments)}")
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}.function.arguments: has no JSON form: {error}") from None


def _text(where: str, message: Mapping[str, Any], field: str) -> str | None:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}.{field}: expected a string, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """A value's type in JSON's words: what the one who sent it knows."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", tuple: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
