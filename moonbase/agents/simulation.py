"""An event loop whose clock jumps to the next thing that will happen: hours of waiting take milliseconds, and the same
program takes the same steps at the same times, every time.

Everything in this room tells time by the running loop, so scripted models with a latency can be run here and real ones
on asyncio's own loop, by the same code.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Never waits; says how long it was asked to."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        super().__init__()
        self._passed = passed

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("nothing will ever happen: a simulated program waits for something outside of it")
        if not events and timeout:
            self._passed(timeout)
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    """For programs that wait for nothing but each other and the clock: no processes or sockets. What they would do on
    a thread is done at once, and takes no time."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Selector(self._pass))

    def time(self) -> float:
        """Simulated seconds."""
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds
        # What is due now is found as due by asyncio only if its resolution is more than a float's at this time.
        self._clock_resolution = max(1e-9, 2 * math.ulp(self._now))

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Here and now."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def simulate(program: Coroutine[Any, Any, Result]) -> Result:
    """Run `program` with a clock that jumps. Raises RuntimeError where it waits for what will never come."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(program)
