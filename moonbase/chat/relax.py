"""Tool schemas as clients write them, brought into the language that `schema.py` checks and the engine enforces.

Generators of schemas (pydantic, zod, OpenAPI tools) say more than can be enforced while a model writes. For a tool that
does not ask for `strict` the rest is what counts: what can be said in the language is rewritten, annotations go, a
keyword that cannot be enforced is left out and noted. So a value may break a keyword that a note names, and no other.
What is plainly wrong stays as it is, for the check to refuse.
"""

from __future__ import annotations

import json
from typing import Any

from moonbase.chat.pattern import PatternError, check_pattern
from moonbase.chat.schema_walk import (
    COMBINERS,
    KNOWN,
    MAX_UNIQUE,
    NOTES,
    ROOT_ONLY,
    SchemaError,
    children,
    decimal_places,
    matches_type,
    resolve,
    show,
    types_of,
)

ANNOTATIONS = frozenset(
    "discriminator nullable example externalDocs xml id $anchor $dynamicAnchor $vocabulary contentMediaType "
    "contentEncoding contentSchema".split()
)
UNENFORCED = frozenset(
    "not if then else patternProperties propertyNames minProperties maxProperties dependentRequired dependentSchemas "
    "dependencies unevaluatedProperties unevaluatedItems contains minContains maxContains additionalItems".split()
)
MOST_SCHEMAS = 3_000
"""Schemas that are looked at; more are refused by the check."""
MOST_NOTES = 100

_PLAIN_OBJECT = NOTES | {"type", "properties", "required", "additionalProperties"}


