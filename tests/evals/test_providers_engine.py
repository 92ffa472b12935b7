"""`moonbase/MODEL` under Inspect, compared with the engine driven by hand, with jsonschema, and with `sha256sum`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from inspect_ai import Task, eval
from inspect_ai.agent import react
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    GenerateConfig,
    Model,
    ModelOutput,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, ToolFunction, ToolInfo, tool
from inspect_ai.util import json_schema

import moonbase
from moonbase.chat import encode, parse, render_parts
from moonbase.chat.prompt import prompt_of
from moonbase.data import load_tokenizer
from moonbase.engine import Engine, Sampling
from moonbase.engine.turn import turn_constraint
from moonbase.errors import UserError
from moonbase.evals.providers import engines, weights
from moonbase.evals.providers.engine_api import EngineAPI
from moonbase.evals.records import ModelCall
from tests.agents import tiny_chat

USER = [{"role": "user", "content": "How warm is it in Paris, and in Berlin?"}]
GREEDY = GenerateConfig(temperature=0, max_tokens=24)
NO_END = dict.fromkeys((tiny_chat.tokenizer().im_end_id, *tiny_chat.tokenizer().eos_ids), -100.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> Engine:
    """An engine of the same weights that nothing of the provider has touched."""
    tokenizer = load_tokenizer(folder)
    return Engine(moonbase.load(folder), tokenizer, stop_ids=tokenizer.eos_ids, cache_tokens=65536)


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    asyncio.run(engines.close_engines())


def model_of(folder: Path, **arguments: Any) -> Model:
    return get_model(f"moonbase/{folder}", memoize=False, **{"style": "kimi-k2", **arguments})


def ask(model: Model, config: GenerateConfig = GREEDY, text: str = USER[0]["content"], **more: Any) -> ModelOutput:
    return asyncio.run(model.generate(text, config=config, **more))


def prompt_ids(engine: Engine, style: str = "kimi-k2") -> list[int]:
    return encode(engine.tokenizer, render_parts(USER, None, style))


def reply_ids(engine: Engine, sampling: Sampling, style: str = "kimi-k2") -> list[int]:
    """What the engine says by itself. Random weights say markers of all kinds; a chat has room for few of them."""
    prompt = prompt_of(engine.tokenizer, USER, [], style)
    assert prompt.ids == prompt_ids(engine, style)
    constraint = turn_constraint(engine.tokenizer, engine.model.config.vocab_size, prompt, [], choice="none")
    return engine.complete([prompt.ids], sampling, constraint)[0].ids


@tool
def weather() -> Tool:
    async def execute(city: str, days: int) -> str:
        """The weather.

        Args:
            city: Where.
            days: For how long.
        """
        return f"sunny for {days} days"

    return execute


def tool_info() -> ToolInfo:
    from inspect_ai.tool import ToolDef

    definition = ToolDef(weather())
    return ToolInfo(name=definition.name, description=definition.description, parameters=definition.parameters)


# --- one call ---------------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_engine_s(folder: Path, by_hand: Engine) -> None:
    ids = prompt_ids(by_hand)
    reply = reply_ids(by_hand, Sampling(max_tokens=24, temperature=0))
    output = ask(model_of(folder))
    assert output.completion == parse(by_hand.tokenizer.decode(reply), "kimi-k2").content
    assert (output.usage.input_tokens, output.usage.output_tokens) == (len(ids), len(reply))
    assert output.usage.total_tokens == len(ids) + len(reply)


def test_log_probabilities_are_the_engine_s_scores(folder: Path, by_hand: Engine) -> None:
    output = ask(model_of(folder), GenerateConfig(temperature=1, seed=5, max_tokens=16, logprobs=True, top_logprobs=3))
    entries = output.choices[0].logprobs.content
    ids = prompt_ids(by_hand)
    reply = reply_ids(by_hand, Sampling(max_tokens=16, temperature=1.0, seed=5))
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"".join(map(by_hand.tokenizer.token_bytes, reply))
    scores = by_hand.score([*ids, *reply], top=3)
    assert len(entries) == len(reply) == output.usage.output_tokens
    assert [entry.logprob for entry in entries] == pytest.approx(scores.logprobs[-len(reply) :], abs=1e-4)
    for entry, top in zip(entries, scores.top_logprobs[-len(reply) :], strict=True):
        assert [bytes(one.bytes) for one in entry.top_logprobs] == [by_hand.tokenizer.token_bytes(id) for id, _ in top]
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx([value for _, value in top], abs=1e-4)


def test_settings_reach_the_engine(folder: Path, by_hand: Engine) -> None:
    """Each of them changes the text as it changes that of the engine."""
    for settings in ({"temperature": 1.3, "top_p": 0.7}, {"temperature": 1.0, "top_k": 3},
                     {"temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
                     {"temperature": 0.0, "logit_bias": {40: 100.0}}):  # fmt: skip
        expected = reply_ids(by_hand, Sampling(max_tokens=12, seed=3, **settings))
        output = ask(model_of(folder), GenerateConfig(max_tokens=12, seed=3, **settings))
        assert output.completion == parse(by_hand.tokenizer.decode(expected), "kimi-k2").content, settings
        decoding = output.metadata["moonbase"]["decoding"]
        assert all(decoding[name] == value for name, value in settings.items() if name != "logit_bias")


def test_reasoning_stands_apart(folder: Path, by_hand: Engine) -> None:
    reply = by_hand.tokenizer.decode(reply_ids(by_hand, Sampling(max_tokens=24), "kimi-k2.5"))
    expected = parse(reply, "kimi-k2.5", prefix="<think>")
    output = ask(model_of(folder, style="kimi-k2.5"))
    part = output.message.content[0]
    assert isinstance(part, ContentReasoning) and part.reasoning == expected.reasoning_content
    assert output.completion == (expected.content or "") and 0 < output.usage.reasoning_tokens <= 24
    silent = ask(model_of(folder, style="kimi-k2.5"), GREEDY.merge(GenerateConfig(reasoning_effort="none")))
    assert isinstance(silent.message.content, str) and silent.usage.reasoning_tokens == 0
    assert silent.completion == ask(model_of(folder, style="kimi-k2.5", thinking=False)).completion


def test_reasoning_of_earlier_turns_is_shown_on_request(folder: Path) -> None:
    from inspect_ai.model import ChatMessageAssistant, ContentText

    dialogue = [ChatMessageUser(content="Hello."), ChatMessageAssistant(content=[
        ContentReasoning(reasoning="They greet me in a friendly way."), ContentText(text="Hello!")]),
        ChatMessageUser(content="And now?")]
    model = model_of(folder, style="kimi-k2.5")
    counts = [asyncio.run(model.generate(dialogue, config=GREEDY.merge(GenerateConfig(reasoning_history=history))))
              .usage.input_tokens for history in ("none", "last", "all")]  # fmt: skip
    assert counts[0] <= counts[1] < counts[2]


def test_why_it_stopped(folder: Path) -> None:
    model = model_of(folder)
    assert ask(model).stop_reason == "max_tokens"
    text = ask(model).completion
    letter = next(letter for letter in text[1:] if letter.isalpha() and letter not in text[0])
    cut = ask(model, GREEDY.merge(GenerateConfig(stop_seqs=[letter])))
    assert cut.stop_reason == "stop" and cut.completion == text[: text.index(letter)]
    long = ask(model, text="moon " * (2 * tiny_chat.CONTEXT))
    assert long.stop_reason == "model_length" and str(tiny_chat.CONTEXT) in long.error and long.completion == ""
    assert ModelCall.model_validate(long.metadata["moonbase"]).weights_digest == sha256sum(folder)
    endless = GREEDY.merge(GenerateConfig(max_tokens=100_000, logit_bias=NO_END))
    full = ask(model, endless, text="m" * (tiny_chat.CONTEXT - 200))
    assert full.stop_reason == "model_length" and full.usage.total_tokens == tiny_chat.CONTEXT


def test_a_seed_draws_the_same_again(folder: Path) -> None:
    model = model_of(folder)
    config = GenerateConfig(temperature=1, max_tokens=16)
    free = [ask(model, config) for _ in range(2)]
    assert free[0].completion != free[1].completion
    # The seed that was drawn is told, and draws the same.
    seed = free[0].metadata["moonbase"]["decoding"]["seed"]
    assert ask(model, config.merge(GenerateConfig(seed=seed))).completion == free[0].completion
    several = [ask(model, config.merge(GenerateConfig(seed=9, num_choices=3))) for _ in range(2)]
    texts = [[choice.message.text for choice in output.choices] for output in several]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3


def test_what_the_engine_cannot_read_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,iVBORw0KGgo=")])
    with pytest.raises(UserError, match=r"message 0 .user. holds content of type 'image'"):
        asyncio.run(EngineAPI(str(folder)).generate([picture], [], "auto", GREEDY))
    for arguments, said in (({"name": tmp_path / "absent"}, "no such folder"), ({"colour": 1}, "argument 'colour'"),
                            ({"thinking": "perhaps"}, "must be true or false"), ({"style": "kimi"}, "chat style")):
        with pytest.raises(UserError, match=said):
            EngineAPI(str(arguments.pop("name", folder)), **arguments)


# --- tools and schemas ------------------------------------------------------------------------------------------------


def test_tool_calls_are_valid_by_construction(folder: Path) -> None:
    """The weights are random: nothing but the constraint can make these calls fit."""
    schema = tool_info().parameters.model_dump(exclude_none=True)
    model = model_of(folder)
    for seed in range(4):
        config = GenerateConfig(temperature=1, seed=seed, max_tokens=80, parallel_tool_calls=False)
        output = ask(model, config, tools=[weather()], tool_choice="any")
        (call,) = output.message.tool_calls
        assert call.function == "weather" and call.parse_error is None
        assert output.stop_reason in ("tool_calls", "max_tokens")
        jsonschema.validate(call.arguments, schema)
    named = ask(model, config, tools=[weather()], tool_choice=ToolFunction("weather"))
    assert named.message.tool_calls
    assert not ask(model, config, tools=[weather()], tool_choice="none").message.tool_calls


def test_a_schema_holds_by_construction(folder: Path) -> None:
    from pydantic import BaseModel

    class Verdict(BaseModel):
        refused: bool
        confidence: int

    schema = ResponseSchema(name="verdict", json_schema=json_schema(Verdict))
    for seed in range(3):
        output = ask(model_of(folder), GenerateConfig(temperature=1, seed=seed, max_tokens=60, response_schema=schema))
        Verdict.model_validate(json.loads(output.completion))
    with pytest.raises(Exception, match="too few"):
        ask(model_of(folder), GenerateConfig(max_tokens=2, response_schema=schema))


def run(task: Task, model: Model | str, logs: Path, **more: Any) -> Any:
    log = eval(task, model=model, log_dir=str(logs), display="none", **more)[0]
    assert log.status == "success", log.error
    return read_eval_log(log.location)


def test_a_round_trip_of_tools_through_inspect(folder: Path, tmp_path: Path) -> None:
    """Inspect's own loop executes the calls, and the next prompt is what the renderer makes of the dialogue."""
    task = Task(dataset=[Sample(input=USER[0]["content"], target="x")], scorer=includes(), message_limit=7,
                solver=[use_tools(weather(), tool_choice="any"), generate(tool_calls="loop")])
    config = {"temperature": 1.0, "seed": 2, "max_tokens": 80, "parallel_tool_calls": False}
    sample = run(task, model_of(folder), tmp_path, **config).samples[0]
    calls = [call for message in sample.messages if message.role == "assistant" for call in message.tool_calls or ()]
    results = [message for message in sample.messages if message.role == "tool"]
    assert calls and len(calls) == len(results)
    assert [call.id for call in calls] == [result.tool_call_id for result in results]
    assert [result.text for result in results] == [f"sunny for {call.arguments['days']} days" for call in calls]
    # The second prompt, rendered by hand from what the log tells of the dialogue.
    second = [event for event in sample.events if event.event == "model"][1]
    assert [message.role for message in second.input] == ["user", "assistant", "tool"]
    said, call = second.input[1], calls[0]
    dialogue = [*USER, {"role": "assistant", "content": said.text, "tool_calls": [{
        "id": call.id, "type": "function", "function": {
            "name": "weather", "arguments": json.dumps(call.arguments, ensure_ascii=False)}}]},
        {"role": "tool", "tool_call_id": call.id, "content": results[0].text}]
    tools = [{"type": "function", "function": tool_info().model_dump(exclude_none=True, exclude={"options"})}]
    expected = encode(load_tokenizer(folder), render_parts(dialogue, tools, "kimi-k2"))
    assert second.output.usage.input_tokens == len(expected)


