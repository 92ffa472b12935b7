"""The engine on a thread of its own, for an asyncio program: forward passes never hold up the event loop."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from moonbase.engine.engine import Engine, EngineStatistics, MakeConstraint
from moonbase.engine.sampling import Sampling, Scores
from moonbase.engine.scheduler import Request
from moonbase.engine.text import Piece
from moonbase.errors import TryAgain


class QueueFull(TryAgain):
    """Too many requests wait. `retry_after`: seconds after which another try is sensible."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Stopped(TryAgain):
    """The service is shutting down."""


class Failed(Exception):
    """A forward pass raised; the requests that were in it are lost, the service goes on."""


_Deliver = Callable[[Piece | Exception], None]


class Service:
    """`start`, then `generate` from any number of tasks, then `stop`."""

    def __init__(self, engine: Engine, *, queue_limit: int = 256) -> None:
        """`queue_limit`: requests that may wait for their first pass; more raise QueueFull."""
        self.engine, self.queue_limit = engine, queue_limit
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._deliver: dict[Request, _Deliver] = {}
        self._open = 0
        self._finished_times: list[float] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._statistics = EngineStatistics()

    @property
    def statistics(self) -> EngineStatistics:
        """A snapshot after the last forward pass."""
        return self._statistics

    @property
    def open_requests(self) -> int:
        """Requests that have been accepted and not yet ended."""
        return self._open

    def start(self) -> None:
        """Make the cache and begin. Raises UserError where no cache fits."""
        self._snapshot()
        self._thread = threading.Thread(target=self._work, name="moonbase-engine", daemon=True)
        self._thread.start()

    async def stop(self, grace_seconds: float = 0.0) -> None:
        """Accept nothing more; let what runs finish for so long, then cancel it."""
        self._stopping = True
        until = time.monotonic() + grace_seconds
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        for request in list(self._deliver):
            self._command(lambda request=request: self._cancel(request))
        until = time.monotonic() + 10
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        with self._changed:
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            await asyncio.to_thread(thread.join, 10)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, constraint: MakeConstraint | None = None
    ) -> AsyncIterator[Piece]:
        """One reply, piece by piece; the last has a finish_reason. Closing the iterator cancels the request.

        Raises QueueFull, Stopped, UserError for a prompt or setting that does not fit, Failed where the pass raised.
        """
        self._check_room()
        async for piece in self._follow(self.engine.request(prompt_ids, sampling, constraint, text=True)):
            yield piece

    async def score(self, prompt_ids: Sequence[int], top: int = 0) -> Scores:
        """See `Engine.score`. Raises what `generate` raises."""
        self._check_room()
        request = self.engine.request(prompt_ids, Sampling(max_tokens=1, logprobs=top), score=True)
        async for _ in self._follow(request):
            pass
        assert request.scores is not None
        return request.scores

    def _check_room(self) -> None:
        if self._stopping or self._thread is None:
            raise Stopped("the server is shutting down")
        waiting = self._open - self.engine.max_running
        if waiting >= self.queue_limit:
            raise QueueFull(max(0, waiting), self._retry_after())

    async def _follow(self, request: Request) -> AsyncIterator[Piece]:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(piece: Piece | Exception) -> None:
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except RuntimeError:
                # The loop has been closed: nobody listens any more.
                self._command(lambda: self._cancel(request))

        def submit() -> None:
            self._deliver[request] = deliver
            self.engine.submit(request)

        self._open += 1
        try:
            self._command(submit)
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self._open -= 1
            if request.finish_reason is None:
                self._command(lambda: self._cancel(request))

    def _retry_after(self) -> float:
        """When a place is likely to be free: by the rate of the last finished requests."""
        recent = [moment for moment in self._finished_times if moment > time.monotonic() - 60]
        return min(60.0, max(1.0, 60.0 / len(recent))) if recent else 5.0

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _cancel(self, request: Request) -> None:
        self.engine.cancel(request)
        self._snapshot()
        deliver = self._deliver.pop(request, None)
        if deliver is not None:
            deliver(Piece(finish_reason="cancelled"))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._commands and not self.engine.busy and self._thread is not None:
                    self._changed.wait()
                if self._thread is None:
                    return
                commands, self._commands = self._commands, []
            for command in commands:
                command()
            error: Exception | None = None
            try:
                if self.engine.busy:
                    self.engine.step()
            except Exception as raised:
                error = raised
            # First, so that whoever has read the last piece finds the blocks free.
            self._snapshot()
            for request, piece in self.engine.fetch():
                self._hand_out(request, piece)
            if error is not None:
                self._fail(error)

    def _hand_out(self, request: Request, piece: Piece) -> None:
        deliver = self._deliver.get(request)
        if piece.finish_reason is not None:
            self._deliver.pop(request, None)
            self._finished_times = [*self._finished_times[-255:], time.monotonic()]
        if deliver is not None:
            deliver(piece if request.error is None else _failed("the reply's grammar failed", request.error))

    def _fail(self, error: Exception) -> None:
        """Everyone who was in the pass learns of it; whoever waits goes on."""
        lost = [request for request in self._deliver if request.row >= 0 or request.finish_reason is not None]
        for request in lost or list(self._deliver):
            self.engine.cancel(request)
            self._deliver.pop(request)(_failed("the forward pass failed", error))
        self._snapshot()

    def _snapshot(self) -> None:
        self._statistics = copy.deepcopy(self.engine.statistics)


def _failed(what: str, error: Exception) -> Failed:
    """Names the kind of error, without words that may hold somebody's text; the error itself is its cause."""
    failed = Failed(f"{what}: {type(error).__name__}")
    failed.__cause__ = error
    return failed
