"""Whatever a client sends, it gets a 4xx in its own surface's shape that says what is wrong, and never a 500."""

from __future__ import annotations

import json
import random
from typing import Any

import anthropic
import httpx
import openai
import pytest

from moonbase.engine.service import Failed, QueueFull
from moonbase.errors import UserError
from tests.serve.service_double import PATIENCE, Running, ScriptedService, says, serving, until
from tests.serve.test_openai import TWO_CALLS

USER = [{"role": "user", "content": "hi"}]
CHAT = {"model": "moon", "messages": USER}
MESSAGES = {"model": "moon", "messages": USER, "max_tokens": 5}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens",
         "/anthropic/v1/messages", "/anthropic/v1/messages/count_tokens")


def told(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, after a look at its shape, which depends on the path alone."""
    body = response.json()
    assert response.headers["x-request-id"] == response.headers["request-id"] != ""
    if response.request.url.path.startswith(("/v1/messages", "/anthropic")):
        assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
        assert body["error"].keys() == {"type", "message"} and body["request_id"] == response.headers["request-id"]
    else:
        assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]


# --- bodies that are no requests --------------------------------------------------------------------------------------

NESTED = b'{"model": "moon", "messages": [{"role": "user", "content": "x"}], "tools": ' + b"[" * 70 + b"]" * 70 + b"}"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(("body", "word"), [
    (b"", "JSON"), (b"{", "JSON"), (b"null", "object"), (b"[]", "object"), (b'"x"', "object"), (b"{'a': 1}", "JSON"),
    (b'{"model": "\xff"}', "UTF-8"), (b"\xff\xfe{\x00}\x00", "UTF-8"), (b'{"model": NaN}', "NaN"),
    (b'{"temperature": Infinity}', "Infinity"), (b'{"temperature": -Infinity}', "Infinity"),
    (b'{"temperature": 1e999}', "too large"), (b'{"seed": ' + b"9" * 5000 + b"}", "5000"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deeper"), (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deeper"),
    (NESTED, "deeper"),
])  # fmt: skip
def test_no_json(http: httpx.Client, server: Running, path: str, body: bytes, word: str) -> None:
    response = http.post(path, content=body)
    assert response.status_code == 400
    assert word in told(response)["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(tokenizer: Any, path: str, chunked: bool) -> None:
    with serving(ScriptedService(), tokenizer, most_body_bytes=1000) as running:
        body = json.dumps(CHAT | {"user": "x" * 3_000_000}).encode()
        response = httpx.post(running.url + path, content=iter([body]) if chunked else body, timeout=PATIENCE)
        assert response.status_code == 413
        assert "1,000 bytes" in told(response)["message"]


def test_a_body_that_never_comes(tokenizer: Any) -> None:
    import socket

    with serving(ScriptedService(), tokenizer, body_timeout=0.2) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head.encode() + b"{")
            # The server hangs up afterwards.
            answer = b"".join(iter(lambda: connection.recv(10_000), b"")).decode()
        assert answer.startswith("HTTP/1.1 408") and "0.2 s" in answer


def test_a_compressed_body(http: httpx.Client, server: Running) -> None:
    response = http.post("/v1/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert response.status_code == 415 and told(response)["message"]


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", "/v1/messages/nothing", 404), ("POST", "/", 405),
    ("GET", "/anthropic/nothing", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/messages", 405),
    ("PUT", "/anthropic/v1/messages", 405), ("POST", "/v1/models", 405), ("POST", "/metrics", 405),
    ("GET", "/../../etc/passwd", 404), ("GET", "/%2e%2e/%2e%2e/app.py", 404), ("GET", "/index.html", 404),
    ("GET", "/v1/chat/completions/", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404),
])  # fmt: skip
def test_unknown_routes_and_wrong_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    told(response)
    assert status != 405 or response.headers["allow"]


# --- requests that are wrong ------------------------------------------------------------------------------------------


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user"} | fields]}


@pytest.mark.parametrize(("change", "param"), [
    ({"model": None}, "model"), ({"model": 5}, "model"), ({"model": "x" * 257}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"), ({"messages": [5]}, "messages[0]"), (message(content=5), "messages[0].content"),
    (message(content="x", role="robot"), "messages[0].role"), (message(), "messages[0]"),
    (message(content=[{"type": "image_url", "image_url": {"url": "data:"}}]), "messages[0].content[0]"),
    (message(content=[{"type": "input_audio"}]), "messages[0].content[0]"),
    (message(content=[{"type": "text"}]), "messages[0].content[0]"),
    (message(content=[{"type": "text", "text": 5}]), "messages[0].content[0].text"),
    (message(content="x", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": "{}"}}]), "messages[0]"),
    (message(content="x", role="tool"), "messages[0]"), (message(content="x", role="tool", tool_call_id="a"),
                                                         "messages[0].tool_call_id"),
    (message(role="assistant", tool_calls=[{"id": "a", "function": {"name": "f", "arguments": {}}}]),
     "messages[0].tool_calls[0].function.arguments"),
    ({"temperature": "1"}, "temperature"), ({"temperature": -1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 2}, "top_p"), ({"n": 0}, "n"),
    ({"n": 1000}, "n"), ({"n": 1.5}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"stop": 5}, "stop"), ({"stop": ""}, "stop"), ({"stop": ["x"] * 17}, "stop"), ({"stop": ["a", None]}, "stop[1]"),
    ({"seed": 2**70}, "seed"), ({"seed": 0.5}, "seed"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"١": 1}}, "logit_bias"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 5}}, "stream_options.include_usage"), ({"functions": [{}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"modalities": ["audio"]}, "modalities"), ({"audio": {}}, "audio"), ({"thinking": {"type": "x"}}, "thinking.type"),
    ({"tools": [{}]}, "tools[0].type"), ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
                                         "tools[0].function.name"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}},
     "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "text"}}}}}]}, "tools[0].function.parameters.properties.a.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
     "response_format.json_schema.schema.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}, "tools": [TOOL]},
     "response_format.json_schema.schema.type"),
    ({"response_format": {"type": "json_object"}, "max_tokens": 1}, "max_tokens"),
    ({"messages": [{"role": "assistant", "content": "x", "partial": True}, *USER]}, "messages[0].partial"),
])  # fmt: skip
def test_wrong_chat_requests(http: httpx.Client, server: Running, change: dict[str, Any], param: str) -> None:
    body = {name: value for name, value in (CHAT | change).items() if value is not None}
    response = http.post("/v1/chat/completions", json=body)
    error = told(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"] or "").startswith(param), error
    assert param.split("[")[0].split(".")[0] in error["message"] and not server.service.asked


@pytest.mark.parametrize(("change", "words"), [
    ({"max_tokens": None}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"),
    ({"model": "x" * 257}, "256"), ({"context_management": {"edits": [{"type": "clear"}]}}, "context_management"),
    ({"compaction": {"type": "auto"}}, "compaction"), ({"fallbacks": [{"model": "x"}]}, "fallbacks"),
    ({"output_format": {"type": "json_schema", "schema": {"type": "x"}}}, "output_format.schema.type"),
    (message(content=[{"type": "image", "source": {}}]), "messages[0].content[0]: a block of type 'image'"),
    (message(content=[{"type": "document"}]), "messages[0].content[0]"), (message(content=[]), "messages[0].content"),
    (message(content=[{"type": "tool_use", "id": "a", "name": "f", "input": {}}]), "messages[0]"),
    (message(content=[{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}]),
     "content[0].content"),
    (message(content=[{"type": "tool_result", "tool_use_id": "a", "content": "x"}]), "messages[0].tool_use_id"),
    (message(role="assistant", content=[{"type": "tool_use", "id": "a", "name": "f", "input": {}}]), "messages[0]"),
    (message(role="assistant", content=[{"type": "tool_use", "id": "a", "name": "f", "input": "{}"}]), "input"),
    ({"system": 5}, "system"), ({"system": [{"type": "image"}]}, "system[0]"), ({"temperature": 1.5}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"), ({"stop_sequences": "x"}, "stop_sequences"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"), ({"tools": [{"type": "web_search_20250305"}]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"), ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"mcp_servers": [{}]}, "mcp_servers"),
    ({"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "x"}}}}]},
     "tools[0].input_schema.properties.a.type"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
     "output_config.format.schema.type"),
])  # fmt: skip
def test_wrong_messages_requests(http: httpx.Client, server: Running, change: dict[str, Any], words: str) -> None:
    body = {name: value for name, value in (MESSAGES | change).items() if value is not None}
    response = http.post("/v1/messages", json=body)
    error = told(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert words in error["message"] and not server.service.asked


@pytest.mark.parametrize(("change", "word"), [
    ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [10**9]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["x"] * 100}, "prompt"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"),
    ({"max_tokens": 0}, "echo"), ({"max_tokens": 0, "echo": True, "prompt": "moon " * 600}, "512"),
    ({"model": "x" * 257}, "256"), ({"logprobs": 99}, "logprobs"), ({"max_tokens": 600}, "512"),
])  # fmt: skip
def test_wrong_completions_requests(http: httpx.Client, server: Running, change: dict[str, Any], word: str) -> None:
    body = {name: value for name, value in ({"model": "moon", "prompt": "x"} | change).items() if value is not None}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400 and word in told(response)["message"]


def test_unknown_models(http: httpx.Client, server: Running) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", CHAT | {"prompt": "x"}),
                       ("/v1/messages", MESSAGES), ("/v1/messages/count_tokens", MESSAGES)):
        response = http.post(path, json=body | {"model": "sun"})
        assert response.status_code == 404 and "'sun'" in told(response)["message"]


def test_a_context_that_is_full(server: Running, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "moon " * 600}]
    with pytest.raises(openai.BadRequestError, match=r"prompt has \d{3} tokens; the model's context is 512") as caught:
        gpt.chat.completions.create(model="moon", messages=long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"prompt has \d\d tokens and max_tokens is 500, together 5\d\d"):
        gpt.chat.completions.create(model="moon", messages=USER, max_tokens=500)
    with pytest.raises(anthropic.BadRequestError, match="the model's context is 512"):
        claude.messages.create(model="moon", messages=long, max_tokens=5)


# --- errors of the engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kinds"), [
    (QueueFull(3, 7.2), 429, ("rate_limit_error", "rate_limit_error")),
    (UserError("the prompt has 9 tokens; the cache is 8"), 400, ("invalid_request_error", "invalid_request_error")),
    (Failed("the forward pass failed"), 500, ("server_error", "api_error")),
])  # fmt: skip
def test_errors_before_the_first_token_have_a_status(
    http: httpx.Client, server: Running, stream: bool, error: Exception, status: int, kinds: tuple[str, str]
) -> None:
    server.service.script = [error]
    for kind, path, body in ((kinds[0], "/v1/chat/completions", CHAT), (kinds[1], "/v1/messages", MESSAGES)):
        response = http.post(path, json=body | {"stream": stream})
        assert (response.status_code, told(response)["type"]) == (status, kind)
        assert response.headers.get("retry-after") == ("8" if status == 429 else None)
        assert status != 500 or "forward" not in response.text, "what happened inside is for the log"


def test_errors_within_a_stream_are_its_last_event(
    server: Running, tokenizer: Any, gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    server.service.script = [*says(tokenizer, "</think>some words")[:5], Failed("the forward pass failed")]
    with pytest.raises(openai.APIError, match="its log has it under req_"):
        for _ in gpt.chat.completions.create(model="moon", messages=USER, stream=True):
            pass
    with pytest.raises(anthropic.APIError, match="api_error"):
        for _ in claude.messages.create(**MESSAGES, stream=True):
            pass


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_of_a_failure_has_its_place_and_no_text(
    http: httpx.Client, server: Running, tokenizer: Any, caplog: pytest.LogCaptureFixture, stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    try:
        raise KeyError("secret words")
    except KeyError as cause:
        failure = ValueError("secret words of a prompt")
        failure.__cause__ = cause
    server.service.script = [*says(tokenizer, "</think>some words")[:3], failure]
    http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert "secret" not in caplog.text and "request req_" in caplog.text
    assert "ValueError" in caplog.text and "KeyError" in caplog.text and "service_double.py" in caplog.text
    monkeypatch.setenv("MOONBASE_DEBUG", "1")
    http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert "secret words of a prompt" in caplog.text


def test_a_failure_that_nobody_waits_for_is_logged(
    server: Running, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two choices fails while the other's failure is being told, or after the client has gone."""
    server.service.script = lambda number: [UserError("too long") if number == 0 else Failed("the pass failed")]
    response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"n": 2}, timeout=PATIENCE)
    assert response.status_code == 400 and "too long" in response.text
    until(lambda: "Failed" in caplog.text)
    assert f"request {response.headers['x-request-id']} failed" in caplog.text


