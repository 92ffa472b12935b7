"""The engine as a chat model: the very tokens, batches, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import torch

import moonbase.engine.engine as choosing
from moonbase.agents.budget import Limits
from moonbase.agents.episodes import write_episodes
from moonbase.agents.models.base import CallOptions, ModelError
from moonbase.agents.models.connect import PROVIDERS, connect
from moonbase.agents.models.engine import EngineModel
from moonbase.agents.models.openai import OpenAIModel
from moonbase.agents.swarm import Swarm
from moonbase.agents.tools.tool import Toolset, tool
from moonbase.chat import encode, parse, render_parts
from moonbase.engine import Engine
from moonbase.errors import UserError
from tests.agents import tiny_chat
from tests.agents.tiny_chat import TOOLS, USER


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_chat.model()


@pytest.fixture
def model(network: Any) -> Iterator[EngineModel]:
    engine = Engine(network, tiny_chat.tokenizer(), stop_ids=tiny_chat.tokenizer().eos_ids, cache_tokens=65536)
    model = EngineModel(engine, tiny_chat.tokenizer(), "kimi-k2.5")
    yield model
    asyncio.run(model.close())


def test_a_reply_is_its_tokens(model: EngineModel, network: Any) -> None:
    """Prompt ids are the renderer's, the ids decode to the message, and a plain forward pass gives their
    log-probabilities."""
    completion = asyncio.run(model.complete(USER, TOOLS, CallOptions(max_tokens=120, seed=1, tool_choice="required")))
    prompt = encode(tiny_chat.tokenizer(), render_parts(USER, TOOLS, "kimi-k2.5"))
    assert completion.prompt_ids == prompt and model.count_tokens(USER, TOOLS) == len(prompt)
    assert completion.usage.input_tokens == len(prompt)
    reply = parse(tiny_chat.tokenizer().decode(completion.token_ids), "kimi-k2.5", prefix="<think>")
    calls = completion.message["tool_calls"]
    # A random model may not come to an end by itself; its calls are whole all the same.
    assert completion.finish_reason in ("tool_calls", "length") and calls
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        (call.id, call.name, call.arguments) for call in reply.tool_calls]
    assert completion.message.get("reasoning_content") == reply.reasoning_content
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
    # The end token was sampled too, and is told; it is no token of the text.
    extra = len(completion.token_ids) - completion.usage.output_tokens
    assert extra in (0, 1) and (not extra or completion.token_ids[-1] in tiny_chat.tokenizer().eos_ids)
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logprobs = network(ids)[0].float().log_softmax(-1)
    expected = [logprobs[place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1])]
    assert len(completion.logprobs) == len(completion.token_ids)
    assert all(math.isclose(one, other, abs_tol=1e-3) for one, other in
               zip(completion.logprobs, expected, strict=True))


def test_the_mask_of_a_trace_selects_what_the_engine_drew(
    model: EngineModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of an agent, the second on the calls and results of the first: from the line alone, the mask gives the
    ids that came out of the sampler, and what it leaves out is the prompt as the renderer has it."""
    drawn: list[int] = []
    draw = choosing.choose

    def listen(*arguments: Any) -> Any:
        chosen = draw(*arguments)
        drawn.extend(chosen.ids)
        return chosen

    monkeypatch.setattr(choosing, "choose", listen)

    @tool(inline=True)
    def calculate(sum: Literal["1+1", "2*3"]) -> str:
        """A sum."""
        return "21"

    toolset = Toolset([calculate])
    options = CallOptions(max_tokens=80, seed=2, tool_choice="calculate")
    swarm = Swarm(model, toolset, delegate=False, system="", limits=Limits(steps=2), options=options)
    write_episodes(tmp_path / "t.jsonl", [asyncio.run(swarm.run(USER[0]["content"])).episode])
    (agent,) = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8"))["agents"]
    calls = [call for call in agent["calls"] if call["kind"] == "model"]
    assert len(calls) == 2 and len(drawn) > 10
    selected: list[int] = []
    for call, tools in zip(calls, (toolset.schemas(), []), strict=True):
        ids = call["prompt_ids"] + call["token_ids"]
        kept = [place for start, stop in call["sampled"] for place in range(start, stop)]
        selected += [ids[place] for place in kept]
        seen = [agent["messages"][place] for start, stop in call["sees"] for place in range(start, stop)]
        others = [id for place, id in enumerate(ids) if place not in kept]
        assert others == encode(tiny_chat.tokenizer(), render_parts(seen, tools, "kimi-k2.5"))
        assert len(call["logprobs"]) == len(kept)
    assert selected == drawn


