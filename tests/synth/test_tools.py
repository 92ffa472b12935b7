"""The tools against Python's own arithmetic and published factors."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from moonbase.errors import UserError
from moonbase.synth.tools import ITEMS, TABLES, TOOLS, UNITS, number_text, run_tool


def test_the_calculator_is_python_s() -> None:
    chance = random.Random(0)
    for _ in range(500):
        first, second, third = (chance.randint(1, 999) for _ in range(3))
        text = f"{first} {chance.choice('+-*/')} ({second} {chance.choice('+-*')} {third + 1000})"
        answer = float(run_tool("calculator", {"expression": text}))
        assert answer == pytest.approx(eval(text), abs=0.0051)


@pytest.mark.parametrize("expression", ["", "1 +", "1 / 0", "2 ** 99", "x + 1", "__import__('os')", "1 if 1 else 2",
                                        "'a' * 3", "True + 1", "9" * 300, 5, None, [1]])
def test_what_is_no_sum_is_refused(expression: object) -> None:
    with pytest.raises(UserError, match="calculator: cannot compute"):
        run_tool("calculator", {"expression": expression})


@pytest.mark.parametrize(("value", "unit", "to", "wanted"), [
    (1, "mi", "km", "1.61"), (26, "km", "mi", "16.16"), (10, "ft", "m", "3.05"), (1, "in", "cm", "2.54"),
    (100, "lb", "kg", "45.36"), (1, "kg", "lb", "2.2"), (16, "oz", "lb", "1"),
    (90, "min", "h", "1.5"), (2, "h", "s", "7200"),
])  # fmt: skip
def test_units_convert_as_defined(value: int, unit: str, to: str, wanted: str) -> None:
    assert run_tool("convert", {"value": value, "unit": unit, "to": to}) == wanted


def test_converting_back_gives_what_one_began_with() -> None:
    for unit, (measure, size) in UNITS.items():
        for to, (other, other_size) in UNITS.items():
            if measure == other:
                assert Fraction(size) / Fraction(other_size) * Fraction(other_size) / Fraction(size) == 1
                assert float(run_tool("convert", {"value": 1000, "unit": unit, "to": to})) == pytest.approx(
                    1000 * size / other_size, abs=0.0051)


def test_a_table_has_one_value_for_every_item() -> None:
    values = [run_tool("lookup", {"table": table, "item": item}) for table in TABLES for item in ITEMS]
    assert all(value.isdigit() and 10 <= int(value) <= 999 for value in values) and len(set(values)) > 900
    assert values == [run_tool("lookup", {"table": table, "item": item}) for table in TABLES for item in ITEMS]


@pytest.mark.parametrize(("name", "arguments", "complaint"), [
    ("weather", {}, "there is no tool weather"), ("lookup", "{", "no JSON"),
    ("lookup", "[" * 100_000, "no JSON"), ("lookup", "[]", "must be table, item"),
    ("lookup", {"table": "price"}, "must be table, item"), ("lookup", {"table": "price", "item": 7}, "no item 7"),
    ("lookup", {"table": ["price"], "item": {}}, "no item"), ("lookup", {"table": "size", "item": 300.0}, "no item"),
    ("convert", {"value": 1, "unit": "km", "to": "kg"}, "cannot turn"),
    ("convert", {"value": True, "unit": "km", "to": "m"}, "must be a number"),
    ("convert", {"value": 1, "unit": [], "to": "m"}, "cannot turn"),
])  # fmt: skip
def test_wrong_calls_are_refused_in_words(name: str, arguments: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        run_tool(name, arguments)  # type: ignore[arg-type]


def test_numbers_are_written_shortly() -> None:
    assert [number_text(value) for value in (3.1, 4.0, 0.005, -0.001, 1e6, -2.5, 7)] == [
        "3.1", "4", "0.01", "0", "1000000", "-2.5", "7"]


def test_declarations_are_valid_tools() -> None:
    from moonbase.chat.schema import check_tools

    check_tools(list(TOOLS.values()))
