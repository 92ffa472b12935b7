"""A server that plays a written part: it shows the page and streams replies in the OpenAI format.

For what a random tiny model does not do when asked: reason, call tools, fail in the middle. It keeps what it was sent.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moonbase.serve.app import PAGE, PAGE_HEADERS

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}

Delta = dict[str, Any]


def text(words: str, pause: float = 0.0, field: str = "content") -> Iterator[Delta]:
    for number, word in enumerate(words.split(" ")):
        yield {field: f" {word}" if number else word}
        time.sleep(pause)


def call(number: int, name: str, arguments: str, id: str | None = None) -> Iterator[Delta]:
    start = {"index": number, "id": id or f"functions.{name}:{number}", "type": "function"}
    yield {"tool_calls": [{**start, "function": {"name": name, "arguments": ""}}]}
    for cut in range(0, len(arguments), 3):
        yield {"tool_calls": [{"index": number, "function": {"arguments": arguments[cut : cut + 3]}}]}


class PageServer(ThreadingHTTPServer):
    """`replies`: what the last message says, or its role -> a function of the request that returns deltas, or a refusal
    (status, message, headers). A delta {"raw": text} is sent as it is and ends the stream."""

    daemon_threads = True

    def __init__(self, replies: dict[str, Any], key: str = "", models: tuple[str, ...] = ("runs/tiny",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.key, self.models = replies, key, models
        self.requests: list[dict[str, Any]] = []
        self.broken = threading.Event()
        """Set when a client closed its connection in the middle of a stream."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str, headers: dict[str, str]) -> None:
        self.answer(status, json.dumps({"error": {"message": message}}).encode(), "application/json", headers)

    def allowed(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.refuse(401, "an API key is needed: send Authorization: Bearer KEY", {})
            return False
        return True

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self.allowed():
                models = [{"id": name, "object": "model"} for name in self.server.models]
                self.answer(200, json.dumps({"object": "list", "data": models}).encode(), "application/json", {})
            return
        path = PAGE / (self.path.lstrip("/") or "index.html")
        if path.parent != PAGE or not path.is_file():
            self.refuse(404, "no such page", {})
            return
        self.answer(200, path.read_bytes(), TYPES[path.suffix], PAGE_HEADERS)

    def do_POST(self) -> None:
        # Read first: a connection that is closed over an unread body is reset.
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append(request)
        last = request["messages"][-1]
        part = self.server.replies.get(last["content"]) or self.server.replies.get(last["role"])
        if part is None:
            self.refuse(400, f"nothing is written for {last['content']!r}", {})
            return
        if isinstance(part, tuple):
            self.refuse(*part)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            self.stream(part(request))
        except (BrokenPipeError, ConnectionResetError):
            self.server.broken.set()

    def stream(self, deltas: Iterator[Delta]) -> None:
        count, finish = 0, "stop"
        for delta in deltas:
            if "raw" in delta:
                self.wfile.write(delta["raw"].encode())
                self.wfile.flush()
                return
            if "finish" in delta:
                finish = delta["finish"]
                continue
            finish = "tool_calls" if "tool_calls" in delta else finish
            count += 1
            self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        usage = {"prompt_tokens": 40, "completion_tokens": count, "total_tokens": 40 + count,
                 "prompt_tokens_details": {"cached_tokens": 32}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps({"object": "chat.completion.chunk", **chunk}).encode() + b"\n\n")
        self.wfile.flush()
