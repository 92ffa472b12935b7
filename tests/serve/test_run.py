"""`moonbase serve` as a user starts and stops it: a process of its own, with a model from a folder."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from moonbase import cli
from moonbase.checkpoint import save_weights
from moonbase.errors import UserError
from moonbase.serve.run import address, bind, check_packages, run
from moonbase.serve.settings import Settings
from tests.model.tiny import tiny_model
from tests.serve.service_double import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny-moon"
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, max_position_embeddings=4096)
    save_weights(model, place, model.config)
    tokenizer.save(place)
    return place


class Process:
    """`moonbase serve` with what it says; `url` once it listens."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "moonbase", "serve", str(folder), "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        until(lambda: self.process.poll() is not None or any("http://" in line for line in self.lines), 300)
        assert self.process.poll() is None, self.lines
        self.url = re.search(r"http://\S+", "".join(self.lines))[0]


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("log") / "access.jsonl"
    process = Process(folder, "--cache-tokens", "8192", "--grace", "120", "--access-log", str(log))
    process.log = log
    yield process
    process.process.kill()
    process.process.wait()


def test_on_a_cpu_the_cache_is_large_enough_to_keep_something(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    engines: list[Any] = []
    monkeypatch.setattr("moonbase.serve.run.serve", lambda app, _: engines.append(app.state.backend.service.engine))
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    # Two layers of ten and eight fp32 numbers a token.
    for free, options, expected in ((8 << 30, {}, 1 << 30), (1 << 30, {}, 0.4 * (1 << 30)),
                                    (8 << 30, {"cache_tokens": 1024}, 1024 * 144)):
        monkeypatch.setattr("moonbase.engine.engine.free_memory_bytes", lambda free=free: free)
        run(model, tokenizer, Settings(), {}, **options)
        size = engines[-1].capacity * 144
        assert size == pytest.approx(expected, rel=1e-4) and size <= expected


def test_both_clients_with_a_changed_base_url(running: Process) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x")
    assert [model.id for model in client.models.list()] == ["tiny-moon"]
    reply = client.chat.completions.create(model="tiny-moon", messages=USER, max_tokens=5)
    assert reply.usage.completion_tokens <= 5
    other = anthropic.Anthropic(base_url=running.url, api_key="x")
    assert other.messages.create(model="tiny-moon", messages=USER, max_tokens=5).usage.output_tokens <= 5
    assert client.chat.completions.create(model="gpt-4o", messages=USER, max_tokens=5).model == "gpt-4o"
    assert any("chat style kimi-k2," in line and "4096 tokens" in line and "any model name" in line
               for line in running.lines)
    until(lambda: len(running.log.read_text().splitlines()) == 4)
    assert [json.loads(line)["status"] for line in running.log.read_text().splitlines()] == [200] * 4


def test_sigterm_finishes_what_runs_and_leaves_with_0(running: Process) -> None:
    """Last: it ends the server of this file."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x")
    stream = client.completions.create(model="tiny-moon", prompt="a", max_tokens=150, stream=True,
                                       extra_body={"ignore_eos": True})
    assert next(iter(stream)).choices
    running.process.send_signal(signal.SIGTERM)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length"
    assert running.process.wait(120) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url, timeout=PATIENCE)
    assert not any("Traceback" in line for line in running.lines)


@pytest.mark.slow
def test_the_end_of_the_grace_ends_what_runs(folder: Path) -> None:
    process = Process(folder, "--cache-tokens", "8192", "--grace", "0.2", "--api-key", "k", "--model-name", "any")
    try:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="k")
        with pytest.raises(openai.NotFoundError, match="this server has 'any'"):
            client.completions.create(model="gpt-4o", prompt="a")
        assert any("model names any)" in line for line in process.lines)
        stream = client.completions.create(model="any", prompt="a", max_tokens=4000, stream=True,
                                           extra_body={"ignore_eos": True})
        next(iter(stream))
        waiting = socket.create_connection(("127.0.0.1", int(process.url.rsplit(":", 1)[1].strip("/"))), PATIENCE)
        waiting.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer k\r\n"
                        b"expect: 100-continue\r\ncontent-length: 99\r\n\r\n")
        assert waiting.recv(1000).startswith(b"HTTP/1.1 100 ")
        waiting.sendall(b"{")  # and never the rest
        process.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert waiting.recv(1000).startswith(b"HTTP/1.1 503 "), "not when its time for the body is over, which is 408"
        waiting.close()
        assert process.process.wait(120) == 0
        assert not any("Traceback" in line for line in process.lines)
    finally:
        process.process.kill()
        process.process.wait()


# --- before it starts -------------------------------------------------------------------------------------------------


def test_the_socket() -> None:
    with bind(Settings(port=0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        assert address(listener) == f"http://127.0.0.1:{port}"
        # Without this an answer in two parts waits for the client's delayed acknowledgement.
        assert listener.proto == socket.IPPROTO_TCP
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind(Settings(port=port))
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.host\.example:0"):
        bind(Settings(host="no.such.host.example", port=0))


@pytest.mark.parametrize(("arguments", "words"), [
    (["nowhere"], "nowhere: no such folder"),
    (["preset:pico"], "no tokenizer"),
    (["nowhere", "--style", "kimi"], "style='kimi' is unknown"),
    (["nowhere", "--request-timeout", "0"], "request_timeout=0.0"),
    (["nowhere", "--api-key", ""], "an API key must be"),
])  # fmt: skip
def test_mistakes_are_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", *arguments])
    error = capfd.readouterr().err
    assert left.value.code == 2 and words in error and error.count("\n") == 1


def test_a_log_that_cannot_be_written_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", str(folder), "--access-log", str(folder / "no" / "such" / "folder")])
    assert left.value.code == 2 and "--access-log" in capfd.readouterr().err


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    with pytest.raises(UserError, match=r"needs uvicorn; install them with pip install 'moonbase\[serve\]'"):
        check_packages()
