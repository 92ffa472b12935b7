"""Accounts of one reply: which tokens are whose, which calls are whole; whatever way the text is cut into pieces."""

from __future__ import annotations

import random
from typing import Any

import pytest

from moonbase.chat import StreamParser, parse
from moonbase.engine.text import Piece
from moonbase.engine.turn import Call, Turn
from tests.serve.service_double import says
from tests.serve.test_openai import SECTION, call

REPLY = "thinking 🌕 first</think>Said – 月面!" + SECTION.format(call(4, '{"city": "Köln 🌕"}') + call(5, "{}"))


def turn_of(steps: list[Any]) -> tuple[Turn, list[Any]]:
    turn = Turn(StreamParser("kimi-k2.5", prefix="<think>"))
    return turn, [event for step in steps for event in turn.push(step)]


def merged(steps: list[Piece], dice: random.Random) -> list[Piece]:
    """The same reply as an engine would bring it that gives several tokens at once."""
    result: list[Piece] = []
    for step in steps:
        last = result[-1] if result else None
        if last is not None and not (last.special or step.special or step.finish_reason) and dice.random() < 0.6:
            result[-1] = Piece(last.ids + step.ids, last.text + step.text, False, last.logprobs + step.logprobs,
                               last.top_logprobs + step.top_logprobs)
        else:
            result.append(step)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_every_way_of_cutting_gives_the_same_accounts(tokenizer: Any, seed: int) -> None:
    steps = says(tokenizer, REPLY, cached=3)
    turn, _ = turn_of(merged(steps, random.Random(seed)) if seed else steps)
    whole = parse(REPLY, "kimi-k2.5", prefix="<think>")
    assert (turn.content, turn.reasoning) == (whole.content, whole.reasoning_content)
    assert [(call.id, call.name, call.arguments) for call in turn.tool_calls] == [
        (call.id, call.name, call.arguments) for call in whole.tool_calls]
    assert turn.completion_tokens == len(tokenizer.encode_rendered(REPLY))
    assert turn.reasoning_tokens == len(tokenizer.encode("thinking 🌕 first"))
    assert tokenizer.decode(entry.id for entry in turn.logprobs) == "Said – 月面!"
    assert (turn.finish_reason, turn.cached_tokens) == ("tool_calls", 3)


def test_every_place_of_being_cut_off(tokenizer: Any) -> None:
    """The limit may fall anywhere: half of a call is neither a call nor text, whole calls before it stay."""
    ids = tokenizer.encode_rendered(REPLY)
    for length in range(len(ids)):
        text = tokenizer.decode_bytes(ids[:length]).decode(errors="ignore")
        turn, _ = turn_of(says(tokenizer, text, finish="length"))
        assert turn.finish_reason == "length"
        assert len(turn.tool_calls) == text.count("<|tool_call_end|>")
        assert turn.content == text.partition("<|tool_calls_section_begin|>")[0].partition("</think>")[2]
        assert "<|" not in turn.content


@pytest.mark.parametrize(("arguments", "valid"), [
    ("{}", True), ('{"a": [1]}', True), ("", False), ("[]", False), ("null", False), ('{"a"', False), ("{} {}", False),
    ("{" * 100_000, False),
])  # fmt: skip
def test_only_an_object_is_a_calls_arguments(arguments: str, valid: bool) -> None:
    assert Call("functions.f:0", "f", arguments, complete=True).is_valid is valid
    assert not Call("functions.f:0", "f", arguments).is_valid


def test_a_call_that_is_no_json_is_said_and_not_acted_upon(tokenizer: Any) -> None:
    """An agent shows it to its model, which can mend it; a client would stumble over it."""
    turn, _ = turn_of(says(tokenizer, "</think>" + SECTION.format(call(0, '{"city": ') + call(1, "{}"))))
    assert [call.arguments for call in turn.said_calls] == ['{"city": ', "{}"]
    assert [call.arguments for call in turn.tool_calls] == ["{}"]
    said = turn.message(turn.said_calls)
    assert [call["function"]["arguments"] for call in said["tool_calls"]] == ['{"city": ', "{}"]
    assert said["content"] is None and turn.message([])["content"] == ""


def test_a_call_that_breaks_off_within_the_reply_becomes_text(tokenizer: Any) -> None:
    """Only a model that nothing constrains does so."""
    broken = call(0, "{").replace("<|tool_call_end|>", "<|tool_calls_section_end|>")
    turn, events = turn_of(says(tokenizer, "</think><|tool_calls_section_begin|>" + broken + "so"))
    assert not turn.tool_calls and turn.finish_reason == "stop"
    assert turn.content.startswith("<|tool_call_begin|>functions.weather:0") and turn.content.endswith("so")
    assert any(type(event).__name__ == "ToolCallAborted" for event in events)


def test_plain_text_keeps_the_marks_that_replies_are_parsed_by(tokenizer: Any) -> None:
    turn = Turn(None)
    for step in says(tokenizer, "a<think>b<|im_user|>c<|tool_call_end|>", finish="length"):
        turn.push(step)
    assert turn.content == "a<think>bc<|tool_call_end|>" and turn.completion_tokens == 6
