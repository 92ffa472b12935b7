"""A checked JSON Schema as a graph of what may be written: references resolved, types split, dead ends cut off.

The grammar (`grammar.py`) and the shortest ending of a half-written value (`completion.py`) are both read off this
graph, so that they cannot disagree about what a schema allows. Recursive schemas are cycles of the graph. Every shape
knows the shortest text that is one of its values; a member or an option that can never be finished is left out.

All texts are UTF-8 bytes of compact JSON, because a token may end inside a character.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from moonbase.chat.pattern import Pattern, compile_pattern
from moonbase.chat.schema import check_schema
from moonbase.chat.schema_walk import COMBINERS, SchemaError, decimal_places, matches_type, resolve, types_of

SAFE_INTEGER = 2**53 - 1
"""Integers without bounds of their own stay where every JSON reader keeps them exact (RFC 8259 §6)."""
WHOLE_DIGITS, FRACTION_DIGITS, OPEN_FRACTION_DIGITS = 16, 17, 6
"""Digits before and after the point of a number, unless its bounds have more. Few after the point where a bound itself
is excluded: a reader that rounds 9.99999999999999999 to 10 must not find it outside."""
LONGEST_MINIMUM = 16_384
"""Bytes that the shortest value of a schema may have."""
LONGEST_TOTAL = 65_536
"""Bytes that the shortest values of all its parts may have together: each is spelled in tokens."""

_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(eq=False)
class Shape:
    """What may stand in one place."""

    shortest: bytes | None = field(default=None, init=False)
    """The shortest value; None: there is none."""

    def parts(self) -> list[Shape]:
        """The shapes directly inside."""
        return []

    def minimal(self) -> bytes | None:
        """The shortest value as far as the shortest of the parts are known."""
        raise AssertionError("a shape of no kind")


@dataclass(eq=False)
class Literals(Shape):
    """One of a few texts: enum, const, true, false, null."""

    texts: tuple[bytes, ...]

    def minimal(self) -> bytes | None:
        return min(self.texts, key=lambda text: (len(text), text), default=None)


@dataclass(eq=False)
class String(Shape):
    """`low` to `high` characters (code points), all of them if there is no pattern."""

    low: int = 0
    high: int | None = None
    pattern: Pattern | None = None

    def minimal(self) -> bytes | None:
        if self.pattern is not None:
            high = LONGEST_MINIMUM if self.high is None else self.high
            text = self.pattern.rest(self.pattern.initial, self.low, high) if self.low < LONGEST_MINIMUM else None
            return None if text is None else json_bytes(text)
        return b'"' + b"a" * self.low + b'"' if self.low < LONGEST_MINIMUM else None


@dataclass(eq=False)
class Number(Shape):
    """A number from `low` to `high`; with `step`, a multiple of it. Integers have no point and no exponent."""

    integer: bool
    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False
    step: int = 1
    places: int | None = None
    """Digits after the point at most, with no exponent: a multiple of 0.01 has two."""

    def digits(self) -> tuple[int, int]:
        """The most digits before and after the point."""
        before, after = WHOLE_DIGITS, OPEN_FRACTION_DIGITS if self.low_open or self.high_open else FRACTION_DIGITS
        if self.places is not None:
            # As a double, the number must still be told from its neighbours of so many places.
            before, after = WHOLE_DIGITS - 1 - self.places, self.places
        for bound in (self.low, self.high):
            if bound is not None:
                whole, _, fraction = f"{abs(bound):f}".partition(".")
                before, after = max(before, len(whole)), max(after, len(fraction))
        return before, 0 if self.integer else after

    def magnitudes(self) -> list[tuple[bytes, Decimal, Decimal | None, bool, bool]]:
        """The range without signs: for each sign its text, then lowest, highest, and whether these are excluded."""
        zero, found = Decimal(0), []
        if self.high is None or self.high > 0 or (self.high == 0 and not self.high_open):
            below = self.low is None or self.low < 0
            found.append((b"", zero if below else self.low, self.high, self.low_open and not below, self.high_open))
        if self.low is None or self.low < 0:
            above = self.high is None or self.high > 0
            lowest, highest = zero if above else -self.high, None if self.low is None else -self.low
            found.append((b"-", lowest, highest, self.high_open and not above, self.low_open))
        return found

    def minimal(self) -> bytes | None:
        from moonbase.chat.completion import finish_number

        return finish_number(self, b"")


@dataclass(eq=False)
class Array(Shape):
    """`low` to `high` items, the first as `prefix` says, the others as `items` does; with `unique`, a selection of
    literal items in their order."""

    items: Shape
    low: int = 0
    high: int | None = None
    unique: bool = False
    prefix: tuple[Shape, ...] = ()

    def parts(self) -> list[Shape]:
        return [*self.prefix, self.items]

    def item(self, number: int) -> Shape:
        """What item `number`, from 0, must be."""
        return self.prefix[number] if number < len(self.prefix) else self.items

    def minimal(self) -> bytes | None:
        if self.low == 0:
            return b"[]"
        if self.unique:
            assert isinstance(self.items, Literals)
            if self.low > len(self.items.texts):
                return None
            chosen = sorted(range(len(self.items.texts)), key=lambda index: len(self.items.texts[index]))[: self.low]
            return b"[" + b",".join(self.items.texts[index] for index in sorted(chosen)) + b"]"
        if self.low > LONGEST_MINIMUM:
            return None
        found = [part.shortest for part in self.prefix[: self.low]]
        if self.low > len(self.prefix):
            found.append(self.items.shortest)
        if None in found:
            return None
        items = [text or b"" for text in found]
        times = self.low - len(self.prefix)
        if sum(map(len, items)) + self.low + (times * len(items[-1]) if times > 0 else 0) > LONGEST_MINIMUM:
            return None
        return b"[" + b",".join([*items, *items[-1:] * max(0, times - 1)]) + b"]"


@dataclass(eq=False)
class Member:
    """One named member of an object; `key` is its name as JSON text."""

    key: bytes
    shape: Shape
    required: bool


@dataclass(eq=False)
class Object(Shape):
    """Members in the order of the schema, then, where `others` is not None, any with further names."""

    members: list[Member] = field(default_factory=list)
    others: Shape | None = None
    taken: frozenset[bytes] = frozenset()
    """Keys that further members must not have: all that the schema names."""

    def parts(self) -> list[Shape]:
        return [member.shape for member in self.members] + ([self.others] if self.others else [])

    def minimal(self) -> bytes | None:
        texts = []
        for member in self.members:
            if member.required:
                if member.shape.shortest is None:
                    return None
                texts.append(member.key + b":" + member.shape.shortest)
        text = b"{" + b",".join(texts) + b"}"
        return text if len(text) <= LONGEST_MINIMUM else None


@dataclass(eq=False)
class Choice(Shape):
    """Any one of several."""

    options: list[Shape] = field(default_factory=list)

    def parts(self) -> list[Shape]:
        return self.options

    def minimal(self) -> bytes | None:
        found = [option.shortest for option in self.options if option.shortest is not None]
        return min(found, key=lambda text: (len(text), text), default=None)


def json_bytes(value: Any) -> bytes:
    """Compact JSON, characters as they are."""
    return _compact(value).encode("utf-8", "replace")


def build_shape(schema: dict[str, Any], path: str = "schema") -> Shape:
    """The shape of a schema, checked first. Raises SchemaError, also where no value can fit."""
    try:
        check_schema(schema, path)
        root = _Builder(schema).build(schema)
    except RecursionError:
        raise SchemaError(path, "the schema, or a value in it, nests too deep") from None
    settle(root)
    if root.shortest is None:
        raise SchemaError(path, f"no value of at most {LONGEST_MINIMUM:,} bytes fits this schema")
    if sum(len(text) for text in {shape.shortest for shape in walk(root)} if text) > LONGEST_TOTAL:
        raise SchemaError(path, f"the shortest values of its parts have more than {LONGEST_TOTAL:,} bytes together")
    return root


def any_shape() -> Shape:
    """Any JSON value."""
    shape = _Builder({}).anything()
    settle(shape)
    return shape


def any_object() -> Object:
    """Any JSON object."""
    shape = Object(others=any_shape())
    settle(shape)
    return shape


def minimal_instance(schema: dict[str, Any]) -> Any:
    """The value with the shortest text that a schema allows. Raises SchemaError where there is none."""
    shortest = build_shape(schema).shortest
    assert shortest is not None
    return json.loads(shortest)


def walk(root: Shape) -> Iterator[Shape]:
    """Every shape of a graph once."""
    seen, stack = {id(root)}, [root]
    while stack:
        shape = stack.pop()
        yield shape
        for part in reversed(shape.parts()):
            if id(part) not in seen:
                seen.add(id(part))
                stack.append(part)


def settle(root: Shape) -> None:
    """Find every shape's shortest value, then cut off what has none.

    Texts only ever get shorter, from the leaves up, until nothing changes: the least fixed point of the grammar.
    """
    shapes = list(walk(root))
    leaves = [shape for shape in shapes if not shape.parts()]
    for shape in leaves:
        shape.shortest = shape.minimal()
    inner = [shape for shape in reversed(shapes) if shape.parts()]
    changed = True
    while changed:
        changed = False
        for shape in inner:
            text = shape.minimal()
            if text is not None and (shape.shortest is None or len(text) < len(shape.shortest)):
                shape.shortest, changed = text, True
    for shape in inner:
        if isinstance(shape, Choice):
            shape.options = [option for option in shape.options if option.shortest is not None]
        elif isinstance(shape, Object):
            shape.members = [member for member in shape.members if member.shape.shortest is not None]
            if shape.others is not None and shape.others.shortest is None:
                shape.others = None
        elif isinstance(shape, Array):
            for number, part in enumerate(shape.parts()):
                if part.shortest is None:
                    shape.high = number if shape.high is None else min(shape.high, number)


class _Builder:
    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.made: dict[int, Shape] = {}
        self._anything: Choice | None = None

    def anything(self) -> Shape:
        if self._anything is None:
            self._anything = Choice()
            self._anything.options = [
                Literals((b"true", b"false", b"null")), self.number({}, integer=False), String(),
                Array(self._anything), Object(others=self._anything),
            ]
        return self._anything

    def build(self, schema: dict[str, Any]) -> Shape:
        """Schemas already on the way are found again, which closes the cycles."""
        if id(schema) in self.made:
            return self.made[id(schema)]
        if not any(keyword in schema for keyword in ("enum", "const", "type", *COMBINERS)):
            types = types_of(schema)
            if len(types) > 1:
                return self.anything()
        choice = Choice()
        self.made[id(schema)] = choice
        if "$ref" in schema:
            choice.options = [self.build(resolve(self.root, schema["$ref"]))]
            return choice
        for combiner in COMBINERS[1:]:
            if combiner in schema:
                choice.options = [self.build(option) for option in schema[combiner]]
                return choice
        if "enum" in schema or "const" in schema:
            choice.options = [self.literals(schema)]
            return choice
        types = types_of(schema)
        choice.options = [self.typed(schema, name) for name in types if not (name == "integer" and "number" in types)]
        return choice

    def literals(self, schema: dict[str, Any]) -> Shape:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        types = types_of(schema)
        kept = [value for value in values if any(matches_type(value, name) for name in types)]
        kept = [value for value in kept if not matches_type(value, "number") or _within(schema, value)]
        return Literals(tuple(dict.fromkeys(json_bytes(value) for value in kept)))

    def typed(self, schema: dict[str, Any], name: str) -> Shape:
        if name == "object":
            return self.object(schema)
        if name == "array":
            unique = schema.get("uniqueItems", False)
            items = self.literals(schema["items"]) if unique else self.build(schema.get("items", {}))
            prefix = tuple(self.build(inner) for inner in schema.get("prefixItems", []))
            return Array(items, int(schema.get("minItems", 0)), _whole(schema.get("maxItems")), unique, prefix)
        if name == "string":
            pattern = compile_pattern(schema["pattern"]) if "pattern" in schema else None
            return String(int(schema.get("minLength", 0)), _whole(schema.get("maxLength")), pattern)
        if name in ("number", "integer"):
            return self.number(schema, name == "integer")
        return Literals((b"null",) if name == "null" else (b"true", b"false"))

    def object(self, schema: dict[str, Any]) -> Shape:
        named = schema.get("properties", {})
        required = set(schema.get("required", []))
        members = [Member(json_bytes(name), self.build(inner), name in required) for name, inner in named.items()]
        additional = schema.get("additionalProperties", "properties" not in schema)
        others = self.build(additional) if isinstance(additional, dict) else self.anything() if additional else None
        return Object(members, others, frozenset(member.key for member in members))

    def number(self, schema: dict[str, Any], integer: bool) -> Number:
        places = decimal_places(schema.get("multipleOf", 1)) if not integer else 0
        step = 0 if places else int(schema.get("multipleOf", 0))
        lows = [(_decimal(schema[name]), name[0] == "e") for name in ("minimum", "exclusiveMinimum") if name in schema]
        highs = [(_decimal(schema[name]), name[0] != "e") for name in ("maximum", "exclusiveMaximum") if name in schema]
        low, low_open = max(lows, default=(None, False))
        high, high_closed = min(highs, default=(None, True))
        if places:
            grain = Decimal(1).scaleb(-places)
            if low is not None and low % grain:
                low, low_open = low.quantize(grain, ROUND_CEILING), False
            if high is not None and high % grain:
                high, high_closed = high.quantize(grain, ROUND_FLOOR), True
            return Number(False, low, high, low_open, not high_closed, places=places)
        if not (integer or step):
            return Number(False, low, high, low_open, not high_closed)
        # An integer has whole bounds that belong to it.
        if low is not None:
            low = Decimal(math.floor(low) + 1 if low_open else math.ceil(low))
        if high is not None:
            high = Decimal(math.floor(high) if high_closed else math.ceil(high) - 1)
        low = low if low is not None else Decimal(min(-SAFE_INTEGER, 2 * int(high or 0)))
        high = high if high is not None else Decimal(max(SAFE_INTEGER, 2 * int(low)))
        return Number(True, low, high, step=max(1, step))


def _whole(value: int | float | None) -> int | None:
    return None if value is None else int(value)


def _decimal(value: int | float) -> Decimal:
    return Decimal(repr(value))


def _within(schema: dict[str, Any], value: int | float) -> bool:
    """Whether a literal number keeps the bounds beside it."""
    return (
        value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and not ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"])
        and not ("exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"])
        and ("multipleOf" not in schema or _decimal(value) % _decimal(schema["multipleOf"]) == 0)
    )
