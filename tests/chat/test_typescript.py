"""Tool declarations against published pairs, byte for byte, and against what the published rules say by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.chat.render import render
from moonbase.chat.typescript import compact_json, declare
from moonbase.errors import UserError


def tool(parameters: object, **fields: object) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


def body(parameters: object, **fields: object) -> str:
    """What stands between the braces of the namespace."""
    text = declare([tool(parameters, **fields)])
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def field(schema: object, required: bool = True) -> str:
    """The lines of one field `x`."""
    text = body({"properties": {"x": schema}, "required": ["x"] if required else []})
    head, tail = "type f = (_: {\n", "\n}) => any;"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def test_published_pairs(shared_data: Path) -> None:
    folder = shared_data / "tool-typescript"
    if not folder.is_dir():
        pytest.skip(f"the published pairs are absent: {folder}")
    schemas = sorted((folder / "schemas").glob("*.json"))
    assert len(schemas) >= 5
    for path in schemas:
        expected = (folder / "expected" / f"{path.stem}.txt").read_bytes()
        assert declare(json.loads(path.read_bytes())).encode() == expected, path.stem


@pytest.mark.parametrize(
    ("schema", "lines"),
    [
        ({"type": "integer"}, "  x: number"),
        ({"type": "boolean"}, "  x: boolean"),
        ({"type": "null"}, "  x: null"),
        ({}, "  x: any"),
        (True, "  x: any"),
        ({"type": "array"}, "  x: Array<any>"),
        ({"type": "array", "items": {"type": "integer"}}, "  x: Array<number>"),
        ({"type": "array", "items": {"type": "array", "items": {}}}, "  x: Array<Array<any>>"),
        (
            {"type": "array", "items": {"type": "string", "description": "a word", "minLength": 2}},
            "  x: Array<\n    // a word\n    // minLength: 2\n    string\n  >",
        ),
        (
            {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
            "  x: Array<{\n    a?: string\n  }>",
        ),
        ({"type": "array", "maxItems": 3, "minItems": 1}, "  // maxItems: 3, minItems: 1\n  x: Array<any>"),
        ({"type": "number", "minimum": 0.5, "maximum": 2}, "  // maximum: 2, minimum: 0.5\n  x: number"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 9}, "  // maxLength: 9, pattern: ^a+$\n  x: string"),
        ({"type": "string", "minimum": 3}, "  x: string"),
        ({"enum": ["a", 1, 2.5, True, None]}, '  x: "a" | 1 | 2.5 | True | None'),
        ({"type": ["string", "null"], "enum": ["a", None]}, '  x: "a" | None'),
        ({"type": ["integer", "null", "object", "array"]}, "  x: number | null | {} | Array<any>"),
        ({"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}, "  x: string | Array<any>"),
        ({"type": "string", "description": "one\n\nthree"}, "  // one\n\n  // three\n  x: string"),
        ({"type": "integer", "default": 3}, "  // Default: 3\n  x: number"),
        ({"type": "boolean", "default": False}, "  // Default: False\n  x: boolean"),
        ({"type": "string", "default": "é\n"}, '  // Default: "é\\n"\n  x: string'),
        ({"default": {"a": [1, None]}, "type": "object"}, '  // Default: {"a": [1, null]}\n  x: {}'),
        ({"type": "string", "default": None}, "  x: string"),
        (
            {"type": "string", "description": "d", "maxLength": 1, "default": ""},
            '  // d\n  // maxLength: 1\n  // Default: ""\n  x: string',
        ),
        ({"type": "object", "additionalProperties": True}, "  x: {\n    [k: string]: any\n  }"),
        ({"type": "object", "additionalProperties": False}, "  x: {\n    [k: string]: never\n  }"),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "  x: {\n    [k: string]: number\n  }"),
    ],
)
def test_one_field(schema: object, lines: str) -> None:
    assert field(schema) == lines


def test_required_fields_come_first_each_set_by_name() -> None:
    kinds = {name: {"type": "string"} for name in ("d", "b", "c", "a")}
    text = body({"type": "object", "properties": kinds, "required": ["c", "b"], "additionalProperties": False})
    assert text == (
        "type f = (_: {\n  b: string,\n  c: string,\n  a?: string,\n  d?: string,\n  [k: string]: never\n}) => any;"
    )


def test_description_of_a_function_and_no_parameters() -> None:
    assert body(None, description="Say\nit.") == "// Say\n// it.\ntype f = (_: {}) => any;"
    assert declare([{"type": "function", "function": {"name": "g"}}]).endswith("{\ntype g = (_: {}) => any;\n}\n")


def test_definitions_become_interfaces() -> None:
    node = {"type": "object", "description": "A node.", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    parameters = {
        "type": "object",
        "properties": {"head": {"$ref": "#/$defs/Node", "description": "first"}, "id": {"$ref": "#/$defs/Id"}},
        "required": ["head"],
        "$defs": {"Node": node, "Id": {"type": "integer"}},
    }
    assert body(parameters, description="Walk.") == (
        "// A node.\ninterface Node {\n  next?: Node\n}\ninterface Id number\n// Walk.\n"
        "type f = (_: {\n  // first\n  head: Node,\n  id?: Id\n}) => any;"
    )


def test_a_reference_to_the_root() -> None:
    parameters = {"type": "object", "properties": {"child": {"$ref": "#"}, "name": {"type": "string"}}}
    assert body(parameters) == (
        "interface parameters {\n  child?: parameters,\n  name?: string\n}\ntype f = (_: parameters) => any;"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/definitions/A"},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "https://example.com/a.json"},
        {"title": "says nothing"},
        {"type": "string", "enum": [1]},
        {"type": ["string", "integer"], "enum": ["a"]},
        {"type": ["no such type"]},
        {"type": {}},
        {"type": "object", "additionalProperties": "yes"},
        {"anyOf": 3},
        {"type": "string", "description": 3},
        "string",
        None,
    ],
)
def test_what_cannot_be_declared_is_given_as_json(schema: object) -> None:
    tools = [tool({"properties": {"x": schema}}), tool({})]
    assert declare(tools) == json.dumps(tools, separators=(",", ":"))


def test_other_kinds_of_tool_are_left_out() -> None:
    assert declare([{"type": "web"}, tool({})]) == declare([tool({})])
    assert declare([{"type": "web"}]) == '[{"type":"web"}]'


def test_the_prompt_does_not_depend_on_the_order_of_keys() -> None:
    parameters = {"properties": {"a": {"$ref": "#/$defs/B"}}, "$defs": {"B": {"type": "null"}, "A": {"type": "null"}}}
    turned = json.loads(json.dumps(parameters, sort_keys=True))
    assert list(turned) != list(parameters)
    prompts = {render([], [tool(one)], "kimi-k2.5") for one in (parameters, turned)}
    assert len(prompts) == 1 and "interface A null\ninterface B null" in prompts.pop()
    undeclarable = tool({"properties": {"x": {"title": "nothing"}}})
    as_json = json.dumps([undeclarable], separators=(",", ":"), sort_keys=True)
    assert f"tool_declare<|im_middle|>{as_json}<|im_end|>" in render([], [undeclarable], "kimi-k2.5")


def test_compact_json_keeps_order_and_letters() -> None:
    assert compact_json([{"z": "é月", "a": [1, 2]}]) == '[{"z":"é月","a":[1,2]}]'
    for value in (float("nan"), {1, 2}, b"x"):
        with pytest.raises(UserError, match="tools"):
            compact_json([{"x": value}])


def test_bottomless_schemas() -> None:
    deep: dict = {"type": "string"}
    for _ in range(100_000):
        deep = {"type": "array", "items": deep}
    for style in ("kimi-k2", "kimi-k2.5"):
        with pytest.raises(UserError, match="tools"):
            render([], [tool({"properties": {"x": deep}})], style)


keywords = st.sampled_from(
    "type properties required items anyOf enum $ref $defs additionalProperties description default minimum "
    "minLength pattern".split()
)
words = st.sampled_from(["string", "object", "array", "integer", "null", "#", "#/$defs/A", "A", ""])
values = st.recursive(
    words | st.none() | st.booleans() | st.integers(-3, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords | words, inner, max_size=4),
    max_leaves=15,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_any_schema_gives_some_text(schema: object) -> None:
    text = declare([tool(schema)])
    assert text.startswith("# Tools\n") or json.loads(text) == [tool(schema)]
