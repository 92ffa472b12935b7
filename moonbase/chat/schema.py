"""Which JSON Schemas a tool, or a reply, may have; and what is wrong with one that is refused.

The language is Moonshot's flavour of JSON Schema: the part of Draft 2020-12 that can be enforced while a model writes,
with readings that leave no room for two opinions. A keyword that would not be enforced is refused, never ignored;
only tools that do not ask for `strict` are first brought into this language (`relax.py`), with notes of what is lost.

Rules
- A schema is an object. Keywords outside the table below are refused by name, wherever they stand.
- `type` is one of the seven names, or a list of them without repeats. Without it, the keywords tell (`properties` means
  object); with no such keyword either, any JSON value will do.
- A keyword belongs to a type: `minLength` beside `"type": "object"` is refused. A list of types takes no keyword
  but `enum` and notes, except that "T or null" takes what T takes.
- `$ref` is `#` or `#/$defs/...` and leads somewhere; beside it only notes. `anyOf`, `oneOf` and `allOf` are lists of
  schemas; beside them only notes, so that a `type` belongs into their items. Of `oneOf` no two items may have a value
  in common, as far as can be seen from their types, literals and required literal members; `allOf` has one item.
- `required` names members that `properties` has. Names are not empty; `$ref`, `$defs`, `$id` and `additionalProperties`
  are reserved; inside `$defs` no name holds `/`, or a reference could not spell its way.
- `enum` has 1 to 1,000 values, each of a stated type. Bounds are numbers of the type, not negative for lengths, the
  lower not above the upper. `multipleOf` is a positive integer, or for numbers 0.1, 0.01, ... 0.000001.
  `uniqueItems: true` needs items with an `enum` of at most 64 values, and no `prefixItems`.
- `$id`, `$schema` and `$defs` stand at the root. Schemas nest at most 9 deep, references followed, and are at most
  2,000 in all.
- At most 64 choices in a `oneOf`; a `pattern` has at most 1,000 states, and states times `minLength` at most 100,000.
- A value can be finished: what is required, and the items of arrays, must not lead into itself for ever.
- `format` is a note, as in Draft 2020-12. `pattern` keeps to what `pattern.py` can follow.

An object that lists `properties` and does not speak of `additionalProperties` gets the listed members only.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from moonbase.chat.exclusive import Exclusive
from moonbase.chat.finite import endless_reference, ends
from moonbase.chat.pattern import PatternError, check_pattern, compile_pattern
from moonbase.chat.relax import relax
from moonbase.chat.schema_walk import (
    COMBINERS,
    KEYWORDS_OF,
    KNOWN,
    MAX_UNIQUE,
    NOTES,
    NUMBER_KEYWORDS,
    ROOT_ONLY,
    TYPED,
    TYPES,
    SchemaError,
    children,
    decimal_places,
    matches_type,
    member_path,
    options_of,
    parse_schema,
    resolve,
    show,
    subschemas,
    types_of,
)

__all__ = ["Costs", "PreparedTools", "SchemaError", "check_schema", "check_tools", "prepare_tools"]

RESERVED_NAMES = frozenset({"$ref", "$defs", "$id", "additionalProperties"})
MAX_ENUM = 1000
MAX_DEPTH = 9
MAX_SCHEMAS = 2000
MAX_PREFIX = 64
MAX_COSTS = {"schemas": 3000, "enum values": 10_000, "pattern states": 4000}
"""Of all schemas of a request together."""
MAX_REFERENCES = 64
"""Steps from the root to any place, references among them."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_tools(tools: Any, path: str = "tools") -> list[str]:
    """Raise SchemaError for anything but a list of OpenAI function tools whose parameters are checked objects.

    Returns notes, each with its place: what of the schemas will not be enforced. Tools with `strict: true` have none.
    """
    return list(prepare_tools(tools, path).notes)


class PreparedTools(NamedTuple):
    """Checked tools: for each the schema that is enforced, and what of the client's schemas is not."""

    parameters: list[dict[str, Any]]
    notes: list[str]


def prepare_tools(tools: Any, path: str = "tools") -> PreparedTools:
    """Check tools and bring their parameters into the language above. Raises SchemaError as `check_tools` does."""
    try:
        text = json.dumps(tools)
    except (TypeError, ValueError, RecursionError):
        raise SchemaError(path, "must be an array of tools in JSON") from None
    try:
        return _prepare(text, path)
    except RecursionError:
        raise SchemaError(path, "a value in it nests too deep") from None


