"""Mathematics with one exact answer, an integer or a fraction.

Solver A computes with integers, fractions and dynamic programming; solver B asks sympy, or counts by brute force.
"""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction
from typing import Any

from moonbase.evals.fresh.answers import final, read_number
from moonbase.evals.fresh.problem import Draw, answer_line

Spec = dict[str, Any]


def make(draw: Draw, difficulty: int) -> Spec:
    kind = draw.choice(tuple(KINDS))
    return {"kind": kind, "difficulty": difficulty} | KINDS[kind][0](draw, difficulty)


def leaks(spec: Spec) -> bool:
    """Whether the answer happens to stand in the question."""
    answer = solve_a(spec, "en")
    return answer in re.findall(r"\d+(?:/\d+)?", render(spec, "en"))


def render(spec: Spec, language: str) -> str:
    text = KINDS[spec["kind"]][1](spec, language == "zh")
    return text + answer_line(language, "the number (an exact integer or fraction)", "这个数（精确的整数或分数）")


def solve_a(spec: Spec, language: str) -> str:
    return str(Fraction(KINDS[spec["kind"]][2](spec)))


def solve_b(spec: Spec, language: str) -> str:
    return str(Fraction(str(KINDS[spec["kind"]][3](spec))))


def verify(spec: Spec, language: str, target: str, text: str) -> tuple[float, str]:
    said = final(text)
    value = read_number(said)
    if value is None:
        return 0.0, f"no number in {said[:60]!r}"
    return (1.0, "") if value == Fraction(target) else (0.0, f"{said[:60]!r} is not the number")


def effort(spec: Spec) -> int:
    """Rises with the difficulty by construction: each kind's knob is its number of steps."""
    return {1: 2, 2: 5, 3: 10, 4: 18, 5: 30}[spec["difficulty"]]


# Linear systems: integer coefficients and solution, asked for a weighted sum of the unknowns.


def _make_system(draw: Draw, difficulty: int) -> Spec:
    size = (2, 2, 3, 3, 4)[difficulty - 1]
    reach = (9, 25, 9, 25, 19)[difficulty - 1]
    while True:
        rows = [[draw.randint(-reach, reach) for _ in range(size)] for _ in range(size)]
        if _determinant(rows):
            break
    solution = [draw.randint(-3 * reach, 3 * reach) for _ in range(size)]
    right = [sum(a * x for a, x in zip(row, solution, strict=True)) for row in rows]
    return {"rows": rows, "right": right, "weights": [draw.randint(2, 9) for _ in range(size)]}


def _determinant(rows: list[list[int]]) -> int:
    if len(rows) == 1:
        return rows[0][0]
    return sum((-1) ** column * rows[0][column] * _determinant([row[:column] + row[column + 1 :] for row in rows[1:]])
               for column in range(len(rows)))


def _sum_of(weights: list[int]) -> str:
    terms = [f"{'-' if w < 0 else '+'} {abs(w) if abs(w) != 1 else ''}{'xyzw'[i]}" for i, w in enumerate(weights) if w]
    return _lead(" ".join(terms)) or "0"


def _lead(text: str) -> str:
    """The first sign as it is written: "+ 3x - y" is 3x - y and "- 3x" is -3x."""
    return text.removeprefix("+ ") if text[:1] != "-" else "-" + text[2:]


def _show_system(spec: Spec, zh: bool) -> str:
    lines = "\n".join(f"  {_sum_of(row)} = {right}" for row, right in zip(spec["rows"], spec["right"], strict=True))
    wanted = _sum_of(spec["weights"])
    return f"解方程组\n{lines}\n并求 {wanted} 的值。" if zh else f"Solve\n{lines}\nand find the value of {wanted}."


def _cramer(spec: Spec) -> Fraction:
    rows, right = spec["rows"], spec["right"]
    whole = _determinant(rows)
    values = [Fraction(_determinant([[*row[:i], value, *row[i + 1 :]] for row, value in zip(rows, right, strict=True)]),
                       whole) for i in range(len(rows))]
    return sum((w * x for w, x in zip(spec["weights"], values, strict=True)), Fraction(0))


def _sympy_system(spec: Spec) -> Any:
    from sympy import Matrix

    solution = Matrix(spec["rows"]).LUsolve(Matrix(spec["right"]))
    return (Matrix([spec["weights"]]) * solution)[0]


# Remainders: a sum of powers modulo m.


