"""Tool schemas: what is accepted, what is refused, and whether the error names the place."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moonbase.chat.completion import completion
from moonbase.chat.relax import relax
from moonbase.chat.schema import SchemaError, check_schema, check_tools, prepare_tools
from moonbase.chat.shape import build_shape, json_bytes, minimal_instance
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
        ({"properties": {"x": {"type": "array", "items": {"nut": {}}}}}, "parameters.properties.x.items"),
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
    "unevaluatedItems": False, "contains": {}, "minContains": 1, "maxContains": 1,
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
        {"type": "array", "prefixItems": []},
        {"type": "array", "prefixItems": [{}] * 65},
        {"type": "array", "prefixItems": [{"enum": [1]}], "items": {"enum": [1]}, "uniqueItems": True},
        {"type": "number", "multipleOf": 0.25},
        {"type": "integer", "multipleOf": 0.1},
        {"type": "string", "pattern": "a{99999999999}"},
        {"type": "string", "pattern": "a{" + "9" * 5000 + "}"},
        {"type": "string", "pattern": "(" * 1500 + ")" * 1500},
        {"type": "string", "pattern": "^(.{0,200})*$", "minLength": 200},
        {"type": "object", "properties": {str(i): {"type": "string", "pattern": f"^[a-z]{{90}}{i}$"}
                                          for i in range(40)}},
        {"oneOf": [{"const": number} for number in range(65)]},
        {"type": "object", "properties": {str(i): {"enum": list(range(1000))} for i in range(11)}},
        {"oneOf": [{"$ref": "#/$defs/a/default"}, {"type": "null"}],
         "$defs": {"a": {"type": "null", "default": {"anyOf": 3}}}},
        {"oneOf": [{"$ref": "#/$defs/a/default"}, {"type": "null"}],
         "$defs": {"a": {"type": "null", "default": {"$ref": 5}}}},
        {"$ref": "#/$defs/a/properties", "$defs": {"a": {"type": "object", "properties": {"type": {}}}}},
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


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(.{0,200})*$", "minLength": 120},
        {"type": "object", "properties": {
            str(i): {"type": "string", "pattern": f"^(.{{0,20}})*{i}$", "minLength": 200} for i in range(10)}},
        {"oneOf": [{"enum": [f"{i} {j}" for j in range(150)]} for i in range(64)]},
        {"type": "object", "properties": {str(i): {"type": "string", "minLength": 15_000} for i in range(1900)}},
    ],
)
def test_a_small_schema_costs_little(schema: dict[str, Any]) -> None:
    start = time.process_time()
    try:
        build_shape(schema)
    except SchemaError:
        pass
    assert time.process_time() - start < 1.0


def test_many_tools_cost_little_together() -> None:
    schema = {f"p{number}": {"type": "string"} for number in range(400)}
    with pytest.raises(SchemaError, match="schemas in one request") as caught:
        check_tools([tool(f"t{number}", properties=schema) for number in range(10)])
    assert caught.value.path == "tools[7].function.parameters"


ITEM = {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]}

# What pydantic, zod and hand-written MCP servers send; the words of the note, if there is one; values that are right.
CLIENTS: list[tuple[dict[str, Any], str, list[Any], list[Any]]] = [
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems", [["a"]], ["a"]),
    ({"type": "array", "items": {"$ref": "#/$defs/E"}, "uniqueItems": True}, "", [["x", "y"]], [["x", "x"]]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2}, "",
     [[1, "a"]], [["a", 1], [1], [1, "a", 1]]),
    ({"type": "array", "items": [{"type": "null"}], "additionalItems": False}, "", [[], [None]], [[None, None], [1]]),
    ({"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
      "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A"}}}, "", [{"kind": "b"}], [{"kind": "c"}]),
    ({"type": "number", "multipleOf": 0.01}, "", [1.25, 3], ["1"]),
    ({"type": "number", "multipleOf": 0.25}, "multipleOf", [1.3], ["1"]),
    ({"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "integer"}},
     "propertyNames", [{"b": 1}], [{"b": "1"}]),
    ({"$ref": "#/definitions/Old"}, "", [7], ["7"]),
    ({"type": "string", "nullable": True, "x-order": {"a": 1}, "readOnly": True, "example": "e"}, "", ["a"], [None]),
    ({"type": "string", "anyOf": [{"minLength": 2}, {"enum": ["a"]}]}, "", ["a", "bb"], ["b", 5]),
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
      "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "", [{"a": None}, {"b": None}], [{}]),
    ({"allOf": [{"$ref": "#/$defs/A"}, {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"]}]},
     "", [{"kind": "a", "n": None}], [{"kind": "a"}, {"n": None}]),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf", [1.5], ["1"]),
    ({"type": "string", "pattern": r"^(?!x)\w+$"}, "pattern", ["x"], [1]),
    ({"type": "object", "minProperties": 1, "not": {"required": ["z"]}}, "minProperties", [{}], [1]),
    ({"type": "string", "description": None, "strict": True}, "strict", ["a"], [1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "note", "right", "wrong"), CLIENTS)
def test_what_clients_send_is_enforced_as_far_as_it_goes(
    schema: dict[str, Any], note: str, right: list[Any], wrong: list[Any]
) -> None:
    definitions = {"$defs": {"A": ITEM, "B": {**ITEM, "properties": {"kind": {"const": "b"}}},
                             "E": {"type": "string", "enum": ["x", "y"], "title": "E"}},
                   "definitions": {"Old": {"type": "integer", "nullable": False}}}
    sent = tool(properties={"v": schema}, required=["v"], **definitions)
    notes = check_tools([sent])
    assert bool(notes) == bool(note) and all("tools[0].function.parameters.properties.v" in line for line in notes)
    assert not note or any(note in line for line in notes)
    (enforced,) = prepare_tools([sent]).parameters
    assert relax(enforced) == enforced
    shape = build_shape(enforced)
    for value in right:
        assert completion(shape, json_bytes({"v": value})) == b"", value
    for value in wrong:
        assert completion(shape, json_bytes({"v": value})) is None, value


@pytest.mark.parametrize(("schema", "note", "right", "wrong"), [row for row in CLIENTS if row[1]])
def test_strict_tools_are_refused_where_something_is_not_enforced(
    schema: dict[str, Any], note: str, right: list[Any], wrong: list[Any]
) -> None:
    sent = tool(properties={"v": schema}, required=["v"])
    sent["function"]["strict"] = True
    with pytest.raises(SchemaError) as caught:
        check_tools([sent])
    assert caught.value.path.startswith("tools[0].function.parameters.properties.v")


def test_tools_whose_schemas_are_plainly_wrong_stay_refused(shared_data: Path) -> None:
    for line in lines(shared_data, "invalid"):
        row = json.loads(line)
        if row["unmarshal"]:
            continue
        schema = json.loads(row["schema"])
        with pytest.raises(SchemaError) as caught:
            check_tools([{"type": "function", "function": {"name": "a", "parameters": schema}}])
        assert row["expect"] in str(caught.value)


def test_a_client_that_sends_nothing_to_fill_in() -> None:
    for parameters in ({}, None):
        sent = [{"type": "function", "function": {"name": "now", "parameters": parameters}}]
        assert check_tools(sent) == [] and prepare_tools(sent).parameters == [{"type": "object", "properties": {}}]
