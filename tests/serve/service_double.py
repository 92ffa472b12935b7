"""A stand-in for the engine's service that says what a test tells it to: for what the protocol does at its edges."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moonbase.engine import Sampling, Scores
from moonbase.engine.engine import EngineStatistics
from moonbase.engine.text import Piece, TextStream
from moonbase.serve.app import create_app
from moonbase.serve.run import address, bind, make_server
from moonbase.serve.settings import Settings

PATIENCE = 120.0
"""Seconds, against hanging alone: a machine may stand still while a test waits."""

Step = Piece | Exception | float | threading.Event
"""What a script holds: a piece to say, an error to raise, seconds to wait, something to wait for."""


@dataclass
class Asked:
    """What the server asked the engine for."""

    prompt_ids: list[int]
    sampling: Sampling
    constraint: Any


@dataclass
class ScriptedService:
    """Says `script` to whoever asks; a function gets the number of the request and gives its script."""

    script: list[Step] | Callable[[int], list[Step]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    statistics: EngineStatistics = field(default_factory=EngineStatistics)
    stopped: float | None = None
    max_running: int = 64
    queue_limit: int = 256
    scores: list[list[int]] = field(default_factory=list)
    """Whose log-probabilities were asked for."""

    @property
    def engine(self) -> Any:
        return self

    @property
    def open_requests(self) -> int:
        return self.running

    async def score(self, prompt_ids: Any, top: int = 0) -> Scores:
        """The id of each token as its log-probability, below zero; the most likely are always the first ids."""
        self.scores.append(list(prompt_ids))
        likely = [(id, -float(id)) for id in range(top)]
        return Scores([-float(id) for id in prompt_ids[1:]], [likely for _ in prompt_ids[1:]])

    def start(self) -> None:
        self.stopped = None

    async def stop(self, grace_seconds: float) -> None:
        self.stopped = grace_seconds

    async def generate(self, prompt_ids: Any, sampling: Sampling, constraint: Any = None) -> AsyncIterator[Piece]:
        number = len(self.asked)
        self.asked.append(Asked(list(prompt_ids), sampling, constraint))
        self.running += 1
        over = False
        try:
            for step in self.script(number) if callable(self.script) else self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Piece):
                    over = step.finish_reason is not None
                    yield step
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.01)
                else:
                    await asyncio.sleep(step)
        finally:
            self.running -= 1
            self.cancelled += not over


def says(tokenizer: Any, text: str, finish: str = "stop", stop_reason: str | int | None = None, cached: int = 0,
         wait: float = 0.0) -> list[Step]:
    """`text`, in which special-token names are tokens, as the engine would bring it: a piece per token."""
    stream, steps = TextStream(tokenizer), []
    for id in tokenizer.encode_rendered(text):
        said = stream.push(id)
        head, (last, special) = said[:-1], said[-1] if said else ("", False)
        steps += [Piece(text=before) for before, _ in head]
        top = [[(id, -0.5), (7, -1.5)]]
        steps.append(Piece([id], last, special, [-0.5], top))
        if wait:
            steps.append(wait)
    rest = "".join(said for said, _ in stream.flush())
    return [*steps, Piece(text=rest, finish_reason=finish, stop_reason=stop_reason, cached_tokens=cached)]


@dataclass
class Running:
    """A server under test."""

    url: str
    app: Any
    service: Any
    log: list[str]
    server: Any


@contextmanager
def serving(service: Any, tokenizer: Any, *, context_length: int = 512, vocab_size: int | None = None,
            **settings: Any) -> Iterator[Running]:
    """The application under uvicorn on a free port, on a thread of its own."""
    chosen = Settings(**({"port": 0, "model_names": ("moon",), "grace": 0.2} | settings))
    log: list[str] = []
    app = create_app(service, tokenizer, vocab_size=vocab_size or tokenizer.vocab_size, context_length=context_length,
                     settings=chosen, access_log=log.append)
    listening = threading.Event()
    server = make_server(app, chosen, listening.set)
    listener: socket.socket = bind(chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert listening.wait(PATIENCE), "the server did not start"
    try:
        yield Running(address(listener), app, service, log, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def by_hand(running: Running, path: str, body: dict[str, Any], **options: int) -> Iterator[socket.socket]:
    """A connection on which a request was sent; the end of the block hangs up, whatever was read. `options`: of it."""
    host, port = running.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.socket() as connection:
        connection.settimeout(PATIENCE)
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        yield connection


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