@lru_cache(maxsize=32)
def _prepare(text: str, path: str) -> PreparedTools:
    tools = json.loads(text)
    if not isinstance(tools, list):
        raise SchemaError(path, "must be an array of tools")
    seen: set[str] = set()
    prepared, costs = PreparedTools([], []), Costs()
    for number, tool in enumerate(tools):
        place = f"{path}[{number}]"
        if not isinstance(tool, dict):
            raise SchemaError(place, 'a tool must be an object {"type": "function", "function": {...}}')
        if tool.get("type", "function") != "function":
            raise SchemaError(f"{place}.type", f"only \"function\" tools are known, not {show(tool['type'])}")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise SchemaError(f"{place}.function", "must be an object with a name")
        place += ".function"
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise SchemaError(f"{place}.name", f"{show(name)} is no tool name: 1 to 64 of a-z, A-Z, 0-9, _ and -")
        if name in seen:
            raise SchemaError(f"{place}.name", f"{show(name)} is the name of an earlier tool")
        seen.add(name)
        if not isinstance(function.get("description") or "", str):
            raise SchemaError(f"{place}.description", "description must be a string")
        prepared.parameters.append(_parameters(function, place, prepared.notes, costs))
    return prepared


def _parameters(function: dict[str, Any], place: str, notes: list[str], costs: Costs) -> dict[str, Any]:
    """The checked parameters of one function; without `strict` relaxed first."""
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise SchemaError(f"{place}.strict", "strict must be a boolean")
    parameters, place = function.get("parameters"), f"{place}.parameters"
    if parameters is None or (parameters == {} and not strict):
        return {"type": "object", "properties": {}}
    if strict or not isinstance(parameters, dict):
        check_schema(parameters, place, costs=costs)
    else:
        parameters = relax(parameters, place, notes)
        check_schema(parameters, place, notes, costs)
    if any(types_of(option) != ("object",) for option in options_of(parameters, parameters)):
        raise SchemaError(place, 'arguments are an object: "type" must be "object"')
    return parameters


