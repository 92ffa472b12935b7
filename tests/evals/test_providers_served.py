"""A server of our own, over a socket, as Inspect's own providers see a hosted model: who answered, what was counted,
calls, reasoning, and a server that goes away in the middle."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
pytest.importorskip("openai", reason="Inspect's provider needs the openai package")
pytest.importorskip("fastapi", reason="the server is not installed (moonbase[serve])")

from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.tool import ToolInfo, ToolParams

from moonbase.errors import UserError
from moonbase.evals.providers.thinking import thinking_settings
from moonbase.evals.records import read_records
from moonbase.evals.run import run_suite
from moonbase.evals.suite import Suite
from tests.agents import tiny_chat
from tests.serve.service_double import ScriptedService, says, serving

NAME = "kimi-k2.5"
QUESTIONS = 6
ENDPOINTS = {"openai-api/moonbase": "/v1", "vllm": "/v1", "anthropic": ""}
"""Provider of Inspect to what it wants behind the server's address."""


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    """The whole server with a scripted engine behind it."""
    tokenizer = tiny_chat.tokenizer()
    with serving(ScriptedService(), tokenizer, style=NAME, model_names=(NAME,), context_length=4096) as running:
        running.tokenizer = tokenizer
        yield running


def ask(running: Any, provider: str, config: GenerateConfig, **more: Any) -> Any:
    import asyncio

    model = get_model(f"{provider}/{NAME}", base_url=running.url + ENDPOINTS[provider], api_key="unused", memoize=False)
    return asyncio.run(model.generate("How warm is it in Paris?", config=config, **more))


def reasoning_of(output: Any) -> str:
    content = output.message.content
    # Of Anthropic's blocks Inspect keeps the signature as the reasoning, and the words as its summary.
    return "" if isinstance(content, str) else "".join(
        part.summary or part.reasoning for part in content if part.type == "reasoning")


@pytest.mark.parametrize("provider", ENDPOINTS)
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_thinking_is_switched_and_split_off(provider: str, thinking: str, served: Any) -> None:
    said = "Let me see.</think>It is mild." if thinking == "on" else "It is mild."
    served.service.__init__(says(served.tokenizer, said))
    config = GenerateConfig(max_tokens=2048 if provider != "anthropic" else 20_000, max_retries=0,
                            **thinking_settings(f"{provider}/{NAME}", thinking))
    output = ask(served, provider, config)
    # What the prompt opens tells what the server understood.
    opened = served.tokenizer.decode(served.service.asked[-1].prompt_ids[-2:])
    assert opened.endswith("<think>") if thinking == "on" else opened == "<think></think>"
    assert output.completion == "It is mild."
    assert reasoning_of(output).strip() == ("Let me see." if thinking == "on" else "")
    assert output.stop_reason == "stop"
    assert output.usage.input_tokens == len(served.service.asked[-1].prompt_ids)
    assert output.usage.output_tokens >= 3
    if thinking == "on":
        assert 0 < output.usage.reasoning_tokens < output.usage.output_tokens


@pytest.mark.parametrize("provider", ENDPOINTS)
def test_calls_and_cut_replies_arrive_as_such(provider: str, served: Any) -> None:
    tool = ToolInfo(name="weather", description="The weather.", parameters=ToolParams.model_validate(
        {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}))
    text = ("</think><|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>')
    served.service.__init__(says(served.tokenizer, text))
    output = ask(served, provider, GenerateConfig(max_tokens=200, max_retries=0), tools=[tool])
    assert output.stop_reason == "tool_calls"
    assert [(call.function, call.arguments) for call in output.message.tool_calls] == [("weather", {"city": "Paris"})]
    served.service.__init__(says(served.tokenizer, "</think>It is", finish="length"))
    assert ask(served, provider, GenerateConfig(max_tokens=3, max_retries=0)).stop_reason == "max_tokens"


# --- a whole evaluation -----------------------------------------------------------------------------------------------


def make_suite(folder: Path) -> Suite:
    import hashlib

    rows = "".join(json.dumps({"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"}) + "\n"
                   for number in range(QUESTIONS))
    (folder / "sums.jsonl").write_text(rows)
    return Suite.model_validate({"name": "sums", "title": "Sums", "metric": "accuracy", "tasks": [
        {"name": "sums", "source": "builtin:gsm8k", "params": {
            "file": "sums.jsonl", "sha256": hashlib.sha256(rows.encode()).hexdigest()}}]})


def test_a_server_that_goes_away_and_comes_back_is_paid_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server fails after half of the answers; another on the same port gives the rest."""
    from moonbase.evals import run as runs

    monkeypatch.setattr(runs, "RETRIES", 0)
    tokenizer, suite = tiny_chat.tokenizer(), make_suite(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = f"openai-api/moonbase/{NAME}"
    services = []

    def run(answer: str, lasts: int) -> Any:
        service = ScriptedService(lambda number: says(tokenizer, f"</think>{answer}") if number < lasts
                                  else [RuntimeError("the machine is on fire")])
        services.append(service)
        with ExitStack() as open:
            open.enter_context(serving(service, tokenizer, style=NAME, model_names=(NAME,), port=port,
                                       context_length=4096))
            arguments = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "unused", "max_retries": 0}
            return run_suite(suite, [model], tmp_path / "out", data=tmp_path, quiet=True, max_connections=1,
                             model_args={model: arguments})

    found = run("#### 1", lasts=3)
    assert (found.records, found.errors) == (QUESTIONS, QUESTIONS - 3)
    found = run("#### 1", lasts=QUESTIONS)
    assert (found.records, found.errors) == (QUESTIONS, 0)
    assert len(services[1].asked) == QUESTIONS - 3, "what was answered is not asked again"
    records = list(read_records(tmp_path / "out" / "records.jsonl"))
    assert [record.scores["accuracy"] for record in records] == [1.0] + [0.0] * (QUESTIONS - 1)
    assert {(record.call.provider, record.call.stop_reason, record.status) for record in records} == {
        ("moonbase", "stop", "scored")}
    assert all(record.input_tokens > 5 and record.output_tokens > 2 for record in records)


def test_a_router_to_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use openrouter/MODEL"):
        run_suite(make_suite(tmp_path), [f"openai-api/litellm/{NAME}"], tmp_path / "out", data=tmp_path)
    assert not (tmp_path / "out").exists()
