"""What is seen while Inspect asks: how far each task is with each model, in place of Inspect's own panels.

On a terminal bars that go when all is done, elsewhere a line now and then. Warnings of Inspect and of providers are
printed, each once. No text of a question or an answer is shown.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

SECONDS = 30.0
"""Between two lines about one task where there is no terminal."""
LONGEST = 300
"""Letters of a warning."""


@dataclass
class _Task:
    name: str
    total: int
    begun: float
    said: float
    done: int = 0
    failed: int = 0
    why: str = ""
    """Of the first that failed."""
    bar: Any = None


class Progress:
    """Counts of every task that runs. Calls may come for tasks that nobody started: they are left alone."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._tasks: dict[str, _Task] = {}
        self._bars: Any = None
        if out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                                  TimeRemainingColumn(), console=Console(file=out), transient=True)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, key: str, name: str, total: int) -> None:
        task = self._tasks[key] = _Task(name, total, self._clock(), self._clock())
        if self._bars is not None:
            task.bar = self._bars.add_task(name, total=total)

    def sample(self, key: str, failure: str | None) -> None:
        task = self._tasks.get(key)
        if task is None:
            return
        task.done += 1
        if failure is not None:
            task.failed, task.why = task.failed + 1, task.why or failure
        if self._bars is not None:
            self._bars.update(task.bar, completed=task.done)
        elif task.done < task.total and self._clock() - task.said >= SECONDS:
            task.said = self._clock()
            self._print(self._line(task))

    def end(self, key: str) -> None:
        task = self._tasks.pop(key, None)
        if task is None:
            return
        if self._bars is not None:
            self._bars.update(task.bar, completed=task.total)
        if self._bars is None or task.failed:
            self._print(self._line(task))

    def _line(self, task: _Task) -> str:
        failed = f"; {task.failed:,} failed: {task.why}" if task.failed else ""
        return f"{task.name}: {task.done:,} of {task.total:,} samples in {self._clock() - task.begun:,.0f} s{failed}"

    def _print(self, line: str) -> None:
        if self._bars is None:
            print(line, file=self._out, flush=True)
        else:
            # Above the bars, and it stays when they go.
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)


_current: Progress | None = None
_hooked = False
_tell: Callable[[str], str] = str


@contextlib.contextmanager
def inspect_progress(tell: Callable[[str], str], warn: bool = True) -> Iterator[None]:
    """Progress on standard error while Inspect runs, and warnings where `warn`; nothing that Inspect itself would
    print. `tell`: of an error's message what may be shown."""
    import rich

    global _current, _tell
    _tell = tell
    _hook()
    console, root, warnings = rich.get_console(), logging.getLogger(), _Warnings()
    quiet, console.quiet, level = console.quiet, True, root.level
    if warn:
        root.addHandler(warnings)
        # Inspect sets the level once in a process, by the first run.
        root.setLevel(min(level, logging.WARNING))
    try:
        with Progress(sys.stderr) as _current:
            yield
    finally:
        _current, console.quiet = None, quiet
        root.removeHandler(warnings)
        root.setLevel(level)


class _Warnings(logging.Handler):
    """Each warning once, in one line."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:LONGEST]
        if text not in self._said:
            self._said.add(text)
            print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)


def _hook() -> None:
    """Once per process: whoever Inspect tells of the samples that are done."""
    global _hooked
    if _hooked:
        return
    from inspect_ai.hooks import Hooks, SampleEnd, TaskEnd, TaskStart, hooks

    class Told(Hooks):
        def enabled(self) -> bool:
            return _current is not None

        async def on_task_start(self, data: TaskStart) -> None:
            dataset = data.spec.dataset
            asked = len(dataset.sample_ids) if dataset.sample_ids is not None else dataset.samples or 0
            if _current is not None:
                _current.start(data.eval_id, f"{data.spec.task}, {data.spec.model}",
                               asked * (data.spec.config.epochs or 1))

        async def on_sample_end(self, data: SampleEnd) -> None:
            if _current is not None:
                error = data.sample.error
                _current.sample(data.eval_id, None if error is None else _tell(error.message))

        async def on_task_end(self, data: TaskEnd) -> None:
            if _current is not None:
                _current.end(data.eval_id)

    hooks(name="moonbase_progress", description="how far an evaluation is")(Told)
    _hooked = True
