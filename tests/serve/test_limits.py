"""Where patience ends: full queues, deadlines, clients that leave or stall, a server that is told to stop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest

from moonbase.engine.service import QueueFull
from tests.serve.service_double import PATIENCE, Running, ScriptedService, by_hand, says, serving, until

FOREVER = 600.0
"""Seconds that a script is silent: longer than any test waits for anything."""
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
    server.service.script = lambda number: [QueueFull(9, 1)] if number == 2 else [*says(tokenizer, "x", wait=FOREVER)]
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"n": 3},
                      timeout=PATIENCE).status_code == 429
    until(lambda: server.service.running == 0)


def test_the_jobs_of_a_request_get_in_together(tokenizer: Any) -> None:
    """More than ever fit are a mistake; more than fit now are told to come again, before any of them has begun."""
    service = ScriptedService([*says(tokenizer, "</think>hi")[:2], FOREVER], max_running=2, queue_limit=2)
    with serving(service, tokenizer) as running, httpx.Client(base_url=running.url, timeout=PATIENCE) as http:
        for path, body, name in (("/v1/chat/completions", CHAT | {"n": 5}, "n: "),
                                 ("/v1/completions", {"model": "moon", "prompt": ["a", "b", "c"], "n": 2}, "n: ")):
            refused = http.post(path, json=body)
            assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(name)
            assert "holds 4 at a time" in refused.json()["error"]["message"]
        with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as first:
            parts = first.iter_text()
            assert next(parts) and service.running == 1
            busy = http.post("/v1/chat/completions", json=CHAT | {"n": 4})
            assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
            assert "1 of 4 places" in busy.json()["error"]["message"] and len(service.asked) == 1
        until(lambda: service.running == 0)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def slow_reader(tokenizer: Any, request_timeout: float) -> Iterator[tuple[Running, list[bytes], threading.Event]]:
    """A server that reads a body that says so only when it may; the bodies that have come; how to allow it."""
    allowed, came = threading.Event(), []
    with serving(ScriptedService(says(tokenizer, "</think>hi")), tokenizer, context_length=10**6,
                 request_timeout=request_timeout) as running:
        backend = running.app.state.backend
        prepare, read = backend.prepare, backend.read

        def slow(wish: Any) -> Any:
            if "slow" in str(wish.messages[0]["content"]):
                allowed.wait()
            return prepare(wish)

        async def noting(body: bytes, how: Any) -> Any:
            came.append(body)
            return await read(body, how)

        backend.prepare, backend.read = slow, noting
        try:
            yield running, came, allowed
        finally:
            allowed.set()


LONG = CHAT | {"messages": [{"role": "user", "content": "slow" + "." * 300_000}]}


def test_long_bodies_do_not_keep_short_ones_waiting(tokenizer: Any) -> None:
    with (slow_reader(tokenizer, FOREVER) as (running, came, allowed), ThreadPoolExecutor(12) as threads,
          httpx.Client(base_url=running.url, timeout=PATIENCE) as http):
        late = [threads.submit(http.post, "/v1/chat/completions", json=LONG) for _ in range(12)]
        try:
            until(lambda: len(came) == 12)
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
            assert http.get("/").status_code == 200
            assert not any(answer.done() for answer in late)
        finally:
            allowed.set()
        assert {answer.result().status_code for answer in late} == {200}


def test_reading_counts_towards_the_time_limit(tokenizer: Any) -> None:
    with (slow_reader(tokenizer, 0.5) as (running, _, _), ThreadPoolExecutor(12) as threads,
          httpx.Client(base_url=running.url, timeout=PATIENCE) as http):
        late = [threads.submit(http.post, "/v1/chat/completions", json=LONG) for _ in range(12)]
        assert {answer.result().status_code for answer in late} == {504}


def test_leaving_while_the_request_is_read(tokenizer: Any) -> None:
    with slow_reader(tokenizer, FOREVER) as (running, came, _):
        for number, (path, body) in enumerate(PATHS):
            with by_hand(running, path, body | {"messages": [{"role": "user", "content": "slow"}]}):
                until(lambda number=number: len(came) == number + 1)
            until(lambda number=number: len(running.log) == number + 1)
        assert finishes(running) == ["disconnected"] * 2
        assert [json.loads(line)["status"] for line in running.log] == [499] * 2 and not running.service.asked


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_deadline(tokenizer: Any) -> None:
    slow = ScriptedService([*says(tokenizer, "</think>some words")[:-1], FOREVER])
    with (serving(slow, tokenizer, request_timeout=0.4) as running,
          httpx.Client(base_url=running.url, timeout=PATIENCE) as http):
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
        until(lambda: len(running.log) == 4)
        assert slow.running == 0 and finishes(running) == ["deadline"] * 4
        # On a machine that stands still, time may be up before the engine is asked.
        assert 0 < slow.cancelled == len(slow.asked) <= 4


def test_a_client_that_loses_patience(server: Running, tokenizer: Any) -> None:
    """The clients' own time-outs close the connection: that is all the server learns, and it is enough."""
    server.service.script = [FOREVER, *says(tokenizer, "</think>late")]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    other = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
    for sdk, create, ask in ((openai, client.chat.completions.create, CHAT),
                             (anthropic, other.messages.create, MESSAGES)):
        asked = len(server.service.asked)
        # Where the machine stands still, patience may end before the request is at work: then with more.
        for seconds in (0.3, 3.0, 20.0):
            lines = len(server.log)
            with pytest.raises(sdk.APITimeoutError):
                create(**ask, timeout=sdk.Timeout(PATIENCE, read=seconds))
            until(lambda lines=lines: len(server.log) == lines + 1)
            if len(server.service.asked) > asked:
                break
        assert server.service.running == 0 and server.service.cancelled == asked + 1
        assert json.loads(server.log[-1])["status"] == 499


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_leaving_a_stream_frees_its_place_at_once(server: Running, tokenizer: Any, path: str, body: dict) -> None:
    """Noticed while the model is silent."""
    server.service.script = [*says(tokenizer, "</think>first")[:3], FOREVER, *says(tokenizer, "late")]
    with httpx.stream("POST", server.url + path, json=body | {"stream": True, "n": 1}, timeout=PATIENCE) as response:
        parts = response.iter_text()
        assert next(parts)
        assert server.service.running == 1
    until(lambda: server.service.running == 0)
    assert server.service.cancelled == 1
    until(lambda: len(server.log) == 1)
    assert finishes(server) == ["disconnected"]


