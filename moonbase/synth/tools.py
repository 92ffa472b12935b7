"""Three small tools that the practice dialogues call: a calculator, a unit converter and a table. All of them are
deterministic, so that every call has one right result."""

from __future__ import annotations

import ast
import hashlib
import json
import operator
from collections.abc import Mapping
from typing import Any

from moonbase.errors import UserError


def _declare(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS: dict[str, dict[str, Any]] = {
    "calculator": _declare("calculator", "Compute an expression.", expression="string"),
    "convert": _declare("convert", "Convert a value to another unit.", value="number", unit="string", to="string"),
    "lookup": _declare("lookup", "Read a value from a table.", table="string", item="number"),
}
"""Name -> declaration in OpenAI's form."""

UNITS = {
    "km": ("length", 1000.0), "m": ("length", 1.0), "cm": ("length", 0.01),
    "mi": ("length", 1609.344), "ft": ("length", 0.3048), "in": ("length", 0.0254),
    "kg": ("mass", 1.0), "g": ("mass", 0.001), "lb": ("mass", 0.45359237), "oz": ("mass", 0.028349523125),
    "h": ("time", 3600.0), "min": ("time", 60.0), "s": ("time", 1.0),
}  # fmt: skip
"""Unit -> what it measures, and how many of that measure's base unit it is."""

TABLES = ("price", "weight", "stock", "size", "age", "shelf")
ITEMS = range(100, 1000)
"""What the tables know about: items by their number."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LONGEST_EXPRESSION = 200


def number_text(value: float) -> str:
    """A number with up to two decimals and no more signs than it needs: 3.10 -> '3.1', 4.0 -> '4'."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def table_value(table: str, item: int) -> str:
    """What stands in a table: a whole number of two or three digits that looks random and is always the same."""
    digest = hashlib.blake2b(f"{table}/{item}".encode(), digest_size=4).digest()
    return str(10 + int.from_bytes(digest, "little") % 990)


def run_tool(name: str, arguments: str | Mapping[str, Any]) -> str:
    """The text that a tool answers. Raises UserError for a tool or arguments that do not exist."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise UserError(f"{name}: the arguments are no JSON") from None
    if name not in TOOLS:
        raise UserError(f"there is no tool {name}; there are {', '.join(TOOLS)}")
    expected = TOOLS[name]["function"]["parameters"]["required"]
    if not isinstance(arguments, Mapping) or sorted(arguments) != sorted(expected):
        raise UserError(f"{name}: the arguments must be {', '.join(expected)}")
    return {"calculator": _calculate, "convert": _convert, "lookup": _look_up}[name](**arguments)


def _calculate(expression: Any) -> str:
    try:
        if not isinstance(expression, str) or len(expression) > _LONGEST_EXPRESSION:
            raise ValueError
        return number_text(_value(ast.parse(expression.strip(), mode="eval").body))
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        raise UserError(f"calculator: cannot compute {str(expression)[:_LONGEST_EXPRESSION]!r}") from None


def _value(node: ast.expr) -> float:
    """The value of an expression of numbers, + - * / and parentheses; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError


def _convert(value: Any, unit: Any, to: Any) -> str:
    known = isinstance(unit, str) and isinstance(to, str) and unit in UNITS and to in UNITS
    if not known or UNITS[unit][0] != UNITS[to][0]:
        raise UserError(f"convert: cannot turn {unit!r} into {to!r}")
    if type(value) not in (int, float):
        raise UserError(f"convert: the value must be a number, found {value!r}")
    return number_text(value * UNITS[unit][1] / UNITS[to][1])


def _look_up(table: Any, item: Any) -> str:
    if table not in TABLES or type(item) is not int or item not in ITEMS:
        raise UserError(f"lookup: there is no item {item!r} in the table {table!r}")
    return table_value(table, item)
