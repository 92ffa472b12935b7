"""Whether two schemas surely have no value in common: then "exactly one of" is the same as "any of"."""

from __future__ import annotations

import json
from typing import Any

from moonbase.chat.schema_walk import SchemaError, options_of, types_of

MAX_OPTIONS = 64
"""Items of one oneOf, choices inside them counted too."""
MAX_PAIRS = 5_000
"""Pairs of them in one schema."""

_spell = json.JSONEncoder(sort_keys=True).encode


class Exclusive:
    """Compares the items of every oneOf below one root, whose other rules were checked before."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.pairs = 0
        self.texts: dict[int, frozenset[str] | None] = {}

    def check(self, schema: dict[str, Any], path: str) -> None:
        """Raise SchemaError where two items of `oneOf` may have a value in common, or are too many to tell."""
        items = schema["oneOf"]
        if len(items) > MAX_OPTIONS:
            raise SchemaError(f"{path}.oneOf", f"more than {MAX_OPTIONS} items: use anyOf")
        options = [options_of(self.root, item) for item in items]
        total = sum(map(len, options))
        if len(items) > 1 and total > MAX_OPTIONS:
            raise SchemaError(f"{path}.oneOf", f"more than {MAX_OPTIONS} choices inside its items: use anyOf")
        self.pairs += total * total // 2
        if self.pairs > MAX_PAIRS:
            raise SchemaError(f"{path}.oneOf", "too many oneOf in one schema to tell their items apart: use anyOf")
        for second in range(len(items)):
            for first in range(second):
                if not all(self.apart(one, two) for one in options[first] for two in options[second]):
                    raise SchemaError(f"{path}.oneOf[{second}]", f"cannot be told from oneOf[{first}] by type, literal "
                                                                 "or a required literal member: use anyOf")

    def apart(self, one: dict[str, Any], two: dict[str, Any]) -> bool:
        """Whether two plain schemas surely have no value in common."""
        kinds = [{"number" if name == "integer" else name for name in types_of(schema)} for schema in (one, two)]
        if not kinds[0] & kinds[1]:
            return True
        texts = [self.literal_texts(schema) for schema in (one, two)]
        if texts[0] is not None and texts[1] is not None:
            return texts[0].isdisjoint(texts[1])
        if kinds != [{"object"}, {"object"}]:
            return False
        for name in set(one.get("required", [])) & set(two.get("required", [])):
            inside = [self.literal_texts(schema["properties"][name]) for schema in (one, two)]
            if inside[0] is not None and inside[1] is not None and inside[0].isdisjoint(inside[1]):
                return True
        return False

    def literal_texts(self, schema: dict[str, Any]) -> frozenset[str] | None:
        """The values of a schema that has but literal ones."""
        if id(schema) not in self.texts:
            found: set[str] | None = set()
            for option in options_of(self.root, schema):
                if "enum" not in option and "const" not in option:
                    found = None
                    break
                found.update(_spell(value) for value in option.get("enum", [option.get("const")]))
            self.texts[id(schema)] = None if found is None else frozenset(found)
        return self.texts[id(schema)]
