"""The whole way: official clients, a real socket, the real engine with a small random model, real constraints.

A model of random weights says anything that it may: what comes out well formed is so because it cannot be otherwise.
"""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import anthropic
import jsonschema
import openai
import pydantic
import pytest
import torch

from moonbase.chat import encode, render_parts
from moonbase.engine import Engine, Sampling
from moonbase.engine.service import Service
from moonbase.model import Transformer
from tests.serve.conftest import CONTEXT
from tests.serve.service_double import PATIENCE, Running, by_hand, serving, until

USER = [{"role": "user", "content": "How warm is it in Paris, and in Berlin?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
                   "unit": {"type": "string", "enum": ["celsius", "kelvin"]}, "exact": {"type": "boolean"}},
    "required": ["city", "unit"],
}  # fmt: skip
OTHER = {"type": "object", "properties": {"expression": {"enum": ["1+1", "2*3"]}}, "required": ["expression"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}},
         {"type": "function", "function": {"name": "calculate", "parameters": OTHER}}]
SCHEMAS = {"weather": SCHEMA, "calculate": OTHER}


@pytest.fixture(scope="module")
def gpt(real: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(real: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real.url, api_key="unused", max_retries=0) as client:
        yield client


def check_call(name: str, arguments: Any) -> None:
    jsonschema.validate(json.loads(arguments) if isinstance(arguments, str) else arguments, SCHEMAS[name])


def test_greedy_text_is_the_engines_own(model: Transformer, gpt: openai.OpenAI, claude: anthropic.Anthropic,
                                        tokenizer: Any) -> None:
    """The surfaces add nothing and lose nothing: the same tokens as a direct call of another engine."""
    instant = encode(tokenizer, render_parts(USER, None, "kimi-k2.5", thinking=False))
    special = {id: -100.0 for id in tokenizer.special_tokens.values() if id not in tokenizer.eos_ids}
    unused = {id: -100.0 for id in range(tokenizer.vocab_size, model.config.vocab_size)}
    sampling = Sampling(max_tokens=24, logit_bias=special | unused)
    (expected,) = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids).complete([instant], sampling)
    text = tokenizer.decode(expected.ids)
    options = {"model": "moon", "messages": USER, "max_tokens": 24, "temperature": 0}
    body = {"thinking": {"type": "disabled"}}
    whole = gpt.chat.completions.create(**options, extra_body=body)
    assert whole.choices[0].message.content == text
    assert whole.usage.prompt_tokens == len(instant) and whole.usage.completion_tokens == len(expected.ids)
    stream = gpt.chat.completions.create(**options, extra_body=body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    said = claude.messages.create(model="moon", messages=USER, max_tokens=24, extra_body={"temperature": 0})
    assert said.content[0].text == text and said.usage.output_tokens == len(expected.ids)
    assert said.usage.cache_read_input_tokens + said.usage.input_tokens == len(instant)
    assert said.usage.cache_read_input_tokens > 0, "the same prompt came before"
    plain = gpt.completions.create(model="moon", prompt=instant, max_tokens=24, temperature=0,
                                   logit_bias={str(id): bias for id, bias in (special | unused).items()})
    assert plain.choices[0].text == text


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_valid_whatever_the_model(gpt: openai.OpenAI, stream: bool) -> None:
    from tests.serve.test_openai import joined

    for seed, choice in enumerate(["required", "required", {"type": "function", "function": {"name": "calculate"}}]):
        reply = gpt.chat.completions.create(
            model="moon", messages=USER, tools=TOOLS, tool_choice=choice, seed=seed, n=2, temperature=1.0,
            max_tokens=120, stream=stream, extra_body={"thinking": {"type": "disabled"}})
        if stream:
            choices = [(got["finish"], list(got["calls"].values())) for got in joined(reply).values()]
        else:
            choices = [(one.finish_reason, [{"id": call.id, "name": call.function.name,
                                             "arguments": call.function.arguments} for call in one.message.tool_calls])
                       for one in reply.choices]
        assert len(choices) == 2
        for finish, calls in choices:
            assert finish == "tool_calls" and calls
            for number, call in enumerate(calls):
                assert call["id"] == f"functions.{call['name']}:{number}"
                check_call(call["name"], call["arguments"])
            assert isinstance(choice, str) or {call["name"] for call in calls} == {"calculate"}


def test_one_call_where_no_more_are_wanted_and_the_round_trip(gpt: openai.OpenAI) -> None:
    options = {"model": "moon", "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
               "max_tokens": 200, "seed": 3, "extra_body": {"thinking": {"type": "disabled"}}}
    first = gpt.chat.completions.create(messages=USER, **options).choices[0].message
    (call,) = first.tool_calls
    assert call.id.endswith(":0")
    history = [*USER, first.model_dump(exclude_none=True),
               {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}, *USER]
    (second,) = gpt.chat.completions.create(messages=history, **options).choices[0].message.tool_calls
    assert second.id.endswith(":1")


def test_tools_through_the_anthropic_client(claude: anthropic.Anthropic) -> None:
    tools = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    options = {"model": "moon", "tools": tools, "tool_choice": {"type": "any"}, "max_tokens": 120}
    first = claude.messages.create(messages=USER, **options)
    assert first.stop_reason == "tool_use"
    blocks = [block for block in first.content if block.type == "tool_use"]
    for block in blocks:
        check_call(block.name, block.input)
    said = [block.model_dump(exclude_none=True) for block in first.content]
    history = [*USER, {"role": "assistant", "content": said},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "21"}
                                            for block in blocks]}]
    with claude.messages.stream(messages=history, **options) as stream:
        second = stream.get_final_message()
    for number, block in enumerate(block for block in second.content if block.type == "tool_use"):
        check_call(block.name, block.input)
        assert block.id == f"functions.{block.name}:{len(blocks) + number}"


