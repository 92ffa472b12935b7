"""A typed function with a docstring is a tool; a toolset answers calls and never raises.

What a model gets wrong (a name, JSON, a type) and what a tool gets wrong (an exception, too much time or output) comes
back as an observation that says what and how to mend it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import typing
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter, create_model
from pydantic.fields import FieldInfo

OUTPUT_LIMIT = 32_000
"""Characters of a result that a model sees."""


@dataclass(frozen=True)
class ToolResult:
    """What a call answered."""

    content: str
    error: bool = False
    critical_steps: int = 0
    """Of agents that ran inside the call, the longest chain."""
    spent: dict[str, float] | None = None
    """By them, in the names of `agents.budget.Spent`."""


@dataclass
class ToolContext:
    """Who calls. A parameter annotated so is handed in and is not part of the schema."""

    agent: str
    step: int
    call_id: str
    seconds_left: float | None = None


Call = Callable[[dict[str, Any], ToolContext], Awaitable[ToolResult | str]]


@dataclass(frozen=True)
class Tool:
    """Something that a model can call. `parameters`: a JSON schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]
    call: Call
    timeout: float | None = None
    """Seconds; None leaves it to the toolset."""

    def schema(self) -> dict[str, Any]:
        """As the OpenAI chat API has it."""
        return {"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters}}


def tool(
    function: Callable[..., Any] | None = None, *, name: str | None = None, inline: bool = False,
    timeout: float | None = None,
) -> Any:
    """A tool from a function: `@tool` or `@tool(inline=True)`.

    Name, description, parameters and their descriptions come from the signature and the docstring (its `Args:` part).
    A plain function runs on a thread, or where it stands if `inline`. It returns a text, a ToolResult, or anything that
    JSON can say. Raises TypeError for a parameter without annotation.
    """
    if function is None:
        return functools.partial(tool, name=name, inline=inline, timeout=timeout)
    description, explained = _read_docstring(function)
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    context_name = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {function.__name__}: parameter {parameter.name} must have a name of its own")
        if parameter.name not in hints:
            raise TypeError(f"tool {function.__name__}: parameter {parameter.name} needs a type annotation")
        if hints[parameter.name] is ToolContext:
            context_name = parameter.name
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], FieldInfo(
            default=default, description=explained.get(parameter.name)))
    model = create_model(function.__name__, __config__={"extra": "forbid"}, **fields)
    adapters = {key: TypeAdapter(hints[key]) for key in fields}

    async def call(arguments: dict[str, Any], context: ToolContext) -> ToolResult | str:
        values = {key: adapters[key].validate_python(value) for key, value in arguments.items()}
        if context_name is not None:
            values[context_name] = context
        if inspect.iscoroutinefunction(function):
            answer = await function(**values)
        elif inline:
            answer = function(**values)
        else:
            answer = await asyncio.to_thread(function, **values)
        if isinstance(answer, (ToolResult, str)):
            return answer
        return TypeAdapter(Any).dump_json(answer).decode()

    return Tool(name or function.__name__, description, _plain_schema(model.model_json_schema()), call, timeout)


