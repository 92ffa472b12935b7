"""Questions that one tool call answers, each with its truth: the call, the tool's result, the reply.

Training and evaluation never share a question: a hash of the call (tool and arguments) decides on which side it is, and
some phrasings are kept for evaluation altogether.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moonbase.synth.tools import ITEMS, TABLES, run_tool

HELD_OUT_SHARE = 0.1
"""Share of all possible calls that only the evaluation asks for."""
KINDS = ("calculator", "convert", "lookup")
PAIRS = (("km", "mi"), ("m", "ft"), ("cm", "in"), ("kg", "lb"), ("g", "oz"), ("h", "min"), ("min", "s"),
         ("m", "cm"), ("ft", "in"), ("km", "m"), ("kg", "oz"))
"""What is converted into what, both ways where the result keeps enough digits."""
_ONE_WAY = frozenset((("km", "m"), ("m", "cm"), ("kg", "oz")))
_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}

_OPENINGS = ("", "Please ", "Can you ", "Could you ", "Now ", "So ")
_PATTERNS: dict[str, tuple[str, ...]] = {
    "calculator": ("what is {sum}?", "compute {sum}.", "how much is {sum}?", "work out {sum}.", "tell me {sum}.",
                   "calculate {sum}."),
    "convert": ("convert {value} {unit} to {to}.", "what is {value} {unit} in {to}?", "turn {value} {unit} into {to}.",
                "how many {to} is {value} {unit}?", "tell me {value} {unit} in {to}."),
    "lookup": ("what is the {table} of item {item}?", "look up the {table} of item {item}.",
               "tell me the {table} of item {item}.", "check the {table} of item {item}.",
               "find the {table} of item {item}."),
}
_BARE: dict[str, tuple[str, ...]] = {
    "calculator": ("{sum}", "{sum} = ?"), "convert": ("{value} {unit} in {to}?", "{value} {unit} to {to}"),
    "lookup": ("item {item}: {table}?", "{table} of item {item}?")}
_FOR_QUESTIONS = ("", "Now ", "So ")
"""Openings that go before a question; all of them go before a request."""


def _phrases() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Ways of asking: those that training uses, and a few that it never does."""
    known: dict[str, tuple[str, ...]] = {}
    new: dict[str, tuple[str, ...]] = {}
    for place, (kind, patterns) in enumerate(_PATTERNS.items()):
        every = []
        for pattern in patterns:
            openings = _FOR_QUESTIONS if pattern.endswith("?") else _OPENINGS
            for opening in openings:
                phrase = opening + (pattern if opening else pattern[0].upper() + pattern[1:])
                every.append(phrase[:-1] + "?" if opening.endswith("you ") else phrase)
        new[kind] = tuple(every[place + 2::5])
        known[kind] = (*(phrase for phrase in every if phrase not in new[kind]), *_BARE[kind])
    return known, new


PHRASES, NEW_PHRASES = _phrases()
"""Tool -> ways of asking for it; and those that no training dialogue holds, a fifth of all."""


@dataclass(frozen=True)
class Question:
    """One question and its truth."""

    kind: str
    """The tool that answers it."""
    text: str
    arguments: dict[str, Any]
    result: str
    """What the tool says; a right reply holds it."""
    reply: str
    new_phrase: bool = False

    @property
    def call(self) -> dict[str, str]:
        """The call as OpenAI's `function` object; the arguments as compact JSON, the form that constrained decoding
        allows."""
        return {"name": self.kind, "arguments": json.dumps(self.arguments, separators=(",", ":"))}


def is_held_out(kind: str, arguments: dict[str, Any]) -> bool:
    """Whether only the evaluation may ask for this call. For sums it is the two numbers that decide, in any order and
    with any sign between them."""
    if kind == "calculator":
        first, _, second = arguments["expression"].split(" ")
        content: list[Any] = [kind, *sorted((first, second))]
    else:
        content = [kind, *arguments.values()]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_SHARE * 2**32


def draw_question(generator: random.Random, held_out: bool, kind: str | None = None,
                  new_phrase: bool = False) -> Question:
    """A random question of the wanted side; `new_phrase`: asked in a way that training never does."""
    kind = kind or generator.choice(("calculator", "calculator", "convert", "lookup"))
    while True:
        arguments, blanks = _DRAW[kind](generator)
        if is_held_out(kind, arguments) == held_out:
            break
    result = run_tool(kind, arguments)
    phrase = generator.choice((NEW_PHRASES if new_phrase else PHRASES)[kind])
    return Question(kind, phrase.format(**blanks), arguments, result,
                    _REPLIES[kind].format(result=result, **arguments), new_phrase)


_REPLIES = {"calculator": "{expression} = {result}.", "convert": "{value} {unit} is {result} {to}.",
            "lookup": "The {table} of item {item} is {result}."}


def _number(generator: random.Random) -> int:
    low, high = generator.choice(((2, 9), (10, 99), (10, 99), (100, 999)))
    return generator.randint(low, high)


def _draw_sum(generator: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    sign = generator.choice("++--**/")
    first, second = _number(generator), _number(generator)
    if sign == "/":
        second = generator.randint(2, 20)
    written = _SPOKEN[sign] if generator.random() < 0.4 else sign
    return {"expression": f"{first} {sign} {second}"}, {"sum": f"{first} {written} {second}"}


def _draw_conversion(generator: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    pair = generator.choice(PAIRS)
    unit, to = pair if pair in _ONE_WAY or generator.random() < 0.5 else pair[::-1]
    arguments = {"value": _number(generator), "unit": unit, "to": to}
    return arguments, arguments


def _draw_lookup(generator: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    arguments = {"table": generator.choice(TABLES), "item": generator.choice(ITEMS)}
    return arguments, arguments


_DRAW: dict[str, Callable[[random.Random], tuple[dict[str, Any], dict[str, Any]]]] = {
    "calculator": _draw_sum, "convert": _draw_conversion, "lookup": _draw_lookup}
