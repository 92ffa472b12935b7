"""Anything may come in at the door, from careless clients and from hostile ones.

Bodies are drawn by hypothesis: requests that are nearly right, with something odd in any place. The whole application
answers in process with the real engine behind it. Whatever came, the answer is a 2xx that the official clients' own
types can read, or a 4xx in the surface's error shape; it comes soon, and afterwards no block of the cache is held.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import math
import urllib.parse
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moonbase.chat import STYLES
from moonbase.engine import Engine
from moonbase.engine.service import Service
from moonbase.serve.app import create_app
from moonbase.serve.settings import Settings
from tests.serve.conftest import CONTEXT
from tests.serve.test_errors import told

PATIENCE = 120.0
"""Seconds for one answer; a short one takes some hundredths."""

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

# --- what may come ----------------------------------------------------------------------------------------------------

MARKS = ["<|im_end|>", "<|im_user|>", "<|im_system|>", "<|im_middle|>", "<think>", "</think>", "[EOS]",
         "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
         "<|tool_calls_section_end|>", "functions.f:0", "functions.f:999999999", "functions.:0", "functions.f:-1",
         "## Return of functions.f:0\n"]  # fmt: skip
# Lone halves of surrogate pairs are characters to Python, and `\udc00` in JSON.
letters = st.characters() | st.characters(categories=["Cs", "Cc", "Zl", "Zp"])
texts = st.one_of(
    st.text(letters, max_size=12), st.lists(st.sampled_from(MARKS) | st.text(letters, max_size=3), max_size=5).map(
        "".join), st.sampled_from(["", "f", "x" * 70, "moon " * 30, "a" * 20_000, "🌕" * 30, "\x00", "\ud83c",
                            "{}", "[]"]))
numbers = st.one_of(
    st.integers(-3, 40), st.integers(), st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.floats(), st.sampled_from([0.5, 1.0, -0.0, 1e300, 5e-324, math.nan, math.inf, -math.inf]))
plain = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8)


def object_of(needed: dict[str, Any], may: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(needed, optional=may)


def any_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


names = any_of("f", "g", "get_weather", "f" * 64)
schemas = st.recursive(
    st.one_of(any_of({"type": "string"}, {"type": "integer", "minimum": 0}, {"enum": ["x", 1]}, {"type": "boolean"}),
              object_of({}, {
                  "type": any_of("object", "array", "string", "number", "null", "strin", ["string", "null"]),
                  "$ref": any_of("#", "#/$defs/a", "#/definitions/a", "#/$defs/", "http://x"),
                  "minLength": numbers, "maxItems": numbers, "maximum": numbers, "multipleOf": numbers,
                  "pattern": any_of("^a+$", "(a|b)*c", "(?=x)", "(", "a{1000}", "\\p{L}", "[\ud800-\udfff]", "^\x00$"),
                  "enum": st.lists(plain, max_size=4), "const": anything, "required": st.lists(names, max_size=3),
                  "uniqueItems": st.booleans(), "not": anything, "format": texts})),
    lambda inner: st.one_of(
        object_of({"type": st.just("object"), "properties": st.dictionaries(names | texts, inner, max_size=3)},
                  {"required": st.lists(names, max_size=2), "additionalProperties": inner | st.booleans(),
                   "$defs": st.dictionaries(names, inner, max_size=2)}),
        object_of({"type": st.just("array"), "items": inner}),
        object_of({"anyOf": st.lists(inner, max_size=3)}), object_of({"allOf": st.lists(inner, max_size=3)}),
        object_of({"oneOf": st.lists(inner, max_size=3)})),
    max_leaves=5)
objects = any_of({"type": "object"}, {"type": "object", "properties": {"city": {"type": "string"}, "n": {"enum": [1]}},
                                      "required": ["city"]})
parameters = objects | schemas.map(lambda schema: {"type": "object", "properties": {"a": schema}})
arguments = any_of("{}", '{"a": 1}', "", "not JSON", "[" * 10_000) | texts

# --- requests as they should be, but for their texts ------------------------------------------------------------------

words = texts.filter(bool)


def exchange(call_ids: list[str], name: str, said: list[Any], claude: bool) -> list[dict[str, Any]]:
    """A turn with tool calls and its results, in the words of a surface."""
    if claude:
        uses = [{"type": "tool_use", "id": id, "name": name, "input": {"a": said[0]}} for id in call_ids]
        results = [{"type": "tool_result", "tool_use_id": id, "content": said[1]} for id in call_ids]
        thought = {"type": "thinking", "thinking": said[2], "signature": said[3]}
        return [{"role": "assistant", "content": [thought, {"type": "text", "text": said[4]}, *uses]},
                {"role": "user", "content": [*results, {"type": "text", "text": said[1]}]}]
    calls = [{"id": id, "type": "function", "function": {"name": name, "arguments": said[0]}} for id in call_ids]
    return [{"role": "assistant", "content": said[4], "reasoning_content": said[2], "tool_calls": calls},
            *({"role": "tool", "tool_call_id": id, "content": said[1]} for id in call_ids)]


def dialogues(claude: bool) -> st.SearchStrategy[list[Any]]:
    """Questions, answers, and calls with their results, whose ids and names are anything."""
    ids = st.lists(any_of("a", "functions.f:0", "functions.g:7", "functions.f:999999998") | words, min_size=1,
                   max_size=3, unique=True)
    turn = st.one_of(
        st.tuples(words, words).map(lambda said: [{"role": "user", "content": said[0]},
                                                  {"role": "assistant", "content": said[1]}]),
        st.tuples(ids, names | words.filter(str.strip), st.lists(texts, min_size=5, max_size=5)).map(
            lambda drawn: exchange(*drawn, claude)))
    parts = st.lists(texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
    return st.tuples(st.lists(turn, max_size=2), words | parts).map(
        lambda drawn: [*itertools.chain(*drawn[0]), {"role": "user", "content": drawn[1]}])


few = st.integers(1, 12)
base = {"model": st.just("moon"), "stream": st.booleans()}
common = {
    "stream_options": st.just({"include_usage": True}), "n": st.integers(1, 3),
    "temperature": st.floats(0, 2), "top_p": st.floats(0.01, 1), "seed": st.integers(-(2**63), 2**64 - 1),
    "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2), "top_k": st.integers(-1, 9),
    "stop": words.map(lambda text: text[:999]) | st.lists(any_of("e", *MARKS), max_size=3), "min_p": st.floats(0, 1),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.floats(-100, 100), max_size=3),
    "repetition_penalty": st.floats(0.01, 100), "ignore_eos": st.booleans(), "user": plain, "metadata": anything}
tool = object_of({"type": st.just("function"), "function": object_of(
    {"name": names, "parameters": parameters}, {"description": texts, "strict": st.booleans()})})
formats = any_of({"type": "json_object"}, {"type": "text"}) | (schemas | objects).map(
    lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
chat = object_of(base | {"messages": dialogues(False), "max_tokens": few | st.just(60)}, common | {
    "tools": st.lists(tool, max_size=3, unique_by=lambda tool: tool["function"]["name"]),
    "tool_choice": any_of("auto", "auto", "none", "required", {"type": "function", "function": {"name": "f"}}),
    "parallel_tool_calls": st.booleans(), "logprobs": st.just(True), "response_format": formats,
    "thinking": any_of({"type": "enabled"}, {"type": "disabled"}), "return_token_ids": st.booleans(),
    "reasoning_effort": any_of("none", "high"), "chat_template_kwargs": any_of({}, {"preserve_thinking": True})})
completion = object_of(base | {"max_tokens": few, "prompt": st.one_of(
    words, st.lists(words, min_size=1, max_size=3), st.lists(st.integers(0, 400), min_size=1, max_size=9),
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=4), min_size=1, max_size=3))}, common | {
        "echo": st.booleans(), "logprobs": st.integers(0, 20)})
messages = object_of(base | {"messages": dialogues(True), "max_tokens": few | st.just(60)}, {
    "system": texts, "temperature": st.floats(0, 1), "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 9), "stop_sequences": st.lists(any_of("e", *MARKS), max_size=3),
    "thinking": st.just({"type": "enabled", "budget_tokens": 5}), "metadata": anything,
    "tools": st.lists(object_of({"name": names, "input_schema": parameters}, {"description": texts}), max_size=3,
                      unique_by=lambda tool: tool["name"]),
    "tool_choice": any_of({"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "none"},
                          {"type": "tool", "name": "f"}),
    "output_config": (schemas | objects).map(lambda schema: {"format": {"type": "json_schema", "schema": schema}})})

# --- and as they should not be ----------------------------------------------------------------------------------------

odd = st.one_of(
    anything, schemas, any_of("tool", "assistant", "robot", "required", {"type": "text"}, {"type": "tool_use"}, 3),
    any_of([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], [{"type": "input_audio"}],
           [{"type": "image", "source": {"type": "base64"}}], [{"type": "document"}], [{}]))
DEEP = "nesting"
deep = st.tuples(any_of((b"[", b"]"), (b'{"a":', b"}")), any_of(60, 64, 70, 10_000)).map(
    lambda drawn: drawn[0][0] * drawn[1] + b"1" + drawn[0][1] * drawn[1])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Everything inside a value, as what holds it and under which name."""
    found, work = [], [value]
    while work:
        holder = work.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        work += [holder[key] for key in keys]
    return found


