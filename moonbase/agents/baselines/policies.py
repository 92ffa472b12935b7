"""Scripted agents for wide tasks: one that does all the work, an orchestrator that has it done, and its helpers.

A policy is a function from the messages that an agent sees and the tools that it has to its next message. They work as
a competent model does: find the list, look every member up, settle what pages disagree on by the rule of the task,
answer with a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moonbase.agents.agent import LAST_STEP
from moonbase.agents.baselines.reading import (
    DECISIVE,
    LABEL_OF_NOUN,
    TO_DO,
    Findings,
    Question,
    look,
    read_question,
    table,
)
from moonbase.agents.context import Summarise
from moonbase.agents.models.base import Message

Policy = Callable[[list[Message], list[dict[str, Any]]], Message]
Wanted = tuple[str, dict[str, Any]]
"""A tool and its arguments."""

RESULTS = 5
MORE_RESULTS = 20
HELPER = "You look things up and report what you find as rows of a table, with no other words."
TEMPLATE = ("Look up the things named below, each on its own page, and answer with one row for each of them, in this "
            "form: {columns}\n\nNames: {{item}}\n\n{rule}")


@dataclass(frozen=True)
class Wide:
    """The policy of an agent on a wide task; which one it is follows from its task and its tools."""

    calls_per_turn: int = 1
    notes: bool = False
    """Write every row down when it is complete, for a context in which results are hidden later."""
    alone_up_to: int = 4
    """Rows for which an orchestrator asks nobody else: calls of its own, side by side, are as fast and cost less."""
    most_helpers: int = 100

    def __call__(self, messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        task = next(message["content"] for message in messages if message["role"] == "user")
        question = read_question(task)
        found = look(messages, len(question.columns))
        last = messages[-1]
        if last["role"] == "user" and last["content"] == Summarise.request:
            return {"content": _summary(question, found)}
        if not tools or last["content"] == LAST_STEP:
            return {"content": _answer(question, found, _names(question, found)[0])}
        if not question.names:
            wanted = list(_discovery(question, found))
            if wanted:
                return self._say(messages, question, found, wanted)
        names, _ = _names(question, found)
        offered = {tool["function"]["name"] for tool in tools}
        if "assign_tasks" in offered and len(names) > self.alone_up_to:
            return self._delegate(messages, question, found, names, task)
        wanted = []
        for name in names:
            if name not in found.rows:
                wanted += _next_calls(question, found, name)
            if len(wanted) >= self.calls_per_turn:
                break
        if wanted:
            return self._say(messages, question, found, wanted)
        return {"content": _answer(question, found, names)}

    def _say(self, messages: list[Message], question: Question, found: Findings, wanted: list[Wanted]) -> Message:
        """Calls, and what is worth noting."""
        message: Message = {"tool_calls": _calls(messages, wanted[: self.calls_per_turn])}
        if self.notes:
            names, _ = _names(question, found)
            rows = [row for name in names if name not in found.rows and (row := _row(question, found, name))]
            if rows:
                message["content"] = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return message

    def _delegate(
        self, messages: list[Message], question: Question, found: Findings, names: Sequence[str], task: str
    ) -> Message:
        """One kind of helper, one item each, or so many that there are helpers enough; then the answer."""
        done = {call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
        if "create_subagent" not in done:
            return {"tool_calls": _calls(messages, [("create_subagent", {
                "name": "helper", "system_prompt": HELPER})])}
        if "assign_tasks" not in done:
            template = TEMPLATE.format(columns=" | ".join(question.columns), rule=task.rpartition("\n\n")[2])
            return {"tool_calls": _calls(messages, [("assign_tasks", {
                "agent": "helper", "template": template, "items": batches(names, self.most_helpers)})])}
        return {"content": _answer(question, found, names)}


def batches(names: Sequence[str], most: int) -> list[str]:
    """At most `most` items, as even as can be, of names joined by semicolons."""
    size = -(-len(names) // most)
    return ["; ".join(names[start : start + size]) for start in range(0, len(names), size)]


def _calls(messages: list[Message], wanted: list[Wanted]) -> list[dict[str, Any]]:
    """Calls whose ids nothing visible has."""
    used = [int(call["id"].rpartition(":")[2]) for message in messages for call in message.get("tool_calls") or ()]
    first = max(used, default=-1) + 1
    return [{"id": f"functions.{name}:{first + place}", "type": "function",
             "function": {"name": name, "arguments": json.dumps(arguments)}}
            for place, (name, arguments) in enumerate(wanted)]


def _names(question: Question, found: Findings) -> tuple[list[str], bool]:
    """The members asked for as far as they are known, and whether that is all of them."""
    if question.names:
        return list(question.names), True
    listed = dict(member for part in sorted(found.parts) for member in found.parts[part])
    count = min(question.first or found.num_members, found.num_members)
    numbered = [listed[number] for number in sorted(listed) if number <= count]
    if found.num_members and len(numbered) == count:
        return numbered, True
    if found.to_do:
        # A summary that knows what is left knew them all.
        done = [name for name in found.rows if name not in found.to_do]
        return [*done, *(name for name in found.to_do if name != "nothing")], True
    return list(dict.fromkeys([*found.rows, *numbered])), False


def _discovery(question: Question, found: Findings) -> Iterator[Wanted]:
    """What is still missing of the list."""
    if _names(question, found)[1]:
        return
    query = f"{question.group} members"
    title = f"Members of the {question.group}, page "
    pages = {int(name.removeprefix(title).partition(" of ")[0]): url
             for url, name in found.hits.items() if name.startswith(title)}
    if not pages:
        if query not in found.queries:
            yield "search", {"query": query, "k": RESULTS}
        return
    parts = int(next(name for name in found.hits.values() if name.startswith(title)).rpartition(" of ")[2])
    if found.num_parts:
        parts = found.num_parts
    if question.first and found.parts:
        per_part = max(len(members) for members in found.parts.values())
        parts = min(parts, -(-question.first // per_part))
    address = next(iter(pages.values())).rpartition("/")[0]
    for part in range(1, parts + 1):
        url = f"{address}/{part}"
        if part not in found.parts and url not in found.opened:
            yield "open", {"url": url}
            if question.first and not found.parts:
                return


def _next_calls(question: Question, found: Findings, name: str) -> list[Wanted]:
    """What can be done now for one row; nothing where it is complete or there is no way."""
    own = found.by_title.get(name)
    if own is None:
        for query, count in ((name, RESULTS), (f"{name} gazetteer", MORE_RESULTS)):
            if query not in found.queries:
                return [("search", {"query": query, "k": count})]
        return []
    wanted = [own]
    if own in found.by_address:
        source = found.by_address[own]
        wanted += [source.links[label] for label in ("Registry record",) if label in source.links]
        for column in question.columns:
            relation = _relation(source.values, column)
            if relation and relation[0] in source.links:
                wanted.append(source.links[relation[0]])
    wanted += [url for title, url in found.by_title.items()
               if title.startswith(f"{name}: ") and DECISIVE.search(title)]
    return [("open", {"url": url}) for url in dict.fromkeys(wanted) if url not in found.opened]


def _relation(values: dict[str, str], column: str) -> tuple[str, str] | None:
    """`Date of birth of the captain` -> the line Captain, and the line Born of that page."""
    noun, of, relation = column.partition(" (")[0].rpartition(" of the ")
    label = relation[:1].upper() + relation[1:]
    attribute = LABEL_OF_NOUN.get(noun[:1].lower() + noun[1:])
    return (label, attribute) if of and attribute and label in values else None


def _row(question: Question, found: Findings, name: str) -> tuple[str, ...] | None:
    """The row of a thing, if everything has been looked up."""
    if name in found.rows:
        return found.rows[name]
    if name not in found.sources or _next_calls(question, found, name):
        return None
    return _cells(question, found, name)


def _cells(question: Question, found: Findings, name: str) -> tuple[str, ...]:
    """As much of a row as is known."""
    if name in found.rows:
        return found.rows[name]
    cells = [name]
    own = found.by_address.get(found.by_title.get(name, ""))
    for column in question.columns[1:]:
        value = found.value(name, column.partition(" (")[0])
        relation = _relation(own.values, column) if own and value is None else None
        if relation:
            related = found.by_address.get(own.links.get(relation[0], ""))
            value = found.value(related.name, relation[1]) if related else None
        cells.append(value or "")
    return tuple(cells)


def _answer(question: Question, found: Findings, names: Sequence[str]) -> str:
    """The table, with whatever is known. A helper's has no heading, since it was asked for rows."""
    rows = [_cells(question, found, name) for name in names]
    rows = [row for row in rows if any(row[1:])] or rows
    if question.names:
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return table(question.columns, rows)


def _summary(question: Question, found: Findings) -> str:
    """What is found, and what is left to do."""
    names, whole = _names(question, found)
    rows = [row for name in names if (row := _row(question, found, name))]
    done = {row[0] for row in rows}
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if not whole:
        return text or "Nothing yet."
    return f"{text}\n{TO_DO}{'; '.join(name for name in names if name not in done) or 'nothing'}"
