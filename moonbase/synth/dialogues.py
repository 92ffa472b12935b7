"""Practice dialogues from a seed: enough for a tiny model to learn to answer, to call tools and to keep to a rule.

What they hold: sums, conversions and look-ups through tools, one call or two at once, over several turns; requests
made where there is no tool; small talk; questions on code; look-ups in a table that stands in the question; and a
made-up policy that forbids a harmless topic. Everything is procedural: no text of others, no downloads, the same seed
gives the same bytes. Every dialogue carries the truth that it was made from, so that any of them can be checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moonbase import files
from moonbase.chat.messages import call_id
from moonbase.synth.phrasebook import CODE, SMALL_TALK, THINGS, TOPICS
from moonbase.synth.questions import KINDS, Question, draw_question
from moonbase.synth.tools import TOOLS

_SHARES = {"tools": 0.42, "talk": 0.07, "code": 0.07, "no tool": 0.04, "table": 0.2, "policy": 0.2}
"""What share of the dialogues is of which kind; those with tools are about eight times as long as the others."""
_TWO_AT_ONCE = 0.2
NO_TOOL = "I have no tool for that here."


def write_dialogues(path: str | Path, count: int, seed: int = 0) -> Path:
    """Write `count` dialogues as JSONL, `{"messages", "tools", "truth"}` a line; whole or not at all."""
    lines = (json.dumps(dialogue, ensure_ascii=False) + "\n" for dialogue in make_dialogues(count, seed))
    files.write_text(path, "".join(lines))
    return Path(path)


def make_dialogues(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` dialogues for training. No call in them is one that the evaluation asks for."""
    generator = random.Random(f"dialogues {seed}")
    kinds, shares = list(_SHARES), list(_SHARES.values())
    for _ in range(count):
        yield _MAKERS[generator.choices(kinds, shares)[0]](generator)


def exchange(questions: list[Question], first_index: int) -> list[dict[str, Any]]:
    """The messages of one turn: the questions, one call each, the results, the reply. Calls are numbered from
    `first_index`."""
    calls = [{"id": call_id(question.kind, first_index + number), "type": "function", "function": question.call}
             for number, question in enumerate(questions)]
    results = [{"role": "tool", "tool_call_id": call["id"], "name": question.kind, "content": question.result}
               for call, question in zip(calls, questions, strict=True)]
    return [{"role": "user", "content": " ".join(question.text for question in questions)},
            {"role": "assistant", "content": None, "tool_calls": calls}, *results,
            {"role": "assistant", "content": " ".join(question.reply for question in questions)}]


def shuffled_tools(generator: random.Random, needed: set[str]) -> list[dict[str, Any]]:
    """The declarations of the needed tools, and perhaps of others, in any order."""
    chosen = [name for name in KINDS if name in needed or generator.random() < 0.5]
    generator.shuffle(chosen)
    return [TOOLS[name] for name in chosen]


def _say(user: str, assistant: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _dialogue(messages: list[dict[str, Any]], tools: list[dict[str, Any]], kind: str, **truth: Any) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "truth": {"kind": kind, **truth}}


def _with_tools(generator: random.Random) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    asked: list[Question] = []
    for _ in range(generator.randint(1, 5)):
        if messages and generator.random() < 0.1:
            messages += _say(*generator.choice(SMALL_TALK))
            continue
        number = 2 if generator.random() < _TWO_AT_ONCE else 1
        questions = [draw_question(generator, held_out=False) for _ in range(number)]
        messages += exchange(questions, len(asked))
        asked += questions
    tools = shuffled_tools(generator, {question.kind for question in asked})
    return _dialogue(messages, tools, "tools", calls=[question.call for question in asked],
                     results=[question.result for question in asked])


def _without_a_tool(generator: random.Random) -> dict[str, Any]:
    """A question for a tool where none is declared."""
    question = draw_question(generator, held_out=False)
    return _dialogue(_say(question.text, NO_TOOL), [], "no tool", reply=NO_TOOL)


def _talk(generator: random.Random) -> dict[str, Any]:
    pairs = generator.sample(SMALL_TALK, generator.randint(1, 3))
    tools = shuffled_tools(generator, set()) if generator.random() < 0.5 else []
    return _dialogue([message for pair in pairs for message in _say(*pair)], tools, "talk", reply=pairs[-1][1])


def _code(generator: random.Random) -> dict[str, Any]:
    pairs = generator.sample(CODE, generator.randint(1, 3))
    tools = shuffled_tools(generator, set()) if generator.random() < 0.3 else []
    return _dialogue([message for pair in pairs for message in _say(*pair)], tools, "code", reply=pairs[-1][1])


def _table(generator: random.Random) -> dict[str, Any]:
    """A look-up in a table that stands in the question itself; no tool is needed."""
    rows = {key: generator.randint(10, 99) for key in generator.sample(THINGS, generator.randint(2, 4))}
    key = generator.choice(list(rows))
    table = ", ".join(f"{name} {value}" for name, value in rows.items())
    reply = f"{key} is {rows[key]}."
    return _dialogue(_say(f"List: {table}. What is {key} in the list?", reply), [], "table", reply=reply)


def _policy(generator: random.Random) -> dict[str, Any]:
    """A rule in the system message forbids one topic; another one is asked about as often as that."""
    (forbidden, _), (other, fact) = generator.sample(TOPICS, 2)
    refused = generator.random() < 0.5
    system = {"role": "system", "content": f"Policy: never speak about {forbidden}."}
    reply = f"I am not allowed to speak about {forbidden}." if refused else fact
    question = f"Tell me about {forbidden if refused else other}."
    return _dialogue([system, *_say(question, reply)], [], "policy", refused=refused, reply=reply)


_MAKERS = {"tools": _with_tools, "talk": _talk, "code": _code, "no tool": _without_a_tool, "table": _table,
           "policy": _policy}
