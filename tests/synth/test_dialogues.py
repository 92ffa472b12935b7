"""The corpus: reproducible, true, in the model's grammar, and without a single question of the evaluation."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moonbase.chat import parse, render_parts
from moonbase.synth import held_out_tasks, make_dialogues, write_dialogues
from moonbase.synth.dialogues import NO_TOOL
from moonbase.synth.phrasebook import TOPICS
from moonbase.synth.questions import NEW_PHRASES, PHRASES
from moonbase.synth.tools import TOOLS, run_tool


@pytest.fixture(scope="module")
def dialogues() -> list[dict[str, Any]]:
    return list(make_dialogues(3000, seed=5))


def calls_of(dialogue: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for message in dialogue["messages"] for call in message.get("tool_calls", ())]


def numbers(call: dict[str, str]) -> tuple[str, ...]:
    """A call without what may differ: of a sum only its two numbers, in any order."""
    arguments = json.loads(call["arguments"])
    if call["name"] == "calculator":
        return (call["name"], *sorted(re.findall(r"\d+", arguments["expression"])))
    return (call["name"], *map(str, arguments.values()))


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, third = (write_dialogues(tmp_path / f"{number}.jsonl", 200, seed) for number, seed in
                            enumerate((1, 1, 2)))
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
    lines = first.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200 and list(make_dialogues(200, 1)) == [json.loads(line) for line in lines]


def test_no_question_of_the_evaluation_is_in_any_dialogue(dialogues: list[dict[str, Any]]) -> None:
    trained = {numbers(call["function"]) for dialogue in dialogues for call in calls_of(dialogue)}
    asked = [numbers(question.call) for task in held_out_tasks(900) for question in task.questions]
    assert len(asked) > 900 and len(trained) > 2500 and not trained & set(asked)


def test_some_phrasings_are_in_no_dialogue(dialogues: list[dict[str, Any]]) -> None:
    said = "\n".join(message["content"] or "" for dialogue in dialogues for message in dialogue["messages"])

    blanks = {"sum": r"\d+ (?:[-+*/]|plus|minus|times|divided by) \d+", "value": r"\d+", "item": r"\d+"}

    def pattern(phrase: str) -> str:
        filled = re.sub(r"\\\{(\w+)\\\}", lambda blank: blanks.get(blank[1], "[a-z]+"), re.escape(phrase))
        return rf"(?m)(?:^|(?<=[.?] )){filled}(?:$| )"

    for kind in PHRASES:
        assert all(re.search(pattern(phrase), said) for phrase in PHRASES[kind]), kind
        assert not any(re.search(pattern(phrase), said) for phrase in NEW_PHRASES[kind]), kind
    new = [task for task in held_out_tasks(200) for question in task.questions if question.new_phrase]
    assert len(new) == 40


def test_every_result_is_what_python_makes_of_the_call(dialogues: list[dict[str, Any]]) -> None:
    seen: Counter = Counter()
    for dialogue in dialogues:
        results = {message["tool_call_id"]: message["content"] for message in dialogue["messages"]
                   if message["role"] == "tool"}
        for call in calls_of(dialogue):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert results[call["id"]] == run_tool(name, arguments)
            if name == "calculator":
                assert float(results[call["id"]]) == pytest.approx(eval(arguments["expression"]), abs=0.0051)
            seen[name] += 1
        assert len(results) == len(calls_of(dialogue))
    assert min(seen[name] for name in TOOLS) > 500


def test_replies_hold_the_results_and_tools_are_declared(dialogues: list[dict[str, Any]]) -> None:
    for dialogue in dialogues:
        declared = {tool["function"]["name"] for tool in dialogue["tools"]}
        waiting: list[str] = []
        for message in dialogue["messages"]:
            if message["role"] == "tool":
                waiting.append(message["content"])
            elif message["role"] == "assistant" and "tool_calls" not in message:
                for result in waiting:
                    assert re.search(rf"(?<![\w.-]){re.escape(result)}(?!\w)", message["content"])
                waiting = []
        assert {call["function"]["name"] for call in calls_of(dialogue)} <= declared and not waiting


def test_calls_are_numbered_through_the_dialogue(dialogues: list[dict[str, Any]]) -> None:
    for dialogue in dialogues:
        ids = [call["id"] for call in calls_of(dialogue)]
        assert ids == [f"functions.{call['function']['name']}:{number}"
                       for number, call in enumerate(calls_of(dialogue))]
    assert any(len(message.get("tool_calls", ())) == 2 for dialogue in dialogues for message in dialogue["messages"])
    assert any(len(calls_of(dialogue)) > 5 for dialogue in dialogues)


@pytest.mark.parametrize("style", ["kimi-k2", "kimi-k2-thinking", "kimi-k2.5"])
def test_what_is_learnt_parses_back(dialogues: list[dict[str, Any]], style: str) -> None:
    for dialogue in dialogues[:200]:
        parts = render_parts(dialogue["messages"], dialogue["tools"], style, add_generation_prompt=False)
        turns = "".join(part.text if part.generated else "\0" for part in parts)
        replies = [parse(text.removesuffix("<|im_end|>"), style) for text in re.split("\0+", turns) if text]
        spoken = [message for message in dialogue["messages"] if message["role"] == "assistant"]
        assert len(replies) == len(spoken)
        for reply, message in zip(replies, spoken, strict=True):
            assert reply.content == (message["content"] or "") and not reply.notes
            assert [(call.id, call.name, call.arguments) for call in reply.tool_calls] == [
                (call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls", ())]


def test_rules_tables_and_missing_tools_are_kept_to(dialogues: list[dict[str, Any]]) -> None:
    facts, kinds = dict(TOPICS), Counter(dialogue["truth"]["kind"] for dialogue in dialogues)
    assert set(kinds) == {"tools", "talk", "code", "no tool", "table", "policy"} and min(kinds.values()) > 80
    for dialogue in dialogues:
        kind, messages = dialogue["truth"]["kind"], dialogue["messages"]
        question, reply = messages[-2]["content"], messages[-1]["content"]
        if kind == "policy":
            forbidden = re.fullmatch(r"Policy: never speak about (.*)\.", messages[0]["content"])[1]
            topic = re.fullmatch(r"Tell me about (.*)\.", question)[1]
            refusal = f"I am not allowed to speak about {forbidden}."
            assert reply == (refusal if topic == forbidden else facts[topic])
        elif kind == "table":
            key = re.search(r"What is (\w+) in the list", question)[1]
            assert reply == f"{key} is {re.search(rf'{key} ([0-9]+)', question)[1]}."
        elif kind == "no tool":
            assert reply == NO_TOOL and not calls_of(dialogue)