def test_leaving_before_the_first_token(server: Running, tokenizer: Any) -> None:
    server.service.script = [FOREVER, *says(tokenizer, "late")]
    with by_hand(server, "/v1/chat/completions", CHAT | {"stream": True}):
        until(lambda: server.service.running == 1)
    until(lambda: server.service.running == 0)


def test_async_clients_that_cancel(server: Running, tokenizer: Any) -> None:
    server.service.script = [*says(tokenizer, "</think>moon " * 200, wait=0.02)[:-1], FOREVER]

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)

        async def read() -> None:
            async for _ in await client.chat.completions.create(**CHAT, stream=True):
                pass

        tasks = [asyncio.create_task(read()) for _ in range(8)]
        async with asyncio.timeout(PATIENCE):
            while server.service.running < 8:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()

    asyncio.run(main())
    until(lambda: server.service.running == 0)
    assert server.service.cancelled == 8


def test_a_client_that_reads_nothing_is_cut_off(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonbase.serve.streaming.STALLED_SECONDS", 0.2)
    flood = ScriptedService(says(tokenizer, "</think>" + "moon " * 3000))
    flood.script = [piece for piece in flood.script for _ in range(5) if piece.finish_reason is None] + [FOREVER]
    # Long enough to be at work when the time is up, though the machine stands still for a while.
    with serving(flood, tokenizer, request_timeout=3.0) as running:
        with by_hand(running, "/v1/chat/completions", CHAT | {"stream": True}, SO_RCVBUF=4096):
            until(lambda: flood.running == 1)
            until(lambda: flood.running == 0)


def test_a_silent_stream_shows_that_it_lives(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream begins without a token when none comes for a while."""
    monkeypatch.setattr("moonbase.serve.streaming.ADMISSION_SECONDS", 0.1)
    for (path, body), ping, end in zip(PATHS, (": ping\n\n", "event: ping\n"), ("data: [DONE]\n\n", "message_stop"),
                                       strict=True):
        speak, text = threading.Event(), ""
        with (serving(ScriptedService([speak, *says(tokenizer, "x")]), tokenizer, ping_every=0.1) as running,
              httpx.stream("POST", running.url + path, json=body | {"stream": True}, timeout=PATIENCE) as response):
            for part in response.iter_text():
                text += part
                if text.count(ping) >= 4:
                    speak.set()
        assert speak.is_set() and end in text[text.rindex(ping) :]


# --- the end of the server --------------------------------------------------------------------------------------------


def asking(running: Running, path: str, body: dict[str, Any]) -> Any:
    executor = ThreadPoolExecutor(1)
    future = executor.submit(lambda: httpx.post(running.url + path, json=body, timeout=PATIENCE))
    until(lambda: running.service.running == 1)
    return future


def refuses(running: Running) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(f"{running.url}/health", timeout=PATIENCE)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass  # met in the middle of the end
    return False


def test_a_stop_waits_for_what_runs(tokenizer: Any) -> None:
    *words, last = says(tokenizer, "</think>last words")
    finish = threading.Event()
    service = ScriptedService([*words, finish, last])
    with serving(service, tokenizer, style="kimi-k2.5", grace=FOREVER) as running:
        answer = asking(running, "/v1/chat/completions", CHAT)
        running.server.should_exit = True
        until(lambda: refuses(running))
        assert service.running == 1 and not answer.done()
        finish.set()
        assert answer.result().json()["choices"][0]["message"]["content"] == "last words"
    assert service.stopped == FOREVER


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), PATHS)
def test_after_the_grace_what_runs_is_ended(tokenizer: Any, stream: bool, path: str, body: dict[str, Any]) -> None:
    service = ScriptedService([*says(tokenizer, "</think>word")[:2], FOREVER])
    with serving(service, tokenizer, grace=0.3) as running:
        answer = asking(running, path, body | {"stream": stream})
        running.server.should_exit = True
        response = answer.result()
    assert response.status_code == (200 if stream else 503)
    assert "the server is shutting down" in response.text and service.running == 0 and service.stopped == 0.0
