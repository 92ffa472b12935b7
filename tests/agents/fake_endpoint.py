"""A server that answers what a test tells it to, byte for byte; in the event loop of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Step = bytes | float
"""What is sent, or how many seconds pass."""


@dataclass
class Answer:
    """Raw parts of an answer; `steps` is its body. Without an end, the connection stays open."""

    status: int = 200
    steps: list[Step] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    ends: bool = True


def whole(value: Any, status: int = 200, **headers: str) -> Answer:
    """A body in one piece: JSON, or bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, [body], {"content-type": "application/json"} | named)


def stream(events: list[Any], ends: bool = True) -> Answer:
    """Server-sent events: objects, texts (sent as data), seconds of silence, or bytes as they are."""
    steps: list[Step] = []
    for event in events:
        if isinstance(event, bytes | float):
            steps.append(event)
        else:
            data = event if isinstance(event, str) else json.dumps(event)
            steps.append(f"data: {data}\n\n".encode())
    return Answer(200, steps, {"content-type": "text/event-stream; charset=utf-8"}, ends)


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeEndpoint:
    """`answer` tells what the request is answered with; None closes the connection at once."""

    answer: Callable[[Asked], Answer | None]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    inside: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.inside += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            content = await reader.readexactly(int(headers.get("content-length", 0)))
            asked = Asked(head[0].split(" ")[1], headers, json.loads(content) if content else None)
            self.asked.append(asked)
            answer = self.answer(asked)
            if answer is None:
                return
            lines = [f"HTTP/1.1 {answer.status} X", "connection: close"]
            lines += [f"{name}: {value}" for name, value in answer.headers.items()]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            for step in answer.steps:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    writer.write(step)
                    await writer.drain()
            if not answer.ends:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.inside -= 1
            writer.close()


@asynccontextmanager
async def serving(answer: Callable[[Asked], Answer | None] | Answer | list[Answer]) -> AsyncIterator[FakeEndpoint]:
    """A running endpoint. A list is answered one by one, the last for ever."""
    if isinstance(answer, Answer):
        answer = [answer]
    if isinstance(answer, list):
        answers = list(answer)
        endpoint = FakeEndpoint(lambda _: answers.pop(0) if len(answers) > 1 else answers[0])
    else:
        endpoint = FakeEndpoint(answer)
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield endpoint
    finally:
        server.close()
