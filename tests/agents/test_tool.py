"""From functions to schemas, held against written ones and a validator; and toolsets that never raise."""

from __future__ import annotations

import asyncio
import json
import threading
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import jsonschema
import pytest
from pydantic import BaseModel, Field

from moonbase.agents.simulation import simulate
from moonbase.agents.tools.tool import Tool, ToolContext, ToolResult, Toolset, cut, tool

CONTEXT = ToolContext("main", 1, "main#1.0")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    """A place."""

    x: float
    title: str = "none"


class Shape(BaseModel):
    points: list[Point]
    colour: Colour = Colour.RED


@tool(inline=True)
def draw(
    shape: Shape, mode: Literal["fill", "line"], names: list[str], copy: Annotated[int, Field(ge=1, le=9)] = 1,
    label: Optional[str] = None,  # noqa: UP045
    title: str = "", sizes: tuple[int, int] = (1, 2), json: dict[str, int] | None = None,
) -> str:
    """Draw a shape.

    In colour, if there is any.

    Args:
        shape: What to draw.
        mode (str): How: lines
            or areas.
        copy: How often.

    Returns:
        What was drawn.
    """
    return f"{type(shape).__name__} {shape.points[0].x} {shape.colour} {mode} {names} {copy} {label} {sizes} {json}"


def ask(tools: Toolset, name: str, arguments: Any, context: ToolContext = CONTEXT) -> ToolResult:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return simulate(tools.call(name, text, context))


