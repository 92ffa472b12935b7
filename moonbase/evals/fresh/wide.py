"""Wide search: tables and chains over a WideWorld of the item's own seed, in English or translated page by page.

What is expected is the world's own answer, from the facts that the pages were written from. Both solvers know pages
only, in the language of the question. A reads every page, keeps all facts by name, and sorts pages that disagree; B has
nothing but `search` and `open`, as a model has, follows links, and weighs what it finds one page at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from moonbase.agents.worlds.grading import score
from moonbase.agents.worlds.wideworld import WideWorld, make_tasks, make_world
from moonbase.agents.worlds.wideworld.facts import KINDS
from moonbase.agents.worlds.world import Column, PagedWorld, Task
from moonbase.evals.fresh import wide_chinese as zh_words
from moonbase.evals.fresh.answers import READ, final
from moonbase.evals.fresh.problem import Draw

Spec = dict[str, Any]
PAGES = 2000
WORLDS = 4
"""Worlds of a seed, among which its items are spread."""
# Of each difficulty: (family, fewest and most rows, other knobs).
_KNOBS: tuple[tuple[tuple[str, tuple[int, int] | None, dict[str, Any]], ...], ...] = (
    (("narrow", (1, 2), {"columns": 2, "second_page": False}),),
    (("narrow", (2, 2), {"columns": 4}), ("deep", None, {"hops": 2})),
    (("distract", (3, 4), {"columns": 3}), ("deep", None, {"hops": 3}), ("wide", (6, 10), {"columns": 3})),
    (("wide", (14, 24), {"columns": 3}), ("mixed", (8, 14), {"hops": 2, "columns": 3}), ("deep", None, {"hops": 4})),
    (("wide", (40, 64), {"columns": 4}), ("mixed", (24, 40), {"hops": 3, "columns": 4}),
     ("deep", None, {"hops": 5, "contested": True})),
)


def make(draw: Draw, difficulty: int) -> Spec:
    kind, rows, others = draw.choice(_KNOBS[difficulty - 1])
    knobs = others | ({"rows": draw.randint(*rows)} if rows else {})
    return {"kind": kind, "difficulty": difficulty, "knobs": knobs,
            "world": draw.root * WORLDS + draw.randrange(WORLDS),
            "task": draw.getrandbits(48)}


@functools.lru_cache(maxsize=2 * WORLDS)
def _world(seed: int) -> WideWorld:
    return make_world(seed, pages=PAGES, grammar="test")


@functools.lru_cache(maxsize=WORLDS)
def _chinese_world(seed: int) -> PagedWorld:
    english = _world(seed)
    return PagedWorld(f"{english.name}-zh", [zh_words.page(page) for page in english.pages])


def world_of(spec: Spec, language: str) -> PagedWorld:
    """What `search` and `open` look into."""
    return _chinese_world(spec["world"]) if language == "zh" else _world(spec["world"])


@functools.lru_cache(maxsize=4096)
def _task_of(world: int, kind: str, knobs: tuple[tuple[str, Any], ...], seed: int) -> Task:
    return make_tasks(_world(world), kind, 1, seed, **dict(knobs))[0]


def task_of(spec: Spec, language: str) -> Task:
    """The WideWorld task; in Chinese its columns, words and dates are translated."""
    task = _task_of(spec["world"], spec["kind"], tuple(sorted(spec["knobs"].items())), spec["task"])
    if language == "en":
        return task
    names = {column.name: _column_zh(column) for column in task.columns}
    columns = tuple(dataclasses.replace(column, name=names[column.name]) for column in task.columns)
    answer = (zh_words.value(task.answer) if isinstance(task.answer, str)
              else [{names[name]: zh_words.value(cell) for name, cell in row.items()} for row in task.answer])
    return dataclasses.replace(task, columns=columns, answer=answer, keys=tuple(names[key] for key in task.keys),
                               prompt=_prompt_zh(task))


# What is asked, in Chinese, read out of the English prompt, which follows a few patterns.

_NOUNS = {attribute.noun: attribute.label for kind in KINDS.values() for attribute in kind.attributes}
_RELATIONS = {relation.noun: relation.label for kind in KINDS.values() for relation in kind.relations}


def _column_zh(column: Column) -> str:
    """"Elevation (m)", "Region" or "Date of foundation of the employer"; "elevation" of a single answer."""
    name = column.name.removesuffix(f" ({column.unit})")
    unit = f"（{zh_words.UNITS.get(column.unit, column.unit)}）" if column.unit else ""
    if name in zh_words.LABELS:
        return zh_words.LABELS[name] + unit
    noun, of, relation = name.rpartition(" of the ")
    if not of:
        return zh_words.LABELS[_NOUNS[name]] + unit
    noun = noun[0].lower() + noun[1:]
    return f"{zh_words.LABELS[_RELATIONS[relation]]}的{zh_words.LABELS[_NOUNS[noun]]}{unit}"


def _phrase_zh(phrase: str) -> str:
    """the mayor of the birthplace of X (a person) → X（人物）的出生地的市长"""
    found = re.fullmatch(r"((?:[Tt]he [a-z ]+? of )*)(.+) \(an? (\w+)\)", phrase)
    steps = re.findall(r"[Tt]he ([a-z ]+?) of ", found[1])
    chain = "".join(f"的{zh_words.LABELS[_RELATIONS[step]]}" for step in reversed(steps))
    return f"{found[2]}（{zh_words.KIND_NAMES[found[3]]}）{chain}"


def _prompt_zh(task: Task) -> str:
    start = task.prompt.partition("\n\n")[0]
    if task.family == "deep":
        found = re.fullmatch(r"What is the (.+?)(?: \(in ([^()]*)\))? of ((?:the [a-z ]+? of )+.+ \(an? \w+\))\?",
                             start)
        unit = f"（单位：{zh_words.UNITS.get(found[2], found[2])}）" if found[2] else ""
        noun = zh_words.LABELS[_NOUNS[found[1]]]
        return (f"{_phrase_zh(found[3])}的{noun}{unit}是多少？\n\n{zh_words.RULE}\n\n"
                "最后单独用一行写出“答案：…”，其中只写这个值。")
    rows = f"前 {task.meta['rows']} 个成员（按名单编号）" if " first " in start else "全部成员"
    if task.family == "mixed":
        found = re.fullmatch(r"(.+) is a member of just one (\w+)\. .*", start)
        group = zh_words.GROUPS[found[2]]
        text = f"{_phrase_zh(found[1])}只属于一个{group}。请查明是哪一个{group}，并列出其{rows}的表格。"
    elif task.family == "wide":
        noun = next(group for group in zh_words.GROUPS if f"{task.meta['group']} {group}" in start)
        text = f"请编制 {task.meta['group']} {zh_words.GROUPS[noun]}的{rows}的表格。"
    else:
        text = f"请列出以下各项的数据：{'、'.join(row['Name'] for row in task.answer)}。"
        if task.family == "distract":
            text += "注意：另有一些名称只差几个字母的。"
    header = " | ".join(_column_zh(column) for column in task.columns)
    return f"{text}\n\n请用一个 Markdown 表格回答，各列如下，每项一行，不得重复：{header}\n\n{zh_words.RULE}"


def render(spec: Spec, language: str) -> str:
    return task_of(spec, language).prompt


def gold(spec: Spec, language: str) -> Any:
    """A text, or rows by column name."""
    return task_of(spec, language).answer


@functools.lru_cache(maxsize=2 * WORLDS)
def _read_pages(world: int, language: str) -> tuple[dict[str, list[dict[str, str]]], dict[str, list[str]]]:
    """The facts of each name, a dict a page; the members of each list, by its name."""
    facts: dict[str, list[dict[str, str]]] = {}
    lists: dict[str, list[str]] = {}
    label = zh_words.LABELS if language == "zh" else {name: name for name in zh_words.LABELS}
    for page in world_of({"world": world}, language).pages:
        if page.dead:
            continue
        lines = page.text.split("\n")
        pairs = [line.split(": ", 1) for line in lines[2:] if ": " in line]
        found = {name: re.sub(r" ?<[^<>]*>$", "", said) for name, said in pairs}
        if label["Source"] in found:
            facts.setdefault(found[label["Name"]], []).append(found)
        if member := re.fullmatch(r"(?:Members of the )?(\S.*?) (?:\w+, page \d+ of \d+|"
                                  r"\w+ 成员，第 \d+ 页，共 \d+ 页)", lines[0]):
            lists.setdefault(member[1], []).extend(
                line.partition(". ")[2] for line in lines if re.match(r"\d+\. ", line))
    return facts, lists


class _AllPages:
    """What every page of a world says."""

    def __init__(self, spec: Spec, language: str) -> None:
        self._facts, self._lists = _read_pages(spec["world"], language)
        self._zh = language == "zh"

    def value(self, name: str, label: str) -> str:
        """By the rule: the registry's, else the latest."""
        source, as_of = _label("Source", self._zh), _label("As of", self._zh)
        registry = zh_words.SOURCES["registry"] if self._zh else "registry"
        pages = [page for page in self._facts[name] if label in page]
        return max(pages, key=lambda page: (page[source] == registry, page[as_of]))[label]

    def members(self, group: str) -> list[str]:
        return self._lists[group]

    def group_of(self, name: str) -> str:
        return next(group for group, members in self._lists.items() if name in members)


