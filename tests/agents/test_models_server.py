"""The real server in a process of its own, asked by our clients, by the official ones, and past it by the engine here:
the same request is the same reply."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from moonbase.agents.models.anthropic import AnthropicModel
from moonbase.agents.models.base import CallOptions, ChatModel, Completion, ModelError
from moonbase.agents.models.connect import connect
from moonbase.agents.models.engine import EngineModel
from moonbase.agents.models.openai import OpenAIModel
from moonbase.agents.models.pool import Pool
from tests.agents import tiny_chat
from tests.agents.tiny_chat import TOOLS, USER

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tiny_chat.save(tmp_path_factory.mktemp("models") / "tiny-moon")
    command = [sys.executable, "-m", "moonbase", "serve", str(folder), "--port", "0", "--style", "kimi-k2.5",
               "--cache-tokens", "65536", "--grace", "0", "--max-running", "4", "--queue-limit", "2"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    until = time.monotonic() + 300
    while not any("http://" in line for line in lines):
        assert process.poll() is None and time.monotonic() < until, lines
        time.sleep(0.02)
    yield re.search(r"http://[^\s]+", "".join(lines))[0]
    process.kill()
    process.wait()


# Clients read the machine's certificates when they are made, which takes longer than a reply.


@pytest.fixture(scope="module")
def gpt(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def here() -> EngineModel:
    """The same model in this process."""
    from moonbase.engine import Engine

    engine = Engine(tiny_chat.model(), tiny_chat.tokenizer(), stop_ids=tiny_chat.tokenizer().eos_ids,
                    cache_tokens=65536, max_running=4)
    return EngineModel(engine, tiny_chat.tokenizer(), "kimi-k2.5")


def ask(model: ChatModel, messages: Any, tools: Any, options: CallOptions) -> Completion:
    async def one() -> Completion:
        try:
            return await model.complete(messages, tools, options)
        finally:
            await model.close()

    return asyncio.run(one())


def history(first: dict[str, Any]) -> list[dict[str, Any]]:
    """The dialogue after a reply with calls."""
    results = [{"role": "tool", "tool_call_id": call["id"], "content": f"{number} degrees"}
               for number, call in enumerate(first["tool_calls"])]
    return [{"role": "system", "content": "Be brief."}, *USER, first, *results,
            {"role": "user", "content": "And tomorrow?"}]


@pytest.mark.parametrize("choice", ["auto", "required", "weather", "none"])
def test_openais_client_the_engine_and_ours_read_the_same(
    url: str, gpt: openai.OpenAI, here: EngineModel, choice: str
) -> None:
    """Text, reasoning, calls, counts: a request, and the one that follows with its results."""
    named = {"type": "function", "function": {"name": choice}} if choice == "weather" else choice
    messages: list[dict[str, Any]] = USER
    ours = OpenAIModel("tiny-moon", f"{url}/v1")
    called = 0
    for seed in range(2):
        options = CallOptions(max_tokens=80, seed=seed, tool_choice=choice)
        completion = ask(ours, messages, TOOLS, options)
        theirs = gpt.chat.completions.create(
            model="tiny-moon", messages=messages, tools=TOOLS, tool_choice=named, max_tokens=80, seed=seed,
            temperature=1.0, top_p=1.0)
        message = theirs.choices[0].message.model_dump(exclude_none=True)
        assert completion.message.get("content") == theirs.choices[0].message.content or not message.get("content")
        for field in ("tool_calls", "reasoning_content"):
            assert completion.message.get(field) == message.get(field)
        assert completion.finish_reason == theirs.choices[0].finish_reason
        assert completion.usage.input_tokens == theirs.usage.prompt_tokens
        assert completion.usage.output_tokens == theirs.usage.completion_tokens
        local = ask(here, messages, TOOLS, options)
        assert (local.message, local.finish_reason) == (completion.message, completion.finish_reason)
        assert local.usage.input_tokens == completion.usage.input_tokens == here.count_tokens(messages, TOOLS)
        assert local.usage.output_tokens == completion.usage.output_tokens
        if completion.message.get("tool_calls"):
            called += 1
            messages = history(completion.message)
    assert called or choice in ("auto", "none")
    assert not called or choice != "none"


@pytest.mark.parametrize(("choice", "thinking"), [
    ("auto", "enabled"), ("required", "disabled"), ("calculate", "enabled")])
def test_anthropics_client_and_ours_read_the_same(
    url: str, claude: anthropic.Anthropic, choice: str, thinking: str
) -> None:
    extra = {"thinking": {"type": thinking, "budget_tokens": 1024}}
    tools = [{"name": tool["function"]["name"], "description": tool["function"]["description"],
              "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    named = {"auto": {"type": "auto"}, "required": {"type": "any"}}.get(choice, {"type": "tool", "name": choice})
    ours = AnthropicModel("tiny-moon", url, extra=extra)
    # Greedy, as this surface has no seed. Thinking has no temperature of its own there, so it is 0 for both.
    ours.extra["temperature"] = 0
    completion = ask(ours, USER, TOOLS, CallOptions(max_tokens=80, tool_choice=choice))
    theirs = claude.messages.create(model="tiny-moon", messages=USER, tools=tools, tool_choice=named,
                                    max_tokens=80, extra_body=extra | {"temperature": 0})
    check_same(completion, theirs)
    if completion.message.get("tool_calls"):
        messages = history(completion.message)
        results = [{"type": "tool_result", "tool_use_id": re.sub(r"\W", "_", call["id"]), "content": f"{i} degrees"}
                   for i, call in enumerate(completion.message["tool_calls"])]
        blocks = [block.model_dump(exclude_none=True) for block in theirs.content]
        for block in blocks:
            block |= {"id": re.sub(r"\W", "_", block["id"])} if "id" in block else {}
        turns = [*USER, {"role": "assistant", "content": blocks},
                 {"role": "user", "content": [*results, {"type": "text", "text": "And tomorrow?"}]}]
        second = ask(ours, messages, TOOLS, CallOptions(max_tokens=80))
        check_same(second, claude.messages.create(
            model="tiny-moon", messages=turns, tools=tools, max_tokens=80, system="Be brief.",
            extra_body=extra | {"temperature": 0}))


def check_same(completion: Completion, theirs: Any) -> None:
    kinds = ("text", "thinking", "tool_use")
    said = {kind: [block for block in theirs.content if block.type == kind] for kind in kinds}
    message = completion.message
    assert (message["content"] or "") == "".join(block.text for block in said["text"])
    assert message.get("reasoning_content", "") == "".join(block.thinking for block in said["thinking"])
    assert [block["signature"] for block in message.get("thinking_blocks", ())] == [
        block.signature for block in said["thinking"]]
    calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls", ())]
    assert calls == [(block.id, block.name, block.input) for block in said["tool_use"]]
    reasons = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length"}
    assert completion.finish_reason == reasons[theirs.stop_reason]
    usage = theirs.usage
    assert completion.usage.output_tokens == usage.output_tokens
    assert completion.usage.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_of_the_real_server(url: str) -> None:
    ours = OpenAIModel("tiny-moon", f"{url}/v1")
    for client in (ours, AnthropicModel("tiny-moon", url)):
        with pytest.raises(ModelError) as raised:
            ask(client, [{"role": "user", "content": "Paris " * 5000}], [], CallOptions(max_tokens=5))
        assert (raised.value.kind, raised.value.status) == ("context_length", 400)
        with pytest.raises(ModelError) as raised:
            ask(client, USER, [{"type": "function", "function": {"name": "a b", "parameters": {}}}], CallOptions())
        assert (raised.value.kind, raised.value.status) == ("bad_request", 400)
    with pytest.raises(ModelError) as raised:
        ask(ours, USER, [], CallOptions(max_tokens=tiny_chat.CONTEXT))
    assert raised.value.kind == "context_length"


@pytest.mark.slow
def test_a_pool_fits_many_calls_through_a_small_server(url: str) -> None:
    """It takes six at once and turns the others away; all get their reply."""

    async def many() -> tuple[list[Completion], Pool]:
        pool = Pool(OpenAIModel("tiny-moon", f"{url}/v1"), concurrency=16, base_delay=0.05)
        replies = await asyncio.gather(*(pool.complete(USER, [], CallOptions(max_tokens=8, seed=number))
                                         for number in range(40)))
        await pool.close()
        return replies, pool

    replies, pool = asyncio.run(many())
    assert len(replies) == 40 and all(reply.usage.output_tokens <= 8 for reply in replies)
    assert (pool.running, pool.waiting) == (0, 0)
    assert sum(reply.attempts - 1 for reply in replies) == pool.retries


@pytest.mark.parametrize("choice", ["none", "required"])
def test_a_server_of_ours_gives_the_tokens(url: str, here: EngineModel, choice: str) -> None:
    """Over HTTP a trace holds what it holds of a model in this process: the very ids and log-probabilities."""
    ended = 0
    for seed in range(6):
        options = CallOptions(max_tokens=80, seed=seed, tool_choice=choice)
        remote, local = ask(connect(url), USER, TOOLS, options), ask(here, USER, TOOLS, options)
        assert (remote.message, remote.prompt_ids) == (local.message, local.prompt_ids)
        assert remote.token_ids == local.token_ids and len(remote.logprobs) == len(remote.token_ids)
        assert remote.logprobs == pytest.approx(local.logprobs, abs=1e-3)
        ended += remote.token_ids[-1] in tiny_chat.tokenizer().eos_ids
    assert OpenAIModel("tiny-moon", f"{url}/v1").extra == {}
    assert choice == "none" or ended, "no reply with an end token was seen"


def test_connect_asks_for_name_and_context(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for address in (url, f"{url}/v1", f"{url}/v1/", f"{url}/v1#tiny-moon", f"openai:tiny-moon@{url}/v1"):
        model = connect(address)
        assert (model.name, model.context_tokens) == ("tiny-moon", tiny_chat.CONTEXT)
        assert "authorization" not in model.endpoint.headers, "a provider's key goes to nobody else"
        assert ask(model, USER, [], CallOptions(max_tokens=4)).usage.output_tokens <= 4
    # The server goes by any name; its one context holds for all of them.
    assert connect(f"{url}/v1#other").context_tokens == tiny_chat.CONTEXT
    model = connect(f"anthropic:tiny-moon@{url}")
    assert ask(model, USER, [], CallOptions(max_tokens=4)).usage.output_tokens <= 4
