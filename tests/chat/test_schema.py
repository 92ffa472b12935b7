"""Tool schemas: what is accepted, what is refused, and whether the error names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moonbase.chat.schema import SchemaError, check_schema, check_tools
from moonbase.chat.shape import build_shape, minimal_instance
from moonbase.errors import UserError


def lines(shared_data: Path, kind: str) -> list[str]:
    files = sorted((shared_data / "tool-schemas").glob(f"*/{kind}.jsonl"))
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tool(name: Any = "look", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


def refused(schema: Any) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        build_shape(schema)
    assert str(caught.value).startswith(caught.value.path + ": ") and "\n" not in str(caught.value)
    return caught.value


def test_every_valid_schema_is_accepted(shared_data: Path) -> None:
    found = lines(shared_data, "valid")
    assert len(found) == 103
    for line in found:
        check_schema(line)
        check_schema(json.loads(line))


def test_every_invalid_schema_is_refused_with_the_expected_words(shared_data: Path) -> None:
    found = lines(shared_data, "invalid")
    assert len(found) == 90
    for line in found:
        row = json.loads(line)
        with pytest.raises(SchemaError) as caught:
            check_schema(row["schema"])
        assert row["expect"] in str(caught.value), (row["schema"], str(caught.value))
        assert str(caught.value).startswith(caught.value.path) and caught.value.path.startswith("schema")
        assert ("parsing error" in str(caught.value)) == row["unmarshal"]


def test_the_smallest_value_of_every_valid_schema_is_valid(shared_data: Path) -> None:
    for line in lines(shared_data, "valid"):
        schema = json.loads(line)
        jsonschema.Draft202012Validator(schema).validate(minimal_instance(schema))


@pytest.mark.parametrize(
    ("parameters", "path"),
    [
        ({"properties": {"x": {"type": "strin"}}}, "parameters.properties.x.type"),
        ({"properties": {"x": {"type": ["string", 1]}}}, "parameters.properties.x.type[1]"),
        ({"properties": {"a b": {"type": "string", "minLength": -1}}}, 'parameters.properties["a b"].minLength'),
        ({"properties": {"x": {"anyOf": [{"type": "null"}, {"enum": []}]}}}, "parameters.properties.x.anyOf[1].enum"),
        ({"properties": {"x": {"type": "array", "items": {"not": {}}}}}, "parameters.properties.x.items"),
        ({"$defs": {"D": {"$ref": "#/$defs/E"}}}, "parameters.$defs.D.$ref"),
        ({"properties": {}, "required": ["y"]}, "parameters.required[0]"),
        ({"additionalProperties": 3}, "parameters.additionalProperties"),
    ],
)
def test_the_path_of_a_tool_names_the_place(parameters: dict[str, Any], path: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check_tools([tool("fine"), tool("bad", **parameters)])
    assert caught.value.path == f"tools[1].function.{path}"
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("tools", "path"),
    [
        ({}, "tools"),
        (["x"], "tools[0]"),
        ([{"type": "builtin"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("")], "tools[0].function.name"),
        ([tool("x" * 65)], "tools[0].function.name"),
        ([tool(None)], "tools[0].function.name"),
        ([tool("a"), tool("a")], "tools[1].function.name"),
        ([{"function": {"name": "a", "description": 3}}], "tools[0].function.description"),
        ([{"function": {"name": "a", "parameters": {"type": "string"}}}], "tools[0].function.parameters"),
        ([{"function": {"name": "a", "parameters": {"anyOf": [{"type": "object"}, {}]}}}],
         "tools[0].function.parameters"),
        ([{"function": {"name": "a", "parameters": []}}], "tools[0].function.parameters"),
    ],
)
def test_what_is_no_tool(tools: Any, path: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check_tools(tools)
    assert caught.value.path == path


def test_tools_that_are_fine() -> None:
    check_tools([])
    check_tools([{"type": "function", "function": {"name": "now"}}])
    check_tools([{"type": "function", "function": {"name": "now", "description": None, "parameters": None}}])
    check_tools([tool(**{"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"x": {"const": 1}}})])
    check_tools([tool(properties={"kind": {"oneOf": [{"type": "string"}, {"type": "null"}]}})])


# Keywords of Draft 2020-12 that say something about values and are not enforced here.
UNENFORCED = {
    "not": {}, "if": {}, "then": {}, "else": {}, "patternProperties": {}, "propertyNames": {}, "minProperties": 1,
    "maxProperties": 1, "dependentRequired": {}, "dependentSchemas": {}, "unevaluatedProperties": False,
    "unevaluatedItems": False, "prefixItems": [], "contains": {}, "minContains": 1, "maxContains": 1,
    "$dynamicRef": "#", "$anchor": "a", "$dynamicAnchor": "a", "$vocabulary": {}, "contentMediaType": "a",
    "contentEncoding": "a", "contentSchema": {}, "dependencies": {}, "definitions": {}, "additionalItems": False,
    "nullable": True,
}  # fmt: skip


@pytest.mark.parametrize("keyword", UNENFORCED)
def test_a_keyword_that_would_not_be_enforced_is_refused(keyword: str) -> None:
    error = refused({"type": "object", "properties": {"x": {keyword: UNENFORCED[keyword]}}})
    assert error.path == "schema.properties.x" and keyword in str(error)


def test_every_keyword_of_the_vocabulary_is_either_enforced_or_refused() -> None:
    """No keyword of Draft 2020-12 falls between: each is known here as enforced, as a note, or is in the list above."""
    from moonbase.chat.schema import KNOWN

    vocabularies = jsonschema.Draft202012Validator.VALIDATORS.keys()
    assert not {str(name) for name in vocabularies} - KNOWN - UNENFORCED.keys()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 20_000},
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
        {"type": "integer", "minimum": 1, "maximum": 5, "multipleOf": 7},
        {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
        {"type": "number", "exclusiveMinimum": 1, "maximum": 1},
        {"enum": [1, 2], "minimum": 3, "type": "integer"},
        {"type": "array", "items": {"enum": ["a"]}, "uniqueItems": True, "minItems": 2},
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"oneOf": [{"enum": ["a", "b"]}, {"const": "b"}]},
        {"oneOf": [{"type": "object"}, {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}]},
        {"allOf": [{"type": "string"}, {"minLength": 1}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#"},
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
        {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(500)} | {"500": {}}},
        {"type": "null", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(500)} | {"500": {}}},
        {"type": "object", "properties": {str(i): {} for i in range(3000)}},
        {"type": "number", "minimum": float("nan")},
        {"type": "number", "maximum": float("inf")},
        {"type": "object", "properties": {"x": True}},
        {"type": []},
        {"type": "string", "pattern": 3},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": r"(?=a)b"},
        {"type": "string", "pattern": r"(a)\1"},
        {"type": "string", "pattern": r"(a{1000}){1000}"},
        {"type": "string", "pattern": "^aaa$", "maxLength": 2},
        {"type": "integer", "pattern": "^1$"},
        {"enum": []},
        [],
        None,
        '{"type": "object", "type": "string"}',
        "[" * 100_000,
    ],
)
def test_what_no_value_fits_or_nobody_can_enforce_is_refused(schema: Any) -> None:
    refused(schema)


def test_a_schema_that_unfolds_without_end_is_refused_quickly() -> None:
    letters = list("abcdefgh")
    definitions: dict[str, Any] = {
        f"d{depth}": {"type": "object", "required": letters,
                      "properties": {letter: {"$ref": f"#/$defs/d{depth + 1}"} for letter in letters}}
        for depth in range(7)
    }
    definitions["d7"] = {"type": "string"}
    assert "no value of at most" in str(refused({"$ref": "#/$defs/d0", "$defs": definitions}))
    assert "depth" in str(refused(json.loads('{"items":' * 400 + "{}" + "}" * 400)))


def test_what_can_never_be_finished_is_left_out() -> None:
    endless = {"type": "object", "properties": {"next": {"$ref": "#/$defs/X"}}, "required": ["next"]}
    schema = {"type": "object", "properties": {"node": {"$ref": "#/$defs/X"}}, "$defs": {"X": endless}}
    assert minimal_instance(schema) == {}