class _Visitor:
    """What search and links lead to."""

    def __init__(self, spec: Spec, language: str) -> None:
        self._world, self._zh = world_of(spec, language), language == "zh"

    def _facts(self, text: str) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in text.splitlines()[2:] if ": " in line)

    def value(self, name: str, label: str) -> str:
        found: dict[str, str] = {}
        for hit in self._world.search(name, 50):
            if name not in hit.title:
                continue
            facts = self._facts(self._world.open(hit.url))
            if facts.get(_label("Name", self._zh)) != name or label not in facts:
                continue
            if "//registry." in hit.url:
                return facts[label].partition(" <")[0]
            found[facts[_label("As of", self._zh)]] = facts[label].partition(" <")[0]
        return found[sorted(found)[-1]]

    def members(self, group: str) -> list[str]:
        first = next(hit for hit in self._world.search(f"{group} {'成员' if self._zh else 'members'}", 50)
                     if hit.url.endswith("/1") and f"{group} " in hit.title and "/lists." in hit.url
                     and "/index/" not in hit.url)
        address, members = first.url, []
        while address:
            text = self._world.open(address)
            members += [line.partition(". ")[2] for line in text.splitlines() if line.partition(". ")[0].isdecimal()]
            address = self._facts(text).get(_label("Next page", self._zh), "").strip("<>")
        return members

    def group_of(self, name: str) -> str:
        for hit in self._world.search(name, 50):
            said = self._facts(self._world.open(hit.url)) if hit.title == name else {}
            if _label("Member of", self._zh) in said:
                return said[_label("Member of", self._zh)].removeprefix("the ").partition(" <")[0].rpartition(" ")[0]
        raise KeyError(name)