@st.composite
def bodies(draw: Any, right: st.SearchStrategy[Any]) -> bytes:
    """A right request in which up to three things are odd, absent or there twice, as some JSON library writes it."""
    request = {"a": copy.deepcopy(draw(right))}
    for _ in range(draw(any_of(0, 0, 1, 1, 2, 3))):
        found = places(request)
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(any_of("odd", "odd", "odd", "odd", "absent", "twice", "unexpected", "deep"))
        if how == "absent" and holder is not request:
            del holder[key]
        elif how == "twice" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == "deep":
            holder[key] = DEEP
        elif how == "unexpected" and isinstance(holder, dict):
            holder[draw(texts)] = copy.deepcopy(draw(odd))
        else:  # a copy: what is drawn may be one of the values above, and the next change would go into that
            holder[key] = copy.deepcopy(draw(odd))
    text = json.dumps(request["a"], ensure_ascii=draw(any_of(True, True, True, False)))
    # What nests so deep is put in as text: no library writes it.
    return text.encode("utf-8", "surrogatepass").replace(json.dumps(DEEP).encode(), draw(deep))


# --- the answers ------------------------------------------------------------------------------------------------------


class House:
    """The application and its engine on an event loop of their own, without a socket between."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """One application for each chat style."""
        engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids, cache_tokens=4 * CONTEXT, max_running=8)
        self.service = Service(engine, queue_limit=64)
        self.runner = asyncio.Runner()
        self.doors: dict[str, httpx.AsyncClient] = {}
        for style in STYLES:
            app = create_app(self.service, tokenizer, vocab_size=model.config.vocab_size, context_length=CONTEXT,
                             settings=Settings(model_names=("moon",), style=style), access_log=None)
            # An exception that leaves the application is no answer: it fails the test.
            self.doors[style] = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
        self.service.start()

    def close(self) -> None:
        for http in self.doors.values():
            self.runner.run(http.aclose())
        self.runner.run(self.service.stop(0))
        self.runner.close()

    def ask(self, path: str, body: bytes | None = None, style: str = "kimi-k2.5") -> httpx.Response:
        """The answer, which comes in time and leaves nothing behind."""

        async def answered() -> httpx.Response:
            async with asyncio.timeout(PATIENCE):
                http = self.doors[style]
                response = await (http.get(path) if body is None else http.post(path, content=body))
                numbers = self.service.statistics
                while numbers.running or numbers.waiting or numbers.blocks_used or self.service.open_requests:
                    await asyncio.sleep(0.001)
                    numbers = self.service.statistics
                return response

        return self.runner.run(answered())


@pytest.fixture(scope="module")
def house(model: Any, tokenizer: Any) -> Iterator[House]:
    opened = House(model, tokenizer)
    yield opened
    opened.close()


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def read(text: str) -> Any:
    return json.loads(text, parse_constant=no_constant)


TYPES = {
    "/v1/chat/completions": (openai.types.chat.ChatCompletion, openai.types.chat.ChatCompletionChunk),
    "/v1/completions": (openai.types.Completion, openai.types.Completion),
    "/v1/messages": (anthropic.types.Message, None),
    "/v1/messages/count_tokens": (anthropic.types.MessageTokensCount, None),
}


def without_nulls(said: dict[str, Any]) -> dict[str, Any]:
    """Plain completions have nulls, as OpenAI's own have, of which its client's types know nothing: the finish reason
    until the end of a stream, and the log-probability of an echo's first token."""
    for choice in said["choices"] if said.get("object") == "text_completion" else ():
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        measured = choice["logprobs"]
        if measured and measured["token_logprobs"][:1] == [None]:
            assert measured["top_logprobs"].pop(0) is None and measured["token_logprobs"].pop(0) is None
    return said