def _make_power(draw: Draw, difficulty: int) -> Spec:
    terms = (1, 1, 2, 3, 4)[difficulty - 1]
    exponent = (40, 90, 200, 900, 3000)[difficulty - 1]
    modulus = draw.randint(*((7, 99), (50, 150), (100, 500), (300, 2000), (1000, 9999))[difficulty - 1])
    return {"modulus": modulus, "powers": [[draw.randint(2, 99), draw.randint(exponent // 3, exponent)]
                                           for _ in range(terms)]}


def _show_power(spec: Spec, zh: bool) -> str:
    text = " + ".join(f"{base}^{exponent}" for base, exponent in spec["powers"])
    return (f"求 {text} 除以 {spec['modulus']} 的余数。" if zh
            else f"What is the remainder of {text} when divided by {spec['modulus']}?")


def _powers_by_steps(spec: Spec) -> int:
    total = 0
    for base, exponent in spec["powers"]:
        value = 1
        for _ in range(exponent):
            value = value * base % spec["modulus"]
        total += value
    return total % spec["modulus"]


def _sympy_power(spec: Spec) -> Any:
    from sympy import Integer, Mod

    return Mod(sum(Integer(base) ** exponent for base, exponent in spec["powers"]), spec["modulus"])


# Counting: how many integers up to N are divisible by none of some numbers.


def _make_counting(draw: Draw, difficulty: int) -> Spec:
    most = (900, 2000, 4000, 9000, 20000)[difficulty - 1]
    return {"most": draw.randint(most // 2, most), "divisors": sorted(draw.sample(range(2, 30), (1, 2, 3, 4, 5)[
        difficulty - 1]))}


def _show_counting(spec: Spec, zh: bool) -> str:
    divisors = ("、" if zh else ", ").join(map(str, spec["divisors"]))
    if zh:
        return f"从 1 到 {spec['most']}（含两端）的整数中，有多少个不能被以下任何一个数整除：{divisors}？"
    return f"How many integers from 1 to {spec['most']} (both included) are divisible by none of: {divisors}?"