def test_the_react_agent_of_inspect_runs_on_it(folder: Path, tmp_path: Path) -> None:
    task = Task(dataset=[Sample(input="Go.", target="x")], solver=react(tools=[weather()]), scorer=includes(),
                message_limit=8)
    sample = run(task, model_of(folder), tmp_path, temperature=1.0, seed=1, max_tokens=60).samples[0]
    assert sum(event.event == "model" for event in sample.events) >= 2
    for event in sample.events:
        if event.event == "model":
            ModelCall.model_validate(event.output.metadata["moonbase"])


def test_system_messages_and_tool_errors_are_rendered(folder: Path) -> None:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageTool
    from inspect_ai.tool import ToolCall, ToolCallError

    from moonbase.evals.providers.messages import to_messages

    call = ToolCall(id="call_1", function="weather", arguments={"city": "Ré", "days": 1})
    dialogue = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Hi."),
                ChatMessageAssistant(content="", tool_calls=[call]),
                ChatMessageTool(content="", tool_call_id="call_1", error=ToolCallError("timeout", "too slow"))]
    assert to_messages(dialogue) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": {
            "name": "weather", "arguments": '{"city": "Ré", "days": 1}'}}]},
        {"role": "tool", "content": "Error: too slow", "tool_call_id": "call_1"}]


