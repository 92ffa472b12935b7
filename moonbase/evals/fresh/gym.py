"""What reasoning-gym has: a thin adapter over a few of its tasks, whose entries tell all that a Chinese twin needs.

What is expected is reasoning-gym's own answer. Solver A is a few lines of ours on what its entry tells; solver B reads
the question in its language and asks numpy, sympy, scipy and Python's own arithmetic. English wording is kept as it is.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.fresh.answers import final, read_items, read_number
from moonbase.evals.fresh.problem import Draw, answer_line

Spec = dict[str, Any]
_LOW = (10**2, 10**3, 10**4, 10**5, 10**6)


def _configuration(name: str, level: int) -> dict[str, Any]:
    """Options of reasoning-gym for a difficulty from 0 to 4."""
    size = (4, 5, 6, 8, 10)[level]
    return {
        "gcd": {"min_numbers": 2 + level // 2, "max_numbers": 2 + level // 2, "min_value": _LOW[level],
                "max_value": 9 * _LOW[level]},
        "lcm": {"min_numbers": 2 + level // 2, "max_numbers": 2 + level // 2, "min_value": (40, 100, 60, 80, 99)[level],
                "max_value": (900, 2000, 900, 1500, 3000)[level]},
        "base_conversion": {"min_base": 3, "max_base": (9, 12, 16, 24, 36)[level], "min_value": 10 * _LOW[level],
                            "max_value": 90 * _LOW[level]},
        "prime_factorization": {"min_value": 5 * _LOW[level], "max_value": 90 * _LOW[level]},
        "count_bits": {"min_n": 5 * _LOW[level], "max_n": 900 * _LOW[level]},
        "chain_sum": {"min_terms": 3 + 2 * level, "max_terms": 3 + 2 * level, "min_digits": 2 + level // 2,
                      "max_digits": 2 + level // 2},
        "spiral_matrix": {"min_n": size, "max_n": size},
        "largest_island": {"min_rows": size + 1, "max_rows": size + 1, "min_cols": size, "max_cols": size,
                           "min_num_islands": 2,
                           "max_num_islands": 3 + level, "max_island_size": 5 + 2 * level},
    }[name]


NAMES = ("gcd", "lcm", "base_conversion", "prime_factorization", "count_bits", "chain_sum", "spiral_matrix",
         "largest_island")


def make(draw: Draw, difficulty: int) -> Spec | None:
    name, seed = draw.choice(NAMES), draw.getrandbits(31)
    entry = _entry(name, difficulty, seed)
    given = _given(entry)
    # Most numbers have no common divisor: an answer that is right so often is no answer.
    return None if given is None or (name == "gcd" and entry["answer"] == "1") else {"kind": name,
                                                                                     "difficulty": difficulty,
                                                                                     "seed": seed, "given": given}


@functools.lru_cache(maxsize=8192)
def _entry(name: str, difficulty: int, seed: int) -> dict[str, Any]:
    """Item 0 of a task of reasoning-gym under this seed. Raises UserError where the package is missing."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("family gym: reasoning-gym is not installed: pip install 'moonbase[evals]'") from None
    return reasoning_gym.create_dataset(name, size=1, seed=seed, **_configuration(name, difficulty - 1))[0]


def _given(entry: dict[str, Any]) -> dict[str, Any] | None:
    """What is given, of all that the entry tells; None for a question that is not one."""
    told = entry["metadata"]
    keys = {"gcd": ("numbers",), "lcm": ("numbers",), "base_conversion": ("source_repr", "source_base", "target_base"),
            "prime_factorization": ("number",), "count_bits": ("number",), "chain_sum": ("expression",),
            "spiral_matrix": ("matrix",), "largest_island": ("grid",)}[told["source_dataset"]]
    given = {key: told[key] for key in keys}
    return None if given.get("source_base") == given.get("target_base", 0) else given


def render(spec: Spec, language: str) -> str:
    given, kind = spec["given"], spec["kind"]
    ending = answer_line(language, "the result", "结果")
    if language == "en":
        return _entry(kind, spec["difficulty"], spec["seed"])["question"].strip() + ending
    grid = "\n".join(" ".join(map(str, row)) for row in given.get("matrix", given.get("grid", ())))
    numbers = ", ".join(map(str, given.get("numbers", ())))
    return {
        "gcd": f"求这些数的最大公约数：{numbers}",
        "lcm": f"求这些数的最小公倍数：{numbers}",
        "base_conversion": f"把 {given.get('source_base')} 进制数 {given.get('source_repr')} 转换成 "
                           f"{given.get('target_base')} 进制。"
                           "大于 9 的数位用小写字母 a-z 表示。",
        "prime_factorization": f"把 {given.get('number')} 分解质因数。"
                               "质因数从小到大用 × 连接（例如 12 的答案是：2 × 2 × 3）。",
        "count_bits": f"{given.get('number')} 的二进制表示中有多少个 1？",
        "chain_sum": f"计算：{given.get('expression')} =",
        "spiral_matrix": f"从左上角开始，按顺时针螺旋顺序列出矩阵的所有元素，用空格分隔：\n{grid}",
        "largest_island": f"下面的矩阵中，1 表示陆地，0 表示水。上下左右相连的 1 组成一个岛。"
                          f"最大的岛有多少格？没有岛则为 0。\n{grid}",
    }[kind] + ending


def gold(spec: Spec, language: str) -> str:
    return str(_entry(spec["kind"], spec["difficulty"], spec["seed"])["answer"]).strip()


def solve_a(spec: Spec, language: str) -> str:
    return _SOLVERS[spec["kind"]](**spec["given"])


def solve_b(spec: Spec, language: str) -> str:
    """From the text of the question, by other people's code."""
    return _LIBRARIES[spec["kind"]](render(spec, language).rpartition("\n\n")[0])