@pytest.mark.parametrize("form", [{"type": "json_object"},
                                  {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}])
def test_answers_that_are_json(gpt: openai.OpenAI, form: dict[str, Any]) -> None:
    for seed, thinking in enumerate(("disabled", "disabled", "enabled")):
        choice = gpt.chat.completions.create(
            model="moon", messages=USER, response_format=form, seed=seed, max_tokens=80,
            extra_body={"thinking": {"type": thinking}}).choices[0]
        # A model of random weights seldom stops by itself; the limit ends the value, and does not break it.
        assert choice.finish_reason in ("stop", "length")
        jsonschema.validate(json.loads(choice.message.content), SCHEMA if "json_schema" in form else {"type": "object"})


def test_json_or_calls_where_the_model_may_choose(gpt: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(6):
        choice = gpt.chat.completions.create(
            model="moon", messages=USER, tools=TOOLS, response_format=form, seed=seed, max_tokens=120,
            extra_body={"thinking": {"type": "disabled"}}).choices[0]
        if choice.message.tool_calls:
            for call in choice.message.tool_calls:
                check_call(call.function.name, call.function.arguments)
            assert not choice.message.content
        else:
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)


class Weather(pydantic.BaseModel):
    """What the clients' own helpers make a schema of."""

    class Place(pydantic.BaseModel):
        city: Literal["Paris", "Berlin"]
        exact: bool | None

    places: Annotated[list[Place], pydantic.Field(max_length=2)]
    degrees: Annotated[int, pydantic.Field(ge=0, le=99)]


def test_the_clients_own_helpers_get_what_they_ask_for(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    options = {"model": "moon", "messages": USER, "max_tokens": 150}
    instant = {"thinking": {"type": "disabled"}}
    parsed = gpt.chat.completions.parse(**options, response_format=Weather, extra_body=instant)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    tools = [openai.pydantic_function_tool(Weather, name="report")]
    # One call: a random model would go on calling until its tokens are spent, which this client takes for an error.
    (call,) = gpt.chat.completions.parse(
        **options, tools=tools, tool_choice="required", parallel_tool_calls=False,
        extra_body=instant).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with gpt.chat.completions.stream(**options, response_format=Weather, extra_body=instant) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)
    # This client turns bounds of numbers and lists into words, so it gets a model without.
    place = claude.messages.parse(**options, output_format=Weather.Place).parsed_output
    assert isinstance(place, Weather.Place)


def test_stop_strings_and_logprobs(model: Transformer, gpt: openai.OpenAI, tokenizer: Any) -> None:
    ordinary = range(min(tokenizer.special_tokens.values()))
    options = {"model": "moon", "prompt": "the weather", "max_tokens": 40, "temperature": 0, "logit_bias": {
        str(id): -100 for id in range(model.config.vocab_size) if id not in ordinary}}
    text = gpt.completions.create(**options).choices[0].text
    stop = text[8:11]
    cut = gpt.completions.create(**options, stop=stop).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    scored = gpt.completions.create(**options, logprobs=3).choices[0]
    assert scored.text == text and len(scored.logprobs.tokens) == len(scored.logprobs.token_logprobs)
    for value, top in zip(scored.logprobs.token_logprobs, scored.logprobs.top_logprobs, strict=True):
        # Greedy, but for the tokens that were ruled out; the chosen one is always among the named.
        assert value <= max(top.values()) + 1e-6 and value in top.values() and len(top) in (3, 4)