# --- many calls -------------------------------------------------------------------------------------------------------


def test_calls_at_once_are_one_batch_and_say_what_they_say_alone(folder: Path) -> None:
    model, other = model_of(folder), model_of(folder)
    config = GenerateConfig(temperature=1, max_tokens=30)
    alone = [ask(model, config.merge(GenerateConfig(seed=seed)), f"Question {seed}?") for seed in range(8)]
    service = engines.engine_of(str(folder)).service

    async def together() -> list[ModelOutput]:
        return await asyncio.gather(*((model, other)[seed % 2].generate(
            f"Question {seed}?", config=config.merge(GenerateConfig(seed=seed))) for seed in range(8)))

    before = service.statistics.passes
    outputs = asyncio.run(together())
    assert [output.completion for output in outputs] == [output.completion for output in alone]
    # One by one they take a pass for each token; two instances of one model share the engine.
    assert service.statistics.passes - before < sum(output.usage.output_tokens for output in outputs) / 3


def test_whoever_gives_up_leaves_nothing_running(folder: Path) -> None:
    import time

    model = model_of(folder)
    ask(model)
    service = engines.engine_of(str(folder)).service

    async def give_up() -> None:
        async with asyncio.timeout(0.3):
            await model.generate("Go on.", config=GenerateConfig(temperature=1, max_tokens=3500, logit_bias=NO_END))

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    until = time.monotonic() + 120
    while service.statistics.running and time.monotonic() < until:
        time.sleep(0.02)
    assert service.statistics.running == service.statistics.waiting == service.open_requests == 0


