"""Sending an answer: in one piece or as server-sent events, to a client that may leave, stall or stay silent.

A client that goes away is noticed while the model is thinking, not only at the next word: whoever waits for tokens
also listens for the end of the connection, and leaving cancels the work.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from moonbase.engine.turn import Turn
from moonbase.serve.backend import Backend
from moonbase.serve.errors import RequestError, log_failure
from moonbase.serve.gate import Record
from moonbase.serve.generation import Generations, Job

Result = TypeVar("Result")

STALLED_SECONDS = 10.0
"""A client that reads nothing may hold its stream so long after the deadline before it is cut off."""

ADMISSION_SECONDS = 1.0
"""A stream begins with the first token, so that a refusal still has a status of its own; or after so long."""

CLIENT_CLOSED = 499
"""The status in log and metrics where nobody was left to be answered (nginx's number)."""


class Disconnected(Exception):
    """The client has gone; nobody is there to be answered."""


class Answer(Protocol):
    """How a surface words a reply."""

    turns: Sequence[Turn]
    stream: bool

    def begin(self) -> Iterable[bytes]:
        """What a stream opens with."""

    def deltas(self, number: int, piece: Any, events: list[Any]) -> Iterable[bytes]:
        """What a piece of choice `number` adds to the stream; after the last piece also how it ended."""

    def end(self) -> Iterable[bytes]:
        """What a stream closes with."""

    def ping(self) -> bytes:
        """A sign of life."""

    def failure(self, error: RequestError, request_id: str) -> Iterable[bytes]:
        """What a stream closes with when it cannot go on."""

    def body(self) -> dict[str, Any]:
        """The whole reply in one."""

    def cached_tokens(self) -> int:
        """Prompt tokens that were in the cache already; a prompt that several choices share counts once."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event, `data` as JSON in one line."""
    # ASCII alone: clients that split lines as Unicode does (U+2028, U+0085) would cut an event in two.
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("ascii")


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Any, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled where the client leaves first (raises Disconnected)."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        for task in (working, watching):
            task.cancel()
        # Where the client has gone nobody is left to be told what the work ended with.
        await asyncio.gather(working, watching, return_exceptions=True)


class Reply:
    """The ASGI response that runs jobs and sends what a surface makes of them.

    What goes wrong before the first byte is raised, for the app's handlers to answer; afterwards it is the stream's
    last event.
    """

    def __init__(self, backend: Backend, jobs: Sequence[Job], answer: Answer, record: Record, deadline: float) -> None:
        self.backend, self.jobs, self.answer, self.record, self.deadline = backend, jobs, answer, record, deadline

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = self._stream if self.answer.stream else self._whole
        self.record.stream = self.answer.stream
        self.backend.metrics.open.inc()
        running = Generations(self.backend.service, self.jobs, self.deadline, self.backend.lifetime)
        try:
            async with asyncio.timeout_at(self.deadline + STALLED_SECONDS), running:
                await unless_gone(receive, work(running, scope, receive, send))
            self.record.finish = self.record.finish or ",".join(turn.finish_reason for turn in self.answer.turns)
        except Disconnected:
            self.record.status, self.record.finish = CLIENT_CLOSED, "disconnected"
        except TimeoutError:
            self.record.finish = "stalled"
        finally:
            self.backend.metrics.open.dec()
            if running.failure is not None:
                log_failure(self.record.id, running.failure)
            self._account()

    def _account(self) -> None:
        turns, record = self.answer.turns, self.record
        first = [turn.first_time for turn in turns if turn.first_time is not None]
        record.first_token_seconds = min(first) - record.started if first else None
        record.completion_tokens = sum(turn.completion_tokens for turn in turns)
        record.cached_tokens = self.answer.cached_tokens()
        self.backend.metrics.turns_ended(turns, record.started)

    async def _whole(self, running: Generations, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        while not running.done:
            number, piece = await running.next() or (0, None)
            self.answer.turns[number].push(piece)
        await JSONResponse(self.answer.body())(scope, receive, send)

    async def _stream(self, running: Generations, scope: Any, receive: Any, send: Any) -> None:
        item = None if running.done else await running.next(ADMISSION_SECONDS)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        waiting = list(self.answer.begin())
        try:
            while True:
                if item is None and not running.done:
                    waiting.append(self.answer.ping())
                while item is not None:
                    number, piece = item
                    waiting += self.answer.deltas(number, piece, self.answer.turns[number].push(piece))
                    item = running.ready()
                if running.done:
                    break
                if waiting:
                    await send({"type": "http.response.body", "body": b"".join(waiting), "more_body": True})
                    waiting = []
                item = await running.next(self.backend.settings.ping_every)
            waiting += self.answer.end()
        except Exception as error:
            known = error if isinstance(error, RequestError) else RequestError(
                500, f"an error on the server's side; its log has it under {self.record.id}", code="internal_error")
            if known is not error:
                log_failure(self.record.id, error)
            self.record.finish = known.code
            waiting += self.answer.failure(known, self.record.id)
        await send({"type": "http.response.body", "body": b"".join(waiting), "more_body": False})
