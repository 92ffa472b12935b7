"""How often a model answers a held-out tool question rightly, through the right call.

A question counts if both of its turns are right: the first is a well-formed call (or two) and nothing else, with the
right tool and arguments that are equal as JSON; then, given the tool's result, the second holds the right value as a
word of its own, and no further call. What completes a prompt is handed in: the engine, a server, another model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moonbase.chat import Reply, parse
from moonbase.chat.messages import call_id
from moonbase.synth.dialogues import exchange, shuffled_tools
from moonbase.synth.questions import KINDS, Question, draw_question
from moonbase.synth.tools import run_tool

Prompt = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Messages and tools."""
Complete = Callable[[Sequence[Prompt]], list[str]]
"""Prompts to what the model wrote after each, tool-call markers included, without the end-of-turn token."""


@dataclass(frozen=True)
class Task:
    """What is asked last in a dialogue: one question, or two at once."""

    history: tuple[dict[str, Any], ...]
    questions: tuple[Question, ...]
    tools: list[dict[str, Any]]
    kind: str
    """calculator, convert, lookup, two calls, second turn."""
    first_index: int = 0

    @property
    def messages(self) -> list[dict[str, Any]]:
        user = {"role": "user", "content": " ".join(question.text for question in self.questions)}
        return [*self.history, user]


@dataclass
class Outcome:
    """What became of one task."""

    task: Task
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The whole dialogue as it went, the model's turns and the tools' results included."""
    called: bool = False
    answered: bool = False
    reason: str = ""
    """Why it failed; empty where it did not."""


@dataclass
class Evaluation:
    """The outcomes of all tasks."""

    outcomes: list[Outcome]

    def rate(self, chosen: Callable[[Outcome], bool] = lambda outcome: True) -> float:
        """Share of the chosen tasks that were called for and answered rightly."""
        rows = [outcome.answered for outcome in self.outcomes if chosen(outcome)]
        return sum(rows) / len(rows) if rows else float("nan")

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a run's facts."""
        kinds = dict.fromkeys(outcome.task.kind for outcome in self.outcomes)
        new = [outcome for outcome in self.outcomes if any(q.new_phrase for q in outcome.task.questions)]
        return {
            "questions": len(self.outcomes),
            "right_calls": sum(outcome.called for outcome in self.outcomes) / len(self.outcomes),
            "right": self.rate(),
            "by_kind": {kind: {"questions": sum(outcome.task.kind == kind for outcome in self.outcomes),
                               "right": self.rate(lambda outcome, kind=kind: outcome.task.kind == kind)}
                        for kind in kinds},
            "new_phrasings": {"questions": len(new), "right": Evaluation(new).rate() if new else None},
        }


def held_out_tasks(count: int = 200, seed: int = 0) -> list[Task]:
    """Tasks whose calls are in no training dialogue: 80% single questions (a quarter of them in phrasings that are new
    too), 10% two at once, 10% in the second turn of a dialogue."""
    assert count <= 1000, "the held-out calls must not run out"
    generator = random.Random(f"held out {seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    while len(tasks) < count:
        number = len(tasks)
        kind = KINDS[number % len(KINDS)]
        if number % 10 < 8:
            questions, history, name = (draw_question(generator, True, kind, number % 4 == 0),), (), kind
        elif number % 10 == 8:
            questions = (draw_question(generator, True, kind), draw_question(generator, True))
            history, name = (), "two calls"
        else:
            before = draw_question(generator, False)
            history, name = tuple(exchange([before], 0)), "second turn"
            questions = (draw_question(generator, True, kind),)
        calls = {json.dumps(question.call) for question in questions}
        if calls & seen or len(calls) < len(questions):
            continue
        seen |= calls
        needed = {question.kind for question in questions} | {message["name"] for message in history
                                                               if message["role"] == "tool"}
        tasks.append(Task(history, questions, shuffled_tools(generator, needed), name, bool(history)))
    return tasks


def evaluate(tasks: Sequence[Task], complete: Complete, style: str = "kimi-k2") -> Evaluation:
    """Put every task to the model, run the tools that it rightly calls, and let it answer."""
    outcomes = [Outcome(task, task.messages) for task in tasks]
    written = complete([(outcome.messages, outcome.task.tools) for outcome in outcomes])
    for outcome, text in zip(outcomes, written, strict=True):
        _judge_call(outcome, parse(text, style))
    called = [outcome for outcome in outcomes if outcome.called]
    written = complete([(outcome.messages, outcome.task.tools) for outcome in called]) if called else []
    for outcome, text in zip(called, written, strict=True):
        _judge_answer(outcome, parse(text, style))
    return Evaluation(outcomes)


def _judge_call(outcome: Outcome, reply: Reply) -> None:
    """Note the model's first turn, and what the tools answer if it is right."""
    calls = [{"id": call_id(call.name, outcome.task.first_index + number), "type": "function",
              "function": {"name": call.name, "arguments": call.arguments}}
             for number, call in enumerate(reply.tool_calls)]
    turn: dict[str, Any] = {"role": "assistant", "content": reply.content}
    outcome.messages.append(turn | {"tool_calls": calls} if calls else turn)
    outcome.reason = _fault_of_calls(outcome.task, reply)
    outcome.called = not outcome.reason
    if outcome.called:
        outcome.messages += [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"],
             "content": run_tool(call["function"]["name"], call["function"]["arguments"])} for call in calls]


def _fault_of_calls(task: Task, reply: Reply) -> str:
    if reply.notes:
        return "malformed: " + "; ".join(reply.notes)
    if len(reply.tool_calls) != len(task.questions):
        return f"{len(reply.tool_calls)} calls instead of {len(task.questions)}"
    if reply.content.strip():
        return "words beside the call"
    for number, (call, question) in enumerate(zip(reply.tool_calls, task.questions, strict=True)):
        if call.id != call_id(question.kind, task.first_index + number):
            return f"the call is {call.id} instead of {call_id(question.kind, task.first_index + number)}"
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            return "the arguments are no JSON"
        if arguments != question.arguments:
            return f"the arguments are {call.arguments} instead of {json.dumps(question.arguments)}"
    return ""


def _judge_answer(outcome: Outcome, reply: Reply) -> None:
    """Note the model's last turn. The results must stand in it, each a word of its own, in the questions' order."""
    outcome.messages.append({"role": "assistant", "content": reply.content})
    words = [rf"(?<![\w.-]){re.escape(question.result)}(?![\w-]|\.\d)" for question in outcome.task.questions]
    if reply.notes or reply.tool_calls:
        outcome.reason = "the answer is no plain text"
    elif not re.search(".*".join(words), reply.content, re.DOTALL):
        results = ", ".join(question.result for question in outcome.task.questions)
        outcome.reason = f"the answer does not hold {results}"
    else:
        outcome.answered = True
