"""Shapes, number ranges, endings of half-written values: against brute force and jsonschema."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moonbase.chat.completion import completion, count_characters, finish_number
from moonbase.chat.grammar import at_least, at_most, json_grammar, opens_thinking
from moonbase.chat.shape import Number, any_object, build_shape, json_bytes
from moonbase.chat.styles import STYLES


def numerals(before: int, after: int) -> list[str]:
    """Every numeral without sign of so many digits."""
    wholes = [str(number) for number in range(10**before)]
    fractions = [f".{number:0{digits}d}" for digits in range(1, after + 1) for number in range(10**digits)]
    return [whole + fraction for whole in wholes for fraction in ("", *fractions)]


@pytest.mark.parametrize("bound", ["0", "1", "9", "10", "19", "57", "99", "0.5", "0.09", "3.99", "10.01", "42.1"])
@pytest.mark.parametrize("is_open", [False, True])
def test_ranges_as_regular_expressions_equal_comparison(bound: str, is_open: bool) -> None:
    limit = Decimal(bound)
    low, high = re.compile(at_least(limit, is_open, 2, 2)), re.compile(at_most(limit, is_open, 2))
    for text in numerals(2, 2):
        value = Decimal(text)
        assert bool(low.fullmatch(text)) == (value > limit or (value == limit and not is_open)), text
        assert bool(high.fullmatch(text)) == (value < limit or (value == limit and not is_open)), text


@pytest.mark.parametrize("integer", [True, False])
def test_a_number_is_finished_in_the_fewest_characters(integer: bool) -> None:
    """Brute force: every prefix of every numeral of up to two digits before and one after the point."""
    generator = random.Random(0)
    texts = [sign + text for sign in ("", "-") for text in numerals(2, 0 if integer else 1)]
    prefixes = {text[:end] for text in texts for end in range(len(text) + 1)}
    bounds = [0, 5, -5, 37, -12, 99] + ([] if integer else [0.5, -0.2, 7.3])
    for _ in range(20):
        low, high = sorted(Decimal(str(generator.choice(bounds))) for _ in "ab")
        low_open, high_open = (not integer and generator.random() < 0.5 for _ in "ab")
        shape = Number(integer, low, high, low_open, high_open)
        shortest: dict[str, str] = {}
        for text in sorted(texts, key=len):
            value = Decimal(text)
            if (low < value or (low == value and not low_open)) and (value < high or (value == high and not high_open)):
                if not (text.startswith("-") and low >= 0):
                    for end in range(len(text) + 1):
                        shortest.setdefault(text[:end], text)
        for prefix in prefixes:
            found = finish_number(shape, prefix.encode())
            if prefix in shortest:
                assert found is not None and len(prefix) + len(found) == len(shortest[prefix]), (shape, prefix, found)
            elif found is not None:
                # More digits than brute force tries may still fit between the bounds.
                assert len(found.partition(b".")[2]) > 1 or "." in prefix, (shape, prefix, found)


def cut_everywhere(schema: dict[str, Any], value: Any) -> None:
    shape, text = build_shape(schema), json_bytes(value)
    validator = jsonschema.Draft202012Validator(schema)
    assert completion(shape, text) == b""
    for end in range(len(text)):
        ending = completion(shape, text[:end])
        assert ending is not None, text[:end]
        validator.validate(json.loads(text[:end] + ending))
        assert len(ending) <= len(text) - end


MEMBERS = {"city": {"type": "string", "minLength": 3}, "code": {"enum": ["é1", "é22", 7]}}
PLACE = {"type": "object", "properties": MEMBERS}
LINK = {"type": "object", "properties": {"next": {"$ref": "#"}, "v": {"type": ["integer", "null"]}}, "required": ["v"]}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, 'a "quoted" \\ \n \x01 ü 北京 🌙 end'),
        ({"type": "string", "minLength": 3, "maxLength": 6}, "🌙🌙ü北"),
        ({"type": "number", "minimum": -3.25, "exclusiveMaximum": 100}, -3.1875),
        ({"type": "number"}, -1.5e-7),
        ({"type": "integer", "minimum": 1000, "maximum": 5000, "multipleOf": 7}, 1001),
        ({}, {"a": [1, {"b": None, "": True}], "ü": "x", "c": {"d": []}}),
        ({**PLACE, "required": ["code"]}, {"city": "Köln", "code": "é22"}),
        ({**PLACE, "additionalProperties": {"type": "integer"}}, {"code": "é1", "cit": 4, "citys": 5}),
        ({"type": "array", "items": {"anyOf": [PLACE, {"type": "array", "items": PLACE}]}, "minItems": 2},
         [[{"city": "Rom"}], {"code": 7}, [], {}]),
        ({"type": "array", "items": {"enum": ["a", "bb", 3]}, "uniqueItems": True, "minItems": 2}, ["bb", 3]),
        (LINK, {"next": {"next": {"v": 1}, "v": None}, "v": 12}),
    ],
)  # fmt: skip
def test_a_value_cut_anywhere_is_finished_validly(schema: dict[str, Any], value: Any) -> None:
    cut_everywhere(schema, value)


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (rb'"\ud83d', rb'\udc00"'),
        (rb'"\ud83d\uD', rb'c00"'),
        (rb'"\uD', rb'000"'),
        (rb'"\u', rb'0000"'),
        (b'"\\', b'n"'),
        (b'"\xf0\x9f', b'\x80\x80"'),
        (b'"\xe0', b'\xa0\x80"'),
        (b'"\xf0', b'\x90\x80\x80"'),
        (b'"a', b'"'),
    ],
)
def test_half_a_character_is_finished(text: bytes, ending: bytes) -> None:
    assert completion(build_shape({"type": "string"}), text) == ending
    json.loads(text + ending).encode()


def test_text_that_no_ending_can_mend() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    shape = build_shape(schema)
    for text in (b"[", b'{"b', b'{"a":10', b'{"a":-"', b'{"a":1,', b'{"a":1}}', b"{ "):
        assert completion(shape, text) is None, text


def test_characters_are_counted_as_a_validator_counts_them() -> None:
    for text in ("", "abc", "ü🌙", '"\\/\n', "北京"):
        for ascii_only in (False, True):
            assert count_characters(json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode()) == len(text)


def test_objects_say_what_they_do_not_list() -> None:
    """Listed members only, unless the schema speaks of others or lists none."""
    closed = build_shape({"type": "object", "properties": {"a": {"type": "null"}}})
    assert completion(closed, b'{"b') is None and completion(closed, b'{"a') == b'":null}'
    for schema in ({"type": "object"}, {"type": "object", "properties": {"a": {}}, "additionalProperties": True}):
        assert completion(build_shape(schema), b'{"b') == b'":0}'
    assert completion(any_object(), b'{"b":[[') == b"]]}"


def test_a_further_key_never_hides_a_listed_one() -> None:
    schema = {"type": "object", "properties": {"ab": {"type": "null"}}, "additionalProperties": {"type": "integer"}}
    assert completion(build_shape(schema), b'{"ab"') == b":null}"
    assert completion(build_shape(schema), b'{"\\u0061') is None
    assert "~" in json_grammar(build_shape(schema))


def test_grammars_are_small_text(shared_data: Path) -> None:
    for path in sorted((shared_data / "tool-schemas").glob("*/valid.jsonl")):
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            text = json_grammar(build_shape(json.loads(line)))
            assert text.startswith("%llguidance") and "\nstart: v0\n" in text
            assert len(text) < 3000 + 20 * len(line)


def test_only_one_style_begins_its_reasoning_itself() -> None:
    assert [opens_thinking(style, False) for style in STYLES] == [False, True, False]
    assert not opens_thinking("kimi-k2-thinking", True)


NODE = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"},
        {"type": "null"}], "default": None}}, "required": ["value"]}
TREE = {"type": "object", "properties": {"kids": {"anyOf": [{"type": "array", "items": {"$ref": "#"}},
                                                            {"type": "null"}]}}, "required": ["kids"]}
STEPS = {f"s{number}": {"$ref": f"#/$defs/s{number + 1}"} for number in range(20)}
CHAIN = {"$ref": "#/$defs/s0", "$defs": {**STEPS, "s20": {"type": "object", "properties": {
    "next": {"anyOf": [{"$ref": "#/$defs/s0"}, {"type": "null"}]}}}}}


@pytest.mark.parametrize(
    ("schema", "opening", "ending"),
    [
        ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, b'{"value":1,"next":', b"}"),
        (TREE, b'{"kids":[', b"]}"),
        (CHAIN, b'{"next":', b"}"),
        ({}, b"[", b"]"),
    ],
)
def test_nesting_does_not_exhaust_the_stack(schema: dict[str, Any], opening: bytes, ending: bytes) -> None:
    found = completion(build_shape(schema), opening * 500)
    assert found is not None and found.endswith(ending * 499)


def test_arrays_whose_first_items_are_of_their_own_kinds() -> None:
    pair = [{"type": "integer"}, {"enum": ["left", "right"]}]
    cut_everywhere({"type": "array", "prefixItems": pair, "minItems": 2, "maxItems": 2}, [12, "right"])
    cut_everywhere({"type": "array", "prefixItems": pair, "items": {"type": "null"}, "minItems": 3}, [1, "left", None])
    cut_everywhere({"type": "array", "prefixItems": pair}, [1, "right", {"a": "b"}])
    shape = build_shape({"type": "array", "prefixItems": pair, "items": {"type": "null"}})
    for text in (b"[]", b"[1]", b'[1,"left"]', b'[1,"left",null,null]'):
        assert completion(shape, text) == b""
    for text in (b'["', b"[1,2", b'[1,"left",3'):
        assert completion(shape, text) is None


def test_hundredths() -> None:
    schema = {"type": "number", "multipleOf": 0.01, "minimum": 0.005, "exclusiveMaximum": 0.03}
    shape = build_shape(schema)
    assert shape.shortest == b"0.01" and completion(shape, b"0.0") == b"1" and completion(shape, b"0.02") == b""
    assert completion(shape, b"0.011") is None