def relax(schema: dict[str, Any], path: str = "schema", notes: list[str] | None = None) -> dict[str, Any]:
    """A copy of `schema` in the language of `schema.py`, as far as it goes; still to be checked.

    `notes` receives a line for each keyword that is not enforced. Raises SchemaError for what is no JSON.
    """
    try:
        root = json.loads(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        raise SchemaError(path, "must be JSON that does not nest too deep") from None
    relaxer = _Relaxer(root, [] if notes is None else notes)
    relaxer.definitions()
    for step in (relaxer.keywords, relaxer.combined):
        waiting, seen = [(root, path)], 0
        while waiting and seen < MOST_SCHEMAS:
            inner, place = waiting.pop()
            seen += 1
            if isinstance(inner, dict):
                step(inner, place)
                waiting.extend(reversed(list(children(inner, place))))
    return root


class _Relaxer:
    def __init__(self, root: dict[str, Any], notes: list[str]) -> None:
        self.root = root
        self.notes = notes

    def note(self, place: str, problem: str) -> None:
        if len(self.notes) < MOST_NOTES:
            self.notes.append(f"{place}: {problem}")

    def definitions(self) -> None:
        """`definitions` of earlier drafts are what `$defs` are."""
        older = self.root.get("definitions")
        newer = self.root.setdefault("$defs", {}) if isinstance(older, dict) else None
        if isinstance(older, dict) and isinstance(newer, dict) and not older.keys() & newer.keys():
            newer.update(self.root.pop("definitions"))

    def keywords(self, schema: dict[str, Any], place: str) -> None:
        """Rewrite or leave out what one schema says by itself."""
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/definitions/"):
            schema["$ref"] = "#/$defs/" + reference.removeprefix("#/definitions/")
        for keyword in [keyword for keyword in schema if keyword in NOTES and schema[keyword] is None]:
            del schema[keyword]
        self.items(schema, place)
        members = schema.get("properties")
        if isinstance(members, dict):
            schema["properties"] = {name: {} if inner is True else inner for name, inner in members.items()}
        for keyword in sorted(schema.keys() - KNOWN):
            self.unknown(schema, keyword, place)
        factor = schema.get("multipleOf")
        if matches_type(factor, "number") and factor > 0 and not matches_type(factor, "integer"):
            if "integer" in types_of(schema) or not decimal_places(factor):
                del schema["multipleOf"]
                self.note(f"{place}.multipleOf", f"a multiple of {show(factor)} is not enforced")
        pattern, low = schema.get("pattern"), schema.get("minLength", 0)
        if isinstance(pattern, str) and isinstance(low, int):
            try:
                check_pattern(pattern, low)
            except PatternError as error:
                del schema["pattern"]
                self.note(f"{place}.pattern", f"not enforced: {error}")

    def items(self, schema: dict[str, Any], place: str) -> None:
        if isinstance(schema.get("items"), list):
            schema["prefixItems"] = schema.pop("items")
            if "additionalItems" in schema:
                schema["items"] = schema.pop("additionalItems")
        if schema.get("prefixItems") == []:
            del schema["prefixItems"]
        others, prefix = schema.get("items"), schema.get("prefixItems", [])
        if others is True:
            del schema["items"]
        elif others is False and isinstance(prefix, list):
            del schema["items"]
            high = schema.get("maxItems", len(prefix))
            schema["maxItems"] = min(high, len(prefix)) if matches_type(high, "integer") else high
        if schema.get("uniqueItems") is True:
            literal = self.target(others)
            values = literal.get("enum") if isinstance(literal, dict) else None
            if isinstance(values, list) and len(values) <= MAX_UNIQUE and "prefixItems" not in schema:
                schema["items"] = {keyword: literal[keyword] for keyword in ("type", "enum") if keyword in literal}
            else:
                del schema["uniqueItems"]
                self.note(f"{place}.uniqueItems", "that no item repeats is not enforced")

    def target(self, schema: Any) -> Any:
        """What a schema that is a reference leads to, any other itself."""
        for _ in range(len(COMBINERS)):
            if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
                return schema
            schema = resolve(self.root, schema["$ref"].replace("#/definitions/", "#/$defs/"))
        return None

    def unknown(self, schema: dict[str, Any], keyword: str, place: str) -> None:
        """A keyword outside the language. One that holds a structure nobody knows may be a schema gone astray."""
        if keyword in ANNOTATIONS or keyword.startswith("x-"):
            del schema[keyword]
        elif keyword in UNENFORCED or not isinstance(schema[keyword], dict | list):
            # Other members would have to keep to `additionalProperties`, and those that match a pattern do not.
            if keyword != "patternProperties" or not isinstance(schema.get("additionalProperties"), dict):
                del schema[keyword]
                self.note(f"{place}.{keyword}", "not enforced")

    def combined(self, schema: dict[str, Any], place: str) -> None:
        """Bring what stands beside anyOf, oneOf or allOf into their items."""
        found = [keyword for keyword in COMBINERS if keyword in schema]
        options = schema.get(found[0]) if len(found) == 1 else None
        if not isinstance(options, list) or not options or not all(isinstance(option, dict) for option in options):
            return
        combiner = found[0]
        beside = {keyword: value for keyword, value in schema.items() if keyword not in NOTES | ROOT_ONLY | {combiner}}
        if combiner == "allOf" and (beside or len(options) > 1):
            self.sum(schema, options, beside, place)
        elif beside.keys() == {"type"}:
            kept = [option for option in map(lambda option: _typed(option, beside["type"]), options) if option]
            if kept:
                del schema["type"]
                schema[combiner] = kept
        elif beside:
            merged = [_merge([beside, option]) for option in options]
            if all(merged):
                for keyword in beside:
                    del schema[keyword]
                schema[combiner] = merged

    def sum(self, schema: dict[str, Any], options: list[Any], beside: dict[str, Any], place: str) -> None:
        """Several objects that must all hold are one with the members of all."""
        merged = _merge([*([beside] if beside else []), *map(self.target, options)])
        if merged:
            del schema["allOf"]
            schema.update(merged)
        elif not beside:
            schema["allOf"] = options[:1]
            self.note(f"{place}.allOf", "of several schemas only the first is enforced")


def _typed(option: dict[str, Any], stated: Any) -> dict[str, Any] | None:
    """An option that must also be of the stated type; None where it cannot be."""
    if any(keyword in option for keyword in COMBINERS):
        return option
    if option.keys() <= NOTES:
        return {**option, "type": stated}
    wanted = stated if isinstance(stated, list) else [stated]
    kept = [name for name in types_of(option) if name in wanted or (name == "integer" and "number" in wanted)]
    if not kept and "integer" in wanted and "number" in types_of(option):
        kept = ["integer"]
    return {**option, "type": kept[0] if len(kept) == 1 else kept} if kept else None


def _merge(schemas: list[Any]) -> dict[str, Any] | None:
    """One object with the members of all; None where that is not what they say together."""
    members: dict[str, Any] = {}
    required: list[str] = []
    others: list[Any] = []
    for schema in schemas:
        if not isinstance(schema, dict) or not schema.keys() <= _PLAIN_OBJECT:
            return None
        named, needed = schema.get("properties", {}), schema.get("required", [])
        if schema.get("type", "object") != "object" or not isinstance(named, dict) or not isinstance(needed, list):
            return None
        if not any(keyword in schema for keyword in ("type", "properties", "required")):
            return None
        # Later ones say more of the same member.
        members.update(named)
        required += [name for name in needed if name not in required]
        if "additionalProperties" in schema:
            others.append(schema["additionalProperties"])
    closed = [schema for schema in schemas if schema.get("additionalProperties") is False]
    if any(members.keys() - schema.get("properties", {}).keys() for schema in closed):
        return None
    if any(not isinstance(name, str) or name not in members for name in required):
        return None
    merged: dict[str, Any] = {"type": "object", "properties": members}
    if required:
        merged["required"] = required
    if others and False not in others:
        merged["additionalProperties"] = others[0]
    return merged