def check(path: str, response: httpx.Response) -> None:
    """2xx or 4xx, in the right shape."""
    assert 200 <= response.status_code < 300 or 400 <= response.status_code < 500, response.text
    if response.status_code >= 400:
        told(response)
        return
    whole, chunk = TYPES[path]
    if response.headers["content-type"] == "application/json":
        whole.model_validate(without_nulls(read(response.text)))
        return
    assert response.headers["content-type"].startswith("text/event-stream")
    for event in response.text.split("\n\n"):
        data = event.rpartition("data: ")[2]
        if not data or data == "[DONE]" or event.startswith(":"):
            continue
        said = read(data)
        assert "error" not in said, "a failure that came too late for a status"
        if chunk is not None:
            chunk.model_validate(without_nulls(said))
    assert response.text.endswith("data: [DONE]\n\n" if chunk else 'data: {"type":"message_stop"}\n\n')


usual = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                                                          HealthCheck.function_scoped_fixture])


@usual
@given(body=bodies(chat), style=any_of(*STYLES))
@example(body=b'{"model": "moon", "messages": [{"role": "tool", "tool_call_id": "a", "content": ""}]}', style="kimi-k2")
def test_chat(house: House, body: bytes, style: str) -> None:
    check("/v1/chat/completions", house.ask("/v1/chat/completions", body, style))


