"""Solvers that do what they can with bounded means, to see that difficulty is difficulty.

Unlike `scripted`, none of them knows an answer or slips by chance: a weak and a strong one of each family have another
way of working, or so much of paper, memory, patience or reach, and fail where an item asks for more of it. Their
accuracy falls with difficulty because of what the problems are.

| family | weak | strong |
|---|---|---|
| maths | numbers of 5 digits, nothing reduced on the way | numbers of 16 digits |
| logic | follows what must be, supposes twice at most | supposes 8 times at most |
| tables | the first 12 rows of one table, as they come | the first 24, and the other table |
| long | two hops, within the last 6,000 tokens | four hops, within the last 100,000 |
| tools | numbers as they stand in the request, 4 calls | computes, 6 calls, remembers 10 things |
| code | the first 2 steps | the first 4 steps |
"""

from __future__ import annotations

import decimal
import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from moonbase.evals.fresh import coding, logic, maths, table_questions, tool_use
from moonbase.evals.fresh.problem import Problem

FAMILIES = ("maths", "logic", "tables", "long", "tools", "code")
DIGITS = {"weak": 5, "strong": 16}
SUPPOSED = {"weak": 2, "strong": 8}
ROWS = {"weak": 12, "strong": 24}
WINDOW = {"weak": 6_000, "strong": 100_000}
HOPS = {"weak": 2, "strong": 4}
CALLS = {"weak": 4, "strong": 6}
REMEMBERED = 10
STEPS = {"weak": 2, "strong": 4}


def right(problem: Problem, strength: str) -> bool:
    """Whether the solver of this strength ("weak", "strong") finds the answer of an item."""
    return _SOLVERS[problem.family](problem, strength) == problem.target


# Mathematics: the plain way in decimal numbers of so many digits. Each kind is done as one would by hand: powers are
# taken before remainders, cases are counted one by one, and a fraction is guessed from its digits.