# --- anything at all --------------------------------------------------------------------------------------------------

ODD = [None, True, False, 0, -1, 1, 1.5, 10**18, 1e300, "", "x", "\ud83c", "\x00", "a" * 3000, [], {}, [None],
       [[]], [{}], {"": None}, {"type": "text"}, {"type": "function"}, {"role": "user"}, "assistant", "tool",
       "text", "json_object"]


def mutated(value: Any, dice: random.Random) -> Any:
    """`value` with something odd at a random place."""
    if dice.random() < 0.12 or not isinstance(value, dict | list) or not value:
        return dice.choice(ODD)
    if isinstance(value, list):
        copy = list(value)
        place = dice.randrange(len(copy))
        copy[place] = mutated(copy[place], dice)
        return [*copy, copy[place]] if dice.random() < 0.1 else copy
    key = dice.choice(list(value))
    if dice.random() < 0.1:
        return {name: item for name, item in value.items() if name != key}
    return value | {key: mutated(value[key], dice)}


RICH = CHAT | {
    "tools": [TOOL | {"function": TOOL["function"] | {"description": "d", "parameters": {
        "type": "object", "properties": {"a": {"type": "string", "enum": ["b"]}, "c": {"anyOf": [{"type": "null"}]}},
        "required": ["a"]}}}],
    "messages": [{"role": "system", "content": "s"},
                 {"role": "user", "name": "n", "content": [{"type": "text", "text": "t"}]},
                 {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [
                     {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}]},
                 {"role": "tool", "tool_call_id": "c", "content": "x"}],
    "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "object", "properties": {}}}},
    "tool_choice": "none", "stop": ["x"], "logit_bias": {"1": 1}, "n": 1, "seed": 1, "max_tokens": 50, "logprobs": True,
    "top_logprobs": 1, "temperature": 1.0, "stream_options": {"include_usage": True}, "thinking": {"type": "enabled"},
    "chat_template_kwargs": {"thinking": True}, "parallel_tool_calls": True, "stream": False,
}  # fmt: skip
RICH_MESSAGES = MESSAGES | {
    "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "tools": [{"name": "f", "description": "d", "input_schema": {
        "type": "object", "properties": {"a": {"type": "string"}}}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "temperature": 1.0, "top_p": 0.9, "top_k": 1,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]},
                 {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                                                   {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "b"}}]},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x",
                                               "is_error": False}]}],
    "output_config": {"effort": "low"}, "metadata": {"user_id": "u"}, "max_tokens": 50, "stream": False,
}  # fmt: skip


