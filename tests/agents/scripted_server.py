"""An OpenAI-compatible server whose replies a policy decides, in a process of its own.

    python -m tests.agents.scripted_server wide|hostile|down [--seconds S] [--free N] [--log FILE]

`wide` answers as the scripted agents of the baselines do; `hostile` sends what no client should have to expect; `down`
refuses every call with 503. A reply takes S seconds, the first N none. The first line on standard output is the URL.
Each answered call is a line of the log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moonbase.agents.baselines.policies import Wide

HOSTILE: tuple[dict[str, Any], ...] = (
    {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": {
        "name": "create_subagent", "arguments": '{"name": "x"'}}]},
    {"content": None, "tool_calls": [{"id": "b", "type": "function", "function": {
        "name": "no_such_\x1b[2J", "arguments": "[" * 3000}}]},
    {"content": "\x1b[2J\x1b]0;owned\x07\u202e \ud800 <script>alert(1)</script>", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "create_subagent", "arguments": json.dumps(
            {"name": "\x1b[31m\u202eevil\n\n", "system_prompt": "x" * 10_000})}},
        {"id": "c", "type": "function", "function": {"name": "assign_tasks", "arguments": json.dumps(
            {"agent": "nobody", "template": "no item", "items": ["a"] * 10})}},
        {"id": "", "type": "function", "function": {"name": "", "arguments": "null"}}]},
    {"content": "", "tool_calls": []},
    {"content": "The end. \x1b[31mred\x1b[0m \u202egnirts"},
)


class Server(ThreadingHTTPServer):
    """Holds what the handlers share."""

    daemon_threads = True
    request_queue_size = 256
    policy = "wide"
    seconds = 0.0
    free = 0
    log: Any = None
    lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no news."""

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The assistant's message."""
        messages = body["messages"]
        if self.policy == "hostile":
            said = sum(message["role"] == "assistant" for message in messages)
            return HOSTILE[min(said, len(HOSTILE) - 1)]
        return Wide(calls_per_turn=4)(messages, body.get("tools") or [])


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "scripted", "object": "model", "max_model_len": 65536}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.policy == "down":
            self._send(503, {"error": {"message": "nobody is here"}})
            return
        message = {"role": "assistant", "content": None, **self.server.reply(body)}
        with self.server.lock:
            self.server.free -= 1
            seconds = 0.0 if self.server.free >= 0 else self.server.seconds
        time.sleep(seconds)
        if self.server.log is not None:
            digest = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()
            with self.server.lock:
                self.server.log.write(f"{digest}\n")
                self.server.log.flush()
        self._send(200, {
            "id": "x", "object": "chat.completion", "model": "scripted",
            "choices": [{"index": 0, "message": message,
                         "finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}})

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("policy", choices=("wide", "hostile", "down"))
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--free", type=int, default=0)
    parser.add_argument("--log")
    given = parser.parse_args()
    server = Server(("127.0.0.1", 0), Handler)
    server.policy, server.seconds, server.free = given.policy, given.seconds, given.free
    server.log = open(given.log, "a", encoding="utf-8") if given.log else None
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
