"""Who may come in, and what is written down about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from moonbase.errors import UserError
from moonbase.serve.gate import host_name
from moonbase.serve.settings import Settings
from tests.serve.service_double import PATIENCE, Running, ScriptedService, says, serving, until

CHAT = {"model": "moon", "messages": [{"role": "user", "content": "a secret question"}]}
MESSAGES = CHAT | {"max_tokens": 5}
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def guarded(tokenizer: Any) -> Iterator[Running]:
    service = ScriptedService(says(tokenizer, "</think>hi"))
    with serving(service, tokenizer, api_keys=("first-key", "second-key"), cors_origins=(PAGE,),
                 allowed_hosts=("moon.example",)) as running:
        yield running


@pytest.mark.parametrize(("headers", "welcome"), [
    ({}, False), ({"authorization": "Bearer first-key"}, True), ({"authorization": "bearer second-key"}, True),
    ({"x-api-key": "first-key"}, True), ({"authorization": "Bearer wrong"}, False), ({"x-api-key": "first-ke"}, False),
    ({"x-api-key": "first-key2"}, False), ({"authorization": "Basic first-key"}, False),
    ({"authorization": "first-key"}, False), ({"authorization": "Bearer"}, False),
    ({"x-api-key": "schl\xfcssel"}, False),
    ({"authorization": "Bearer wrong", "x-api-key": "second-key"}, True),
])  # fmt: skip
def test_the_key(guarded: Running, headers: dict[str, str], welcome: bool) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    with httpx.Client(base_url=guarded.url, headers=sent, timeout=PATIENCE) as http:
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGES), ("/v1/models", None),
                           ("/anthropic/v1/messages", MESSAGES), ("/metrics", None), ("/v1/nothing", None)):
            status = (http.post(path, json=body) if body else http.get(path)).status_code
            assert status == ((404 if "nothing" in path else 200) if welcome else 401)
        assert http.get("/health").status_code == 200


def test_the_clients_know_the_refusal(guarded: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong").chat.completions.create(**CHAT)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
        anthropic.Anthropic(base_url=guarded.url, api_key="wrong").messages.create(**MESSAGES)
    assert openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="first-key").chat.completions.create(**CHAT).choices
    assert anthropic.Anthropic(base_url=guarded.url, auth_token="second-key").messages.create(**MESSAGES).content


def test_keys_are_compared_as_digests_all_of_them(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("moonbase.serve.gate.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key in ("first-key", "second-key", "x"):
        httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": key}, timeout=PATIENCE)
    assert len(compared) == 6 and {len(side) for pair in compared for side in pair} == {32}


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("localhost:9", 200), ("LOCALHOST", 200), ("[::1]:80", 200), ("moon.example:8000", 200),
    ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("", 403),
])  # fmt: skip
def test_the_name_a_local_server_is_called_by(guarded: Running, host: str, status: int) -> None:
    """A page whose name was rebound to 127.0.0.1 still calls us by its own name."""
    response = httpx.get(f"{guarded.url}/health", headers={"host": host}, timeout=PATIENCE)
    assert response.status_code == status


def test_a_public_server_takes_any_name(tokenizer: Any) -> None:
    with serving(ScriptedService(), tokenizer, host="0.0.0.0") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/health", headers={"host": "moon.example"}, timeout=PATIENCE).status_code == 200


def test_host_names() -> None:
    assert [host_name(host) for host in ("A.b:80", "[::1]:80", "[fe80::1]", "x", "", ":80", "[::1")] == [
        "a.b", "::1", "fe80::1", "x", "", "", "::1"]


def test_foreign_pages_may_neither_call_nor_read(scripted: Running, guarded: Running) -> None:
    body = {"json": CHAT, "headers": {"x-api-key": "first-key", "origin": "https://evil.example"}}
    for url in (scripted.url, guarded.url):
        response = httpx.post(f"{url}/v1/chat/completions", **body, timeout=PATIENCE)
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    preflight = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    refused = httpx.options(f"{scripted.url}/v1/messages", headers=preflight, timeout=PATIENCE)
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers
    assert httpx.post(f"{scripted.url}/v1/models", headers={"origin": "null"}, timeout=PATIENCE).status_code == 403
    # Its own page, and the one that is allowed.
    own = httpx.post(f"{scripted.url}/v1/chat/completions", headers={"origin": scripted.url}, timeout=PATIENCE)
    assert own.status_code == 400
    granted = httpx.options(f"{guarded.url}/v1/messages", headers=preflight, timeout=PATIENCE)
    assert granted.status_code == 200 and granted.headers["access-control-allow-origin"] == PAGE
    for key, status in (("first-key", 200), ("wrong", 401)):
        answer = httpx.post(f"{guarded.url}/v1/chat/completions", json=CHAT, headers={"origin": PAGE, "x-api-key": key},
                            timeout=PATIENCE)
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE


def test_the_access_log_tells_everything_but_the_text(server: Running, tokenizer: Any, http: httpx.Client) -> None:
    server.service.script = says(tokenizer, "</think>a secret answer", cached=2)
    started = time.monotonic()
    response = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "my-own:1"})
    until(lambda: len(server.log) == 1)
    passed = time.monotonic() - started
    http.post("/v1/messages?key=secret", json=MESSAGES | {"stream": True})
    until(lambda: len(server.log) == 2)
    http.post("/v1/chat/completions", json={"model": "secret"})
    until(lambda: len(server.log) == 3)
    http.get("/secret")
    until(lambda: len(server.log) == 4)
    whole, streamed, wrong, lost = [json.loads(line) for line in server.log]
    assert response.headers["x-request-id"] == whole["id"] == "my-own:1"
    assert "secret" not in "".join(server.log)
    assert whole | {"time": "", "seconds": 0, "first_token_seconds": 0} == {
        "time": "", "id": "my-own:1", "method": "POST", "route": "/v1/chat/completions", "status": 200, "seconds": 0,
        "prompt_tokens": len(server.service.asked[0].prompt_ids), "cached_tokens": 2, "first_token_seconds": 0,
        "completion_tokens": len(tokenizer.encode_rendered("</think>a secret answer")), "finish": "stop"}
    assert 0 <= whole["first_token_seconds"] <= whole["seconds"] <= passed + 0.001, "rounded"
    assert (streamed["route"], streamed["stream"], streamed["finish"]) == ("/v1/messages", True, "stop")
    assert (wrong["status"], wrong["finish"]) == (400, "invalid_value")
    assert (lost["status"], lost["route"]) == (404, "other")


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "ü", "a\tb"])
def test_an_odd_request_id_is_not_passed_on(http: httpx.Client, given: str) -> None:
    answer = http.get("/health", headers={"x-request-id": given.encode("latin-1")})
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("wrong", [
    {"model_names": ()}, {"style": "kimi"}, {"port": 70000}, {"request_timeout": 0}, {"grace": -1}, {"api_keys": ("",)},
    {"api_keys": ("schlüssel",)}, {"body_timeout": float("nan")},
])  # fmt: skip
def test_settings_that_make_no_server(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Settings(**wrong)