def test_repetitions_of_a_sample_differ_and_the_log_tells_everything(folder: Path, tmp_path: Path) -> None:
    task = Task(dataset=[Sample(input="Hi.", target="x")], solver=generate(), scorer=includes(), epochs=3)
    log = run(task, model_of(folder), tmp_path, seed=4, temperature=1.0, max_tokens=16)
    assert len({sample.output.completion for sample in log.samples}) == 3
    calls = [ModelCall.model_validate(sample.output.metadata["moonbase"]) for sample in log.samples]
    assert {call.provider for call in calls} == {"moonbase"} and {call.precision for call in calls} == {"float32"}
    assert {call.weights_digest for call in calls} == {sha256sum(folder)}
    assert len({call.decoding["seed"] for call in calls}) == 3
    again = run(task, model_of(folder), tmp_path / "again", seed=4, temperature=1.0, max_tokens=16)
    assert [one.output.completion for one in again.samples] == [one.output.completion for one in log.samples]
    for sample, call in zip(log.samples, calls, strict=True):
        drawn = ask(model_of(folder), GenerateConfig(temperature=1, max_tokens=16, seed=call.decoding["seed"]), "Hi.")
        assert drawn.completion == sample.output.completion


# --- weights ----------------------------------------------------------------------------------------------------------


