"""Programs to write from a random specification, and programs to repair.

A specification is a list of steps over a list of integers. Solver A interprets the steps; solver B runs the Python
source that is written from them. A candidate runs in the sandbox on inputs alone (what they should give never enters
it); its outputs are compared here, and two properties are checked: equal inputs give equal outputs, and the input is
unchanged.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import tempfile
from pathlib import Path
from typing import Any

from moonbase.agents.tools.sandbox import SandboxLimits, make_sandbox
from moonbase.errors import UserError
from moonbase.evals.fresh.answers import read_code
from moonbase.evals.fresh.problem import Draw

Spec = dict[str, Any]
STEPS = (1, 2, 3, 5, 7)
CASES = 14
LIMITS = SandboxLimits(wall_seconds=10, cpu_seconds=8, memory_bytes=256 << 20, processes=16, file_bytes=1 << 20,
                       output_bytes=1 << 20, kept_bytes=1 << 20)
LONGEST_CODE = 20_000
# Name: (English, Chinese, source of one step on the list `xs`). k and m are numbers of the step.
_STEPS = {
    "add": ("add {k} to every number", "把每个数加上 {k}", "xs = [x + {k} for x in xs]"),
    "multiply": ("multiply every number by {k}", "把每个数乘以 {k}", "xs = [x * {k} for x in xs]"),
    "remainder": ("replace every number by its remainder modulo {m} (from 0 to {top}, also for negative numbers)",
                  "把每个数换成它除以 {m} 的余数（负数的余数也在 0 到 {top} 之间）", "xs = [x % {m} for x in xs]"),
    "keep-above": ("keep only the numbers greater than {k}", "只保留大于 {k} 的数", "xs = [x for x in xs if x > {k}]"),
    "drop-multiples": ("remove the numbers divisible by {m}", "去掉能被 {m} 整除的数",
                       "xs = [x for x in xs if x % {m} != 0]"),
    "reverse": ("reverse the list", "把列表反转", "xs = xs[::-1]"),
    "sort": ("sort the list in ascending order", "把列表按升序排序", "xs = sorted(xs)"),
    "unique": ("keep only the first occurrence of every number", "每个数只保留第一次出现的",
               "xs = [x for i, x in enumerate(xs) if x not in xs[:i]]"),
    "rotate": ("rotate the list to the left by {k2} (modulo its length)",
               "把列表向左循环移动 {k2} 位（位数对列表长度取模）",
               "xs = xs[{k2} % len(xs):] + xs[:{k2} % len(xs)] if xs else []"),
    "prefix-sums": ("replace every number by the sum of all numbers up to and including it",
                    "把每个数换成从开头到它为止（含它）的和",
                    "xs = [sum(xs[:i + 1]) for i in range(len(xs))]"),
    "differences": ("replace the list by the differences of neighbours, the later minus the earlier",
                    "把列表换成相邻两数之差（后者减前者）", "xs = [xs[i + 1] - xs[i] for i in range(len(xs) - 1)]"),
    "every-other": ("keep only the numbers at even positions, counted from 0", "只保留偶数位置的数（位置从 0 开始）",
                    "xs = xs[::2]"),
    "swap-pairs": ("swap the first with the second number, the third with the fourth and so on (a last one without a "
                   "partner stays)", "把第一个数与第二个数交换、第三个与第四个交换，依此类推（末尾落单的不动）",
                   "xs = [x for i in range(0, len(xs), 2) for x in xs[i:i + 2][::-1]]"),
    "clip": ("replace numbers below -{m} by -{m} and numbers above {m} by {m}",
             "把小于 -{m} 的数换成 -{m}，大于 {m} 的数换成 {m}",
             "xs = [min(max(x, -{m}), {m}) for x in xs]"),
}
# What a bug does to a line of the source: the first that fits is put in.
_BUGS = ((" + 1", " + 2"), (" > ", " >= "), ("!= 0", "!= 1"), ("xs[:i]", "xs[:i - 1]"), ("[::2]", "[1::2]"),
         ("[::-1]", "[::1]"),
         ("x + ", "x - "), ("x * ", "x + "), ("% len(xs):]", "% len(xs) + 1:]"), ("min(max(", "max(min("),
         ("x % ", "x // "),
         ("sorted(xs)", "sorted(xs, reverse=True)"))


def make(draw: Draw, difficulty: int) -> Spec | None:
    kind = draw.choice(("write", "repair"))
    size = STEPS[difficulty - 1] + (kind == "repair" or difficulty == 1)
    steps: list[list[Any]] = []
    while len(steps) < size:
        name = draw.choice(tuple(_STEPS))
        if not steps or steps[-1][0] != name:
            steps.append([name, draw.randint(2, 19), draw.randint(2, 25)])
    cases = [[], [draw.randint(-50, 50)]]
    cases += [[draw.randint(-50, 50) for _ in range(draw.randint(2, 14))] for _ in range(CASES - 2)]
    spec = {"kind": kind, "difficulty": difficulty, "steps": steps, "cases": cases,
            "name": f"f{draw.randrange(10**6):06d}"}
    outputs = solve_a(spec, "en")
    if sum(len(output) > 1 for output in outputs) < CASES // 3 or outputs == cases:
        return None  # Nearly every list would be empty or stay as it is: guessing would pay.
    if kind == "repair":
        spec["bug"] = _break(draw, spec, outputs)
        return spec if spec["bug"] else None
    return spec


def _break(draw: Draw, spec: Spec, outputs: list[list[int]]) -> list[Any] | None:
    """[line, wrong line] such that some case comes out wrong."""
    lines = source(spec).splitlines()
    for place in draw.sample(range(1, len(lines) - 1), len(lines) - 2):
        for right, wrong in draw.sample(_BUGS, len(_BUGS)):
            if right in lines[place]:
                bug = [place, lines[place].replace(right, wrong, 1)]
                text = "\n".join([*lines[:place], bug[1], *lines[place + 1 :]])
                try:
                    if _run(text, spec) != outputs:
                        return bug
                except (ArithmeticError, ValueError, IndexError, TypeError):
                    continue
    return None


def source(spec: Spec) -> str:
    """The reference program."""
    lines = [_STEPS[name][2].format(k=k, m=m, k2=k % 7 + 1) for name, k, m in spec["steps"]]
    return "\n".join([f"def {spec['name']}(xs):", *(f"    {line}" for line in lines), "    return xs"])


def broken_source(spec: Spec) -> str:
    lines = source(spec).splitlines()
    lines[spec["bug"][0]] = spec["bug"][1]
    return "\n".join(lines)


def render(spec: Spec, language: str) -> str:
    zh, name = language == "zh", spec["name"]
    steps = "\n".join(f"{number}. {_STEPS[what][zh].format(k=k, m=m, k2=k % 7 + 1, top=m - 1)}"
                      for number, (what, k, m) in enumerate(spec["steps"], 1))
    if zh:
        text = f"请编写 Python 函数 `{name}(xs)`。参数是整数列表，返回一个新列表，依次执行以下步骤：\n\n{steps}"
        if spec["kind"] == "repair":
            text = (f"下面的 Python 函数应当返回依次执行以下步骤的结果：\n\n{steps}\n\n但其中有一处错误：\n\n"
                    f"```python\n{broken_source(spec)}\n```\n\n请修正它。")
        return text + "\n\n列表可能为空；不得修改传入的列表。请在一个 ```python 代码块中给出完整函数。"
    text = (f"Write a Python function `{name}(xs)`. It takes a list of integers and returns a new list, made by these "
            f"steps in order:\n\n{steps}")
    if spec["kind"] == "repair":
        text = (f"This Python function should return the result of these steps in order:\n\n{steps}\n\nBut it has one "
                f"bug:\n\n```python\n{broken_source(spec)}\n```\n\nRepair it.")
    return text + ("\n\nThe list may be empty; the list that is passed in must not be changed. Answer with the whole "
                   "function in one ```python block.")


def solve_a(spec: Spec, language: str) -> list[list[int]]:
    """What the function returns on each case: each step done by its meaning."""
    return [_interpret(spec["steps"], list(case)) for case in spec["cases"]]


def _interpret(steps: list[list[Any]], xs: list[int]) -> list[int]:
    for name, k, m in steps:
        result: list[int] = []
        if name == "rotate":
            for _ in range(k % 7 + 1):
                xs = xs[1:] + xs[:1]
            continue
        if name == "reverse":
            for x in xs:
                result.insert(0, x)
        elif name == "sort":
            while len(result) < len(xs):
                rest = list(xs)
                for x in result:
                    rest.remove(x)
                result.append(min(rest))
        elif name == "swap-pairs":
            result = list(xs)
            for i in range(1, len(xs), 2):
                result[i - 1], result[i] = result[i], result[i - 1]
        else:
            total = 0
            for place, x in enumerate(xs):
                total += x
                if name == "differences":
                    result += [x - xs[place - 1]] if place else []
                elif name == "every-other":
                    result += [x] if place % 2 == 0 else []
                elif name == "unique":
                    result += [x] if x not in result else []
                elif name in ("keep-above", "drop-multiples"):
                    result += [x] if (x > k if name == "keep-above" else divmod(x, m)[1]) else []
                else:
                    result.append({"add": x + k, "multiply": x * k, "remainder": divmod(x, m)[1], "prefix-sums": total,
                                   "clip": sorted((-m, x, m))[1]}[name])
        xs = result
    return xs


def solve_b(spec: Spec, language: str) -> list[list[int]]:
    return _run(source(spec), spec)


def _run(text: str, spec: Spec) -> list[list[int]]:
    """Of our own source only; what a model wrote goes into the sandbox."""
    space: dict[str, Any] = {}
    exec(compile(text, spec["name"], "exec"), space)
    return [space[spec["name"]](list(case)) for case in spec["cases"]]


_DRIVER = """
import json, sys
name, mark, cases = json.loads(sys.stdin.readline())
space = {"__name__": "candidate"}
exec(compile(open("candidate.py", encoding="utf-8").read(), "candidate.py", "exec"), space)
out = []
for case in cases:
    twice = []
    for _ in range(2):
        given = list(case)
        try:
            value = space[name](given)
            value = [list(value) if isinstance(value, (list, tuple)) else None, given == case]
        except Exception as error:
            value = [type(error).__name__, True]
        twice.append(value)
    out.append(twice)