def _label(name: str, zh: bool) -> str:
    return zh_words.LABELS[name] if zh else name


def solve_a(spec: Spec, language: str) -> Any:
    """From the texts of all pages."""
    return _solve(spec, language, _AllPages(spec, language))


def solve_b(spec: Spec, language: str) -> Any:
    """By search and open alone."""
    return _solve(spec, language, _Visitor(spec, language))


def _solve(spec: Spec, language: str, source: _AllPages | _Visitor) -> Any:
    """What the question asks for, read out of its English wording; every fact is the source's."""
    english, zh = task_of(spec, "en"), language == "zh"

    def look_up(name: str, what: str, unit: str) -> str:
        """The value without its unit."""
        return source.value(name, _label(what, zh)).removesuffix(f" {zh_words.UNITS.get(unit, unit) if zh else unit}")

    def follow(phrase: str) -> str:
        found = re.fullmatch(r"((?:[Tt]he [a-z ]+? of )*)(.+) \(an? \w+\)", phrase)
        name = found[2]
        for step in reversed(re.findall(r"[Tt]he ([a-z ]+?) of ", found[1])):
            name = look_up(name, _RELATIONS[step], "")
        return name

    start = english.prompt.partition("\n\n")[0]
    if spec["kind"] == "deep":
        found = re.fullmatch(r"What is the (.+?)(?: \(in ([^()]*)\))? of ((?:the [a-z ]+? of )+.+ \(an? \w+\))\?",
                             start)
        return look_up(follow(found[3]), _NOUNS[found[1]], found[2] or "")
    if spec["kind"] == "mixed":
        group = source.group_of(follow(re.fullmatch(r"(.+) is a member of just one \w+\. .*", start)[1]))
        members = source.members(group)[: spec["knobs"]["rows"]]
    elif spec["kind"] == "wide":
        kinds = "|".join(zh_words.GROUPS)
        group = re.search(rf"\bthe ((?:[A-Z][\w'-]* )+)(?:{kinds})\b", start)[1].strip()
        members = source.members(group)[: spec["knobs"]["rows"]]
    else:
        named = re.search(r": (.*?)\.(?: Take care.*)?$|(?:people|towns?|person|compan\w+|vessels?|books?) (.*)\.$",
                          start)
        members = re.split(r", | and ", named[1] or named[2])
    rows = []
    for name in members:
        row = {}
        for column in english.columns:
            what = column.name.removesuffix(f" ({column.unit})")
            noun, of, relation = what.rpartition(" of the ")
            if of:
                said = look_up(look_up(name, _RELATIONS[relation], ""), _NOUNS[noun[0].lower() + noun[1:]], column.unit)
            else:
                said = look_up(name, what, column.unit)
            row[_column_zh(column) if zh else column.name] = said
        rows.append(row)
    return rows


