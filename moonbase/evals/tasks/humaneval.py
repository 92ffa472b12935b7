"""HumanEval from a local copy: the model's function runs with the published tests in our sandbox, not in this process.
"""

from __future__ import annotations

import re
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState, generate

from moonbase.agents.tools.sandbox import SandboxLimits, make_sandbox
from moonbase.evals.sources import find_copy, read_rows, source_of
from moonbase.evals.suite import Suite, TaskSpec

PROMPT = ("Complete this Python function. Answer with the whole function in one ```python block, and nothing else."
          "\n\n{code}")
LIMITS = SandboxLimits(wall_seconds=15.0, cpu_seconds=10.0, memory_bytes=1 << 30)
PASSED = "all tests passed, {mark}"
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_in(text: str, prompt: str, entry_point: str) -> str:
    """The program that an answer stands for: its last block that defines the function, else the whole text behind the
    prompt, as a base model goes on with it."""
    blocks = [block for block in _BLOCK.findall(text) if f"def {entry_point}" in block]
    if blocks:
        # The prompt's imports and helpers first; the block defines the function anew.
        return f"{prompt}    pass\n\n{blocks[-1]}"
    return prompt + text


def program(row: dict[str, Any], answer: str, mark: str) -> str:
    """The answer, the published tests, and a last line that is printed only where they all ran through."""
    code = code_in(answer, row["prompt"], row["entry_point"])
    return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\nprint({PASSED.format(mark=mark)!r})\n"


def humaneval(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """All 164 tasks. Raises UserError where there is no sandbox, unless `params.allow_unsafe`."""
    rows = {row["task_id"]: row for row in islice(
        read_rows(find_copy(source_of(spec.params, f"suite {suite.name}, task {spec.name}"), data)), limit)}
    samples = [Sample(id=id.replace("/", "_"), input=PROMPT.format(code=row["prompt"]), target="", metadata={
        "item": id, "group": None, "cluster": "", "condition": {"language": "en"}}) for id, row in rows.items()]
    return Task(name=spec.name, dataset=MemoryDataset(samples, name=spec.name), solver=generate(),
                scorer=tests_scorer(rows, bool(spec.params.get("allow_unsafe"))),
                epochs=Epochs(suite.samples, reducer=[]))


@scorer(metrics=[], name="tests")
def tests_scorer(rows: dict[str, dict[str, Any]], allow_unsafe: bool = False) -> Scorer:
    """Whether the published tests pass; the details say how the program ended."""
    # At once, so that a missing sandbox is told before anything is paid for.
    with tempfile.TemporaryDirectory() as folder:
        make_sandbox(folder, LIMITS, allow_unsafe=allow_unsafe)

    async def score(state: TaskState, target: Target) -> Score:
        row = rows[state.metadata["item"]]
        mark = f"{state.sample_id}-{state.uuid}"
        with tempfile.TemporaryDirectory(prefix="moonbase-tests-") as folder:
            async with make_sandbox(folder, LIMITS, allow_unsafe=allow_unsafe) as sandbox:
                result = await sandbox.run([sys.executable, "-I", "-"],
                                           stdin=program(row, state.output.completion, mark).encode())
        passed = result.status == 0 and result.output.rstrip().endswith(PASSED.format(mark=mark))
        remark = "" if passed else result.text().strip().rpartition("\n")[2][:200]
        return Score(value={"accuracy": float(passed)}, metadata={"details": {"remark": remark}})

    return score