def test_calls_at_once_are_one_batch_and_say_what_they_say_alone(model: EngineModel) -> None:
    def options(seed: int) -> CallOptions:
        return CallOptions(max_tokens=24, seed=seed, temperature=0.8)

    async def together() -> list[Any]:
        return await asyncio.gather(*(model.complete(USER, [], options(seed)) for seed in range(12)))

    batch = asyncio.run(together())
    passes = model.engine.statistics.passes
    alone = [asyncio.run(model.complete(USER, [], options(seed))) for seed in range(3)]
    assert [one.token_ids for one in alone] == [one.token_ids for one in batch[:3]]
    sampled = sum(len(one.token_ids) for one in batch)
    assert passes < sampled / 3, "far fewer forward passes than tokens"
    assert len({tuple(one.token_ids) for one in batch}) > 1
    assert alone[0].usage.cached_tokens > 0, "the prompt was there already"


def test_who_gives_up_leaves_no_blocks(model: EngineModel) -> None:
    async def give_up() -> None:
        calls = [asyncio.create_task(model.complete(USER, [], CallOptions(max_tokens=3000, seed=seed)))
                 for seed in range(5)]
        async with asyncio.timeout(120):
            while model.engine.statistics.running < 5:
                await asyncio.sleep(0.01)
            assert model.engine.statistics.blocks_used > 0
            for call in calls:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            while model.engine.statistics.running or model.engine.statistics.blocks_used:
                await asyncio.sleep(0.01)
        assert (await model.complete(USER, [], CallOptions(max_tokens=4))).usage.output_tokens <= 4

    asyncio.run(give_up())


def test_a_dialogue_with_results_and_reasoning(model: EngineModel) -> None:
    """The second prompt shows the calls and the reasoning of the first reply, and counts on."""
    options = CallOptions(max_tokens=120, seed=2, tool_choice="required")
    first = asyncio.run(model.complete(USER, TOOLS, options))
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "21"} for call in first.message["tool_calls"]]
    second = asyncio.run(model.complete([*USER, first.message, *results], TOOLS, options))
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    numbers = [int(call["id"].rpartition(":")[2]) for reply in (first, second)
               for call in reply.message["tool_calls"]]
    assert numbers == list(range(len(numbers)))


def test_what_cannot_be_done_is_a_model_error(model: EngineModel) -> None:
    cases = [
        (USER, [], CallOptions(max_tokens=tiny_chat.CONTEXT), "context_length"),
        ([{"role": "user", "content": "Paris " * 5000}], [], CallOptions(max_tokens=1), "context_length"),
        (USER, TOOLS, CallOptions(max_tokens=9, tool_choice="no_such"), "bad_request"),
        ([{"role": "robot", "content": "x"}], [], CallOptions(max_tokens=9), "bad_request"),
        (USER, [{"type": "function", "function": {"name": "a b"}}], CallOptions(max_tokens=9), "bad_request"),
        (USER, [], CallOptions(max_tokens=9, temperature=-1.0), "bad_request"),
    ]
    for messages, tools, options, kind in cases:
        with pytest.raises(ModelError) as raised:
            asyncio.run(model.complete(messages, tools, options))
        assert raised.value.kind == kind
    with pytest.raises(ModelError):
        model.count_tokens([{"role": "robot", "content": "x"}], [])


def test_closed_and_opened_again(model: EngineModel) -> None:
    for _ in range(2):
        assert asyncio.run(model.complete(USER, [], CallOptions(max_tokens=3))).usage.output_tokens <= 3
        asyncio.run(model.close())


# --- connect ----------------------------------------------------------------------------------------------------------


def test_connect_to_a_folder_and_to_a_preset(tmp_path: Path) -> None:
    for source in (str(tiny_chat.save(tmp_path / "tiny")), "preset:pico"):
        model = connect(source)
        assert model.context_tokens == tiny_chat.CONTEXT and model.name == source
        completion = asyncio.run(model.complete(USER, TOOLS, CallOptions(max_tokens=60, tool_choice="weather")))
        assert {call["function"]["name"] for call in completion.message["tool_calls"]} == {"weather"}
        asyncio.run(model.close())


