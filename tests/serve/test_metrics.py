"""/metrics as Prometheus reads it."""

from __future__ import annotations

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from moonbase.engine.engine import EngineStatistics
from tests.serve.service_double import PATIENCE, Running, ScriptedService, says, serving, until

CHAT = {"model": "moon", "messages": [{"role": "user", "content": "hi"}]}


def samples(url: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    response = httpx.get(f"{url}/metrics", timeout=PATIENCE)
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text) for sample in family.samples
    }


def test_what_is_counted(tokenizer: Any) -> None:
    words = "</think>hello moon, and the base that answers the question"
    service = ScriptedService(says(tokenizer, words, wait=0.02))
    service.statistics = EngineStatistics(
        waiting=3, running=2, blocks_total=40, blocks_used=10, prompt_tokens=200, cached_tokens=50, generated_tokens=70,
        drafted_tokens=30, accepted_tokens=20, preemptions=1, finished={"stop": 4, "length": 5, "cancelled": 6})
    with serving(service, tokenizer) as running, serving(ScriptedService(), tokenizer) as other:
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE)
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"n": 2, "stream": True}, timeout=PATIENCE)
        httpx.post(f"{running.url}/v1/chat/completions", json=CHAT | {"model": "sun"}, timeout=PATIENCE)
        httpx.get(f"{running.url}/somewhere/else", timeout=PATIENCE)
        until(lambda: len(running.log) == 4)
        found = samples(running.url)
        assert "moonbase_requests_total{route=other}{status=404}" not in samples(other.url), "apps share nothing"
    expected = {
        "moonbase_queue_requests": 3, "moonbase_running_requests": 2, "moonbase_cache_usage_ratio": 0.25,
        "moonbase_prefix_cache_hit_ratio": 0.25, "moonbase_prompt_tokens_total": 200,
        "moonbase_cached_prompt_tokens_total": 50, "moonbase_generated_tokens_total": 70,
        "moonbase_drafted_tokens_total": 30, "moonbase_accepted_draft_tokens_total": 20,
        "moonbase_preemptions_total": 1, "moonbase_finished_total{reason=cancelled}": 6, "moonbase_open_requests": 0,
        "moonbase_requests_total{route=/v1/chat/completions}{status=200}": 2,
        "moonbase_requests_total{route=/v1/chat/completions}{status=404}": 1,
        "moonbase_requests_total{route=other}{status=404}": 1,
        # One for each request that had a token, and one for each sequence that had several.
        "moonbase_time_to_first_token_seconds_count": 2, "moonbase_time_per_output_token_seconds_count": 3,
        "moonbase_request_seconds_count{route=/v1/chat/completions}": 3,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    # Of three sequences, each within its request, one of which had two of them.
    between, tokens = found["moonbase_time_per_output_token_seconds_sum"], len(tokenizer.encode_rendered(words))
    assert between >= 3 * 0.02 / 2, "a machine that stands still swallows some of the pauses"
    assert between * (tokens - 1) <= 2 * found["moonbase_request_seconds_sum{route=/v1/chat/completions}"]


def test_the_log_counts_what_was_cached_of_every_prompt(scripted: Running, tokenizer: Any) -> None:
    """Choices share their prompt, so that it counts once for them."""
    import json

    scripted.service.__init__(says(tokenizer, "</think>hi", cached=3))
    for path, body, cached in (("completions", {"prompt": ["moon base", "moon base", "moon"], "n": 2}, 9),
                               ("chat/completions", CHAT | {"n": 2}, 3), ("messages", CHAT | {"max_tokens": 5}, 3)):
        scripted.log.clear()
        httpx.post(f"{scripted.url}/v1/{path}", json={"model": "moon"} | body, timeout=PATIENCE)
        until(lambda: len(scripted.log) == 1)
        assert json.loads(scripted.log[0])["cached_tokens"] == cached


def test_health(scripted: Running) -> None:
    assert httpx.get(f"{scripted.url}/health", timeout=PATIENCE).json() == {"status": "ok", "model": "moon"}


def test_the_page_has_a_strict_policy(scripted: Running) -> None:
    from moonbase.serve.app import PAGE

    names = {file.name for file in PAGE.glob("*.*")}
    for name in names:
        response = httpx.get(f"{scripted.url}/{'' if name == 'index.html' else name}", timeout=PATIENCE)
        assert response.status_code == 200 and response.content == (PAGE / name).read_bytes()
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not name.endswith(".js") or response.headers["content-type"].startswith("text/javascript")