def sha256sum(folder: Path) -> str:
    """As a stranger would compute it."""
    command = "LC_ALL=C sha256sum model*.safetensors | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True).stdout
    return "sha256:" + printed.split()[0]


def test_the_digest_is_what_sha256sum_says_and_notices_one_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "REMEMBERED_BYTES", 0)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    first = weights.digest_of_folder(copy)
    assert first == sha256sum(copy) == sha256sum(folder)
    (note,) = (tmp_path / "cache").rglob("weights/*")
    assert note.read_text().strip() == first and weights.digest_of_folder(copy) == first
    # One bit, and the time put back: what is remembered does not hide it.
    (file,) = weights.weight_files(copy)
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.digest_of_folder(copy) == sha256sum(copy) != first


def test_the_digest_of_several_shards(folder: Path, tmp_path: Path) -> None:
    from moonbase.checkpoint import save_weights

    model = tiny_chat.model()
    save_weights(model, tmp_path / "sharded", model.config, max_shard_bytes=100_000)
    assert len(weights.weight_files(tmp_path / "sharded")) > 1
    assert weights.digest_of_folder(tmp_path / "sharded") == sha256sum(tmp_path / "sharded")


def test_the_digest_of_random_weights() -> None:
    one, other = tiny_chat.model(), tiny_chat.model()
    assert weights.digest_of_model(one) == weights.digest_of_model(other)
    next(other.parameters()).data.view(-1)[7] += 1e-3
    assert weights.digest_of_model(one) != weights.digest_of_model(other)


def test_weights_that_changed_are_another_engine(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    first = engines.engine_of(str(copy))
    assert engines.engine_of(str(copy)) is first
    os.utime(weights.weight_files(copy)[0])
    assert engines.engine_of(str(copy)) is not first


def test_inspect_finds_the_models_and_pays_nothing_for_it() -> None:
    code = ("import sys, moonbase.evals.providers.registry; "
            "assert 'torch' not in sys.modules and 'moonbase.engine' not in sys.modules; "
            "from importlib.metadata import entry_points; "
            "print([e.value for e in entry_points(group='inspect_ai') if e.name == 'moonbase'])")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if "[]" in printed:
        pytest.skip("this installation is older than the entry point: pip install -e . --no-deps")
    assert "moonbase.evals.providers.registry" in printed