def test_a_schema_says_what_the_function_says() -> None:
    assert (draw.name, draw.description) == ("draw", "Draw a shape.\n\nIn colour, if there is any.")
    schema = draw.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object" and schema["required"] == ["shape", "mode", "names"]
    assert schema["additionalProperties"] is False
    properties = schema["properties"]
    assert list(properties) == ["shape", "mode", "names", "copy", "label", "title", "sizes", "json"]
    assert properties["mode"] == {"description": "How: lines or areas.", "enum": ["fill", "line"], "type": "string"}
    assert properties["names"] == {"items": {"type": "string"}, "type": "array"}
    assert properties["copy"] == {
        "default": 1, "description": "How often.", "maximum": 9, "minimum": 1, "type": "integer"}
    assert properties["label"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    assert properties["title"] == {"default": "", "type": "string"}
    assert schema["$defs"]["Point"] == {"description": "A place.", "type": "object", "required": ["x"], "properties": {
        "x": {"type": "number"}, "title": {"default": "none", "type": "string"}}}
    assert json.loads(json.dumps(schema)) == schema


def test_values_arrive_as_they_were_annotated() -> None:
    result = ask(Toolset([draw]), "draw", {"shape": {"points": [{"x": 1}], "colour": "blue"}, "mode": "line",
                                           "names": ["n"], "sizes": [3, 4], "json": {"a": 1}})
    assert result == ToolResult("Shape 1.0 Colour.BLUE line ['n'] 1 None (3, 4) {'a': 1}")


@pytest.mark.parametrize(("change", "where"), [
    ({"mode": "dash"}, "$.mode"), ({"copy": 0}, "$.copy"), ({"copy": "2"}, "$.copy"),
    ({"names": ["a", 3]}, "$.names[1]"),
    ({"shape": {"points": [{"x": "far"}]}}, "$.shape.points[0].x"), ({"shape": {}}, "$.shape"), ({"other": 1}, "$:"),
    ({"sizes": [1]}, "$.sizes"),
])
def test_what_does_not_fit_is_named(change: dict[str, Any], where: str) -> None:
    right = {"shape": {"points": [{"x": 1}]}, "mode": "line", "names": []}
    result = ask(Toolset([draw]), "draw", right | change)
    assert result.error and where in result.content and "\n" not in result.content


def test_what_only_the_annotation_knows_is_told_like_the_rest() -> None:
    @tool(inline=True)
    def pick(point: Annotated[str, Field(pattern="^a")], colour: Colour = Colour.RED) -> str:
        """Pick."""
        return point

    class Even(BaseModel):
        number: int

        def model_post_init(self, context: Any) -> None:
            if self.number % 2:
                raise ValueError("odd")

    def take(even: Any) -> str:
        """Take."""
        return "taken"

    take.__annotations__["even"] = Even
    assert ask(Toolset([pick]), "pick", {"point": "b"}).error
    result = ask(Toolset([tool(take)]), "take", {"even": {"number": 3}})
    assert result.error and "do not fit" in result.content and "odd" in result.content and "\n" not in result.content


@pytest.mark.parametrize("arguments", ["", "   ", "{}"])
def test_no_arguments_are_an_empty_object(arguments: str) -> None:
    @tool
    def now() -> str:
        """Tell."""
        return "now"

    assert ask(Toolset([now]), "now", arguments).content == "now"


def test_functions_that_cannot_be_tools() -> None:
    def bare(x) -> str:
        return x

    def many(*x: int) -> str:
        return ""

    for function in (bare, many):
        with pytest.raises(TypeError, match=function.__name__):
            tool(function)
    with pytest.raises(ValueError, match="two tools are named draw"):
        Toolset([draw, draw])


def test_the_caller_is_handed_in() -> None:
    @tool(name="who")
    def someone(context: ToolContext, again: int = 1) -> list[str]:
        """Tell."""
        return [context.call_id] * again

    assert list(someone.parameters["properties"]) == ["again"]
    assert ask(Toolset([someone]), "who", {"again": 2}).content == '["main#1.0","main#1.0"]'
    assert ask(Toolset([someone]), "who", {"context": 1}).error


def test_plain_functions_run_on_threads_that_hold_nothing_up() -> None:
    """As many sleep side by side as are called, and one that never ends stops neither the others nor the program."""
    @tool
    def sleep() -> str:
        """Sleep until all the others do."""
        together.wait(120)
        return threading.current_thread().name

    @tool(timeout=0.05)
    def hang() -> str:
        """Hang."""
        threading.Event().wait()
        return ""

    async def program() -> list[ToolResult]:
        tools = Toolset([sleep, hang])
        return await asyncio.gather(*(tools.call("hang", "", CONTEXT) for _ in range(40)),
                                    *(tools.call("sleep", "", CONTEXT) for _ in range(40)))

    together = threading.Barrier(40)
    results = asyncio.run(program())
    assert {result.content for result in results[:40]} == {"Error: hang did not answer within 0.05 seconds."}
    assert {result.content for result in results[40:]} == {"moonbase-tool"}


@pytest.mark.parametrize("error", [
    ValueError("no"), KeyError("x"), StopIteration(), SystemExit(3), asyncio.CancelledError(), TimeoutError("own"),
    RecursionError(), MemoryError()])
@pytest.mark.parametrize("kind", ["inline", "thread", "async"])
def test_a_tool_that_fails_is_an_observation(error: BaseException, kind: str) -> None:
    def fail() -> str:
        """Fail."""
        raise error

    async def fail_later() -> str:
        """Fail."""
        await asyncio.sleep(1)
        raise error

    one = tool(fail_later, name="fail") if kind == "async" else tool(fail, inline=kind == "inline")
    result = simulate(Toolset([one], timeout=30).call("fail", "{}", CONTEXT))
    assert result.error and result.content.startswith("Error: fail failed: ")


def test_answers_of_every_kind_are_texts() -> None:
    answers = {"1": 1, '{"a":[1,null]}': {"a": [1, None]}, "null": None, "text": "text", '["a"]': ("a",)}
    for text, answer in answers.items():
        one = Tool("one", "", {"type": "object"}, lambda values, context, answer=answer: _soon(answer))
        assert ask(Toolset([one]), "one", {}) == ToolResult(text)
    for odd in (object(), ToolResult(object())):
        one = Tool("one", "", {"type": "object"}, lambda values, context, answer=odd: _soon(answer))
        assert ask(Toolset([one]), "one", {}).error


async def _soon(answer: Any) -> Any:
    await asyncio.sleep(1)
    return answer


def test_time_limits_of_tool_set_and_caller() -> None:
    @tool
    async def wait(seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    patient = Tool("patient", "", wait.parameters, wait.call, timeout=1000)
    tools = Toolset([wait, patient], timeout=10)
    assert ask(tools, "wait", {"seconds": 9}).content == "waited"
    assert ask(tools, "wait", {"seconds": 11}).content == "Error: wait did not answer within 10 seconds."
    assert ask(tools, "patient", {"seconds": 900}).content == "waited"
    hurried = ToolContext("main", 1, "main#1.0", seconds_left=2)
    assert ask(tools, "patient", {"seconds": 3}, hurried).content == "Error: patient did not answer within 2 seconds."
    late = ToolContext("main", 1, "main#1.0", seconds_left=0)
    assert ask(tools, "wait", {"seconds": 0}, late).content == "Error: wait was not called: the time is up."


def test_sets_put_together_keep_their_own_limits() -> None:
    @tool(inline=True)
    def long() -> str:
        """Say much."""
        return "x" * 1000

    @tool(inline=True, limit=500)
    def longer() -> str:
        """Say much."""
        return "y" * 1000

    class Resource:
        opened = 0

        async def __aenter__(self) -> None:
            self.opened += 1

        async def __aexit__(self, *error: Any) -> None:
            self.opened -= 1

    resource = Resource()
    first = Toolset([long], limit=100, timeout=1, resources=[resource])
    both = first + Toolset([longer], timeout=9, resources=[resource])
    assert "[… 900 characters left out …]" in ask(both, "long", {}).content
    assert "[… 500 characters left out …]" in ask(both, "longer", {}).content
    assert [one.timeout for one in both.tools.values()] == [1, 9]
    assert both.without("long").names == ["longer"] and both.names == ["long", "longer"]

    async def program() -> int:
        async with both:
            return resource.opened

    assert asyncio.run(program()) == 1 and resource.opened == 0


def test_cutting_keeps_both_ends_and_counts() -> None:
    assert cut("short", 10) == "short"
    text = "".join(chr(97 + number % 26) for number in range(1000))
    shown = cut(text, 100)
    assert shown == f"{text[:75]}\n[… 900 characters left out …]\n{text[-25:]}"


def test_cancellation_is_not_swallowed() -> None:
    @tool
    async def stubborn() -> str:
        """Keep a cancellation to itself."""
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            return "never mind"
        return ""

    async def program() -> None:
        running = asyncio.ensure_future(Toolset([stubborn]).call("stubborn", "", CONTEXT))
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    simulate(program())
