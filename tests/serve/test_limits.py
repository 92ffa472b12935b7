"""Where patience ends: full queues, deadlines, clients that leave or stall, a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import anthropic
import httpx
import openai
import pytest

from moonbase.engine.service import QueueFull
from tests.serve.service_double import Running, ScriptedService, says, serving, until

CHAT = {"model": "moon", "messages": [{"role": "user", "content": "hi"}]}
MESSAGES = CHAT | {"max_tokens": 5}
PATHS = (("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGES))


def finishes(running: Running) -> list[str]:
    return [json.loads(line).get("finish") for line in running.log]


def test_a_full_queue_is_tried_again_by_the_clients(server: Running, tokenizer: Any) -> None:
    """429 with Retry-After: what both official clients wait for and repeat by themselves."""
    server.service.script = lambda number: says(tokenizer, "</think>hi") if number % 2 else [QueueFull(9, 0.3)]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=1)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "hi"
    other = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=1)
    assert other.messages.create(**MESSAGES).content
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=0).chat.completions.create(**CHAT)


def test_one_of_several_choices_that_does_not_get_in_stops_all(server: Running, tokenizer: Any) -> None:
    server.service.script = lambda number: [QueueFull(9, 1)] if number == 2 else [*says(tokenizer, "x", wait=9)]
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"n": 3}).status_code == 429
    until(lambda: server.service.running == 0)


def test_the_jobs_of_a_request_get_in_together(tokenizer: Any) -> None:
    """More than ever fit are a mistake; more than fit now are told to come again, before any of them has begun."""
    service = ScriptedService([*says(tokenizer, "</think>hi")[:2], 20.0], max_running=2, queue_limit=2)
    with serving(service, tokenizer) as running, httpx.Client(base_url=running.url) as http:
        for path, body, name in (("/v1/chat/completions", CHAT | {"n": 5}, "n: "),
                                 ("/v1/completions", {"model": "moon", "prompt": ["a", "b", "c"], "n": 2}, "n: ")):
            refused = http.post(path, json=body)
            assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(name)
            assert "holds 4 at a time" in refused.json()["error"]["message"]
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=CHAT | {"stream": True}) as first:
            parts = first.iter_text()
            assert next(parts) and service.running == 1
            busy = http.post("/v1/chat/completions", json=CHAT | {"n": 4})
            assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
            assert "1 of 4 places" in busy.json()["error"]["message"] and len(service.asked) == 1
        until(lambda: service.running == 0)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_reader(tokenizer: Any) -> Any:
    """A server that takes its time over every body that says so, however large it is."""
    with serving(ScriptedService(says(tokenizer, "</think>hi")), tokenizer, request_timeout=1.0) as running:
        backend = running.app.state.backend
        prepare = backend.prepare

        def slow(wish: Any) -> Any:
            if "slow" in str(wish.messages[0]["content"]):
                time.sleep(1.5)
            return prepare(wish)

        backend.prepare = slow
        yield running


def test_long_bodies_do_not_keep_short_ones_waiting(slow_reader: Running) -> None:
    import concurrent.futures

    long = CHAT | {"messages": [{"role": "user", "content": "slow" + "." * 300_000}]}
    with concurrent.futures.ThreadPoolExecutor(12) as threads, httpx.Client(base_url=slow_reader.url) as http:
        late = [threads.submit(http.post, "/v1/chat/completions", json=long) for _ in range(12)]
        time.sleep(0.2)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert http.get("/").status_code == 200
        assert not any(answer.done() for answer in late)
        assert {answer.result().status_code for answer in late} == {504}, "reading counts towards the time limit"


def test_leaving_while_the_request_is_read(slow_reader: Running) -> None:
    for path, body in PATHS:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(slow_reader.url + path, json=body | {"messages": [{"role": "user", "content": "slow"}]},
                       timeout=0.2)
    start = time.monotonic()
    until(lambda: len(slow_reader.log) == 2)
    assert time.monotonic() - start < 1.0 and finishes(slow_reader) == ["disconnected"] * 2
    assert [json.loads(line)["status"] for line in slow_reader.log] == [499] * 2 and not slow_reader.service.asked


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_deadline(tokenizer: Any) -> None:
    slow = ScriptedService([*says(tokenizer, "</think>some words", wait=0.12)])
    with serving(slow, tokenizer, request_timeout=0.4) as running, httpx.Client(base_url=running.url) as http:
        for path, body in PATHS:
            whole = http.post(path, json=body)
            assert whole.status_code == 504 and "timeout_error" in whole.text
        until(lambda: slow.running == 0)
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.APIError, match="time limit"):
            list(client.chat.completions.create(**CHAT, stream=True))
        other = anthropic.Anthropic(base_url=running.url, api_key="x", max_retries=0)
        with pytest.raises(anthropic.APIStatusError, match="timeout_error"):
            list(other.messages.create(**MESSAGES, stream=True))
        until(lambda: slow.running == 0)
        assert slow.cancelled == 4 and finishes(running) == ["deadline"] * 4


def test_a_client_that_loses_patience(server: Running, tokenizer: Any) -> None:
    """The clients' own time-outs close the connection: that is all the server learns, and it is enough."""
    server.service.script = [20.0, *says(tokenizer, "</think>late")]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**CHAT)
    assert until(lambda: server.service.running == 0) < 2
    other = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, timeout=0.3)
    with pytest.raises(anthropic.APITimeoutError):
        other.messages.create(**MESSAGES)
    assert until(lambda: server.service.running == 0) < 2
    assert server.service.cancelled == 2
    until(lambda: len(server.log) == 2)
    assert [json.loads(line)["status"] for line in server.log] == [499, 499]


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_leaving_a_stream_frees_its_place_at_once(server: Running, tokenizer: Any, path: str, body: dict) -> None:
    server.service.script = [*says(tokenizer, "</think>first")[:3], 20.0, *says(tokenizer, "late")]
    with httpx.stream("POST", server.url + path, json=body | {"stream": True, "n": 1}) as response:
        parts = response.iter_text()
        assert next(parts)
        assert server.service.running == 1
    assert until(lambda: server.service.running == 0) < 1, "noticed while the model is silent"
    assert server.service.cancelled == 1
    until(lambda: len(server.log) == 1)
    assert finishes(server) == ["disconnected"]