class Toolset:
    """Tools by name. `async with` it where a tool has something to open and close."""

    def __init__(
        self, tools: Iterable[Tool] = (), *, timeout: float = 120.0, limit: int = OUTPUT_LIMIT,
        resources: Iterable[Any] = (),
    ) -> None:
        """`timeout`: seconds of a call; `limit`: characters of a result; `resources`: async context managers, open as
        long as the toolset is. Raises ValueError where two tools have one name."""
        self.tools: dict[str, Tool] = {}
        self.timeout, self.limit, self.resources = timeout, limit, list(resources)
        for one in tools:
            if one.name in self.tools:
                raise ValueError(f"two tools are named {one.name}")
            self.tools[one.name] = one
        self._schemas = [one.schema() for one in self.tools.values()]
        self._validators: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """In order."""
        return list(self.tools)

    def schemas(self) -> list[dict[str, Any]]:
        """As the OpenAI chat API has them; the same object every time."""
        return self._schemas

    def __add__(self, other: Toolset) -> Toolset:
        return Toolset([*self.tools.values(), *other.tools.values()], timeout=max(self.timeout, other.timeout),
                       limit=max(self.limit, other.limit), resources=[*self.resources, *other.resources])

    def without(self, *names: str) -> Toolset:
        """The same less some tools."""
        return Toolset([one for one in self.tools.values() if one.name not in names], timeout=self.timeout,
                       limit=self.limit, resources=self.resources)

    async def __aenter__(self) -> Toolset:
        opened: list[Any] = []
        try:
            for resource in self.resources:
                await resource.__aenter__()
                opened.append(resource)
        except BaseException:
            for resource in reversed(opened):
                await resource.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for resource in reversed(self.resources):
            await resource.__aexit__(kind, error, trace)

    async def call(self, name: str, arguments: str, context: ToolContext) -> ToolResult:
        """Answer a call as a model wrote it. Raises nothing but cancellation."""
        known = self.tools.get(name)
        if known is None:
            return ToolResult(_unknown(name, self.names), error=True)
        values = self._read(known, arguments)
        if isinstance(values, str):
            return ToolResult(values, error=True)
        limit = known.timeout or self.timeout
        if context.seconds_left is not None:
            limit = min(limit, max(context.seconds_left, 0.001))
        try:
            answer = await _within(known.call(values, context), limit)
        except TimeoutError:
            return ToolResult(f"Error: {name} did not answer within {limit:g} seconds.", error=True)
        except Exception as error:
            return ToolResult(f"Error: {name} failed: {type(error).__name__}: {error}"[: self.limit], error=True)
        if isinstance(answer, str):
            answer = ToolResult(answer)
        return dataclasses.replace(answer, content=cut(answer.content, self.limit))

    def _read(self, known: Tool, arguments: str) -> dict[str, Any] | str:
        """The arguments as values, or what is wrong with them."""
        try:
            values = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            return f"Error: the arguments of {known.name} are not JSON ({error}). Call it again with a JSON object."
        if not isinstance(values, dict):
            return f"Error: the arguments of {known.name} must be a JSON object, not {type(values).__name__}."
        validator = self._validators.get(known.name)
        if validator is None:
            import jsonschema

            validator = self._validators[known.name] = jsonschema.validators.validator_for(
                known.parameters, jsonschema.Draft202012Validator)(known.parameters)
        wrong = next(iter(sorted(validator.iter_errors(values), key=lambda error: error.json_path)), None)
        if wrong is None:
            return values
        return f"Error: the arguments of {known.name} do not fit: at {wrong.json_path}: {wrong.message}"[:2000]


async def _within(work: Awaitable[Any], seconds: float) -> Any:
    async with asyncio.timeout(None if seconds == math.inf else seconds):
        return await work


def cut(text: str, limit: int) -> str:
    """At most `limit` characters; the middle is left out, and how much of it is said."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[len(text) - tail :]}"


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"Error: there is no tool {name!r}.{meant} Tools: {', '.join(names) or 'none'}."


def _read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text before `Args:` and what it says of each parameter."""
    text = inspect.getdoc(function) or ""
    before, _, rest = text.partition("\nArgs:\n")
    explained: dict[str, str] = {}
    current = None
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        found = re.match(r"\s+(\w+)(?: \([^)]*\))?: (.*)", line)
        if found:
            current = found[1]
            explained[current] = found[2].strip()
        elif current and line.strip():
            explained[current] += " " + line.strip()
    return before.strip(), explained


def _plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic adds to everything."""
    def walk(value: Any, inside_properties: bool = False) -> Any:
        if isinstance(value, dict):
            return {key: walk(item, key in ("properties", "$defs") and not inside_properties)
                    for key, item in value.items() if inside_properties or key != "title" or not isinstance(item, str)}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(schema) | {"type": "object"}