def test_a_context_is_as_large_as_is_said_and_no_larger_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"id": "x", "max_model_len": 9000}
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    for entries, given, expected in ((None, None, None), (None, 5000, 5000), ([entry], None, 9000),
                                     ([entry], 5000, 5000), ([entry], 20_000, 9000)):
        monkeypatch.setattr("moonbase.agents.models.connect._models", lambda url, key, needed, said=entries: said)
        assert connect("http://h/v1#x", context_tokens=given).context_tokens == expected
    assert connect("anthropic:claude", context_tokens=200_000).context_tokens == 200_000
    for given, expected in ((100, 100), (10**6, tiny_chat.CONTEXT)):
        model = connect("preset:pico", context_tokens=given)
        assert model.context_tokens == expected
        asyncio.run(model.close())
    with pytest.raises(UserError, match="context_tokens=0"):
        connect("anthropic:claude", context_tokens=0)


def test_keys_come_from_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key, f"of-{provider.key}")
    monkeypatch.delenv("MOONBASE_API_KEY", raising=False)
    monkeypatch.setattr("moonbase.agents.models.connect._models", lambda url, key, needed: None)
    expected = {
        "openai:gpt": ("https://api.openai.com/v1", "Bearer of-OPENAI_API_KEY"),
        "moonshot:kimi-k2.5": ("https://api.moonshot.ai/v1", "Bearer of-MOONSHOT_API_KEY"),
        "https://api.moonshot.cn/v1#kimi": ("https://api.moonshot.cn/v1", "Bearer of-MOONSHOT_API_KEY"),
        "openai:x@http://localhost:1": ("http://localhost:1/v1", None),
        "http://openai.com.evil.example/v1#x": ("http://openai.com.evil.example/v1", None),
        "http://h/v1/chat/completions#org/x": ("http://h/v1", None),
        "http://h/api/paas/v4#glm": ("http://h/api/paas/v4", None),
    }  # fmt: skip
    for address, (url, key) in expected.items():
        model = connect(address)
        assert isinstance(model, OpenAIModel)
        assert (model.endpoint.url, model.endpoint.headers.get("authorization")) == (url, key)
    assert connect("http://h/v1#x", api_key="mine").endpoint.headers["authorization"] == "Bearer mine"
    claude = connect("anthropic:claude")
    assert claude.endpoint.headers["x-api-key"] == "of-ANTHROPIC_API_KEY" and claude.name == "claude"
    assert connect("anthropic:c@http://h:8000/v1").endpoint.url == "http://h:8000"
    assert connect("kimi", base_url="http://h/v1").name == "kimi"


@pytest.mark.parametrize(("entries", "own"), [
    ([{"id": "a", "owned_by": "moonbase"}], True), ([{"id": "a", "owned_by": "vllm"}], False), ([{"id": "a"}], False),
    ([{"id": "a", "owned_by": "moonbase"}, {"id": "b", "owned_by": "x"}], False), (None, False),
])  # fmt: skip
def test_tokens_are_asked_of_our_own_server_only(entries: Any, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonbase.agents.models.connect._models", lambda url, key, needed: entries)
    assert ("return_token_ids" in connect("http://h/v1#a").extra) is own


@pytest.mark.parametrize(("source", "says"), [
    ("openai:gpt", "OPENAI_API_KEY"), ("moonshot:kimi", "MOONSHOT_API_KEY"), ("anthropic:claude", "ANTHROPIC_API_KEY"),
    ("gpt-4o", "openai:NAME"), ("preset:picco", "pico"), ("openai:", "openai:NAME"), ("", "missing"),
    ("http://127.0.0.1:9/v1", "cannot be reached"), ("openai:x@localhost", "http://HOST"), ("http://[", "address"),
])  # fmt: skip
def test_what_cannot_be_reached_is_said_in_one_line(source: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(provider.key for provider in PROVIDERS.values()), "MOONBASE_API_KEY"]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=says) as raised:
        connect(source)
    assert "\n" not in str(raised.value)