print(mark + json.dumps(out), flush=True)
"""


async def run_candidate(spec: Spec, code: str) -> list[Any] | str:
    """[[output, input unchanged] twice] for each case, or why there is nothing. Raises UserError without a sandbox."""
    import secrets

    mark = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="moonbase-fresh-") as folder:
        # Not only ours to read: the sandbox may run as nobody.
        Path(folder, "candidate.py").write_text(code, encoding="utf-8", errors="replace")
        Path(folder, "driver.py").write_text(_DRIVER, encoding="utf-8")
        async with make_sandbox(folder, LIMITS) as sandbox:
            stdin = json.dumps([spec["name"], mark, spec["cases"]]).encode() + b"\n"
            result = await sandbox.run(["python3", "-I", "driver.py"], stdin=stdin)
    for line in reversed(result.output.splitlines()):
        if line.startswith(mark):
            try:
                return json.loads(line.removeprefix(mark))
            except (ValueError, RecursionError):
                break
    lines = result.text().strip().splitlines()
    return f"the program gave no result: {lines[-1][:160] if lines else 'no output'}"


async def verify_async(spec: Spec, language: str, target: list[list[int]], text: str) -> tuple[float, str]:
    """Right on every case, twice, with the input left as it was; nothing less counts."""
    code = read_code(text)
    if code is None:
        return 0.0, "no code block with a function"
    if len(code) > LONGEST_CODE:
        return 0.0, "the program is too long"
    out = await run_candidate(spec, code)
    if isinstance(out, str):
        return 0.0, out
    if not isinstance(out, list) or len(out) != len(target):
        return 0.0, "not an output for every case"
    for number, (twice, wanted) in enumerate(zip(out, target, strict=True)):
        for said, unchanged in twice:
            if not _same(said, wanted):
                return 0.0, f"case {number}: {str(said)[:80]}"
            if unchanged is not True:
                return 0.0, f"case {number}: the list that was passed in has been changed"
    return 1.0, ""


def _same(said: Any, wanted: list[int]) -> bool:
    """True is no 1 here, and 2.0 no 2."""
    return isinstance(said, list) and said == wanted and all(type(x) is int for x in said)


def verify(spec: Spec, language: str, target: list[list[int]], text: str) -> tuple[float, str]:
    """Outside of an event loop or inside of one; there it blocks, so a scorer awaits verify_async."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(verify_async(spec, language, target, text))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, verify_async(spec, language, target, text)).result()


def needs_sandbox() -> None:
    """Raises UserError, before anything runs, where candidates cannot be run."""
    with tempfile.TemporaryDirectory(prefix="moonbase-fresh-") as folder:
        try:
            make_sandbox(folder, LIMITS)
        except UserError as error:
            raise UserError(f"family code: {error}") from None


def effort(spec: Spec) -> int:
    return 2 * len(spec["steps"])
