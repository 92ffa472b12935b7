"""Two solvers of known strength, to see that difficulty is difficulty: they know the way and slip on it.

A solver takes the steps that `effort` counts from an item's structure and slips at each with a fixed probability;
after a slip it answers something near the truth and wrong. So its accuracy on an item is (1 − slip)^effort; how the
answer is worded, read and graded is what models go through too. It is a test of the knob, no model of a model.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from moonbase.evals.fresh import coding, tool_use
from moonbase.evals.fresh.itemset import effort
from moonbase.evals.fresh.problem import Problem

SLIP = {"weak": 0.10, "strong": 0.015}


def answer(problem: Problem, strength: str, sample: int = 0) -> str:
    """What the solver writes; the same for the same arguments."""
    draw = random.Random(hashlib.sha256(f"{problem.item}/{strength}/{sample}".encode()).digest())
    right = draw.random() < (1 - SLIP[strength]) ** effort(problem)
    return wording(problem, right, draw)


def wording(problem: Problem, right: bool, draw: random.Random) -> str:
    """A right or a wrong answer in the form that the prompt asks for."""
    mark = "答案：" if problem.language == "zh" else "Answer: "
    target: Any = problem.target
    if problem.family == "code":
        text = coding.source(problem.spec)
        return f"```python\n{text if right else text.replace('return xs', 'return xs + [0]')}\n```"
    if problem.family == "tools":
        calls = tool_use.calls_of(problem.spec)
        return f"```json\n{json.dumps(calls if right else calls[:-1])}\n```"
    if isinstance(target, list) and target and isinstance(target[0], dict):
        rows = target if right else target[: len(target) // 2]
        lines = [" | ".join(row) for row in ([list(target[0]), ["---"] * len(target[0])])]
        return "\n".join([*(f"| {line} |" for line in lines), *(f"| {' | '.join(row.values())} |" for row in rows)])
    if isinstance(target, list):
        if not right:
            target = [*target[1:], target[0]] if problem.kind == "order" else [*target, "12"]
        return mark + ", ".join(target)
    if right:
        return f"{mark}{target}"
    return f"{mark}{target}{draw.randint(1, 9)}" if str(target)[-1:].isdigit() else f"{mark}{draw.randint(2, 99)}"