class Costs:
    """What schemas cost, summed over a request, so that checking and compiling them stays a matter of milliseconds."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(MAX_COSTS, 0)

    def add(self, what: str, number: int, path: str) -> None:
        """Raises SchemaError where the sum is too much."""
        self.spent[what] += number
        if self.spent[what] > MAX_COSTS[what]:
            raise SchemaError(path, f"more than {MAX_COSTS[what]:,} {what} in one request")


def check_schema(
    schema: Any, path: str = "schema", notes: list[str] | None = None, costs: Costs | None = None
) -> None:
    """Raise SchemaError unless `schema` (parsed, or JSON text) keeps the rules above.

    With `notes`, a `oneOf` whose items cannot be told apart is made an `anyOf`, and noted. `costs` sums over several.
    """
    if isinstance(schema, str | bytes):
        schema = parse_schema(schema, path)
    if not isinstance(schema, dict):
        raise SchemaError(path, "a schema must be an object")
    everything = list(islice(subschemas(schema, path), MAX_SCHEMAS + 1))
    if len(everything) > MAX_SCHEMAS:
        raise SchemaError(path, f"more than {MAX_SCHEMAS} schemas in one")
    for inner, place in everything:
        unknown = sorted(map(str, inner.keys() - KNOWN)) if isinstance(inner, dict) else []
        if unknown:
            raise SchemaError(place, f"unsupported keywords: {', '.join(unknown)}")
    costs = costs or Costs()
    costs.add("schemas", len(everything), path)
    _Checker(schema, path, everything, notes, costs).check_root()


class _Checker:
    def __init__(
        self, root: dict[str, Any], path: str, everything: list[tuple[Any, str]], notes: list[str] | None, costs: Costs
    ) -> None:
        self.root = root
        self.path = path
        self.all = everything
        self.schemas = {id(inner) for inner, _ in everything}
        self.notes = notes
        self.costs = costs

    def check_root(self) -> None:
        for keyword in ("$id", "$schema"):
            if not isinstance(self.root.get(keyword, ""), str):
                raise SchemaError(f"{self.path}.{keyword}", f"{keyword} must be a string")
        definitions = self.root.get("$defs", {})
        if not isinstance(definitions, dict):
            raise SchemaError(f"{self.path}.$defs", "$defs must be an object")
        for name, inner in definitions.items():
            place = member_path(f"{self.path}.$defs", name)
            if not isinstance(inner, dict):
                raise SchemaError(place, "$defs schema must be object")
            self.check_names_within(inner, place)
            if not name or "/" in name:
                raise SchemaError(place, "a name in $defs must not be empty or contain '/' character")
        for inner, place in self.all:
            self.check_one(inner, place)
        done: dict[int, int] = {}
        self.check_depth(self.root, self.path, 1, frozenset(), done)
        for name, inner in definitions.items():
            self.check_depth(inner, member_path(f"{self.path}.$defs", name), 1, frozenset(), done)
        endless = endless_reference(self.root, self.all)
        if endless:
            raise SchemaError(endless, "infinite recursion: the schema leads back to itself and nowhere else")
        self.check_exclusive()
        if not ends(self.root, self.all):
            raise SchemaError(self.path, "infinite recursion: no value of this schema can ever be finished")

    def check_names_within(self, definition: dict[str, Any], path: str) -> None:
        for inner, place in subschemas(definition, path):
            names = inner.get("properties") if isinstance(inner, dict) else None
            for name in names if isinstance(names, dict) else ():
                if "/" in name:
                    raise SchemaError(member_path(f"{place}.properties", name),
                                      "a property name inside $defs must not contain '/' character")

    def check_one(self, schema: Any, path: str) -> None:
        """The rules for one schema by itself, without those inside it."""
        if not isinstance(schema, dict):
            inside = re.search(r"\.(anyOf|oneOf|allOf)\[\d+\]$", path)
            raise SchemaError(path, f"schema in {inside[1] if inside else 'properties'} must be an object")
        self.check_types(schema, path)
        for keyword in ("title", "description", "$comment", "format"):
            if not isinstance(schema.get(keyword, ""), str):
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be a string")
        combiner = next((keyword for keyword in COMBINERS if keyword in schema), None)
        if combiner:
            self.check_combiner(schema, combiner, path)
        else:
            self.check_keywords(schema, path)
        for keyword in sorted(ROOT_ONLY):
            if keyword in schema and schema is not self.root:
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be at root level")
        if combiner:
            return
        self.check_enum(schema, path)
        self.check_object(schema, path)
        self.check_array(schema, path)
        self.check_lengths(schema, path, "minLength", "maxLength")
        if "pattern" in schema:
            self.check_pattern(schema["pattern"], schema.get("minLength", 0), f"{path}.pattern")
        self.check_numbers(schema, path)

    def check_types(self, schema: dict[str, Any], path: str) -> None:
        if "type" not in schema:
            return
        stated = schema["type"]
        if isinstance(stated, list):
            for number, name in enumerate(stated):
                if not isinstance(name, str) or name not in TYPES:
                    raise SchemaError(f"{path}.type[{number}]", f"invalid type in type array: {show(name)}")
            if not stated or len(set(stated)) < len(stated):
                raise SchemaError(f"{path}.type", "a type array must not be empty or repeat a type")
        elif not isinstance(stated, str) or stated not in TYPES:
            raise SchemaError(f"{path}.type", f"invalid type {show(stated)}: known are {', '.join(TYPES)}")

    def check_combiner(self, schema: dict[str, Any], combiner: str, path: str) -> None:
        beside = [keyword for keyword in schema if keyword not in NOTES | ROOT_ONLY | {combiner}]
        if combiner == "$ref":
            reference = schema["$ref"]
            if not isinstance(reference, str):
                raise SchemaError(f"{path}.$ref", "$ref must be a string")
            if "type" in beside:
                raise SchemaError(f"{path}.type", "when using $ref, type should be defined in the referenced schema "
                                                  "instead of the parent schema")
        elif not isinstance(schema[combiner], list) or not schema[combiner]:
            raise SchemaError(f"{path}.{combiner}", f"{combiner} must be an array of schemas")
        elif "type" in beside:
            raise SchemaError(f"{path}.type", f"when using {combiner}, type should be defined in {combiner} items "
                                              "instead of the parent schema")
        if beside:
            raise SchemaError(f"{path}.{beside[0]}", f"{beside[0]} is not allowed at the same level as {combiner}")
        if combiner == "$ref":
            if reference != "#" and not reference.startswith("#/$defs/"):
                raise SchemaError(f"{path}.$ref", f"references must start with #/$defs/, not {show(reference)}")
            target = resolve(self.root, reference)
            if not isinstance(target, dict):
                raise SchemaError(f"{path}.$ref", f"$defs not found for reference {show(reference)}")
            if id(target) not in self.schemas:
                raise SchemaError(f"{path}.$ref", f"{show(reference)} leads to something that is no schema")
        elif combiner == "allOf" and len(schema["allOf"]) > 1:
            raise SchemaError(f"{path}.allOf", "allOf with several schemas is not supported: write their sum as one")

    def check_keywords(self, schema: dict[str, Any], path: str) -> None:
        """Whether every keyword belongs to the type."""
        given = [keyword for keyword in schema if keyword in TYPED]
        stated = types_of(schema)
        if "type" not in schema:
            allowed = set(KEYWORDS_OF[stated[0]]) if given else set()
            for keyword in given:
                if keyword not in allowed:
                    raise SchemaError(path, f"{keyword} and {given[0]} belong to different types: give a type")
            return
        wanted = [name for name in stated if name != "null"]
        allowed = {keyword for name in wanted for keyword in KEYWORDS_OF[name]} if len(wanted) == 1 else set()
        known_elsewhere = {keyword for name in wanted for keyword in KEYWORDS_OF[name]}
        wrong = [keyword for keyword in given if keyword not in known_elsewhere]
        if wrong:
            raise SchemaError(path, f"invalid keywords: {', '.join(wrong)} (not for type {', '.join(stated)})")
        if len(stated) > 1:
            for keyword in schema:
                if (keyword in TYPED and keyword not in allowed) or keyword in ("$id", "$schema"):
                    raise SchemaError(f"{path}.{keyword}", f"{keyword} is not allowed in combination with multiple "
                                                           "types: write anyOf with one schema for each type")

    def check_enum(self, schema: dict[str, Any], path: str) -> None:
        if "const" in schema:
            self.check_literal(schema, schema["const"], f"{path}.const", "const value")
        if "enum" not in schema:
            return
        values = schema["enum"]
        if not isinstance(values, list) or not values:
            raise SchemaError(f"{path}.enum", "enum must be an array with at least one value")
        if len(values) > MAX_ENUM:
            raise SchemaError(f"{path}.enum", f"enum array cannot have more than {MAX_ENUM} items, not {len(values)}")
        if "const" in schema:
            raise SchemaError(f"{path}.enum", "enum is not allowed beside const")
        types = schema.get("type")
        for name in ("object", "array"):
            if isinstance(types, list) and len(types) > 1 and name in types:
                raise SchemaError(f"{path}.type", f"type {name} is not allowed in combination with enum")
        self.costs.add("enum values", len(values), f"{path}.enum")
        for number, value in enumerate(values):
            self.check_literal(schema, value, f"{path}.enum[{number}]", "enum value")

    def check_literal(self, schema: dict[str, Any], value: Any, path: str, what: str) -> None:
        structural = ("properties", "required", "items", "prefixItems", *KEYWORDS_OF["string"])
        limits = [keyword for keyword in structural if keyword in schema]
        if limits:
            raise SchemaError(path, f"{what}: {limits[0]} beside literal values is not supported")
        types = types_of(schema)
        if any(matches_type(value, name) for name in types):
            return
        if types in (("number",), ("integer",)):
            raise SchemaError(path, f"{what} {show(value)} is not a valid {types[0]}")
        raise SchemaError(path, f"{what} {show(value)} does not match any type of {', '.join(types)}")

    def check_object(self, schema: dict[str, Any], path: str) -> None:
        members = schema.get("properties", {})
        if not isinstance(members, dict):
            raise SchemaError(f"{path}.properties", "properties must be an object")
        for name, inner in members.items():
            place = member_path(f"{path}.properties", name)
            if not name:
                raise SchemaError(place, "property name cannot be empty")
            if name in RESERVED_NAMES:
                raise SchemaError(place, f"property name {show(name)} is reserved for JSON Schema")
            if not isinstance(inner, dict):
                raise SchemaError(place, "the schema of a property must be an object")
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise SchemaError(f"{path}.required", "required must be an array of property names")
        for number, name in enumerate(required):
            place = f"{path}.required[{number}]"
            if not isinstance(name, str):
                raise SchemaError(place, "a required property name must be a string")
            if "properties" not in schema:
                raise SchemaError(place, f"{show(name)} is required but the 'properties' keyword is missing")
            if name not in members:
                raise SchemaError(place, f"{show(name)} is required but not among properties")
        if not isinstance(schema.get("additionalProperties", True), bool | dict):
            raise SchemaError(f"{path}.additionalProperties", "additionalProperties must be a boolean or an object")

    def check_array(self, schema: dict[str, Any], path: str) -> None:
        items = schema.get("items", {})
        if not isinstance(items, dict):
            raise SchemaError(f"{path}.items", "items must be an object")
        self.check_lengths(schema, path, "minItems", "maxItems")
        unique = schema.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise SchemaError(f"{path}.uniqueItems", "uniqueItems must be a boolean")
        prefix = schema.get("prefixItems", [{}])
        if not isinstance(prefix, list) or not prefix or not all(isinstance(inner, dict) for inner in prefix):
            raise SchemaError(f"{path}.prefixItems", "prefixItems must be an array of schemas")
        if len(prefix) > MAX_PREFIX:
            raise SchemaError(f"{path}.prefixItems", f"prefixItems cannot have more than {MAX_PREFIX} schemas")
        if unique and "prefixItems" in schema:
            raise SchemaError(f"{path}.uniqueItems", "uniqueItems is not enforced beside prefixItems: leave it out")
        if unique and not (isinstance(items.get("enum"), list) and len(items["enum"]) <= MAX_UNIQUE):
            raise SchemaError(f"{path}.uniqueItems", "uniqueItems is enforced only for items with an enum of at most "
                                                     f"{MAX_UNIQUE} values: leave it out")
        if unique and schema.get("minItems", 0) > len(items["enum"]):
            raise SchemaError(f"{path}.minItems", "minItems is more than there are different items")

    def check_lengths(self, schema: dict[str, Any], path: str, low: str, high: str) -> None:
        for keyword in (low, high):
            value = schema.get(keyword, 0)
            if not matches_type(value, "integer"):
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be an integer")
            if value < 0:
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be non-negative")
        if high in schema and schema.get(low, 0) > schema[high]:
            raise SchemaError(f"{path}.{low}", f"{low} cannot be greater than {high}")

    def check_pattern(self, pattern: Any, low: int, path: str) -> None:
        if not isinstance(pattern, str):
            raise SchemaError(path, "pattern must be a string")
        try:
            check_pattern(pattern, low)
        except PatternError as error:
            raise SchemaError(path, f"pattern {show(pattern)}: {error}") from None
        self.costs.add("pattern states", len(compile_pattern(pattern).edges), path)

    def check_numbers(self, schema: dict[str, Any], path: str) -> None:
        integer = "integer" in types_of(schema)
        for keyword in NUMBER_KEYWORDS:
            value = schema.get(keyword, 1)
            if not matches_type(value, "number"):
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be {'an integer' if integer else 'a number'}")
            if value in (float("inf"), float("-inf")) or value != value:
                raise SchemaError(f"{path}.{keyword}", f"{keyword} must be finite")
            if keyword == "multipleOf" and not integer and decimal_places(value):
                continue
            if (integer or keyword == "multipleOf") and not matches_type(value, "integer"):
                raise SchemaError(f"{path}.{keyword}", f"{keyword}: {value} is not a valid integer")
        if schema.get("multipleOf", 1) <= 0:
            raise SchemaError(f"{path}.multipleOf", "multipleOf must be positive")
        for low in ("minimum", "exclusiveMinimum"):
            for high in ("maximum", "exclusiveMaximum"):
                if low in schema and high in schema:
                    strict = "exclusiveMinimum" == low or "exclusiveMaximum" == high
                    if schema[low] > schema[high] or (strict and schema[low] == schema[high]):
                        raise SchemaError(f"{path}.{low}", f"{low} cannot be greater than {high}, and no value is left")

    def check_depth(
        self, schema: dict[str, Any], path: str, depth: int, above: frozenset[int], done: dict[int, int]
    ) -> None:
        """Nesting with references followed; one that leads back to where it stands is recursion, not depth."""
        if id(schema) in above or done.get(id(schema), 0) >= depth:
            return
        if "$ref" in schema and len(above) <= MAX_REFERENCES:
            inner = resolve(self.root, schema["$ref"])
            return self.check_depth(inner, path, depth, above | {id(schema)}, done)
        if depth > MAX_DEPTH or len(above) > MAX_REFERENCES:
            raise SchemaError(path, f"schema depth exceeds maximum limit of {MAX_DEPTH}")
        for inner, place in children(schema, path):
            if not place.startswith(f"{path}.$defs"):
                self.check_depth(inner, place, depth + 1, above | {id(schema)}, done)
        done[id(schema)] = depth

    def check_exclusive(self) -> None:
        """No two items of oneOf may have a value in common. Where notes are taken, such a oneOf becomes an anyOf."""
        exclusive = Exclusive(self.root)
        for inner, place in self.all:
            if "oneOf" not in inner:
                continue
            try:
                exclusive.check(inner, place)
            except SchemaError as error:
                if self.notes is None:
                    raise
                inner["anyOf"] = inner.pop("oneOf")
                self.notes.append(f"{place}.oneOf: read as anyOf, for {error}")