def test_leaving_before_the_first_token(server: Running, tokenizer: Any) -> None:
    server.service.script = [20.0, *says(tokenizer, "late")]
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(CHAT | {"stream": True}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        until(lambda: server.service.running == 1)
    assert until(lambda: server.service.running == 0) < 1


def test_async_clients_that_cancel(server: Running, tokenizer: Any) -> None:
    server.service.script = [*says(tokenizer, "</think>moon " * 200, wait=0.02)]

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)

        async def read() -> None:
            async for _ in await client.chat.completions.create(**CHAT, stream=True):
                pass

        tasks = [asyncio.create_task(read()) for _ in range(8)]
        while server.service.running < 8:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    asyncio.run(main())
    assert until(lambda: server.service.running == 0) < 2
    assert server.service.cancelled == 8


def test_a_client_that_reads_nothing_is_cut_off(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonbase.serve.streaming.STALLED_SECONDS", 0.2)
    flood = ScriptedService(says(tokenizer, "</think>" + "moon " * 3000))
    flood.script = [piece for piece in flood.script for _ in range(5) if piece.finish_reason is None] + [60.0]
    with serving(flood, tokenizer, request_timeout=0.5) as running:
        host, port = running.url.removeprefix("http://").split(":")
        content = json.dumps(CHAT | {"stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            until(lambda: len(flood.asked) == 1)
            assert until(lambda: flood.running == 0, 10) < 5


def test_a_silent_stream_shows_that_it_lives(tokenizer: Any) -> None:
    silent = ScriptedService([0.5, *says(tokenizer, "x")])
    with serving(silent, tokenizer, ping_every=0.1) as running:
        # The stream begins without a token when none comes for a while.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moonbase.serve.streaming.ADMISSION_SECONDS", 0.1)
            texts = [httpx.post(running.url + path, json=body | {"stream": True}).text for path, body in PATHS]
    assert texts[0].count(": ping\n\n") >= 3 and texts[0].endswith("data: [DONE]\n\n")
    assert texts[1].count("event: ping\n") >= 4 and "event: message_stop" in texts[1]


# --- the end of the server --------------------------------------------------------------------------------------------


def asking(running: Running, path: str, body: dict[str, Any]) -> Any:
    import concurrent.futures

    executor = concurrent.futures.ThreadPoolExecutor(1)
    future = executor.submit(lambda: httpx.post(running.url + path, json=body, timeout=20))
    until(lambda: running.service.running == 1)
    return future


def test_a_stop_waits_for_what_runs(tokenizer: Any) -> None:
    service = ScriptedService([*says(tokenizer, "</think>last words", wait=0.05)])
    with serving(service, tokenizer, style="kimi-k2.5", grace=10.0) as running:
        answer = asking(running, "/v1/chat/completions", CHAT)
        running.server.should_exit = True
        time.sleep(0.15)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")
        assert answer.result().json()["choices"][0]["message"]["content"] == "last words"
    assert service.stopped == 10.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), PATHS)
def test_after_the_grace_what_runs_is_ended(tokenizer: Any, stream: bool, path: str, body: dict[str, Any]) -> None:
    service = ScriptedService([*says(tokenizer, "</think>word")[:2], 60.0])
    with serving(service, tokenizer, grace=0.3) as running:
        answer = asking(running, path, body | {"stream": stream})
        running.server.should_exit = True
        response = answer.result()
    assert response.status_code == (200 if stream else 503)
    assert "the server is shutting down" in response.text and service.running == 0 and service.stopped == 0.0
