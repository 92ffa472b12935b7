"""The judge against models whose faults are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moonbase.chat import next_call_index
from moonbase.synth import evaluate, held_out_tasks
from moonbase.synth.evaluation import Prompt, Task
from moonbase.synth.questions import is_held_out

TASKS = held_out_tasks(60)
Writer = Callable[[Task, list[dict[str, Any]]], str]


def calls_text(task: Task, **changed: str) -> str:
    calls = "".join(
        f"<|tool_call_begin|>functions.{changed.get('name', question.kind)}:{task.first_index + number}"
        f"<|tool_call_argument_begin|>{changed.get('arguments', json.dumps(question.arguments))}<|tool_call_end|>"
        for number, question in enumerate(task.questions))
    return f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"


def answer_text(messages: list[dict[str, Any]]) -> str:
    """From the results alone, as a reader would."""
    results = []
    for message in messages[::-1]:
        if message["role"] != "tool":
            break
        results.insert(0, message["content"])
    return " and ".join(results) + "."


def model(call: Writer = lambda task, _: calls_text(task),
          answer: Writer = lambda _, messages: answer_text(messages)) -> Callable[[Sequence[Prompt]], list[str]]:
    def complete(prompts: Sequence[Prompt]) -> list[str]:
        written = []
        for messages, tools in prompts:
            task = next(task for task in TASKS if messages[: len(task.messages)] == task.messages)
            assert tools == task.tools
            written.append(answer(task, messages) if messages[-1]["role"] == "tool" else call(task, messages))
        return written

    return complete


def test_a_model_that_does_it_right_is_right() -> None:
    evaluation = evaluate(TASKS, model())
    assert evaluation.rate() == 1 and not any(outcome.reason for outcome in evaluation.outcomes)
    summary = evaluation.summary()
    assert (summary["questions"], summary["right"], summary["right_calls"]) == (60, 1.0, 1.0)
    assert sum(kind["questions"] for kind in summary["by_kind"].values()) == 60
    json.dumps(summary)


@pytest.mark.parametrize(("call", "reason"), [
    (lambda task, _: "It is 42.", "0 calls instead of"),
    (lambda task, _: "Let me see. " + calls_text(task), "words beside the call"),
    (lambda task, _: calls_text(task)[:-len("<|tool_calls_section_end|>") - 17], "malformed"),
    (lambda task, _: calls_text(task, name="search"), "the call is functions.search:"),
    (lambda task, _: calls_text(task, arguments="{"), "are not JSON"),
    (lambda task, _: calls_text(task, arguments='{"expression": "1 + 1"}'), "the arguments are"),
    (lambda task, _: calls_text(task) * 2, ""),
], ids=["words", "both", "cut", "name", "json", "arguments", "twice"])
def test_a_wrong_call_is_wrong_whatever_the_answer(call: Writer, reason: str) -> None:
    evaluation = evaluate(TASKS, model(call))
    assert evaluation.rate() == 0 and not any(outcome.called for outcome in evaluation.outcomes)
    assert all(reason in outcome.reason for outcome in evaluation.outcomes)


@pytest.mark.parametrize("answer", [
    lambda task, messages: "I do not know.", lambda task, messages: answer_text(messages).rstrip(".") + "7.",
    lambda task, messages: "1" + answer_text(messages), lambda task, messages: answer_text(messages)[:-1] + ".5",
    lambda task, messages: answer_text(messages) + "<|tool_calls_section_begin|>", lambda task, messages: "",
], ids=["ignorant", "longer", "prefixed", "fraction", "malformed", "silent"])
def test_a_wrong_answer_after_a_right_call_is_wrong(answer: Writer) -> None:
    evaluation = evaluate(TASKS, model(answer=answer))
    assert evaluation.rate() == 0 and all(outcome.called for outcome in evaluation.outcomes)


def test_the_order_of_keys_and_the_spaces_do_not_matter() -> None:
    def loose(task: Task, _: Any) -> str:
        text = calls_text(task)
        for question in task.questions:
            turned = json.dumps(dict(reversed(question.arguments.items())), indent=1)
            text = text.replace(json.dumps(question.arguments), turned)
        return text

    assert evaluate(TASKS, model(loose)).rate() == 1


def test_tasks_are_held_out_distinct_and_numbered_on() -> None:
    assert held_out_tasks(60) == TASKS != held_out_tasks(60, seed=1)
    calls = [json.dumps(question.call) for task in TASKS for question in task.questions]
    assert len(set(calls)) == len(calls)
    for task in TASKS:
        assert all(is_held_out(question.kind, question.arguments) for question in task.questions)
        assert next_call_index(task.messages) == task.first_index
        assert {question.kind for question in task.questions} <= {tool["function"]["name"] for tool in task.tools}
    kinds = {task.kind for task in TASKS}
    assert kinds == {"calculator", "convert", "lookup", "two calls", "second turn"}
