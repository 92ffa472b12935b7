"""A typed function with a docstring is a tool; a toolset answers calls and never raises.

What a model gets wrong (a name, JSON, a type) and what a tool gets wrong (an exception, too much time or output) comes
back as an observation that says what and how to mend it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
import threading
import typing
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pydantic import TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import to_json

OUTPUT_LIMIT = 32_000
"""Characters of a result that a model sees."""


@dataclass(frozen=True)
class ToolResult:
    """What a call answered."""

    content: str
    error: bool = False
    data: Any = None
    """What it stands for, to programs; no model sees it."""


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
    limit: int | None = None
    """Characters of a result; None leaves it to the toolset."""

    def schema(self) -> dict[str, Any]:
        """As the OpenAI chat API has it."""
        return {"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": self.parameters}}


def tool(
    function: Callable[..., Any] | None = None, *, name: str | None = None, inline: bool = False,
    timeout: float | None = None, limit: int | None = None,
) -> Any:
    """A tool from a function: `@tool` or `@tool(inline=True)`.

    Name, description, parameters and their descriptions come from the signature and the docstring (its `Args:` part).
    A plain function runs on a thread, or where it stands if `inline`. It returns a text, a ToolResult, or anything that
    JSON can say. Raises TypeError for a parameter without annotation.
    """
    if function is None:
        return functools.partial(tool, name=name, inline=inline, timeout=timeout, limit=limit)
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
        # By alias, since a model's own attributes take many names (copy, json, schema).
        fields[f"parameter_{len(fields)}"] = (hints[parameter.name], FieldInfo(
            default=default, description=explained.get(parameter.name), alias=parameter.name,
            validation_alias=parameter.name))
    model = create_model(function.__name__, __config__={"extra": "forbid"}, **fields)
    adapters = {field.alias: TypeAdapter(annotation) for annotation, field in fields.values()}

    async def call(arguments: dict[str, Any], context: ToolContext) -> Any:
        values = {key: adapters[key].validate_python(value) for key, value in arguments.items()}
        if context_name is not None:
            values[context_name] = context
        if inline or inspect.iscoroutinefunction(function):
            answer = function(**values)
        else:
            answer = await _on_a_thread(functools.partial(function, **values))
        return await answer if inspect.isawaitable(answer) else answer

    return Tool(name or function.__name__, description, _plain_schema(model.model_json_schema()), call, timeout, limit)


class _DaemonThreads(concurrent.futures.Executor):
    """A thread for each call. One that hangs holds up neither another call nor the end of the program, as it would in
    asyncio's own small pool."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, name="moonbase-tool", daemon=True).start()
        return future


_THREADS = _DaemonThreads()


async def _on_a_thread(work: Callable[[], Any]) -> Any:
    def outcome() -> tuple[Any, BaseException | None]:
        # asyncio's futures do not take every exception (StopIteration), and the loop stops at some (SystemExit).
        try:
            return context.run(work), None
        except BaseException as error:
            return None, error

    context = contextvars.copy_context()
    answer, error = await asyncio.get_running_loop().run_in_executor(_THREADS, outcome)
    if error is not None:
        raise error
    return answer


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
        """Both; each tool keeps the limits of its set."""
        tools = [dataclasses.replace(one, timeout=one.timeout or part.timeout, limit=one.limit or part.limit)
                 for part in (self, other) for one in part.tools.values()]
        held = {id(resource): resource for resource in [*self.resources, *other.resources]}
        return Toolset(tools, timeout=self.timeout, limit=self.limit, resources=held.values())

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
        timeout, limit = known.timeout or self.timeout, known.limit or self.limit
        if context.seconds_left is not None:
            timeout = min(timeout, context.seconds_left)
            if timeout <= 0:
                return ToolResult(f"Error: {name} was not called: the time is up.", error=True)
        # A tool that raises CancelledError or TimeoutError by itself is a tool that failed.
        cancelled = asyncio.current_task().cancelling()
        try:
            async with asyncio.timeout(None if timeout == math.inf else timeout) as clock:
                answer = _result(await known.call(values, context))
            if asyncio.current_task().cancelling() > cancelled:
                raise asyncio.CancelledError  # which the tool kept to itself
        except (Exception, asyncio.CancelledError, SystemExit) as error:
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling() > cancelled:
                raise
            if isinstance(error, TimeoutError) and clock.expired():
                return ToolResult(f"Error: {name} did not answer within {timeout:g} seconds.", error=True)
            if isinstance(error, ValidationError):
                return ToolResult(cut(f"Error: the arguments of {name} do not fit: {_in_one_line(error)}", limit), True)
            return ToolResult(cut(f"Error: {name} failed: {type(error).__name__}: {error}", limit), error=True)
        return dataclasses.replace(answer, content=cut(answer.content, limit))

    def _read(self, known: Tool, arguments: str) -> dict[str, Any] | str:
        """The arguments as values, or what is wrong with them."""
        try:
            values = json.loads(arguments.strip() or "{}")
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


def _result(answer: Any) -> ToolResult:
    """Whatever a tool returned, as a result."""
    if isinstance(answer, str):
        return ToolResult(answer)
    if not isinstance(answer, ToolResult):
        return ToolResult(_text(answer))
    return answer if isinstance(answer.content, str) else dataclasses.replace(answer, content=_text(answer.content))


def _text(value: Any) -> str:
    return to_json(value).decode()


def _in_one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"at {'.'.join(map(str, first['loc'])) or 'the value'}: {first['msg']}"


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


_VALUES = ("default", "const", "enum", "examples")
"""Keywords of a schema that hold values, not schemas."""


def _plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic adds to everything."""
    def walk(value: Any, names: bool = False) -> Any:
        # `names`: the keys are names of parameters or definitions.
        if isinstance(value, dict):
            return {key: item if key in _VALUES and not names else
                    walk(item, key in ("properties", "$defs") and not names)
                    for key, item in value.items() if names or key != "title"}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return walk(schema) | {"type": "object"}
