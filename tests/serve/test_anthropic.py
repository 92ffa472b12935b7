"""The Anthropic surface through Anthropic's own client, over a real socket; the model says what the test wrote."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from tests.serve.service_double import PATIENCE, Running, ScriptedService, says, serving
from tests.serve.test_openai import SECTION, TWO_CALLS, call

USER = [{"role": "user", "content": "How warm is it in Paris?"}]
WEATHER = {"name": "weather", "description": "How warm it is.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
THINKING = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(claude: anthropic.Anthropic) -> anthropic.Anthropic:
    return claude


def create(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**({"model": "moon", "messages": USER, "max_tokens": 50} | options))


# --- replies ----------------------------------------------------------------------------------------------------------


def test_a_reply_with_thinking(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    text = "a thought 🌕</think>naïve – 月面基地!"
    server.service.script = says(tokenizer, text, cached=16)
    reply = create(client, thinking=THINKING)
    thinking, said = reply.content
    assert (thinking.type, thinking.thinking) == ("thinking", "a thought 🌕") and thinking.signature
    assert (said.type, said.text) == ("text", "naïve – 月面基地!")
    assert (reply.stop_reason, reply.stop_sequence, reply.role) == ("end_turn", None, "assistant")
    prompt = server.service.asked[-1].prompt_ids
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == len(prompt)
    assert reply.usage.cache_read_input_tokens == 16
    assert reply.usage.output_tokens == len(tokenizer.encode_rendered(text))
    assert reply.usage.output_tokens_details.thinking_tokens == len(tokenizer.encode("a thought 🌕"))


def test_thinking_is_off_unless_it_is_asked_for(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    server.service.script = says(tokenizer, "at once")
    for options in ({}, {"thinking": {"type": "disabled"}}):
        assert [block.type for block in create(client, **options).content] == ["text"]
        assert tokenizer.decode(server.service.asked[-1].prompt_ids).endswith("<think></think>")
    create(client, thinking={"type": "adaptive"})
    assert tokenizer.decode(server.service.asked[-1].prompt_ids).endswith("<|im_middle|><think>")


def test_a_stream_is_the_message(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    server.service.script = says(tokenizer, "hm 🌕</think>Let me see." + TWO_CALLS, cached=8)
    whole = create(client, thinking=THINKING, tools=[WEATHER])
    with client.messages.stream(model="moon", messages=USER, max_tokens=50, thinking=THINKING,
                                tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    strip = {"id": True, "content": {"__all__": {"parsed_output"}}}
    assert streamed.model_dump(exclude=strip) == whole.model_dump(exclude=strip)
    assert whole.stop_reason == "tool_use"
    assert [(block.id, block.name, block.input) for block in whole.content[2:]] == [
        ("functions.weather:0", "weather", {"city": "Paris"}), ("functions.weather:1", "weather", {"city": "Berlin"})]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)


def test_the_events_on_the_wire(server: Running, tokenizer: Any) -> None:
    """Names and data agree, blocks are numbered, opened and closed in turn, and a ping comes early."""
    import json

    server.service.script = says(tokenizer, "hm</think>Look:" + TWO_CALLS)
    body = {"model": "moon", "messages": USER, "max_tokens": 50, "stream": True, "thinking": THINKING,
            "tools": [WEATHER]}
    text = httpx.post(f"{server.url}/anthropic/v1/messages", json=body, timeout=PATIENCE).text
    events = [part.split("\n") for part in text.strip().split("\n\n")]
    seen, open_block, opened = [], None, 0
    for name, data in events:
        content = json.loads(data.removeprefix("data: "))
        assert name == f"event: {content['type']}"
        seen.append(content["type"])
        if content["type"] == "content_block_start":
            assert open_block is None and content["index"] == opened
            open_block, opened = content["index"], opened + 1
        elif content["type"] == "content_block_delta":
            assert content["index"] == open_block
        elif content["type"] == "content_block_stop":
            assert content["index"] == open_block
            open_block = None
    assert seen[:3] == ["message_start", "ping", "content_block_start"] and opened == 4 and open_block is None


@pytest.mark.parametrize(("finish", "stop_reason", "text", "expected", "sequence"), [
    ("stop", None, "x", "end_turn", None),
    ("stop", "END", "x", "stop_sequence", "END"),
    ("length", None, "x", "max_tokens", None),
    ("stop", None, TWO_CALLS, "tool_use", None),
    ("length", None, TWO_CALLS[:-60], "max_tokens", None),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_stop_reasons(
    server: Running, client: anthropic.Anthropic, tokenizer: Any, finish: str, stop_reason: str | None, text: str,
    expected: str, sequence: str | None, stream: bool,
) -> None:
    server.service.script = says(tokenizer, text, finish, stop_reason)
    options = {"model": "moon", "messages": USER, "max_tokens": 50, "tools": [WEATHER], "stop_sequences": ["END"]}
    if stream:
        with client.messages.stream(**options) as running:
            reply = running.get_final_message()
    else:
        reply = client.messages.create(**options)
    assert (reply.stop_reason, reply.stop_sequence) == (expected, sequence)
    assert server.service.asked[-1].sampling.stop == ("END",)


def test_a_call_that_the_limit_cuts_off_is_none(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    half = SECTION.format(call(0, '{"city": "Paris"}') + call(1, '{"city": "Ber'))[: -len("<|tool_call_end|>") * 2]
    server.service.script = says(tokenizer, half[: half.index('"Ber')], finish="length")
    reply = create(client, tools=[WEATHER])
    assert reply.stop_reason == "max_tokens"
    assert [block.input for block in reply.content] == [{"city": "Paris"}]


def test_more_than_the_context_is_said_so(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    server.service.script = says(tokenizer, "x", finish="length")
    reply = create(client, max_tokens=100_000, timeout=PATIENCE)
    asked = server.service.asked[-1]
    assert reply.stop_reason == "model_context_window_exceeded"
    assert asked.sampling.max_tokens == 512 - len(asked.prompt_ids)


# --- what the client sends --------------------------------------------------------------------------------------------


def test_the_round_trip(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    """Blocks of any kind become the dialogue that the model knows: ids are its own, results precede the text."""
    create(client, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}], tools=[WEATHER],
           thinking=THINKING, messages=[
        *USER,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Two cities.", "signature": "abc"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
            {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"city": "Bonn"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "20"}]},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
            {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}}]},
    ])
    asked = server.service.asked[-1]
    prompt = tokenizer.decode(asked.prompt_ids)
    assert "<|im_system|>system<|im_middle|>Be brief.<|im_end|>" in prompt
    assert '<think>Two cities.</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<' in (
        prompt)
    assert '{"city": "Köln"}' in prompt and "toolu" not in prompt
    tail = prompt[prompt.index("## Return of functions.weather:0\n20") :]
    assert "## Return of functions.weather:1\nError: no such city" in tail and tail.index("Well?") > tail.index("Error")
    assert asked.constraint.first_index == 2


def test_a_beginning_is_continued(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    server.service.script = says(tokenizer, '"moon"]')
    reply = create(client, messages=[*USER, {"role": "assistant", "content": "["}])
    assert reply.content[0].text == '"moon"]'
    assert tokenizer.decode(server.service.asked[-1].prompt_ids).endswith("</think>[")


@pytest.mark.parametrize(("choice", "kind"), [
    ({"type": "auto"}, {"must_call": False, "parallel": True}),
    ({"type": "auto", "disable_parallel_tool_use": True}, {"parallel": False}),
    ({"type": "any"}, {"must_call": True}),
    ({"type": "tool", "name": "weather"}, {"must_call": True}),
    ({"type": "none"}, {"tools": {}}),
])  # fmt: skip
def test_tool_choice(server: Running, client: anthropic.Anthropic, choice: dict, kind: dict) -> None:
    create(client, tools=[WEATHER], tool_choice=choice)
    factory = server.service.asked[-1].constraint
    assert {name: getattr(factory, name) for name in kind} == kind


def test_a_schema_for_the_answer(server: Running, client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}}
    create(client, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert type(server.service.asked[-1].constraint).__name__ == "JsonFactory"


def test_the_older_name_of_the_form(server: Running, client: anthropic.Anthropic) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"warm": {"type": "boolean"}}}}
    create(client, extra_body={"output_format": form})
    assert type(server.service.asked[-1].constraint).__name__ == "JsonFactory"


@pytest.mark.parametrize("body", [
    {"tool_choice": {"type": "auto", "disable_parallel_tool_use": None}}, {"context_management": {"edits": []}},
    {"context_management": None, "compaction": None, "fallbacks": []}, {"output_config": {"effort": "low"}},
])  # fmt: skip
def test_what_asks_for_nothing_is_no_mistake(server: Running, client: anthropic.Anthropic, body: dict) -> None:
    create(client, extra_body=body)
    assert len(server.service.asked) == 1


def test_a_special_token_as_a_stop_sequence(server: Running, client: anthropic.Anthropic, tokenizer: Any) -> None:
    id = tokenizer.special_tokens["<|im_user|>"]
    server.service.script = says(tokenizer, "x", "stop", id)
    reply = create(client, stop_sequences=["<|im_user|>"])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "<|im_user|>")
    assert server.service.asked[-1].sampling.stop_ids == (id,)
    reply = create(client)
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None), "the end that every turn has"


def test_settings_reach_the_engine(server: Running, client: anthropic.Anthropic) -> None:
    create(client, extra_body={"temperature": 0.5, "top_p": 0.7, "top_k": 3})
    sampling = server.service.asked[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.7, 3, 50)


def test_k2_is_asked_for_a_share_of_the_temperature(tokenizer: Any) -> None:
    service = ScriptedService(says(tokenizer, "hi"))
    with serving(service, tokenizer, style="kimi-k2") as running:
        client = anthropic.Anthropic(base_url=f"{running.url}/anthropic", api_key="unused", max_retries=0)
        for given, expected in ((0.5, 0.3), (1.0, 0.6), (0.0, 0.0)):
            create(client, extra_body={"temperature": given})
            assert service.asked[-1].sampling.temperature == pytest.approx(expected)
        create(client)
        assert service.asked[-1].sampling.temperature == 0.6


def test_counting_tells_what_the_message_then_has(server: Running, client: anthropic.Anthropic) -> None:
    for options in ({}, {"system": "Be brief."}, {"tools": [WEATHER]}, {"thinking": THINKING},
                    {"messages": [*USER, {"role": "assistant", "content": "It is"}]}):
        counted = client.messages.count_tokens(**({"model": "moon", "messages": USER} | options)).input_tokens
        usage = create(client, **options).usage
        assert counted == usage.input_tokens + usage.cache_read_input_tokens == len(server.service.asked[-1].prompt_ids)


def test_models(server: Running, client: anthropic.Anthropic) -> None:
    assert [(model.id, model.max_input_tokens) for model in client.models.list()] == [("moon", 512)]
    assert client.models.retrieve("moon").type == "model"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("sun")