@pytest.mark.parametrize(("path", "request_body"), [
    ("/v1/chat/completions", RICH), ("/v1/messages", RICH_MESSAGES), ("/v1/messages/count_tokens", RICH_MESSAGES),
    ("/v1/completions", {"model": "moon", "prompt": [[1, 2]], "logprobs": 1, "stop": "x", "logit_bias": {"1": 1},
                         "n": 2}),
])  # fmt: skip
def test_never_a_500(
    http: httpx.Client, server: Running, tokenizer: Any, path: str, request_body: dict[str, Any]
) -> None:
    server.service.script = says(tokenizer, "hm</think>x" + TWO_CALLS)
    dice, statuses = random.Random(5), []
    assert http.post(path, json=request_body).status_code == 200, "the unchanged request is a good one"
    for _ in range(250):
        body = request_body
        for _ in range(dice.choice((1, 1, 2, 3))):
            body = mutated(body, dice)
        response = http.post(path, content=json.dumps(body, allow_nan=False))
        statuses.append(response.status_code)
        assert response.status_code < 500, (response.text, body)
        if response.status_code >= 400:
            told(response)
    for _ in range(100):
        # And with bytes flipped, cut or doubled.
        raw = bytearray(json.dumps(request_body).encode())
        for _ in range(dice.randrange(1, 4)):
            place = dice.randrange(len(raw))
            raw[place : place + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
        response = http.post(path, content=bytes(raw))
        assert response.status_code < 500, (response.text, bytes(raw))
    assert {200, 400} <= set(statuses) <= {200, 400, 404}
