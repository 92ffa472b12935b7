"""An event loop whose clock jumps to the next thing that will happen: hours of waiting take milliseconds, and the same
program takes the same steps at the same times, every time.

Everything in this room tells time by the running loop, so scripted models with a latency can be run here and real ones
on asyncio's own loop, by the same code.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Never waits; tells how long it was asked to."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout is None:
            raise RuntimeError("nothing will ever happen: a simulated program waits for something outside of it")
        if not events and timeout:
            self._clock.now += timeout
        return events


class _Clock:
    now = 0.0


class SimulatedLoop(asyncio.SelectorEventLoop):
    """For programs that wait for nothing but each other and the clock: no processes or sockets. What they would do on
    a thread is done at once, and takes no time."""

    def __init__(self) -> None:
        self._simulated = _Clock()
        super().__init__(_Selector(self._simulated))

    def time(self) -> float:
        """Simulated seconds."""
        return self._simulated.now

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