_UNITS_EN = {"平方公里": "km²", "平方千米": "km²", "百万马克": "million marks", "厘米": "cm", "米": "m"}


def _plain(text: str) -> str:
    """Chinese dates, units, punctuation and myriads as the grader of tables knows them."""
    text = text[-READ * 4 :]
    text = re.sub(r"(\d{4})\s?年\s?(\d{1,2})\s?月\s?(\d{1,2})\s?日", r"\1-\2-\3", text)
    text = re.sub(r"(\d[\d,]{0,15}(?:\.\d{1,9})?)\s?(万|亿)", _spell_out, text)
    for unit, english in _UNITS_EN.items():
        text = re.sub(rf"(\d) ?{unit}(?!\w)", rf"\1 {english}", text)
    return text.replace("（", "(").replace("）", ")").replace("｜", "|").replace("：", ":")


def _spell_out(found: re.Match[str]) -> str:
    from decimal import Decimal

    number = Decimal(found[1].replace(",", "")) * (10**4 if found[2] == "万" else 10**8)
    return f"{number:f}".rstrip("0").rstrip(".") if "." in f"{number:f}" else f"{number:f}"


def verify(spec: Spec, language: str, target: Any, text: str) -> tuple[float, str]:
    """Item-F1 of a table; right or wrong of a single value."""
    task = task_of(spec, language)
    if language == "zh":
        columns = tuple(dataclasses.replace(column, name=_plain(column.name)) for column in task.columns)
        answer = (_plain(target) if isinstance(target, str)
                  else [{_plain(name): _plain(cell) for name, cell in row.items()} for row in target])
        task = dataclasses.replace(task, columns=columns, answer=answer)
        text = _plain(text)
    if isinstance(task.answer, str):
        text = f"Answer: {final(text)}"
    result = score(task, text)
    return result.item_f1, "; ".join(result.notes)


def effort(spec: Spec) -> int:
    knobs = spec["knobs"]
    return knobs.get("hops", 0) * 3 + knobs.get("rows", 0) * knobs.get("columns", 1) // 2
