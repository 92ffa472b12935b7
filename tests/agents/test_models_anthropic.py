"""The Anthropic client: messages to turns of blocks, events and errors to replies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.agents.agent import Agent
from moonbase.agents.budget import Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.models.anthropic import AnthropicModel, _Answer, read_message, turns_of
from moonbase.agents.models.base import CallOptions, Completion, ModelError, Usage
from moonbase.agents.models.connect import connect
from moonbase.agents.tools.tool import Toolset, tool
from tests.agents.fake_endpoint import Answer, Asked, serving, stream, whole
from tests.agents.test_models_openai import anything, check_clean

USER = [{"role": "user", "content": "How warm is it?"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
THINKING = [{"type": "thinking", "thinking": "Let me see", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "xyz"}]  # fmt: skip
CONTENT = [*THINKING, {"type": "text", "text": "Hm."},
           {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
           {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}}]  # fmt: skip
USAGE = {"input_tokens": 5, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 12, "output_tokens": 7}


def message(content: Any = CONTENT, stop: Any = "tool_use", **more: Any) -> dict[str, Any]:
    return {"id": "msg", "type": "message", "role": "assistant", "model": "claude-1", "content": content,
            "stop_reason": stop, "stop_sequence": None, "usage": USAGE, **more}  # fmt: skip


def events() -> list[Any]:
    """The same message as the API streams it."""
    started = message([], None, usage={**USAGE, "output_tokens": 1})
    said: list[Any] = [{"type": "message_start", "message": started}, {"type": "ping"}]
    deltas: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
        ({"type": "thinking", "thinking": "", "signature": ""},
         [{"type": "thinking_delta", "thinking": "Let me"}, {"type": "thinking_delta", "thinking": " see"},
          {"type": "signature_delta", "signature": "c2ln"}]),
        (THINKING[1], []),
        ({"type": "text", "text": ""}, [{"type": "text_delta", "text": "Hm"}, {"type": "text_delta", "text": "."}]),
        ({"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
         [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"city": ', '"Köln"}')]),
        ({"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}}, []),
    ]  # fmt: skip
    for index, (block, parts) in enumerate(deltas):
        said.append({"type": "content_block_start", "index": index, "content_block": block})
        said += [{"type": "content_block_delta", "index": index, "delta": part} for part in parts]
        said.append({"type": "content_block_stop", "index": index})
    return [*said, {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
                    "usage": {"output_tokens": 7, "input_tokens": None}}, {"type": "message_stop"}]


def run(answer: Any, messages: Any = USER, tools: Any = (), options: CallOptions = CallOptions(timeout=60), **more: Any
        ) -> tuple[Completion, list[Asked]]:
    async def one() -> tuple[Completion, list[Asked]]:
        async with serving(answer) as endpoint:
            model = AnthropicModel("claude", endpoint.url, api_key="key", **more)
            try:
                return await model.complete(messages, list(tools), options), endpoint.asked
            finally:
                await model.close()

    return asyncio.run(one())


@pytest.mark.parametrize("name", ["discard-all", "discard-75%", "hide-tool-result", "summary"])
def test_a_strategy_acts_before_a_refusal_where_the_context_is_told(name: str) -> None:
    """An endpoint that takes 3,000 tokens, of four bytes of its JSON each, and does not say so. If the model is told,
    no prompt is refused; else the strategy acts on the refusals. Either way the agent reads all texts."""
    texts, most, prompts = 12, 3000, []

    def answer(asked: Asked) -> Answer:
        tokens = len(json.dumps([asked.body.get(part) for part in ("system", "messages", "tools")])) // 4
        prompts.append(tokens)
        if tokens + asked.body["max_tokens"] > most:
            return whole({"type": "error", "error": {"type": "invalid_request_error", "message":
                                                     f"prompt is too long: {tokens} tokens > {most} maximum"}}, 400)
        if asked.body.get("tool_choice", {}).get("type") == "none" or "tools" not in asked.body:
            return whole(message([{"type": "text", "text": "A summary."}], "end_turn"))
        read.append(len(read))
        block = {"type": "tool_use", "id": f"t{len(read)}", "name": "look", "input": {"number": len(read)}}
        done = len(read) > texts
        return whole(message([{"type": "text", "text": "All read."}] if done else [block],
                             "end_turn" if done else "tool_use",
                             usage={"input_tokens": tokens, "output_tokens": 9}))

    @tool(inline=True)
    def look(number: int) -> str:
        """A text of 450 tokens."""
        return f"{number} ".ljust(1800, "x")

    async def work(context_tokens: int | None) -> tuple[Any, int]:
        async with serving(answer) as endpoint:
            model = connect("anthropic:claude", base_url=endpoint.url, api_key="key", context_tokens=context_tokens)
            agent = Agent("reader", model, Toolset([look]), context=STRATEGIES[name], limits=Limits(steps=60),
                          options=CallOptions(max_tokens=100, timeout=60))
            result = await agent.run("Read all.")
            await model.close()
            return result, sum(tokens + 100 > most for tokens in prompts)

    for context_tokens in (most, None):
        read: list[int] = []
        prompts.clear()
        result, refused = asyncio.run(work(context_tokens))
        assert (result.status, result.text) == ("finished", "All read."), result.reason
        assert (refused == 0) == (context_tokens is not None), (context_tokens, prompts)


def test_a_stream_and_one_piece_say_the_same_and_as_the_official_client_reads_it() -> None:
    at_once, streamed = run(whole(message()))[0], run(stream(events()))[0]
    arguments = [call["function"].pop("arguments") for call in at_once.message["tool_calls"]]
    assert arguments == [call["function"].pop("arguments") for call in streamed.message["tool_calls"]]
    assert arguments == ['{"city": "Köln"}', "{}"] and at_once == streamed
    assert at_once.usage == Usage(20, 7, 12) and at_once.finish_reason == "tool_calls" and not at_once.notes

    async def official() -> Any:
        named = [f"event: {one['type']}\n".encode() + stream([one]).steps[0] for one in events()]
        async with serving(stream(named)) as endpoint, anthropic.AsyncAnthropic(
                base_url=endpoint.url, api_key="key", max_retries=0) as client:
            async with client.messages.stream(model="claude", messages=USER, max_tokens=9) as running:
                return await running.get_final_message()

    theirs = asyncio.run(official())
    assert [block.model_dump(exclude_none=True, exclude_unset=True) for block in theirs.content[:2]] == (
        streamed.message["thinking_blocks"])
    assert theirs.content[2].text == streamed.message["content"]
    assert [(block.id, block.name) for block in theirs.content[3:]] == [
        (call["id"], call["function"]["name"]) for call in streamed.message["tool_calls"]]


def test_a_dialogue_as_turns() -> None:
    """Several results are one turn, results come first, thinking comes back as it was, ids are spelled their way."""
    reply = run(whole(message()))[0].message
    call = {"id": "functions.search:0", "type": "function", "function": {"name": "search", "arguments": "[not json"}}
    system, turns = turns_of([
        {"role": "system", "content": "Be"}, {"role": "system", "content": "brief."}, *USER, reply,
        {"role": "user", "content": "Quick!"}, {"role": "tool", "tool_call_id": "toolu_1", "content": "21"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": ""}, {"role": "system", "content": "Two left."},
        {"role": "assistant", "content": "", "reasoning_content": "unsigned", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.search:0", "content": [{"type": "text", "text": "none"}]},
        {"role": "assistant", "content": "  "}, {"role": "user", "content": [{"type": "text", "text": "So?"}]},
    ])  # fmt: skip
    assert system == "Be\n\nbrief."
    assert turns == [
        {"role": "user", "content": [{"type": "text", "text": "How warm is it?"}]},
        {"role": "assistant", "content": CONTENT},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "21"},
            {"type": "tool_result", "tool_use_id": "toolu_2"},
            {"type": "text", "text": "Quick!"}, {"type": "text", "text": "Two left."}]},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "functions_search_0", "name": "search", "input": {"arguments": "[not json"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "functions_search_0", "content": "none"},
            {"type": "text", "text": "So?"}]},
    ]  # fmt: skip


def test_what_is_sent() -> None:
    options = CallOptions(max_tokens=9, temperature=1.4, top_p=0.9, tool_choice="required", timeout=60)
    _, (asked,) = run(whole(message()), [{"role": "system", "content": "S"}, *USER], [TOOL], options)
    mark = {"cache_control": {"type": "ephemeral"}}
    assert asked.path == "/v1/messages" and asked.headers["x-api-key"] == "key"
    assert asked.headers["anthropic-version"] == "2023-06-01"
    assert asked.body == {
        "model": "claude", "max_tokens": 9, "stream": True, "temperature": 1.0, "top_p": 0.9,
        "system": [{"type": "text", "text": "S"} | mark],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "How warm is it?"} | mark]}],
        "tools": [{"name": "weather", "description": "Now.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
    }  # fmt: skip
    for choice, sent in (("weather", {"type": "tool", "name": "weather"}), ("none", {"type": "none"})):
        _, (asked,) = run(whole(message()), USER, [TOOL], CallOptions(tool_choice=choice))
        assert asked.body["tool_choice"] == sent and "top_p" not in asked.body
    # A summary of a dialogue with calls is asked for without tools; the API wants the called ones declared.
    reply = run(whole(message()))[0].message
    _, (asked,) = run(whole(message()), [*USER, reply, *USER], [])
    assert [tool["name"] for tool in asked.body["tools"]] == ["weather", "clock"]
    assert asked.body["tool_choice"] == {"type": "none"}
    _, (asked,) = run(whole(message()), extra={"thinking": {"type": "enabled", "budget_tokens": 1024}})
    assert "temperature" not in asked.body and asked.body["thinking"]["budget_tokens"] == 1024


def test_of_temperature_and_top_p_some_models_take_one() -> None:
    def answer(asked: Asked) -> Answer:
        if "top_p" in asked.body:
            error = {"type": "invalid_request_error", "message": "`temperature` and `top_p` cannot both be specified"}
            return whole({"type": "error", "error": error}, 400)
        return whole(message())

    completion, asked = run(answer, options=CallOptions(temperature=0.5, top_p=0.9, timeout=60))
    assert len(asked) == 2 and asked[1].body["temperature"] == 0.5
    assert completion.notes == ["the endpoint does not take top_p"]


@pytest.mark.parametrize(("stop", "reason"), [
    ("end_turn", "tool_calls"), ("tool_use", "tool_calls"), ("max_tokens", "length"), (None, "tool_calls"),
    ("model_context_window_exceeded", "length"), (["x"], "tool_calls")])
def test_why_it_stopped(stop: Any, reason: str) -> None:
    assert run(whole(message(stop=stop)))[0].finish_reason == reason
    texts = [{"type": "text", "text": "a"}]
    assert run(whole(message(texts, stop)))[0].finish_reason == ("length" if reason == "length" else "stop")


def test_a_cut_call_is_no_call() -> None:
    def cut(partial: str) -> list[Any]:
        return [{"type": "message_start", "message": message([], None)},
                {"type": "content_block_start", "index": 0, "content_block": {
                    "type": "tool_use", "id": "a", "name": "weather", "input": {}}},
                {"type": "content_block_delta", "index": 0, "delta": {
                    "type": "input_json_delta", "partial_json": partial}},
                {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {}},
                {"type": "message_stop"}]  # fmt: skip

    for partial in ("", '{"city'):
        completion = run(stream(cut(partial)))[0]
        assert "tool_calls" not in completion.message and completion.finish_reason == "length" and completion.notes
    assert run(stream(cut('{"city": "x"}')))[0].message["tool_calls"]


@pytest.mark.parametrize(("status", "kind_told", "text", "kind"), [
    (529, "overloaded_error", "Overloaded", "overloaded"), (429, "rate_limit_error", "slow", "rate_limit"),
    (500, "api_error", "oh", "server"), (401, "authentication_error", "key", "auth"),
    (403, "permission_error", "", "auth"), (402, "billing_error", "pay", "auth"),
    (404, "not_found_error", "model", "bad_request"),
    (413, "request_too_large", "", "context_length"), (504, "timeout_error", "", "timeout"),
    (400, "invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum", "context_length"),
    (400, "invalid_request_error", "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
     "context_length"),
    (400, "invalid_request_error", "messages: at least one message is required", "bad_request"),
])  # fmt: skip
def test_what_an_error_means(status: int, kind_told: str, text: str, kind: str) -> None:
    body = {"type": "error", "error": {"type": kind_told, "message": text}}
    with pytest.raises(ModelError) as raised:
        run(whole(body, status, retry_after="3"))
    assert (raised.value.kind, raised.value.status, raised.value.retry_after) == (kind, status, 3.0)
    if status not in (400, 404, 413):
        with pytest.raises(ModelError) as raised:
            run(stream([*events()[:4], body]))
        assert raised.value.kind == kind


@pytest.mark.parametrize(("answer", "kind"), [
    (whole(b"not json"), "server"), (whole(b"{}"), "server"), (whole({"content": None, "type": "message"}), "server"),
    (whole(message(stop="refusal")), "refused"), (stream(events()[:5]), "connection"), (stream([]), "server"),
    (stream([*events()[:5], "{half"]), "server"), (stream([{"type": "message_stop"}]), "server"),
])  # fmt: skip
def test_no_reply(answer: Answer, kind: str) -> None:
    with pytest.raises(ModelError) as raised:
        run(answer)
    assert raised.value.kind == kind


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_body_is_a_reply_or_a_model_error(data: st.DataObject) -> None:
    """A good answer in which any values are replaced by anything."""
    def spoil(value: Any) -> Any:
        if data.draw(st.integers(0, 19)) == 0:
            return data.draw(anything)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    answer = _Answer()
    try:
        for event in events() if data.draw(st.booleans()) else [message()]:
            answer.take({key: spoil(item) for key, item in event.items()})
        completion = read_message(answer.whole(), "claude")
    except ModelError as error:
        assert error.kind in ("server", "connection", "refused")
    else:
        check_clean(completion)
        # And it can be sent back.
        turns_of([*USER, completion.message])
