"""Walking through a JSON Schema: parse, resolve references, find the schemas inside, name their places."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from moonbase.errors import UserError

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")
NUMBER_KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
KEYWORDS_OF = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern"),
    "number": NUMBER_KEYWORDS,
    "integer": NUMBER_KEYWORDS,
    "boolean": (),
    "null": (),
}
NOTES = frozenset("title description default examples format deprecated readOnly writeOnly $comment".split())
ROOT_ONLY = frozenset({"$id", "$schema", "$defs"})
TYPED = frozenset(keyword for keywords in KEYWORDS_OF.values() for keyword in keywords)
KNOWN = NOTES | ROOT_ONLY | TYPED | {"type", "enum", "const", *COMBINERS}
MAX_UNIQUE = 64
"""Values of an enum among which `uniqueItems` can choose."""

_CLASS_OF = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (),
             "integer": ()}
_PLAIN_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$-]*")


class SchemaError(UserError):
    """A tool or a schema that cannot be used; `path` names the place."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


def parse_schema(text: str | bytes, path: str = "schema") -> Any:
    """JSON text to values; no NaN, no repeated keys. Raises SchemaError."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SchemaError(path, f"JSON schema parsing error: {error}") from None


def types_of(schema: dict[str, Any]) -> tuple[str, ...]:
    """The types a schema states or implies by its keywords; all of them where nothing tells."""
    stated = schema.get("type")
    if isinstance(stated, str):
        return (stated,)
    if isinstance(stated, list):
        return tuple(stated)
    for kind in ("object", "array", "string", "number"):
        if any(keyword in schema for keyword in KEYWORDS_OF[kind]):
            return (kind,)
    return tuple(name for name in TYPES if name != "integer")


def resolve(root: dict[str, Any], reference: str) -> Any:
    """What `#` or `#/$defs/...` points at; None where it leads nowhere."""
    if reference == "#":
        return root
    if not reference.startswith("#/$defs/"):
        return None
    place: Any = root
    for step in reference[2:].split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and step in place:
            place = place[step]
        elif isinstance(place, list) and step.isdigit() and int(step) < len(place):
            place = place[int(step)]
        else:
            return None
    return place


def children(schema: dict[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    """The schemas directly inside one, with their places; whatever stands where a schema should is among them."""
    for keyword in ("$defs", "properties"):
        members = schema.get(keyword)
        if isinstance(members, dict):
            for name, inner in members.items():
                yield inner, member_path(f"{path}.{keyword}", name)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield schema[keyword], f"{path}.{keyword}"
    for keyword in ("prefixItems", *COMBINERS[1:]):
        options = schema.get(keyword)
        if isinstance(options, list):
            for number, inner in enumerate(options):
                yield inner, f"{path}.{keyword}[{number}]"


def subschemas(schema: Any, path: str) -> Iterator[tuple[Any, str]]:
    """A schema and everything inside it, outermost first."""
    stack = [(schema, path)]
    while stack:
        inner, place = stack.pop()
        yield inner, place
        if isinstance(inner, dict):
            stack.extend(reversed(list(children(inner, place))))


def matches_type(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a type; 1.0 is an integer."""
    if kind in ("number", "integer") and not isinstance(value, bool):
        return isinstance(value, int) or (isinstance(value, float) and (kind == "number" or value.is_integer()))
    return isinstance(value, _CLASS_OF[kind])


def decimal_places(value: Any) -> int | None:
    """k of a number 10**-k, from 1 to 6; None for any other."""
    return next((places for places in range(1, 7) if value == 10.0**-places), None)


def member_path(path: str, name: str) -> str:
    return f"{path}.{name}" if _PLAIN_NAME.fullmatch(name) else f"{path}[{show(name)}]"


def show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def options_of(root: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The plain schemas that a checked schema is a choice of: references followed, combiners opened."""
    found, work, seen = [], [schema], set()
    while work:
        inner = work.pop()
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        combiner = next((name for name in COMBINERS if name in inner), None)
        if combiner is None:
            found.append(inner)
        else:
            work.extend([resolve(root, inner["$ref"])] if combiner == "$ref" else inner[combiner])
    return found