def _maths(problem: Problem, strength: str) -> str | None:
    digits = DIGITS[strength]
    with decimal.localcontext(decimal.Context(prec=digits, Emax=10**6, Emin=-(10**6))):
        try:
            value = _BY_HAND[problem.kind](problem.spec)
        except (ArithmeticError, ValueError):
            return None
    if value is None:
        return None
    return str(Fraction(value).limit_denominator(10 ** (digits // 3)))


def _system(spec: dict[str, Any]) -> Decimal:
    rows = [[*map(Decimal, row), Decimal(right)] for row, right in zip(spec["rows"], spec["right"], strict=True)]
    for place in range(len(rows)):
        pivot = next(number for number in range(place, len(rows)) if rows[number][place])
        rows[place], rows[pivot] = rows[pivot], rows[place]
        for other in range(len(rows)):
            if other != place:
                factor = rows[other][place] / rows[place][place]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[place], strict=True)]
    return sum((Decimal(weight) * row[-1] / row[place] for place, (weight, row) in enumerate(
        zip(spec["weights"], rows, strict=True))), Decimal(0))


def _powers(spec: dict[str, Any]) -> Decimal:
    total = sum((Decimal(base) ** exponent for base, exponent in spec["powers"]), Decimal(0))
    return total % spec["modulus"]


def _counting(spec: dict[str, Any]) -> int | None:
    reach = 10 ** (decimal.getcontext().prec - 1) // 10
    if spec["most"] > reach:
        return None
    return maths._count_all(spec)


def _integral(spec: dict[str, Any]) -> Decimal:
    """Simpson's rule in four parts: exact up to third powers."""
    def at(x: Decimal) -> Decimal:
        return sum((Decimal(value) * x**power for power, value in enumerate(spec["coefficients"])), Decimal(0))

    low, step = Decimal(spec["low"]), Decimal(spec["high"] - spec["low"]) / 8
    total = sum(((1, 4, 2, 4, 2, 4, 2, 4, 1)[place] * at(low + place * step) for place in range(9)), Decimal(0))
    return total * step / 3


def _paths(spec: dict[str, Any]) -> Decimal:
    closed = {tuple(point) for point in spec["closed"]}
    ways: dict[tuple[int, int], Decimal] = {}
    for x, y in itertools.product(range(spec["width"] + 1), range(spec["height"] + 1)):
        here = Decimal(1) if x == y == 0 else ways.get((x - 1, y), Decimal(0)) + ways.get((x, y - 1), Decimal(0))
        ways[x, y] = Decimal(0) if (x, y) in closed else here
    return ways[spec["width"], spec["height"]]


def _balls(spec: dict[str, Any]) -> Decimal:
    red, rest = spec["counts"][0], sum(spec["counts"][1:])
    drawn, wanted = spec["drawn"], spec["wanted"]
    chance = Decimal(math.comb(drawn, wanted))
    for place in range(drawn):
        left = red - place if place < wanted else rest - (place - wanted)
        chance = chance * left / (red + rest - place)
    return chance


def _recurrence(spec: dict[str, Any]) -> Decimal:
    terms = [Decimal(one) for one in spec["first"]]
    while len(terms) <= spec["place"]:
        terms.append(sum((value * terms[-i] for i, value in enumerate(spec["coefficients"], 1)), Decimal(0)))
    return terms[spec["place"]] % spec["modulus"]


_BY_HAND = {"linear-system": _system, "power-remainder": _powers, "counting": _counting, "integral": _integral,
            "paths": _paths, "probability": _balls, "recurrence": _recurrence}


# Logic: values that are excluded by a clue whose other people are settled; where nothing follows, suppose, if at all.


def _logic(problem: Problem, strength: str) -> list[str] | None:
    spec, left = problem.spec, [SUPPOSED[strength]]
    size = len(spec["people"])
    values = range(size) if problem.kind == "order" else (0, 1)
    found = _suppose(spec, [set(values) for _ in range(size)], left)
    return None if found is None else logic._named(spec, problem.language, found)


def _suppose(spec: dict[str, Any], options: list[set[int]], left: list[int]) -> list[int] | None:
    options = _follow(spec, options)
    if not all(options):
        return None
    open_ones = [person for person, some in enumerate(options) if len(some) > 1]
    if not open_ones:
        return [next(iter(some)) for some in options]
    person = min(open_ones, key=lambda one: len(options[one]))
    for value in sorted(options[person]):
        if left[0] == 0:
            return None
        left[0] -= 1
        trial = [set(some) for some in options]
        trial[person] = {value}
        found = _suppose(spec, trial, left)
        if found is not None:
            return found
    return None


def _follow(spec: dict[str, Any], options: list[set[int]]) -> list[set[int]]:
    """Strike out what contradicts a clue once all others that it names are settled, until nothing changes."""
    clues = _clues(spec)
    changed = True
    while changed and all(options):
        changed = False
        for people, holds in clues:
            open_ones = [person for person in people if len(options[person]) > 1]
            if len(open_ones) > 1:
                continue
            person = open_ones[0] if open_ones else people[0]
            values = {other: next(iter(options[other])) for other in people if other != person}
            kept = {value for value in options[person] if holds(values | {person: value})}
            if kept != options[person]:
                options[person], changed = kept, True
            if not kept:
                return options
    return options


def _clues(spec: dict[str, Any]) -> list[tuple[tuple[int, ...], Any]]:
    """(whom a clue names, whether it holds of their values)."""
    found: list[tuple[tuple[int, ...], Any]] = []
    for clue in spec.get("clues", ()):
        named = tuple(clue[place] for place in {"at": [1], "not at": [1], "between": [1, 2, 3]}.get(clue[0], [1, 2]))
        found.append((named, lambda seats, clue=clue: logic._holds(clue, seats)))
    for speaker, form, a, b in spec.get("claims", ()):
        two = form not in ("knight", "knave")
        found.append((tuple(dict.fromkeys((speaker, a, b) if two else (speaker, a))),
                      lambda truth, speaker=speaker, form=form, a=a, b=b:
                      logic._claim_holds(form, truth[a], truth.get(b, 0)) == truth[speaker]))
    if "clues" in spec:
        found += [((a, b), lambda seats, a=a, b=b: seats[a] != seats[b])
                  for a, b in itertools.combinations(range(len(spec["people"])), 2)]
    return found


# The others.


def _tables(problem: Problem, strength: str) -> list[str] | None:
    spec = problem.spec
    question = dict(spec["question"])
    if question["joined"] and strength == "weak":
        question |= {"joined": False, "where": [one for one in question["where"] if one[0] != "region"]}
    tables = [{**spec["tables"][0], "rows": spec["tables"][0]["rows"][: ROWS[strength]]}, *spec["tables"][1:]]
    try:
        return table_questions.solve_b({**spec, "tables": tables, "question": question}, problem.language)
    except (ArithmeticError, ValueError):
        return None


def _long(problem: Problem, strength: str) -> str | None:
    """The needles that stand in the window before the question, so many steps from the label back."""
    spec = problem.spec
    seen = {step for place, number, step in spec["needles"]
            if number == 0 and place >= 1000 * (1 - WINDOW[strength] / spec["tokens"])}
    hops = len(spec["chains"][0]["people"]) - 1
    return spec["chains"][0]["code"] if hops <= HOPS[strength] and len(seen) == hops + 1 else None


def _tools(problem: Problem, strength: str) -> tool_use.State | None:
    spec, calls = problem.spec, []
    known = list(spec["state"])[:REMEMBERED]
    key = spec["keys"]["amount"]
    for call, wish in zip(tool_use.calls_of(spec), spec["wishes"], strict=True):
        if wish.get("how") in ("to", "half") and (strength == "weak" or wish["id"] not in known):
            call = {**call, "arguments": {**call["arguments"], key: wish["number"]}}
        calls.append(call)
    try:
        return tool_use.carry_out(spec, calls[: CALLS[strength]])
    except ValueError:
        return None


def _code(problem: Problem, strength: str) -> list[list[int]]:
    spec = problem.spec
    return coding.solve_a({**spec, "steps": spec["steps"][: STEPS[strength]]}, problem.language)


_SOLVERS = {"maths": _maths, "logic": _logic, "tables": _tables, "long": _long, "tools": _tools, "code": _code}