def _inclusion_exclusion(spec: Spec) -> int:
    return sum((-1) ** len(some) * (spec["most"] // math.lcm(*some))
               for size in range(len(spec["divisors"]) + 1) for some in itertools.combinations(spec["divisors"], size))


def _count_all(spec: Spec) -> int:
    return sum(all(number % divisor for divisor in spec["divisors"]) for number in range(1, spec["most"] + 1))


# Integrals of polynomials.


def _make_integral(draw: Draw, difficulty: int) -> Spec:
    low = draw.randint(-difficulty, 6)
    coefficients = [draw.choice((-1, 1)) * draw.randint(1, 30) for _ in range(difficulty + 1)]
    return {"coefficients": coefficients, "low": low, "high": low + draw.randint(1, 1 + difficulty)}


def _polynomial(coefficients: list[int]) -> str:
    terms = []
    for power in range(len(coefficients) - 1, -1, -1):
        value = coefficients[power]
        number = "" if abs(value) == 1 and power else str(abs(value))
        terms.append(f"{'-' if value < 0 else '+'} {number}{'' if not power else 'x' if power == 1 else f'x^{power}'}")
    return _lead(" ".join(terms))


def _show_integral(spec: Spec, zh: bool) -> str:
    what, low, high = _polynomial(spec["coefficients"]), spec["low"], spec["high"]
    if zh:
        return f"求函数 {what} 在区间 [{low}, {high}] 上的定积分。"
    return f"Find the definite integral of {what} over x from {low} to {high}."


def _antiderivative(spec: Spec) -> Fraction:
    return sum((Fraction(value, power + 1) * (spec["high"] ** (power + 1) - spec["low"] ** (power + 1))
                for power, value in enumerate(spec["coefficients"])), Fraction(0))


def _sympy_integral(spec: Spec) -> Any:
    from sympy import Poly, Symbol

    x = Symbol("x")
    primitive = Poly(spec["coefficients"][::-1], x, domain="QQ").integrate()
    return primitive.eval(spec["high"]) - primitive.eval(spec["low"])


# Paths in a grid with closed crossings.


def _make_paths(draw: Draw, difficulty: int) -> Spec:
    width, height = (draw.randint(difficulty + 2, difficulty + 6) for _ in range(2))
    inner = [[x, y] for x in range(width + 1) for y in range(height + 1) if (x, y) not in ((0, 0), (width, height))]
    closed = sorted(draw.sample(inner, difficulty + 1))
    spec = {"width": width, "height": height, "closed": closed}
    return spec if _paths(spec) > 1 else _make_paths(draw, difficulty)


def _show_paths(spec: Spec, zh: bool) -> str:
    closed = ("、" if zh else ", ").join(f"({x}, {y})" for x, y in spec["closed"])
    end = f"({spec['width']}, {spec['height']})"
    if zh:
        return f"从 (0, 0) 走到 {end}，每一步只能向右或向上走一个单位，且不得经过这些点：{closed}。共有多少条路线？"
    return (f"A walk goes from (0, 0) to {end}, each step one unit right or up, and never visits these points: "
            f"{closed}. How many walks are there?")


def _paths(spec: Spec) -> int:
    closed = {tuple(point) for point in spec["closed"]}
    ways: dict[tuple[int, int], int] = {}
    for x, y in itertools.product(range(spec["width"] + 1), range(spec["height"] + 1)):
        here = 1 if x == y == 0 else ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
        ways[x, y] = 0 if (x, y) in closed else here
    return ways[spec["width"], spec["height"]]


def _paths_by_binomials(spec: Spec) -> int:
    """First closed crossing of each walk: bad walks are counted by where they first go wrong."""
    points = sorted([*map(tuple, spec["closed"]), (spec["width"], spec["height"])], key=sum)
    clean: dict[tuple[int, int], int] = {}
    for x, y in points:
        total = math.comb(x + y, x)
        for (a, b), ways in clean.items():
            if a <= x and b <= y:
                total -= ways * math.comb(x - a + y - b, x - a)
        clean[x, y] = total
    return clean[spec["width"], spec["height"]]


# Probability: drawing balls without putting them back.


def _make_balls(draw: Draw, difficulty: int) -> Spec:
    colours = (2, 2, 3, 3, 4)[difficulty - 1]
    counts = [draw.randint(3, 60) for _ in range(colours)]
    drawn = (2, 3, 3, 4, 5)[difficulty - 1] if difficulty > 1 else draw.randint(2, 3)
    return {"counts": counts, "drawn": drawn, "wanted": draw.randint(1, drawn - 1)}


_COLOURS = (("red", "红"), ("blue", "蓝"), ("green", "绿"), ("white", "白"))


def _show_balls(spec: Spec, zh: bool) -> str:
    named = [f"{count} 个{_COLOURS[i][1]}球" if zh else f"{count} {_COLOURS[i][0]}"
             for i, count in enumerate(spec["counts"])]
    if zh:
        return (f"袋中有 {'、'.join(named)}。不放回地随机取出 {spec['drawn']} 个球，"
                f"恰好有 {spec['wanted']} 个红球的概率是多少？")
    return (f"A bag holds balls of these colours: {', '.join(named)}. At random, {spec['drawn']} are drawn without "
            f"replacement. What is the probability that the number of red ones is exactly {spec['wanted']}?")


def _hypergeometric(spec: Spec) -> Fraction:
    red, rest = spec["counts"][0], sum(spec["counts"][1:])
    ways = math.comb(red, spec["wanted"]) * math.comb(rest, spec["drawn"] - spec["wanted"])
    return Fraction(ways, math.comb(red + rest, spec["drawn"]))


def _ball_by_ball(spec: Spec) -> Fraction:
    """The tree of draws, red or not."""
    def chance(red: int, rest: int, left: int, wanted: int) -> Fraction:
        if left == 0 or wanted < 0:
            return Fraction(wanted == 0)
        total = Fraction(0)
        if red:
            total += Fraction(red, red + rest) * chance(red - 1, rest, left - 1, wanted - 1)
        if rest:
            total += Fraction(rest, red + rest) * chance(red, rest - 1, left - 1, wanted)
        return total

    return chance(spec["counts"][0], sum(spec["counts"][1:]), spec["drawn"], spec["wanted"])


# Linear recurrences modulo m.


def _make_recurrence(draw: Draw, difficulty: int) -> Spec:
    order = (2, 2, 2, 3, 3)[difficulty - 1]
    return {"coefficients": [draw.randint(1, 6 + difficulty) for _ in range(order)],
            "first": [draw.randint(0, 20) for _ in range(order)],
            "place": draw.randint(*((5, 8), (9, 14), (18, 30), (40, 80), (100, 300))[difficulty - 1]),
            "modulus": draw.randint(*((50, 99), (100, 400), (400, 999), (1000, 4000), (4000, 9999))[difficulty - 1])}


def _show_recurrence(spec: Spec, zh: bool) -> str:
    rule = " + ".join(f"{value if value > 1 else ''}a(n-{i})" for i, value in enumerate(spec["coefficients"], 1))
    first = (", ".join(f"a({i}) = {value}" for i, value in enumerate(spec["first"])))
    place, modulus = spec["place"], spec["modulus"]
    if zh:
        return f"数列满足 {first}，此后 a(n) = {rule}。求 a({place}) 除以 {modulus} 的余数。"
    return (f"A sequence has {first} and from then on a(n) = {rule}. "
            f"Find the remainder of a({place}) divided by {modulus}.")


def _term_by_term(spec: Spec) -> int:
    terms = list(spec["first"])
    while len(terms) <= spec["place"]:
        terms.append(sum(value * terms[-i] for i, value in enumerate(spec["coefficients"], 1)) % spec["modulus"])
    return terms[spec["place"]] % spec["modulus"]


def _matrix_power(spec: Spec) -> int:
    from sympy import Matrix, eye

    order = len(spec["first"])
    step = Matrix(order, order, lambda i, j: spec["coefficients"][j] if i == 0 else int(i == j + 1))
    power = eye(order)
    for bit in bin(spec["place"])[2:]:
        power = (power * power * (step if bit == "1" else eye(order))).applyfunc(lambda x: x % spec["modulus"])
    return (power * Matrix(spec["first"][::-1]))[order - 1] % spec["modulus"]


KINDS = {
    "linear-system": (_make_system, _show_system, _cramer, _sympy_system),
    "power-remainder": (_make_power, _show_power, _powers_by_steps, _sympy_power),
    "counting": (_make_counting, _show_counting, _inclusion_exclusion, _count_all),
    "integral": (_make_integral, _show_integral, _antiderivative, _sympy_integral),
    "paths": (_make_paths, _show_paths, _paths, _paths_by_binomials),
    "probability": (_make_balls, _show_balls, _hypergeometric, _ball_by_ball),
    "recurrence": (_make_recurrence, _show_recurrence, _term_by_term, _matrix_power),
}