@usual
@given(body=bodies(completion))
def test_completions(house: House, body: bytes) -> None:
    check("/v1/completions", house.ask("/v1/completions", body))


@usual
@given(body=bodies(messages), style=any_of(*STYLES))
def test_messages(house: House, body: bytes, style: str) -> None:
    answer, count = (house.ask(path, body, style) for path in ("/v1/messages", "/v1/messages/count_tokens"))
    check("/v1/messages", answer)
    check("/v1/messages/count_tokens", count)
    if answer.status_code == 200 and answer.headers["content-type"] == "application/json":
        usage = answer.json()["usage"]
        counted = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
        assert count.json()["input_tokens"] == counted, "what counting promises is what is charged"


@usual
@given(body=bodies(anything) | st.binary(max_size=200) | deep)
def test_anything_at_all(house: House, body: bytes) -> None:
    for path in TYPES:
        check(path, house.ask(path, body))


@usual
@given(name=texts, base=st.sampled_from(["/v1/models/", "/anthropic/v1/models/", "/v1/", "/"]))
def test_paths(house: House, name: str, base: str) -> None:
    quoted = urllib.parse.quote(name.encode("utf-8", "surrogatepass"), safe="/")
    response = house.ask(base + quoted)
    assert response.status_code < 500
    if response.status_code >= 400:
        told(response)
