"""What an agent on a wide task can know from the messages that it sees, and from nothing else.

A scripted policy keeps no memory: whatever a context strategy hides from it is lost to it, as it would be to a model.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moonbase.agents.models.base import Message
from moonbase.agents.worlds.wideworld.facts import KINDS

_HIT = re.compile(r"^\d+\. (.+) <(https?://[^<>]+)>$", re.MULTILINE)
_FACT = re.compile(r"^([A-Z][\w ]*): (.+?)(?: <(https?://[^<>]+)>)?$", re.MULTILINE)
_MEMBER = re.compile(r"^(\d+)\. (.+)$", re.MULTILINE)
_LIST = re.compile(r"^Members of the (.+), page (\d+) of (\d+)\n\nThe .+? has (\d+) ")
_GROUP = re.compile(r"\bmembers? of the (.+?)(?:, as its list numbers them)?(?: \(.*\))?\.\n")
_FIRST = re.compile(r"\bthe first (?:(\d+) members|member) of the ")
NAMED = re.compile(r"^Names: (.+)$", re.MULTILINE)
COLUMNS = re.compile(r"^.*: (Name \| .+)$", re.MULTILINE)
ROW = re.compile(r"^\| (.+) \|$", re.MULTILINE)
TO_DO = "Still to do: "
LABEL_OF_NOUN = {attribute.noun: attribute.label for kind in KINDS.values() for attribute in kind.attributes}
"""That "date of birth" is the line "Born": what a reader of English knows."""
DECISIVE = re.compile(r": (?:registry record|new .+)$")
"""Titles of pages that may overrule the gazetteer; an earlier edition, which its title names too, cannot."""


@dataclass(frozen=True)
class Question:
    """What is asked: a group's members, or things by name."""

    columns: tuple[str, ...]
    group: str = ""
    """Name and kind, `Laliho Slihul union`."""
    first: int | None = None
    """Only so many of the members; None: all."""
    names: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1024)
def read_question(text: str) -> Question:
    """The task of a main agent (as `wide` tasks put it) or of a helper (with a line `Names: A; B`)."""
    columns = tuple(COLUMNS.search(text)[1].split(" | "))
    named = NAMED.search(text)
    if named:
        return Question(columns, names=tuple(named[1].split("; ")))
    first = _FIRST.search(text)
    return Question(columns, _GROUP.search(text)[1], int(first[1] or 1) if first else None)


@dataclass(frozen=True)
class Source:
    """A page that states facts of one thing."""

    name: str
    source: str
    as_of: str
    values: dict[str, str]
    links: dict[str, str]


@dataclass
class Findings:
    """All that is in sight."""

    parts: dict[int, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    """Part of the list -> its members with their numbers."""
    num_parts: int = 0
    num_members: int = 0
    hits: dict[str, str] = field(default_factory=dict)
    """Address -> title, of all search results."""
    queries: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    sources: dict[str, list[Source]] = field(default_factory=dict)
    """By the name of the thing."""
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows that were noted, summed up or reported."""
    to_do: tuple[str, ...] = ()
    """Names that a summary says are left."""
    by_address: dict[str, Source] = field(default_factory=dict)
    by_title: dict[str, str] = field(default_factory=dict)

    def value(self, name: str, label: str) -> str | None:
        """By the rule: the registry, or else the latest."""
        known = [source for source in self.sources.get(name, ()) if label in source.values]
        registry = [source for source in known if source.source == "registry"]
        best = max(registry or known, key=lambda source: source.as_of, default=None)
        return None if best is None else best.values[label]


def look(messages: Sequence[Message], num_columns: int) -> Findings:
    """Read everything that is visible."""
    found = Findings()
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for message in messages[1:] if messages and messages[0]["role"] == "system" else messages:
        text = message.get("content") or ""
        if message["role"] == "tool":
            _look_at_result(found, *calls.get(message["tool_call_id"], ("", {})), text, num_columns)
            continue
        for call in message.get("tool_calls") or ():
            function = call["function"]
            calls[call["id"]] = (function["name"], _arguments(function["arguments"]))
        if text:
            rows, left = _noted(text, num_columns)
            found.rows.update(rows)
            found.to_do = left or found.to_do
    return found


def _look_at_result(found: Findings, name: str, arguments: dict[str, Any], text: str, num_columns: int) -> None:
    if name == "search" and not text.startswith("["):
        found.queries.add(arguments["query"])
        for title, url in _hits(text):
            found.hits[url] = title
            found.by_title[title] = url
    elif name == "open" and not text.startswith("["):
        found.opened.add(arguments["url"])
        part = _list_part(text)
        source = None if part else _source(text)
        if part:
            number, found.num_parts, found.num_members, members = part
            found.parts[number] = members
        elif source:
            found.by_address[arguments["url"]] = source
            found.sources.setdefault(source.name, []).append(source)
    elif name == "assign_tasks":
        for rows in _reports(text, num_columns):
            found.rows.update(rows)


@functools.lru_cache(maxsize=65536)
def _hits(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(_HIT.findall(text))


@functools.lru_cache(maxsize=4096)
def _list_part(text: str) -> tuple[int, int, int, tuple[tuple[int, str], ...]] | None:
    head = _LIST.match(text)
    if head is None:
        return None
    members = tuple((int(number), name) for number, name in _MEMBER.findall(text))
    return int(head[2]), int(head[3]), int(head[4]), members


@functools.lru_cache(maxsize=65536)
def _source(text: str) -> Source | None:
    facts = _FACT.findall(text)
    values = {label: value for label, value, _ in facts}
    if not {"Name", "Source", "As of"} <= values.keys():
        return None
    return Source(values["Name"], values["Source"], values["As of"], values,
                  {label: link for label, _, link in facts if link})


@functools.lru_cache(maxsize=65536)
def _noted(text: str, num_columns: int) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Rows of tables in a text, and the names that it says are left."""
    rows = (tuple(cell.strip() for cell in row.split(" | ")) for row in ROW.findall(text))
    left = [line.removeprefix(TO_DO) for line in text.splitlines() if line.startswith(TO_DO)]
    return ({row[0]: row for row in rows if len(row) == num_columns and row[0] not in ("Name", "---")},
            tuple(left[-1].split("; ")) if left else ())


@functools.lru_cache(maxsize=1024)
def _reports(text: str, num_columns: int) -> tuple[dict[str, tuple[str, ...]], ...]:
    """What sub-agents said: a JSON line for each."""
    found = []
    for line in text.splitlines():
        try:
            found.append(_noted(json.loads(line)["result"], num_columns)[0])
        except (ValueError, KeyError, TypeError):
            continue
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def _arguments(text: str) -> dict[str, Any]:
    return json.loads(text)


def table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
