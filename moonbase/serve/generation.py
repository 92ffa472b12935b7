"""Running requests of the engine, seen from one HTTP request: n choices merged, a deadline, an end whatever happens.

`async with Generations(...)`: leaving the block, however it is left, cancels what still runs in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moonbase.errors import TryAgain, UserError
from moonbase.serve.errors import RequestError, from_user_error

if TYPE_CHECKING:
    from moonbase.engine import Sampling, Scores


class ServiceLike(Protocol):
    """What the server needs of `moonbase.engine.Service`."""

    statistics: Any
    engine: Any
    """Has `max_running`."""
    queue_limit: int
    open_requests: int

    def start(self) -> None: ...

    async def stop(self, grace_seconds: float) -> None: ...

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling, constraint: Any = None) -> AsyncIterator[Any]: ...

    async def score(self, prompt_ids: Sequence[int], top: int = 0) -> Scores: ...


def capacity(service: ServiceLike) -> int:
    """Sequences that a service holds at most, running and waiting."""
    return service.engine.max_running + service.queue_limit


RETRY_SECONDS = 5
"""When a request of several sequences that did not fit may be tried again."""


def shutting_down_error() -> RequestError:
    """What a request gets that the end of the server met."""
    return RequestError(503, "the server is shutting down", code="shutting_down",
                        headers={"retry-after": str(RETRY_SECONDS)})


def deadline_error() -> RequestError:
    """What a request gets whose time is up."""
    return RequestError(504, "the answer was not ready within the server's time limit", code="deadline")


@dataclass(frozen=True)
class Job:
    """One sequence for the engine. `constraint`: a factory of what its tokens must obey, or None."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    constraint: Callable[[], Any] | None = None


class Lifetime:
    """When running answers must end: their deadline, or the server's own end."""

    def __init__(self) -> None:
        self.closing = asyncio.Event()

    def close(self) -> None:
        """End every running answer now."""
        self.closing.set()


class Generations:
    """Pieces of several jobs in the order in which they come. All of them get in, or none."""

    def __init__(self, service: ServiceLike, jobs: Sequence[Job], deadline: float, lifetime: Lifetime) -> None:
        """`deadline`: on the clock of the running event loop."""
        self.service, self.jobs, self.deadline, self.lifetime = service, jobs, deadline, lifetime
        self.arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        self.open = len(jobs)
        self.failure: Exception | None = None
        """What nobody foresaw and nobody was told, for whoever left too early: to be logged after the block."""

    async def __aenter__(self) -> Generations:
        """Raises RequestError 429 where there is no room for all."""
        most, open_requests = capacity(self.service), self.service.open_requests
        if len(self.jobs) > 1 and open_requests + len(self.jobs) > most:
            raise RequestError(429, f"{open_requests} of {most} places are taken and this request needs "
                               f"{len(self.jobs)} at once; try again in {RETRY_SECONDS} s", code="queue_full",
                               headers={"retry-after": str(RETRY_SECONDS)})
        self.tasks = [asyncio.create_task(self._pump(number, job)) for number, job in enumerate(self.jobs)]
        self.tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        # They hand what they raise to `arrived`; nothing but their own cancelling comes back here.
        await asyncio.gather(*self.tasks, return_exceptions=True)
        while not self.arrived.empty():
            _, piece = self.arrived.get_nowait()
            if isinstance(piece, Exception) and not isinstance(as_request_error(piece), RequestError):
                self.failure = piece

    async def _pump(self, number: int, job: Job) -> None:
        try:
            pieces = self.service.generate(job.prompt_ids, job.sampling, job.constraint)
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    self.arrived.put_nowait((number, piece))
                    if piece.finish_reason is not None:
                        return
            raise RuntimeError("the engine ended a request without a reason")
        except Exception as error:
            # Raised again by `next`, or kept as `failure` where nobody asks any more.
            self.arrived.put_nowait((number, error))

    async def _watch(self) -> None:
        try:
            async with asyncio.timeout_at(self.deadline):
                await self.lifetime.closing.wait()
            error = shutting_down_error()
        except TimeoutError:
            error = deadline_error()
        self.arrived.put_nowait((-1, error))

    async def next(self, patience: float | None = None) -> tuple[int, Any] | None:
        """The next (job number, piece); None where none came within `patience` seconds.

        Raises RequestError: 429 the queue is full, 400 the engine refuses the prompt, 503 / 504 time is up.
        """
        try:
            async with asyncio.timeout(patience):
                number, piece = await self.arrived.get()
        except TimeoutError:
            return None
        return self._look(number, piece)

    def ready(self) -> tuple[int, Any] | None:
        """As `next`, but only what has arrived already."""
        if self.arrived.empty() or self.done:
            return None
        return self._look(*self.arrived.get_nowait())

    def _look(self, number: int, piece: Any) -> tuple[int, Any]:
        if isinstance(piece, Exception):
            error = as_request_error(piece)
            if error is piece:
                raise piece
            raise error from piece
        if piece.finish_reason == "cancelled":
            raise shutting_down_error()
        if piece.finish_reason is not None:
            self.open -= 1
        return number, piece

    @property
    def done(self) -> bool:
        """Whether every job has said its last piece."""
        return self.open == 0


def as_request_error(error: Exception) -> Exception:
    """What an error of the engine means to the client; what no client caused stays as it is."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return from_user_error(error)
    if isinstance(error, TryAgain):
        seconds = getattr(error, "retry_after", None)
        if seconds is None:
            return shutting_down_error()
        headers = {"retry-after": str(max(1, math.ceil(seconds)))}
        return RequestError(429, str(error), code="queue_full", headers=headers)
    return error
