"""Constrained decoding: whatever is sampled, the calls are well formed, their arguments valid, and they end in time."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from moonbase import Engine
from moonbase.chat.parse import Reply, StreamParser, parse
from moonbase.chat.schema import SchemaError
from moonbase.chat.schema_walk import options_of, types_of
from moonbase.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moonbase.engine import vocabulary as vocabulary_module
from moonbase.engine.constraint import Constraint, ToolFactory, json_constraint, tool_constraint
from moonbase.engine.sampling import Sampling
from moonbase.engine.vocabulary import nesting_of, vocabulary_of
from moonbase.errors import UserError
from tests.model.tiny import tiny_model

EXTRA_IDS = 7
"""The model has a few more ids than its tokenizer."""
SAMPLE = 'functions.tool_1:0 {"name": "hello world", "value":[1,2,{"x":-3.5}],"a":"","b":{}},"c":null}]}} the quick '

MEMBERS = {"city": {"type": "string"}, "days": {"type": "integer"}}
WEATHER = {"type": "object", "properties": MEMBERS, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SAMPLE * 20], 600)


def special(tokenizer: Tokenizer, name: str) -> int:
    return tokenizer.special_tokens[name]


def allowed(tokenizer: Tokenizer, constraint: Constraint, remaining: int = 1000) -> set[str]:
    """The texts of the tokens on offer."""
    mask = constraint.mask(remaining)
    assert mask is not None and mask.dtype == bool and not mask[tokenizer.vocab_size :].any()
    return {tokenizer.decode([id]) for id in np.flatnonzero(mask)}


def feed(tokenizer: Tokenizer, constraint: Constraint, text: str, remaining: int = 1000) -> None:
    """Accept a text, each token of which must be on offer."""
    for id in tokenizer.encode_rendered(text):
        mask = constraint.mask(remaining)
        assert mask is not None and mask[id], (text, tokenizer.decode([id]))
        constraint.accept(id)


def play(constraint: Constraint, budget: int, choose: Callable[[np.ndarray], int]) -> list[int]:
    ids: list[int] = []
    while not constraint.done and len(ids) < budget:
        mask = constraint.mask(budget - len(ids))
        assert mask is not None
        offered = np.flatnonzero(mask)
        assert len(offered), "nothing is on offer"
        ids.append(choose(offered))
        constraint.accept(ids[-1])
    return ids


def tool_schemas(shared_data: Path) -> list[dict[str, Any]]:
    """The valid schemas as parameters of a tool: those of objects as they are, others as a member."""
    found = []
    for path in sorted((shared_data / "tool-schemas").glob("*/valid.jsonl")):
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            schema = json.loads(line)
            if any(types_of(option) != ("object",) for option in options_of(schema, schema)):
                root = {name: schema.pop(name) for name in ("$defs", "$id") if name in schema}
                schema = {"type": "object", "properties": {"value": schema}, "required": ["value"], **root}
            found.append(schema)
    return found


def check_reply(reply: Reply, schemas: dict[str, Any], first_index: int) -> None:
    for number, call in enumerate(reply.tool_calls):
        assert call.id == f"functions.{call.name}:{first_index + number}"
        jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
        assert json.dumps(json.loads(call.arguments), ensure_ascii=False).encode()


def random_turns(tokenizer: Tokenizer, schemas: list[dict[str, Any]], turns: int) -> tuple[int, int]:
    """Sampled tool turns, each with two tools: uniform over what is on offer, or from random logits. Every section
    that was begun must end in its budget. Returns the calls, and the turns that the budget cut short."""
    generator = np.random.default_rng(0)
    logits = 3 * generator.normal(size=tokenizer.vocab_size)
    section = special(tokenizer, "<|tool_calls_section_begin|>")
    calls = cut = 0
    for turn in range(turns):
        chosen = {"tool_0": schemas[turn % len(schemas)], "tool_1": schemas[int(generator.integers(len(schemas)))]}
        functions = [{"name": name, "parameters": schema} for name, schema in chosen.items()]
        tools = [{"type": "function", "function": function} for function in functions]
        choice, thinking = ("auto", "required", "tool_1")[turn % 3], turn % 4 == 0
        factory = tool_constraint(
            tokenizer, tokenizer.vocab_size + EXTRA_IDS, tools, choice=choice, parallel=turn % 5 != 0,
            style="kimi-k2.5", first_index=turn % 12, thinking_open=thinking,
        )

        def choose(offered: np.ndarray, uniform: bool = turn % 2 == 0) -> int:
            # In "auto" a random policy would hardly ever begin a section of itself.
            if len(offered) > 100 and section in offered and generator.random() < 0.1:
                return section
            if uniform:
                return int(generator.choice(offered))
            return int(offered[np.argmax(logits[offered] + generator.gumbel(size=len(offered)))])

        constraint = factory()
        least = max(factory.minimum_tokens, factory.section_tokens)
        ids = play(constraint, least + int(generator.integers(4, 80)), choose)
        if section not in ids and choice == "auto":
            continue
        assert constraint.done and ids[-1] in tokenizer.eos_ids, tokenizer.decode(ids)
        reply = parse(tokenizer.decode(ids[:-1]), "kimi-k2.5", prefix="<think>" if thinking else "")
        assert reply.tool_calls and not reply.notes, (reply.notes, tokenizer.decode(ids))
        assert turn % 5 or len(reply.tool_calls) == 1
        assert choice != "tool_1" or {call.name for call in reply.tool_calls} == {"tool_1"}
        check_reply(reply, chosen, turn % 12)
        calls, cut = calls + len(reply.tool_calls), cut + constraint.cut_short
    return calls, cut


def test_a_thousand_random_tool_turns_are_valid(tokenizer: Tokenizer, shared_data: Path) -> None:
    calls, cut = random_turns(tokenizer, tool_schemas(shared_data), 1000)
    assert calls > 800 and 100 < cut < 1000


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "kimi-k25-tokenizer")


def test_random_turns_over_the_published_vocabulary(published: Tokenizer, shared_data: Path) -> None:
    calls, _ = random_turns(published, tool_schemas(shared_data), 40)
    assert calls > 30


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_random_model_calls_tools_through_the_engine(tokenizer: Tokenizer, temperature: float) -> None:
    torch.manual_seed(0)
    model = tiny_model(vocab_size=tokenizer.vocab_size + EXTRA_IDS).eval()
    factory = tool_constraint(
        tokenizer, tokenizer.vocab_size + EXTRA_IDS, TOOLS, choice="required", style="kimi-k2", first_index=3
    )
    engine = Engine(model, tokenizer)
    settings = Sampling(max_tokens=60, temperature=temperature, seed=1)
    for output in engine.complete([[1, 2, 3], [4], [9, 9]], settings, factory):
        # Whole either way; "length" says that the budget ended a string which the model would have gone on with.
        assert output.finish_reason in ("stop", "length")
        reply = parse(tokenizer.decode([id for id in output.ids if id not in tokenizer.eos_ids]), "kimi-k2")
        assert reply.tool_calls and not reply.notes and not reply.content
        check_reply(reply, {"get_weather": WEATHER, "get_time": {"type": "object", "maxProperties": 0}}, 3)


def test_a_thousand_tool_turns_of_a_random_model(tokenizer: Tokenizer, shared_data: Path) -> None:
    """Many at once through the engine, sampled, every schema of the set, streamed text and tokens alike."""
    torch.manual_seed(0)
    size = tokenizer.vocab_size + EXTRA_IDS
    engine = Engine(tiny_model(vocab_size=size, max_position_embeddings=2048).eval(), tokenizer, max_running=64)
    schemas, requests = tool_schemas(shared_data), {}
    for turn in range(1000):
        chosen = {"tool_0": schemas[turn % len(schemas)], "tool_1": schemas[(7 * turn + 3) % len(schemas)]}
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}}
                 for name, schema in chosen.items()]
        factory = tool_constraint(tokenizer, size, tools, choice="required", style="kimi-k2", first_index=turn)
        settings = Sampling(max_tokens=factory.minimum_tokens + 10 + turn % 40, temperature=1.0, seed=turn)
        request = engine.request([turn % size, 5], settings, factory, text=True)
        requests[id(request)] = (request, chosen, turn, StreamParser("kimi-k2"))
        engine.submit(request)
    while engine.busy:
        engine.step()
        for request, piece in engine.fetch():
            requests[id(request)][3].push(piece.text, special=piece.special)
    for request, chosen, turn, parser in requests.values():
        parser.finish()
        whole = parse(tokenizer.decode(request.output_ids), "kimi-k2")
        assert parser.reply == whole and whole.tool_calls and not whole.notes and not whole.content
        check_reply(whole, chosen, turn)
    assert engine.statistics.blocks_used == 0


def make(tokenizer: Tokenizer, **options: Any) -> ToolFactory:
    return tool_constraint(tokenizer, tokenizer.vocab_size + EXTRA_IDS, TOOLS, **{"style": "kimi-k2", **options})


def test_a_call_step_by_step(tokenizer: Tokenizer) -> None:
    constraint = make(tokenizer, first_index=4)()
    feed(tokenizer, constraint, "I look. <|tool_calls_section_begin|>")
    assert allowed(tokenizer, constraint) == {"<|tool_call_begin|>"}
    feed(tokenizer, constraint, "<|tool_call_begin|>functions.get_")
    assert allowed(tokenizer, constraint) >= {"w", "t"}
    assert all("weather:4".startswith(text) or "time:4".startswith(text) for text in allowed(tokenizer, constraint))
    feed(tokenizer, constraint, "weather:4")
    assert allowed(tokenizer, constraint) == {"<|tool_call_argument_begin|>"}
    feed(tokenizer, constraint, "<|tool_call_argument_begin|>")
    assert all('{"city":"'.startswith(text) for text in allowed(tokenizer, constraint))
    feed(tokenizer, constraint, '{"city":"Oslo"')
    assert allowed(tokenizer, constraint) >= {",", "}"} and "<|tool_call_end|>" not in allowed(tokenizer, constraint)
    feed(tokenizer, constraint, "}")
    assert allowed(tokenizer, constraint) == {"<|tool_call_end|>"}
    feed(tokenizer, constraint, "<|tool_call_end|>")
    assert allowed(tokenizer, constraint) == {"<|tool_call_begin|>", "<|tool_calls_section_end|>"}
    feed(tokenizer, constraint, "<|tool_call_begin|>functions.get_time:5<|tool_call_argument_begin|>{}")
    feed(tokenizer, constraint, "<|tool_call_end|><|tool_calls_section_end|>")
    assert allowed(tokenizer, constraint) == {"<|im_end|>"} and not constraint.done
    feed(tokenizer, constraint, "<|im_end|>")
    assert constraint.done and not constraint.cut_short


def test_letters_of_a_marker_inside_a_string_are_text(tokenizer: Tokenizer) -> None:
    constraint = make(tokenizer)()
    feed(tokenizer, constraint, "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0")
    feed(tokenizer, constraint, '<|tool_call_argument_begin|>{"city":"')
    for id in tokenizer.encode("<|tool_call_end|></think>"):
        mask = constraint.mask(1000)
        assert mask is not None and mask[id]
        assert not mask[list(tokenizer.special_tokens.values())].any()
        constraint.accept(id)
    feed(tokenizer, constraint, '"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>')


def test_free_text_has_no_markers(tokenizer: Tokenizer) -> None:
    marks = set(tokenizer.special_tokens)
    ends = {tokenizer.decode([id]) for id in tokenizer.eos_ids}
    for options, offered in (
        ({}, {"<|tool_calls_section_begin|>"}),
        ({"choice": "none"}, set()),
        ({"thinking_open": True}, {"</think>", "<|tool_calls_section_begin|>"}),
        ({"thinking_open": True, "choice": "none"}, {"</think>"}),
        ({"style": "kimi-k2-thinking"}, {"<think>", "<|tool_calls_section_begin|>"}),
        ({"style": "kimi-k2.5"}, {"<|tool_calls_section_begin|>"}),
    ):
        constraint = make(tokenizer, **options)()
        assert allowed(tokenizer, constraint) & marks == offered | ends, options
        assert "a" in allowed(tokenizer, constraint)


def test_reasoning_ends_once(tokenizer: Tokenizer) -> None:
    for options, before in (({"thinking_open": True}, ""), ({"style": "kimi-k2-thinking"}, "<think>")):
        constraint = make(tokenizer, **options)()
        feed(tokenizer, constraint, before + "hm, well</think>")
        assert not {"<think>", "</think>"} & allowed(tokenizer, constraint)
        assert "<|tool_calls_section_begin|>" in allowed(tokenizer, constraint)
        constraint = make(tokenizer, **options)()
        feed(tokenizer, constraint, before + "hm<|tool_calls_section_begin|>")
        assert allowed(tokenizer, constraint) == {"<|tool_call_begin|>"}


def test_a_required_call_comes_first(tokenizer: Tokenizer) -> None:
    assert allowed(tokenizer, make(tokenizer, choice="required")()) == {"<|tool_calls_section_begin|>"}
    constraint = make(tokenizer, choice="get_time", thinking_open=True)()
    assert not {"[EOS]", "<|im_end|>"} & allowed(tokenizer, constraint)
    feed(tokenizer, constraint, "hm</think>")
    assert allowed(tokenizer, constraint) == {"<|tool_calls_section_begin|>"}
    feed(tokenizer, constraint, "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_")
    assert all("time:0".startswith(text) for text in allowed(tokenizer, constraint))


def test_one_call_where_calls_are_not_parallel(tokenizer: Tokenizer) -> None:
    constraint = make(tokenizer, parallel=False)()
    feed(tokenizer, constraint, "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0")
    feed(tokenizer, constraint, "<|tool_call_argument_begin|>{}<|tool_call_end|>")
    assert allowed(tokenizer, constraint) == {"<|tool_calls_section_end|>"}


def test_no_tools_and_no_choice(tokenizer: Tokenizer) -> None:
    for tools in (None, []):
        constraint = tool_constraint(tokenizer, tokenizer.vocab_size, tools, style="kimi-k2")()
        assert "<|tool_calls_section_begin|>" not in allowed(tokenizer, constraint)
        feed(tokenizer, constraint, "hello<|im_end|>")
        assert constraint.done


def test_a_section_is_not_begun_where_it_could_not_end(tokenizer: Tokenizer) -> None:
    factory = make(tokenizer)
    offered = ["<|tool_calls_section_begin|>" in allowed(tokenizer, factory(), left) for left in range(1, 60)]
    assert not offered[0] and offered[-1] and offered == sorted(offered)


@pytest.mark.parametrize("room", range(0, 40, 3))
def test_a_long_string_is_closed_in_time(tokenizer: Tokenizer, room: int) -> None:
    """A model that never closes a string: the budget does, and not a token earlier than it must."""
    factory = make(tokenizer, choice="get_weather", thinking_open=True)
    letter, opening = tokenizer.encode("a")[0], special(tokenizer, "<|tool_calls_section_begin|>")
    constraint = factory()
    budget = factory.minimum_tokens + room

    def stubborn(offered: np.ndarray) -> int:
        return next(id for id in (opening, letter, offered[-1]) if id in offered)

    ids = play(constraint, budget, stubborn)
    assert constraint.done and constraint.cut_short
    check_reply(parse(tokenizer.decode(ids[:-1]), "kimi-k2.5", prefix="<think>"), {"get_weather": WEATHER}, 0)
    assert len(ids) >= budget - 24


def test_nesting_is_limited(tokenizer: Tokenizer) -> None:
    bracket, key = tokenizer.encode("[")[0], tokenizer.encode("{")[0]
    constraint = json_constraint(tokenizer, tokenizer.vocab_size, {})()
    ids = play(constraint, 2000, lambda offered: bracket if bracket in offered else int(offered[0]))
    assert constraint.done and 60 < nesting_of(tokenizer.decode_bytes([id for id in ids if id == bracket])) < 80
    json.loads(tokenizer.decode(ids[:-1]))
    assert key != bracket


def test_json_replies(tokenizer: Tokenizer, shared_data: Path) -> None:
    generator = np.random.default_rng(1)
    for number, schema in enumerate([None, *tool_schemas(shared_data)]):
        thinking = number % 3 == 0
        style = "kimi-k2-thinking" if number % 3 == 1 else "kimi-k2.5"
        factory = json_constraint(
            tokenizer, tokenizer.vocab_size + EXTRA_IDS, schema, style=style, thinking_open=thinking
        )
        constraint = factory()
        ids = play(constraint, factory.minimum_tokens + 60, lambda offered: int(generator.choice(offered)))
        assert constraint.done and ids[-1] in tokenizer.eos_ids
        reply = parse(tokenizer.decode(ids[:-1]), style, prefix="<think>" if thinking else "")
        value = json.loads(reply.content)
        jsonschema.Draft202012Validator(schema or {"type": "object"}).validate(value)


ENFORCED: dict[str, list[dict[str, Any]]] = {
    "minLength": [{"type": "string", "minLength": 4}],
    "maxLength": [{"type": "string", "minLength": 1, "maxLength": 2}],
    "pattern": [{"type": "string", "pattern": "^[A-Z]{2}-[^a]+$"}, {"pattern": r"\d", "maxLength": 3}],
    "minimum": [{"type": "number", "minimum": -0.25}, {"type": "integer", "minimum": 998}],
    "maximum": [{"type": "number", "maximum": 12.5, "minimum": 12}, {"type": "integer", "maximum": -3}],
    "exclusiveMinimum": [{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}],
    "exclusiveMaximum": [{"type": "number", "exclusiveMaximum": 10, "minimum": 9}],
    "multipleOf": [{"type": "integer", "multipleOf": 7, "minimum": -100, "maximum": 1000}, {"multipleOf": 3}],
    "prefixItems": [{"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1, 2]}], "items": {"type": "null"}},
                    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "minItems": 1,
                     "maxItems": 2},
                    {"type": "array", "prefixItems": [{"enum": [1, 2]}, {"type": "null"}], "minItems": 4}],
    "minItems": [{"type": "array", "items": {"type": "null"}, "minItems": 3}],
    "maxItems": [{"type": "array", "items": {}, "maxItems": 2}, {"type": "array", "maxItems": 0}],
    "uniqueItems": [{"type": "array", "items": {"enum": ["a", "b", 1, 2]}, "uniqueItems": True, "minItems": 2},
                    {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
                    {"type": "array", "items": {"enum": list("abcd")}, "uniqueItems": True, "maxItems": 2}],
    "enum": [{"enum": ["a", 1, None, {"b": [True]}]}],
    "const": [{"const": "x\n\"y"}],
    "required": [{"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "required": ["b"]}],
    "additionalProperties": [{"type": "object", "properties": {"a": {"type": "null"}},
                              "additionalProperties": {"type": "integer"}},
                             {"type": "object", "properties": {"a": {}}, "additionalProperties": False}],
    "anyOf": [{"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 1}]}],
    "oneOf": [{"oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}}]}],
    "allOf": [{"allOf": [{"type": "boolean"}]}],
    "$ref": [{"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/n"},
                                                                                       {"type": "null"}]}}}}],
    "type": [{"type": ["null", "boolean"]}, {"type": ["string", "null"], "maxLength": 2}],
}  # fmt: skip


@pytest.mark.parametrize("keyword", ENFORCED)
def test_a_keyword_is_enforced(tokenizer: Tokenizer, keyword: str) -> None:
    generator = np.random.default_rng(2)
    for schema in ENFORCED[keyword]:
        factory = json_constraint(tokenizer, tokenizer.vocab_size, schema)
        texts = set()
        for number in range(25):
            constraint = factory()
            budget = factory.minimum_tokens + 4 + 3 * number
            ids = play(constraint, budget, lambda offered: int(generator.choice(offered)))
            assert constraint.done
            texts.add(tokenizer.decode(ids[:-1]))
            jsonschema.Draft202012Validator(schema).validate(json.loads(tokenizer.decode(ids[:-1])))
        assert len(texts) > 1 or keyword == "const" or schema.get("maxItems") == 0


def test_every_keyword_that_is_accepted_is_tried() -> None:
    from moonbase.chat.schema import KNOWN, NOTES, ROOT_ONLY

    assert KNOWN - NOTES - ROOT_ONLY <= ENFORCED.keys() | {"properties", "items"}


def test_errors_name_the_place(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tokenizer.vocab_size
    bad = [TOOLS[0], {"type": "function", "function": {"name": "b", "parameters": {"type": "object", "required": 1}}}]
    with pytest.raises(SchemaError) as caught:
        tool_constraint(tokenizer, size, bad, style="kimi-k2")
    assert caught.value.path == "tools[1].function.parameters.required"
    with pytest.raises(SchemaError) as caught:
        json_constraint(tokenizer, size, {"type": "x"})
    assert caught.value.path == "schema.type"
    with pytest.raises(UserError, match='no tool named "nope"; known: get_weather, get_time'):
        make(tokenizer, choice="nope")
    with pytest.raises(UserError, match="at least one tool"):
        tool_constraint(tokenizer, size, [], choice="required", style="kimi-k2")
    with pytest.raises(UserError, match="fewer than its tokenizer"):
        tool_constraint(tokenizer, size - 1, TOOLS, style="kimi-k2")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'moonbase\[serve\]'"):
        tool_constraint(train_tokenizer([SAMPLE], 300), size, TOOLS, style="kimi-k2")


def test_a_tokenizer_is_prepared_once_and_then_forgotten() -> None:
    tokenizer = train_tokenizer([SAMPLE], 300)
    prepared = weakref.ref(vocabulary_of(tokenizer))
    assert vocabulary_of(tokenizer) is prepared()
    make(tokenizer)
    del tokenizer
    gc.collect()
    assert prepared() is None


REPLY = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}


@pytest.mark.parametrize("options", [{}, {"thinking_open": True}, {"style": "kimi-k2-thinking"}])
def test_a_reply_is_a_call_or_the_value(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    factory = make(tokenizer, response_schema=REPLY, json_reply=True, **options)
    constraint = factory()
    if options.get("thinking_open"):
        assert not {"[EOS]", "<|im_end|>"} & allowed(tokenizer, constraint)
        feed(tokenizer, constraint, "hm</think>")
    offered = allowed(tokenizer, constraint)
    assert "<|tool_calls_section_begin|>" in offered and ("<think>" in offered) == ("style" in options)
    begun = {text for text in offered if '{"answer":"'.startswith(text)}
    assert begun and offered - begun <= {"<think>", "<|tool_calls_section_begin|>"}
    feed(tokenizer, constraint, '{"answer":"yes"}')
    assert constraint.ignores_stop and allowed(tokenizer, constraint) == {"<|im_end|>"}
    feed(tokenizer, constraint, "<|im_end|>")
    assert constraint.done
    constraint = factory()
    feed(tokenizer, constraint, ("hm</think>" if "thinking_open" in options else "") + "<|tool_calls_section_begin|>")
    feed(tokenizer, constraint, "<|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{}")
    feed(tokenizer, constraint, "<|tool_call_end|><|tool_calls_section_end|><|im_end|>")
    assert constraint.done


def test_calls_or_the_value_end_in_time(tokenizer: Tokenizer) -> None:
    generator, calls, values = np.random.default_rng(3), 0, 0
    for turn in range(120):
        style = ("kimi-k2.5", "kimi-k2-thinking")[turn % 2]
        factory = make(tokenizer, response_schema=None if turn % 5 == 0 else REPLY, json_reply=True, style=style,
                       thinking_open=turn % 4 == 0)
        budget = factory.minimum_tokens + turn
        ids = play(factory(), budget, lambda offered: int(generator.choice(offered)))
        assert ids[-1] in tokenizer.eos_ids
        reply = parse(tokenizer.decode(ids[:-1]), style, prefix="<think>" if turn % 4 == 0 else "")
        assert not reply.notes and bool(reply.tool_calls) != bool(reply.content)
        if reply.content:
            values += 1
            schema = {"type": "object"} if turn % 5 == 0 else REPLY
            jsonschema.Draft202012Validator(schema).validate(json.loads(reply.content))
        calls += bool(reply.tool_calls)
    assert calls and values


def test_a_forced_or_forbidden_call_leaves_one_kind_of_reply(tokenizer: Tokenizer) -> None:
    constraint = make(tokenizer, response_schema=REPLY, choice="required")()
    assert allowed(tokenizer, constraint) == {"<|tool_calls_section_begin|>"}
    constraint = make(tokenizer, response_schema=REPLY, choice="none")()
    assert all('{"answer":"'.startswith(text) for text in allowed(tokenizer, constraint))


def test_stop_texts_hold_in_free_text_only(tokenizer: Tokenizer) -> None:
    constraint = make(tokenizer, thinking_open=True)()
    seen = []
    for text in ("hm", "</think>", "well", "<|tool_calls_section_begin|>", "<|tool_call_begin|>functions.get_time:0",
                 "<|tool_call_argument_begin|>{}", "<|tool_call_end|>", "<|tool_calls_section_end|>"):
        feed(tokenizer, constraint, text)
        seen.append(constraint.ignores_stop)
    assert seen == [False] * 3 + [True] * 5
    constraint = json_constraint(tokenizer, tokenizer.vocab_size, REPLY, style="kimi-k2-thinking")()
    assert constraint.ignores_stop, "the first token may be the value's"
    feed(tokenizer, constraint, "<think>hm")
    assert not constraint.ignores_stop
    feed(tokenizer, constraint, '</think>{"')
    assert constraint.ignores_stop


def test_deep_lists_are_finished(tokenizer: Tokenizer) -> None:
    """A linked list as deep as values may nest, and the budget in view, so that every token is looked at."""
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}
    factory = json_constraint(tokenizer, tokenizer.vocab_size, {"$ref": "#/$defs/N", "$defs": {"N": node}})
    deep, written = '{"next":' * 200, ""

    def deeper(offered: np.ndarray) -> int:
        nonlocal written
        rest = deep[len(written) :]
        found = next((int(id) for id in offered if rest.startswith(tokenizer.decode([id]))), int(offered[0]))
        written += tokenizer.decode([found])
        return found

    ids = play(factory(), 900, deeper)
    depth, value = 0, json.loads(tokenizer.decode(ids[:-1]))
    while value:
        depth, value = depth + 1, value.get("next")
    assert depth > 55


def test_threads_may_ask_at_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "_CACHED_GRAMMARS", 2)
    fresh = train_tokenizer([SAMPLE], 300)
    schemas = [{"type": "string", "maxLength": number} for number in range(1, 7)]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: vocabulary_of(fresh), range(8)))) == 1
        values = list(pool.map(lambda number: vocabulary_of(fresh).value(schemas[number % 6], "s"), range(300)))
    assert all(value.shape.options[0].high == number % 6 + 1 for number, value in enumerate(values))


def test_what_was_used_last_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "_CACHED_GRAMMARS", 2)
    vocabulary = vocabulary_of(fresh := train_tokenizer([SAMPLE], 300))
    one, two, three = ({"type": "string", "maxLength": number} for number in (1, 2, 3))
    first, second = vocabulary.value(one, "s"), vocabulary.value(two, "s")
    assert vocabulary.value(one, "s") is first
    vocabulary.value(three, "s")
    assert vocabulary.value(one, "s") is first and vocabulary.value(two, "s") is not second
    assert vocabulary_of(fresh) is vocabulary


def test_generated_text_stays_out_of_messages(tokenizer: Tokenizer) -> None:
    written = vocabulary_module.Written(vocabulary_of(tokenizer).value(REPLY, "s"))
    written.text += b"my secret"
    with pytest.raises(AssertionError) as caught:
        written.ending  # noqa: B018
    assert "secret" not in str(caught.value)
