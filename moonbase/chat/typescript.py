"""Tools as TypeScript declarations: how K2.5 is told what it may call.

    # Tools

    ## functions
    namespace functions {
    // Create a new user record.
    type create_user = (_: {
      name: string,
      // Default: 18
      age?: number
    }) => any;
    }

The model was trained on this text byte for byte, so its oddities are kept: field names are never quoted, a truth value
in an enumeration is Python's `True`, and a description's empty lines lose their slashes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moonbase.errors import UserError

_INDENT = "  "
_PLAIN_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_UNION_TYPES = {**_PLAIN_TYPES, "object": "{}", "array": "Array<any>"}
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_ENUM_TYPES = {"string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,)}


def declare(tools: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI tools as TypeScript, one `type` per function, ended by a newline; tools of another kind are left out.

    Where a schema cannot be declared (a reference other than `#` and `#/$defs/NAME`, a value outside its own type, a
    schema that says nothing) all tools are given as compact JSON instead. Raises UserError where even that cannot be
    written.
    """
    try:
        functions = [_function(tool["function"]) for tool in tools if tool.get("type") == "function"]
    except (_Undeclarable, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        functions = []
    if not functions:
        return compact_json(tools)
    return "\n".join(["# Tools", "", "## functions", "namespace functions {", *functions, "}", ""])


def compact_json(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools as K2 reads them: JSON without spaces, letters of every script as they are, keys in the given order."""
    try:
        return json.dumps(tools, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"tools: have no JSON form: {error}") from None


class _Undeclarable(Exception):
    """A schema without a TypeScript form."""


class _Scope:
    """What the references of one function may point to."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.refers_to_root = False


def _function(function: Mapping[str, Any]) -> str:
    scope = _Scope()
    parameters = function.get("parameters") or {}
    body = _object(parameters, scope, "")
    interfaces = []
    if scope.refers_to_root:
        fields = ",\n".join(_fields(parameters, scope, _INDENT))
        interfaces.append("interface parameters {" + (f"\n{fields}\n" if fields else "") + "}")
        body = "parameters"
    for name, schema in list(scope.definitions.items()):
        comment = _comment(_description(schema), "") if isinstance(schema, Mapping) else ""
        interfaces.append(f"{comment}interface {name} {_type(schema, scope, '')}")
    declaration = f"type {function.get('name', 'function')} = (_: {body}) => any;"
    return "\n".join([*interfaces, _comment(_description(function), "") + declaration])


def _type(schema: Any, scope: _Scope, indent: str) -> str:
    """The type expression of a schema; `indent` is that of the line on which it begins."""
    if isinstance(schema, bool):
        return "any" if schema else "null"
    if not isinstance(schema, Mapping):
        raise _Undeclarable
    if "$ref" in schema:
        return _reference(schema["$ref"], scope)
    if "anyOf" in schema:
        return " | ".join(_type(choice, scope, indent) for choice in schema["anyOf"])
    if "enum" in schema:
        return _enumeration(schema)
    if "type" not in schema:
        if schema:
            raise _Undeclarable
        return "any"
    kind = schema["type"]
    if isinstance(kind, list):
        return " | ".join(_UNION_TYPES[one] for one in kind)
    if kind == "object":
        return _object(schema, scope, indent)
    if kind == "array":
        return _array(schema, scope, indent)
    return _PLAIN_TYPES.get(kind, kind)


def _reference(target: str, scope: _Scope) -> str:
    if target == "#":
        scope.refers_to_root = True
        return "parameters"
    prefix, _, name = target.rpartition("/")
    if prefix != "#/$defs" or name not in scope.definitions:
        raise _Undeclarable
    return name


def _enumeration(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        others = [one for one in kind if one != "null"] or kind
        if len(kind) > 2 or (len(kind) == 2 and "null" not in kind):
            raise _Undeclarable
        kind = others[0]
    allowed = _ENUM_TYPES.get(kind, (object,))
    if not all(value is None or isinstance(value, allowed) for value in schema["enum"]):
        raise _Undeclarable
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in schema["enum"])


def _array(schema: Mapping[str, Any], scope: _Scope, indent: str) -> str:
    item = schema.get("items") or {}
    inner = indent + _INDENT
    comment = _docstring(item, inner)
    if not comment:
        return f"Array<{_type(item, scope, indent)}>"
    return f"Array<\n{comment}{inner}{_type(item, scope, inner)}\n{indent}>"


def _object(schema: Mapping[str, Any], scope: _Scope, indent: str) -> str:
    scope.definitions.update(schema.get("$defs") or {})
    required = schema.get("required") or []
    names = sorted(schema.get("properties") or {}, key=lambda name: (name not in required, name))
    ordered = dict(schema, properties={name: schema["properties"][name] for name in names})
    inner = indent + _INDENT
    fields = _fields(ordered, scope, inner)
    others = schema.get("additionalProperties")
    if isinstance(others, bool):
        fields.append(f"{inner}[k: string]: {'any' if others else 'never'}")
    elif others is not None:
        fields.append(f"{inner}[k: string]: {_type(others, scope, inner)}")
    if not fields:
        return "{}"
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"


def _fields(schema: Mapping[str, Any], scope: _Scope, indent: str) -> list[str]:
    required = schema.get("required") or []
    lines = []
    for name, value in (schema.get("properties") or {}).items():
        comment = _docstring(value, indent)
        default = value.get("default") if isinstance(value, Mapping) else None
        if default is not None:
            plain = isinstance(default, int | float)
            comment += f"{indent}// Default: {default if plain else json.dumps(default, ensure_ascii=False)}\n"
        mark = "" if name in required else "?"
        lines.append(f"{comment}{indent}{name}{mark}: {_type(value, scope, indent)}")
    return lines


def _docstring(schema: Any, indent: str) -> str:
    """Comment lines above a field: its description, then its constraints by name."""
    if not isinstance(schema, Mapping):
        return ""
    comment = _comment(_description(schema), indent)
    if not any(key in schema for key in ("$ref", "anyOf", "enum")):
        kind = schema.get("type")
        limits = [name for name in _CONSTRAINTS.get(kind, ()) if name in schema] if isinstance(kind, str) else []
        if limits:
            comment += f"{indent}// " + ", ".join(f"{name}: {schema[name]}" for name in limits) + "\n"
    return comment


def _description(schema: Mapping[str, Any]) -> str:
    description = schema.get("description") or ""
    if not isinstance(description, str):
        raise _Undeclarable
    return description


def _comment(text: str, indent: str) -> str:
    if not text:
        return ""
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n"))