def test_the_likelihood_of_a_text_is_the_models(model: Transformer, gpt: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer.encode("the weather in Paris and Berlin")
    with torch.inference_mode():
        every = torch.log_softmax(model(torch.tensor([ids]))[0, :-1], -1)
    expected = every.gather(1, torch.tensor(ids[1:])[:, None])
    for limit in (0, 1):
        said = gpt.completions.create(model="moon", prompt=ids, echo=True, logprobs=1, max_tokens=limit, temperature=0)
        first, *found = said.choices[0].logprobs.token_logprobs[: len(ids)]
        assert first is None and found == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
        nothing, *tops = said.choices[0].logprobs.top_logprobs[: len(ids)]
        assert nothing is None
        assert [max(top.values()) for top in tops] == pytest.approx(every.amax(-1).tolist(), abs=1e-4)
        assert all(value in top.values() and len(top) in (1, 2) for value, top in zip(found, tops, strict=True))
        assert said.choices[0].text.startswith("the weather in Paris and Berlin")


def test_many_at_once_say_what_each_alone_says(real: Running, gpt: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        messages = [{"role": "user", "content": f"Question {number}: " + "the moon base " * number}]
        options = {"model": "moon", "messages": messages, "max_tokens": 12, "temperature": 1.0, "seed": number}
        if number % 2:
            return gpt.chat.completions.create(**options).choices[0].message.model_dump_json()
        message: dict[str, str] = {}
        for chunk in gpt.chat.completions.create(**options, stream=True):
            for name, value in chunk.choices[0].delta.model_dump(exclude_none=True).items():
                message[name] = message.get(name, "") + value
        return json.dumps(message)

    alone = [ask(number) for number in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == alone
    until(lambda: real.service.open_requests == 0)


LONG = {"type": "array", "items": {"enum": [0]}, "minItems": 300}
"""What has no short answer: at least 600 tokens, whatever the model would rather say."""
LONG_CHAT = {"model": "moon", "messages": USER, "max_tokens": 800, "extra_body": {"thinking": {"type": "disabled"}},
             "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LONG}}}
LONG_MESSAGE = {"model": "moon", "messages": USER, "max_tokens": 800,
                "extra_body": {"output_config": {"format": {"type": "json_schema", "schema": LONG}}}}
PATIENCES = (0.8, 4.0, 15.0)
"""Seconds until a client gives up: the first for which the request is at work by then. With the engine that `slow`
makes, these requests take at least a minute."""


def leave_openai(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    stream = gpt.chat.completions.create(**LONG_CHAT, stream=True)
    next(iter(stream))
    stream.close()


def leave_anthropic(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    stream = claude.messages.create(**LONG_MESSAGE, stream=True)
    assert any(event.type == "content_block_delta" for event in stream)
    stream.close()


def leave_the_anthropic_helper(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(**LONG_MESSAGE) as stream:
        assert next(iter(stream.text_stream))


def lose_patience_openai(gpt: openai.OpenAI, claude: anthropic.Anthropic, seconds: float) -> None:
    with pytest.raises(openai.APITimeoutError):
        gpt.chat.completions.create(**LONG_CHAT, timeout=openai.Timeout(PATIENCE, read=seconds))


def lose_patience_anthropic(gpt: openai.OpenAI, claude: anthropic.Anthropic, seconds: float) -> None:
    with pytest.raises(anthropic.APITimeoutError):
        claude.messages.create(**LONG_MESSAGE, timeout=anthropic.Timeout(PATIENCE, read=seconds))


def slowed(engine: Engine) -> None:
    step = engine.step

    def slowly() -> None:
        time.sleep(0.1)
        step()

    engine.step = slowly


@pytest.fixture
def slow(real: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of a larger model: the request is at work when patience ends, and far from done, on any machine."""
    until(lambda: real.service.statistics.running == 0)
    monkeypatch.setattr(real.service.engine, "step", real.service.engine.step)  # and back at the end
    slowed(real.service.engine)


def everything_is_free(real: Running) -> bool:
    numbers = real.service.statistics
    return numbers.running == 0 and numbers.blocks_used == 0 and real.service.open_requests == 0


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("leave", [leave_openai, leave_anthropic, leave_the_anthropic_helper])
def test_leaving_frees_the_blocks(
    real: Running, gpt: openai.OpenAI, claude: anthropic.Anthropic, leave: Callable[..., None]
) -> None:
    before = real.service.statistics.finished["cancelled"]
    leave(gpt, claude)
    until(lambda: real.service.statistics.finished["cancelled"] == before + 1)
    until(lambda: everything_is_free(real))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("lose_patience", [lose_patience_openai, lose_patience_anthropic])
def test_losing_patience_frees_the_blocks(
    real: Running, gpt: openai.OpenAI, claude: anthropic.Anthropic, lose_patience: Callable[..., None]
) -> None:
    before = real.service.statistics.finished["cancelled"]
    for seconds in PATIENCES:
        lines = len(real.log)
        lose_patience(gpt, claude, seconds)
        until(lambda lines=lines: len(real.log) == lines + 1)
        until(lambda: everything_is_free(real))
        # Where the machine stood still, the client may have gone before its request was at work.
        if real.service.statistics.finished["cancelled"] > before:
            break
    assert real.service.statistics.finished["cancelled"] == before + 1


@pytest.mark.usefixtures("slow")
def test_leaving_ends_the_measuring_of_prompts(real: Running) -> None:
    """One prompt is measured after the other: those whose turn has not come are not begun."""
    prompts = [[5 + number] * 900 for number in range(64)]
    before = real.service.statistics.prompt_tokens
    request = {"model": "moon", "prompt": prompts, "echo": True, "logprobs": 0, "max_tokens": 0}
    with by_hand(real, "/v1/completions", request):
        until(lambda: real.service.statistics.prompt_tokens > before)
    until(lambda: everything_is_free(real))
    assert real.service.statistics.prompt_tokens - before < sum(map(len, prompts))


def test_the_servers_time_limit_frees_the_blocks(model: Transformer, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids, cache_tokens=2 * CONTEXT, max_running=2)
    slowed(engine)
    with serving(Service(engine), tokenizer, style="kimi-k2.5", context_length=CONTEXT,
                 vocab_size=model.config.vocab_size, request_timeout=0.5) as running:
        gpt = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        claude = anthropic.Anthropic(base_url=running.url, api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="time limit") as late:
            gpt.chat.completions.create(**LONG_CHAT)
        assert late.value.status_code == 504 and late.value.code == "deadline"
        with pytest.raises(anthropic.APIStatusError, match="time limit") as late:
            claude.messages.create(**LONG_MESSAGE)
        assert late.value.status_code == 504 and late.value.type == "timeout_error"
        with pytest.raises(openai.APIError, match="time limit"):
            list(gpt.chat.completions.create(**LONG_CHAT, stream=True))
        with pytest.raises(anthropic.APIStatusError, match="time limit"):
            list(claude.messages.create(**LONG_MESSAGE, stream=True))
        until(lambda: len(running.log) == 4 and everything_is_free(running))
        # Where the machine stood still, time may have been up before the engine was asked.
        finished = running.service.statistics.finished
        assert 0 < finished["cancelled"] == sum(finished.values()) <= 4


def test_metrics_of_the_engine(real: Running) -> None:
    from tests.serve.test_metrics import samples

    found, numbers = samples(real.url), real.service.statistics
    assert found["moonbase_generated_tokens_total"] == numbers.generated_tokens > 100
    assert found["moonbase_prefix_cache_hit_ratio"] == pytest.approx(numbers.cached_tokens / numbers.prompt_tokens)
    assert found["moonbase_cache_blocks"] == numbers.blocks_total and found["moonbase_queue_requests"] == 0


def test_a_full_queue(model: Transformer, tokenizer: Any) -> None:
    engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids, cache_tokens=2 * CONTEXT, max_running=1)
    quick = engine.step
    slowed(engine)  # what streams goes on until it is left
    with serving(Service(engine, queue_limit=1), tokenizer, context_length=CONTEXT,
                 vocab_size=model.config.vocab_size) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=r"asks for 3 sequences .* holds 2 at a time"):
            client.chat.completions.create(model="moon", messages=USER, n=3, max_tokens=100)
        with client.completions.create(model="moon", prompt="a", max_tokens=900, stream=True,
                                       extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="moon", messages=USER, n=2, max_tokens=100)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        until(lambda: running.service.open_requests == 0)
        engine.step = quick
        assert client.chat.completions.create(model="moon", messages=USER, n=2, max_tokens=3).choices
