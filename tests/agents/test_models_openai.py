"""The OpenAI client against a server that misbehaves in every way that endpoints have been seen to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.agents.models.base import CallOptions, Completion, ModelError, Usage, estimate_tokens
from moonbase.agents.models.endpoint import error_of, retry_after
from moonbase.agents.models.openai import OpenAIModel, _Answer, read_completion
from moonbase.errors import UserError
from tests.agents.fake_endpoint import Answer, Asked, FakeEndpoint, serving, stream, whole

USER = [{"role": "user", "content": "How warm is it?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
QUICK = CallOptions(timeout=60)


def reply(message: Any, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27}
    return {"id": "1", "object": "chat.completion", "model": "moon-1", "created": 1, "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}  # fmt: skip


def chunk(delta: dict[str, Any], finish: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": "1", "object": "chat.completion.chunk", "model": "moon-1", "created": 1,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}  # fmt: skip


SAID = {"role": "assistant", "content": "21 degrees"}


async def ask(endpoint: FakeEndpoint, messages: Any = USER, tools: Any = (), options: CallOptions = QUICK,
              **more: Any) -> Completion:
    model = OpenAIModel("moon", endpoint.url + "/v1", **more)
    try:
        return await model.complete(messages, list(tools), options)
    finally:
        await model.close()


def answered(answer: Any, **more: Any) -> Completion:
    async def one() -> Completion:
        async with serving(answer) as endpoint:
            return await ask(endpoint, **more)

    return asyncio.run(one())


def failed(answer: Any, **more: Any) -> ModelError:
    with pytest.raises(ModelError) as raised:
        answered(answer, **more)
    return raised.value


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_request_is_what_openais_client_would_send() -> None:
    """The official client, asked for the same, sends the same fields."""
    history = [{"role": "system", "content": "Short."}, *USER,
               {"role": "assistant", "content": None, "tool_calls": [
                   {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
               {"role": "tool", "tool_call_id": "c", "content": "21"}]  # fmt: skip

    async def both() -> list[Asked]:
        async with serving(stream([chunk(SAID), chunk({}, "stop"), "[DONE]"])) as endpoint:
            options = CallOptions(max_tokens=9, temperature=0.5, top_p=0.9, seed=4, tool_choice="weather", timeout=60)
            await ask(endpoint, history, [TOOL], options, api_key="sk-1")
            async with openai.AsyncOpenAI(base_url=endpoint.url + "/v1", api_key="sk-1") as client:
                chunks = await client.chat.completions.create(
                    model="moon", messages=history, tools=[TOOL], max_tokens=9, temperature=0.5, top_p=0.9, seed=4,
                    tool_choice={"type": "function", "function": {"name": "weather"}}, stream=True,
                    stream_options={"include_usage": True})
                assert [chunk async for chunk in chunks]
            return endpoint.asked

    ours, theirs = asyncio.run(both())
    assert ours.body == theirs.body and ours.path == theirs.path == "/v1/chat/completions"
    assert ours.headers["authorization"] == theirs.headers["authorization"] == "Bearer sk-1"


def test_only_this_apis_fields_are_sent_and_reasoning_goes_back_under_its_name() -> None:
    history = [*USER, {"role": "assistant", "content": "x", "reasoning_content": "hm", "thinking_blocks": [1]}, *USER]

    async def two(name: str) -> list[Asked]:
        async with serving(whole(reply(SAID | {name: "so"}))) as endpoint:
            model = OpenAIModel("moon", endpoint.url + "/v1")
            completion = await model.complete(history, [], QUICK)
            assert completion.message == SAID | {"reasoning_content": "so"}
            await model.complete(history, [], QUICK)
            await model.close()
            return endpoint.asked

    for name in ("reasoning_content", "reasoning"):
        first, second = asyncio.run(two(name))
        assert first.body["messages"][1] == {"role": "assistant", "content": "x", "reasoning_content": "hm"}
        assert second.body["messages"][1] == {"role": "assistant", "content": "x", name: "hm"}
        assert "tools" not in first.body and "tool_choice" not in first.body and "authorization" not in first.headers


@pytest.mark.parametrize(("message", "field", "instead"), [
    ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
     "max_tokens", "max_completion_tokens"),
    ("Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is supported.",
     "temperature", None),
    ("Unrecognized request argument supplied: stream_options", "stream_options", None),
    ("property 'seed' is unsupported", "seed", None),
    ("invalid top_p: only 0.95 is allowed for this model", "top_p", None),
])  # fmt: skip
def test_fields_that_an_endpoint_turns_down(message: str, field: str, instead: str | None) -> None:
    def answer(asked: Asked) -> Answer:
        if field in asked.body:
            return whole({"error": {"message": message, "type": "invalid_request_error"}}, 400)
        return whole(reply(SAID))

    async def twice() -> list[Asked]:
        async with serving(answer) as endpoint:
            model = OpenAIModel("moon", endpoint.url + "/v1")
            for _ in range(2):
                completion = await model.complete(USER, [], CallOptions(temperature=0.5, seed=1, max_tokens=77))
                assert completion.message == SAID
            await model.close()
            return endpoint.asked

    bodies = [asked.body for asked in asyncio.run(twice())]
    assert [field in body for body in bodies] == [True, False, False]
    assert set(bodies[0]) - set(bodies[1]) == {field}
    assert instead is None or bodies[1][instead] == 77


def test_a_limit_on_the_reply_is_never_given_up() -> None:
    error = failed(whole({"error": {"message": "max_tokens is too large: only 10 are supported"}}, 400))
    assert error.kind == "bad_request"


def test_half_a_surrogate_pair_can_be_sent() -> None:
    async def one() -> Any:
        async with serving(whole(reply(SAID))) as endpoint:
            await ask(endpoint, [{"role": "user", "content": "\ud83d"}])
            return endpoint.asked[0].body["messages"][0]["content"]

    assert asyncio.run(one()) == "\ud83d"


# --- what comes back --------------------------------------------------------------------------------------------------


def test_a_stream_and_one_piece_say_the_same() -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
             {"id": "b", "type": "function", "function": {"name": "clock", "arguments": "{}"}}]  # fmt: skip
    usage = {"prompt_tokens": 20, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 16}}
    at_once = answered(whole(reply({"role": "assistant", "content": "Hm.", "reasoning_content": "Let me see",
                                    "tool_calls": calls}, "tool_calls", usage=usage)))
    parts = [
        chunk({"role": "assistant", "content": ""}), chunk({"reasoning_content": "Let me"}), b": ping\n\n",
        chunk({"reasoning_content": " see"}), chunk({"content": "Hm."}),
        chunk({"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "weather"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "b", "function": {"name": "clock", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Köln"}'}}]}),
        chunk({}, "tool_calls"), {"choices": [], "usage": usage}, "[DONE]",
    ]
    raw = b"".join(stream(parts).steps)
    # Also cut at any byte, with carriage returns, and without the last line end.
    for pieces in (stream(parts), stream([raw[i : i + 7] for i in range(0, len(raw), 7)]),
                   stream([raw.replace(b"\n", b"\r\n").rstrip()])):
        streamed = answered(pieces)
        assert streamed == at_once
    assert at_once.usage == Usage(20, 7, 16) and at_once.finish_reason == "tool_calls" and at_once.model == "moon-1"
    assert at_once.message == {"role": "assistant", "content": "Hm.", "reasoning_content": "Let me see",
                               "tool_calls": calls} and not at_once.notes


@pytest.mark.parametrize(("given", "expected"), [
    ({"arguments": {"city": "Köln"}}, '{"city": "Köln"}'), ({"arguments": ""}, "{}"), ({"arguments": None}, "{}"),
    ({}, "{}"), ({"arguments": "{not json"}, "{not json"), ({"arguments": [1]}, "[1]"), ({"arguments": 5}, "5"),
])  # fmt: skip
def test_arguments_are_text_whatever_they_were(given: Any, expected: str) -> None:
    call = {"id": "a", "function": {"name": "weather", **given}}
    for answer in (whole(reply({"tool_calls": [call]}, "tool_calls")),
                   stream([chunk({"tool_calls": [{"index": 0, **call}]}, "tool_calls"), "[DONE]"])):
        completion = answered(answer)
        assert completion.message["tool_calls"] == [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": expected}}]
        assert completion.message["content"] is None


def test_calls_without_index_or_id() -> None:
    whole_calls = [{"id": "a", "function": {"name": "one", "arguments": "{}"}},
                   {"id": "b", "function": {"name": "two", "arguments": "{}"}}]  # fmt: skip
    same = [chunk({"tool_calls": [{"index": 0, **call}]}) for call in whole_calls]
    none = [chunk({"tool_calls": [call]}) for call in whole_calls]
    for parts in (same, none):
        calls = answered(stream([*parts, chunk({}, "stop")])).message["tool_calls"]
        assert [(call["id"], call["function"]["name"]) for call in calls] == [("a", "one"), ("b", "two")]
    rest = chunk({"tool_calls": [{"index": 0, "function": {"arguments": " "}}]})
    calls = answered(stream([*same, rest, chunk({}, "stop")])).message["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ["{}", "{} "]
    listed = chunk({"tool_calls": [{"index": 0, "id": ["a"], "function": {"name": "one"}}]})
    assert len(answered(stream([listed, *same, chunk({}, "stop")])).message["tool_calls"]) == 2
    nameless = answered(whole(reply({"tool_calls": [{"function": {"name": "one"}}, {"id": "", "function": {
        "name": "two"}}, {"id": "c", "function": {"name": ""}}]})))
    ids = [call["id"] for call in nameless.message["tool_calls"]]
    assert len(ids) == len(set(ids)) == 2 and all(ids) and nameless.notes
    assert nameless.finish_reason == "tool_calls", "whatever the endpoint calls it"


def test_a_cut_call_is_no_call() -> None:
    calls = [{"index": 0, "id": "a", "function": {"name": "one", "arguments": "{}"}},
             {"index": 1, "id": "b", "function": {"name": "two", "arguments": '{"x": '}}]  # fmt: skip
    completion = answered(stream([chunk({"tool_calls": calls}), chunk({}, "length"), "[DONE]"]))
    assert [call["id"] for call in completion.message["tool_calls"]] == ["a"] and completion.finish_reason == "length"
    assert any("two" in note for note in completion.notes)


@pytest.mark.parametrize("body", [
    b"", b"not json", b"[1, 2]", b'"text"', b"null", b"{}", b'{"choices": []}', b'{"choices": null}',
    b'{"choices": [{"message": null}]}', b'{"choices": [{}]}', b'{"choices": [null]}', b'{"choices": {"a": 1}}',
    b"[" * 100_000, b'{"choices": [{"message": "text"}]}', b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_no_reply_is_a_server_error(body: bytes) -> None:
    error = failed(whole(body))
    assert error.kind == "server" and error.retryable and len(str(error)) < 400


def test_odd_but_clean() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    for message, content in (({"content": None}, ""), ({}, ""), ({"content": parts}, "ab"), ({"content": 5}, "5"),
                             ({"content": None, "refusal": "No."}, "No.")):
        completion = answered(whole(reply(message, "weird")))
        assert completion.message == {"role": "assistant", "content": content} and completion.finish_reason == "stop"
    completion = answered(whole(reply(SAID, usage=None, model=7)))
    assert completion.model == "moon" and completion.usage.input_tokens == estimate_tokens(USER, [])
    assert completion.usage.output_tokens > 0 and completion.notes


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_body_is_a_reply_or_a_model_error(data: st.DataObject) -> None:
    """A good answer in which any values are replaced by anything."""
    calls = [{"index": 0, "id": "a", "type": "function", "function": {"name": "one", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "x", "reasoning_content": "y", "tool_calls": calls}
    streamed = data.draw(st.booleans())
    event = chunk(message, "stop", usage={"prompt_tokens": 3}) if streamed else reply(message)

    def spoil(value: Any) -> Any:
        if data.draw(st.integers(0, 9)) == 0:
            return data.draw(anything)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    answer = _Answer()
    try:
        for _ in range(2 if streamed else 1):
            answer.take({key: spoil(item) for key, item in event.items()})
        completion = read_completion(answer.whole(), "moon")
    except ModelError as error:
        assert error.kind in ("server", "connection")
    else:
        check_clean(completion)


def check_clean(completion: Completion) -> None:
    """What everybody may rely on."""
    message = json.loads(json.dumps(completion.message))
    assert message["role"] == "assistant" and completion.finish_reason in ("stop", "tool_calls", "length")
    assert isinstance(message["content"], str) or (message["content"] is None and message["tool_calls"])
    for call in message.get("tool_calls", ()):
        assert call["type"] == "function" and isinstance(call["id"], str) and call["id"]
        assert isinstance(call["function"]["name"], str) and call["function"]["name"]
        assert isinstance(call["function"]["arguments"], str)


def test_token_ids_where_an_engine_gives_them() -> None:
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]}
    at_once = reply(SAID, prompt_token_ids=[1, 2, 3])
    at_once["choices"][0] |= {"token_ids": [4, 5], "logprobs": logprobs}
    parts = [chunk({"content": "21 degrees"}, prompt_token_ids=[1, 2, 3])]
    parts[0]["choices"][0] |= {"token_ids": [4, 5], "logprobs": logprobs}
    for answer in (whole(at_once), stream([*parts, chunk({}, "stop"), "[DONE]"])):
        completion = answered(answer, token_ids=True)
        assert completion.prompt_ids == [1, 2, 3] and completion.token_ids == [4, 5]
        assert completion.logprobs == [-0.5, -1.0]
    assert answered(whole(reply(SAID))).token_ids is None


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "error", "kind"), [
    (429, {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}, "rate_limit"),
    (429, {"message": "You exceeded your current quota", "type": "insufficient_quota"}, "auth"),
    (429, {"message": "Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 12000"},
     "context_length"),
    (500, {"message": "oh"}, "server"), (502, b"<html>bad gateway</html>", "server"), (503, b"", "overloaded"),
    (504, b"", "timeout"), (529, {"type": "overloaded_error"}, "overloaded"), (520, b"x", "server"),
    (401, {"message": "Incorrect API key provided", "code": "invalid_api_key"}, "auth"), (403, b"no", "auth"),
    (402, b"pay", "auth"), (404, {"message": "The model `x` does not exist"}, "bad_request"), (408, b"", "timeout"),
    (413, b"", "context_length"), (422, {"detail": [{"msg": "no"}]}, "bad_request"), (302, b"", "bad_request"),
    (400, {"message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 "
                      "tokens.", "code": "context_length_exceeded"}, "context_length"),
    (400, {"message": "This model's maximum context length is 8192 tokens."}, "context_length"),
    (400, {"message": "Input is too long for requested model."}, "context_length"),
    (400, {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"},
     "context_length"),
    (400, {"message": "Invalid request: Your request exceeded model token limit: 8192"}, "context_length"),
    (400, {"message": "The response was filtered", "code": "content_filter"}, "refused"),
    (400, {"message": "messages[0].role: wrong"}, "bad_request"), (400, "plain text", "bad_request"),
])  # fmt: skip
def test_what_an_error_means(status: int, error: Any, kind: str) -> None:
    found = failed(whole(error if isinstance(error, bytes) else {"error": error}, status))
    assert (found.kind, found.status) == (kind, status)
    assert found.retryable == (kind in ("rate_limit", "overloaded", "timeout", "server"))
    if isinstance(error, dict) and "message" in error:
        assert error["message"] in str(found)


@pytest.mark.parametrize(("headers", "seconds"), [
    ({"retry-after": "7"}, 7.0), ({"retry-after": "1.5"}, 1.5), ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
    ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
    ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 0.0), ({"retry-after": "-3"}, 0.0), ({}, None),
    ({"retry-after": "soon"}, None), ({"retry-after": "inf"}, None), ({"retry-after": "nan"}, None),
    ({"retry-after": ""}, None), ({"retry-after": "Wed, 99 Oct 9999999 07:28:00 GMT"}, None),
])  # fmt: skip
def test_when_to_come_back(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
    assert failed(Answer(429, [b"{}"], headers)).retry_after == seconds


def test_errors_within_an_answer() -> None:
    begun = chunk({"content": "The"})
    cases = [
        (stream([begun, {"error": {"message": "overloaded", "type": "overloaded_error"}}]), "overloaded"),
        (stream([begun, {"error": {"message": "x", "type": "server_error"}}, "[DONE]"]), "server"),
        (stream([begun, {"error": "something"}]), "server"), (stream([begun, {"error": {"code": 429}}]), "rate_limit"),
        (whole({"error": {"code": 502, "message": "upstream"}}), "server"), (stream([begun, "{half"]), "server"),
        (stream([begun]), "connection"), (stream([]), "server"),
        (stream([begun, chunk({}, "content_filter"), "[DONE]"]), "refused"),
        (Answer(200, [b"12345"], {"content-type": "application/json", "content-length": "99"}), "connection"),
        (Answer(200, [b"xx"], {"content-type": "application/json", "content-encoding": "gzip"}), "connection"),
        (lambda _: None, "connection"),
    ]  # fmt: skip
    for answer, kind in cases:
        assert failed(answer).kind == kind


def test_nobody_there() -> None:
    async def one() -> None:
        async with serving(whole(reply(SAID))) as endpoint:
            pass
        await ask(endpoint)

    with pytest.raises(ModelError) as raised:
        asyncio.run(one())
    assert raised.value.kind == "connection" and raised.value.retryable


@pytest.mark.slow
def test_silence_times_out_but_a_long_reply_does_not() -> None:
    options = CallOptions(timeout=0.3)
    slow = [part for number in range(9) for part in (chunk({"content": str(number)}), 0.3)]
    # A limit that a machine may stand still in for a while.
    completion = answered(stream([*slow, chunk({}, "stop"), "[DONE]"]), options=CallOptions(timeout=2.6))
    assert completion.message["content"] == "012345678", "2.7 s, but never 2.6 s of silence"
    pings: list[Any] = [b": ping\n\n", 0.1] * 10
    for answer in (stream([chunk({"content": "a"})], ends=False), stream([chunk({"content": "a"}), *pings]),
                   Answer(200, [], {}, ends=False), Answer(200, [1.0])):
        error = failed(answer, options=options)
        assert error.kind == "timeout" and "0.3 s" in str(error)


def test_a_cancelled_call_hangs_up() -> None:
    async def one() -> None:
        async with serving(stream([chunk({"content": "a"})], ends=False)) as endpoint:
            call = asyncio.create_task(ask(endpoint))
            while not endpoint.inside:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            async with asyncio.timeout(60):
                while endpoint.inside:
                    await asyncio.sleep(0.01)

    asyncio.run(one())


def test_one_model_in_several_event_loops() -> None:
    model: list[OpenAIModel] = []

    async def one() -> str:
        async with serving(whole(reply(SAID))) as endpoint:
            if not model:
                model.append(OpenAIModel("moon", endpoint.url + "/v1"))
            model[0].endpoint.url = endpoint.url + "/v1"
            return (await model[0].complete(USER, [], QUICK)).message["content"]

    assert [asyncio.run(one()) for _ in range(3)] == ["21 degrees"] * 3


def test_estimates_learn_from_what_was_seen() -> None:
    async def one() -> tuple[int, int]:
        async with serving(whole(reply(SAID, usage={"prompt_tokens": 100, "completion_tokens": 1}))) as endpoint:
            model = OpenAIModel("moon", endpoint.url + "/v1")
            before = model.count_tokens(USER, [])
            await model.complete(USER, [], QUICK)
            return before, model.count_tokens(USER, [])

    before, after = asyncio.run(one())
    assert before == estimate_tokens(USER, []) and before < after == 8 * before, "no more than eightfold"


@pytest.mark.parametrize("url", ["http://", "ftp://host/v1", "http://host:port/v1", "host"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError):
        OpenAIModel("moon", url)


@pytest.mark.parametrize("key", ["sk\n1", "schlüssel", " sk "])
def test_a_key_that_is_none(key: str) -> None:
    with pytest.raises(UserError, match="API key"):
        OpenAIModel("moon", "http://host/v1", api_key=key)


def test_error_bodies_of_any_form() -> None:
    for body in (None, 5, [], {}, {"error": 5}, {"error": []}, {"error": {"message": 5, "code": [], "type": {}}}):
        assert error_of("x", 500, body, None).kind == "server"
        assert error_of("x", None, body, None).kind == "server"
