"""Fresh twins of public word problems: the same words with other numbers, and the answer that follows from them.

A public set that tells how its answers are computed (GSM8K marks every step: `<<48/2=24>>`) gives its own twins. Each
number of a step is one of the question, the result of an earlier step, or a constant. Numbers of the question are drawn
anew; the steps are done again. A twin asks for the same steps in the same words, so that it is as hard as numbers of
the same size can make it; whoever has learned the public answer by heart does not have this one.

A question has a twin only where nothing is in doubt: its steps, with its own numbers, give its published answer; every
number that changes is used by a step and stands once in the question, and not as a word besides; no number of a step
can be meant in two ways or stands twice in one step; every step's result is used by a later one, and every number above
ten by a step; and a constant is one that the question has in words, or that everybody knows (7 days, 12 months, 100
percent). Numbers that may be constants stay. New numbers keep the order of size, whole results stay whole and positive
ones positive.
"""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction

from moonbase.evals.fresh.problem import Draw

_STEP = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER = re.compile(r"(?<![\w.,/:-])\d+(?:,\d{3})*(?![\w%/:-]|[.,]\d| ?percent| ?%|(?:st|nd|rd|th)\b)")
_PER = re.compile(r" (?:days?|nights?|times|hours?) (?:a|per|each|every) (?:week|day)")
"""Behind a number that cannot be any: there are no eight days in a week."""
_ANY = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
MAY_BE_CONSTANTS = frozenset({0, 1, 2, 7, 10, 12, 24, 30, 31, 52, 60, 100, 365, 1000})
_WORDS = {names: Fraction(value) for value, names in {
    "1": "one", "2": "two twice double doubles doubled both couple pair pairs twin twins duo half halves",
    "3": "three triple thrice third thirds triplet triplets trio",
    "4": "four quarter quarters quadruple fourth fourths quadruplet quadruplets",
    "5": "five fifth weekday weekdays", "6": "six sixth", "7": "seven week weeks weekly", "8": "eight", "9": "nine",
    "10": "ten", "11": "eleven", "12": "twelve dozen dozens year years yearly annual month months", "13": "thirteen",
    "15": "fifteen", "20": "twenty", "24": "day days daily", "30": "thirty month months",
    "52": "year years week weeks", "60": "hour hours minute minutes second seconds", "100": "percent % cent cents",
    "365": "year years", "1000": "kilometers kilograms liters kg km meters", "1/2": "half", "1/3": "third",
    "1/4": "quarter"}.items()}
"""Words in which a question may have a number, or speak of one that everybody knows."""
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ATTEMPTS = 300
MOST_STEPS = 12


@dataclass(frozen=True)
class Twin:
    """A question with other numbers and the answer to it."""

    question: str
    answer: int
    numbers: dict[int, int]
    """Each number that was changed, and what it became."""


@dataclass(frozen=True)
class Template:
    """What a question asks to be computed."""

    question: str
    places: dict[int, tuple[int, int]]
    """Where a number stands in the question that may be another."""
    steps: tuple[str, ...]
    """Expressions over n48 (a number of the question), r0 (the result of a step) and constants."""
    results: tuple[Fraction, ...]

    def compute(self, numbers: dict[int, int]) -> list[Fraction]:
        """The result of every step. Raises ArithmeticError."""
        values = {f"n{old}": Fraction(new) for old, new in numbers.items()}
        for place, step in enumerate(self.steps):
            values[f"r{place}"] = _value(ast.parse(step, mode="eval").body, values)
        return [values[f"r{place}"] for place in range(len(self.steps))]


def template(question: str, worked: str) -> Template | None:
    """None where something is in doubt, or nothing can be changed."""
    steps = _STEP.findall(worked)
    final = _fraction(worked.rpartition("####")[2])
    if not steps or len(steps) > MOST_STEPS or final is None:
        return None
    told = [_fraction(found[0]) for found in _ANY.finditer(question)]
    places = {int(found[0].replace(",", "")): found.span() for found in _NUMBER.finditer(question)
              if not _PER.match(question, found.end())}
    named = _named(question)
    free = {value for value in places if told.count(Fraction(value)) == 1 and value not in MAY_BE_CONSTANTS | named}
    written, results, used = [], [], set()
    for expression, result in steps:
        step = _rewritten(expression, free, {*told, *named}, results, used)
        outcome = _fraction(result)
        if step is None or outcome is None:
            return None
        written.append(step)
        results.append(outcome)
    if any(not re.search(rf"r{place}\b", " ".join(written)) for place in range(len(written) - 1)):
        return None  # Something was computed in the head.
    if any(value is not None and value > 10 and f"{value}" not in re.findall(r"[\d/]+", " ".join(written))
           for value in told):
        return None  # A number that no step needs may be the sum of others.
    found = Template(question, {value: places[value] for value in used}, tuple(written), tuple(results))
    try:
        same = found.compute({value: value for value in used}) == results
    except (ArithmeticError, ValueError, SyntaxError):
        return None
    return found if used and same and results[-1] == final and final.denominator == 1 else None