def _gcd(numbers: list[int]) -> str:
    """By trying all divisors of the smallest, from the largest."""
    least = min(numbers)
    divisors = sorted({one for d in range(1, math.isqrt(least) + 1) if least % d == 0 for one in (d, least // d)})
    return str(next(d for d in reversed(divisors) if all(number % d == 0 for number in numbers)))


def _lcm(numbers: list[int]) -> str:
    """By the highest power of each prime."""
    powers: dict[int, int] = {}
    for number in numbers:
        factors = _factors(number)
        for prime in set(factors):
            powers[prime] = max(powers.get(prime, 0), factors.count(prime))
    return str(math.prod(prime**power for prime, power in powers.items()))


def _factors(number: int) -> list[int]:
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found + [number] * (number > 1)


def _base(source_repr: str, source_base: int, target_base: int) -> str:
    value, digits = int(source_repr, source_base), ""
    while value:
        value, digit = divmod(value, target_base)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def _spiral(matrix: list[list[int]]) -> str:
    """Take the top row and turn what is left."""
    out: list[int] = []
    while matrix:
        out += matrix[0]
        matrix = [list(row) for row in zip(*matrix[1:], strict=True)][::-1]
    return " ".join(map(str, out))


def _island(grid: list[list[int]]) -> str:
    """Join neighbours until nothing changes."""
    land = {(y, x): (y, x) for y, row in enumerate(grid) for x, cell in enumerate(row) if cell == 1}
    changed = True
    while changed:
        changed = False
        for y, x in land:
            for other in ((y + 1, x), (y, x + 1)):
                if other in land and land[other] != land[y, x]:
                    land[other] = land[y, x] = min(land[other], land[y, x])
                    changed = True
    roots = list(land.values())
    return str(max(map(roots.count, roots), default=0))


def _sum(expression: str) -> str:
    return str(sum(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d+)", expression)))


_SOLVERS: dict[str, Callable[..., str]] = {
    "gcd": _gcd, "lcm": _lcm, "base_conversion": _base, "spiral_matrix": _spiral, "largest_island": _island,
    "chain_sum": _sum, "prime_factorization": lambda number: " × ".join(map(str, _factors(number))),
    "count_bits": lambda number: str(sum(number >> place & 1 for place in range(number.bit_length()))),
}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.rpartition(":")[2].rpartition("：")[2] or text)]


def _grid(text: str) -> Any:
    import numpy as np

    lines = [line for line in text.splitlines() if re.fullmatch(r"[\d ]+", line)]
    return np.array([[int(cell) for cell in line.split()] for line in lines])


def _base_of_text(text: str) -> str:
    import numpy as np

    found = (re.search(r"base-(\d+) number (\w+) to base-(\d+)", text)
             or re.search(r"(\d+) 进制数 (\w+) 转换成 (\d+) 进制", text))
    return np.base_repr(int(found[2], int(found[1])), int(found[3])).lower()


def _factors_of_text(text: str) -> str:
    from sympy import factorint

    number = int(re.search(r"(?:factorization of|把) (\d+)", text)[1])
    return " × ".join(str(prime) for prime, power in sorted(factorint(number).items()) for _ in range(power))


def _spiral_of_text(text: str) -> str:
    import numpy as np

    grid, out = _grid(text), []
    while grid.size:
        out += grid[0].tolist()
        grid = np.rot90(grid[1:])
    return " ".join(map(str, out))


def _island_of_text(text: str) -> str:
    import numpy as np
    from scipy.ndimage import label

    marked, count = label(_grid(text))
    return str(int(np.bincount(marked.ravel())[1:].max())) if count else "0"


def _sum_of_text(text: str) -> str:
    import ast

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            return left + right if isinstance(node.op, ast.Add) else left - right
        return -value(node.operand) if isinstance(node, ast.UnaryOp) else node.value

    return str(value(ast.parse(re.search(r"[-\d][-+\d ]*(?= =)", text)[0], mode="eval").body))


_LIBRARIES: dict[str, Callable[[str], str]] = {
    "gcd": lambda text: str(math.gcd(*_numbers(text))), "lcm": lambda text: str(math.lcm(*_numbers(text))),
    "base_conversion": _base_of_text, "prime_factorization": _factors_of_text, "spiral_matrix": _spiral_of_text,
    "largest_island": _island_of_text, "chain_sum": _sum_of_text,
    "count_bits": lambda text: str(int(re.search(r"\d{2,}", text)[0]).bit_count()),
}


def verify(spec: Spec, language: str, target: str, text: str) -> tuple[float, str]:
    said, kind = final(text), spec["kind"]
    if kind == "base_conversion":
        right = re.sub(r"(?:_\{?\d+\}?|\(base.*\)|^0x(?!$))", "", said.lower()).strip(" .。").lstrip("0") == target
    elif kind in ("prime_factorization", "spiral_matrix"):
        parts = re.split(r"[×*x·]|\\times|\\cdot", said) if kind == "prime_factorization" else read_items(said)
        values = [read_number(part) for part in parts]
        wanted = [read_number(part) for part in re.split(r" × | ", target)]
        # Factors in any order; a factor that is no prime makes their number differ.
        right = (sorted(values) == sorted(wanted) if kind == "prime_factorization" and None not in values
                 else values == wanted)
    else:
        right = read_number(said) == int(target)
    return (1.0, "") if right else (0.0, f"{said[:60]!r} is not the answer")


def effort(spec: Spec) -> int:
    given = spec["given"]
    cells = given.get("matrix", given.get("grid", ()))
    return {1: 2, 2: 4, 3: 7, 4: 12, 5: 20}[spec["difficulty"]] + sum(map(len, cells)) // 20