def _named(question: str) -> set[Fraction]:
    """What a question says in words."""
    words = set(re.findall(r"[a-z]+|%", question.lower()))
    return {value for names, value in _WORDS.items() if not words.isdisjoint(names.split())}


def _rewritten(expression: str, free: set[int], told: set[Fraction | None], results: list[Fraction], used: set[int]
               ) -> str | None:
    """A step with names in place of numbers; None where a number can be two things, or is nothing known."""
    out, end = [], 0
    for found in re.finditer(r"\d+(?:\.\d+)?|\.\d+", expression):
        value = Fraction(found[0])
        earlier = [place for place, result in enumerate(results) if result == value]
        mine = value.denominator == 1 and int(value) in free
        if (earlier and value in told) or len(earlier) > 1 or (mine and f"n{value}" in out):
            return None
        if mine:
            used.add(int(value))
        elif not earlier and value not in told:
            return None
        out += [expression[end : found.start()], f"n{value}" if mine else f"r{earlier[0]}" if earlier else f"({value})"]
        end = found.end()
    whole = "".join([*out, expression[end:]]).strip()
    return whole if re.fullmatch(r"[-+*/() nr\d]+", whole) and "**" not in whole and "//" not in whole else None


def make_twin(question: str, worked: str, draw: Draw) -> Twin | None:
    """A twin of a public question; the same for the same draw."""
    found = template(question, worked)
    if found is None:
        return None
    order = sorted(found.places)
    others = sorted({int(value) for one in _ANY.finditer(question) if (value := _fraction(one[0])) is not None
                     and value.denominator == 1} - set(order))
    for _ in range(ATTEMPTS):
        numbers = {value: _drawn(value, draw) for value in order}
        if any(new == old for old, new in numbers.items()) or not _same_order(numbers, others):
            continue
        try:
            results = found.compute(numbers)
        except ArithmeticError:
            continue
        if _alike(results, found.results) and results[-1] != found.results[-1]:
            text = question
            for old in sorted(order, key=lambda value: -found.places[value][0]):
                start, end = found.places[old]
                new = f"{numbers[old]:,}" if "," in text[start:end] else str(numbers[old])
                text = text[:start] + new + text[end:]
            return Twin(text, int(results[-1]), numbers)
    return None


def _drawn(value: int, draw: Draw) -> int:
    """Of about the same size, and as round."""
    unit = next(unit for unit in (1000, 100, 50, 10, 5, 1) if value % unit == 0 and value >= 2 * unit)
    return unit * draw.randint(max(-(-value * 6 // (10 * unit)), 1 + (unit == 1)), -(-value * 16 // (10 * unit)))


def _same_order(numbers: dict[int, int], others: list[int]) -> bool:
    whole = [*numbers.items(), *((one, one) for one in others)]
    return all((a < b) == (x < y) and x != y for a, x in numbers.items() for b, y in whole if a != b)


def _alike(results: list[Fraction], before: tuple[Fraction, ...]) -> bool:
    """Whole where it was whole, positive where positive, and with no more than two decimals elsewhere."""
    return all((new > 0) == (old > 0) and (new < 1) == (old < 1)
               and (new.denominator == 1 if old.denominator == 1 else 100 % new.denominator == 0)
               for new, old in zip(results, before, strict=True))


def _value(node: ast.expr, values: dict[str, Fraction]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, values)
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise ValueError("no step of a calculation")


def _fraction(text: str) -> Fraction | None:
    text = text.strip().replace(",", "").replace("$", "")
    return Fraction(text) if re.fullmatch(r"-?(?:\d+(?:\.\d+)?|\.\d+)", text) else None
