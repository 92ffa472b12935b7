"""What the words say is what was meant: questions are read back, in both languages, by patterns that are written here.

Families whose solvers read the question themselves (logic, long, wide, gym) are checked by these.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from moonbase.evals.fresh import generate, table_questions, tool_use

Spec = dict[str, Any]


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def coefficients(side: str, names: str) -> list[int]:
    """3x - y + 12z: one for each of the names."""
    found = {name: int(f"{sign or '+'}{number or 1}") for sign, number, name in re.findall(
        rf"([+-]?) ?(\d*)([{names}])", side)}
    return [found.get(name, 0) for name in names]


def polynomial(text: str) -> list[int]:
    found: dict[int, int] = {}
    for sign, number, x, power in re.findall(r"([+-]?) ?(\d*)(x?)(?:\^(\d+))?(?=[ ]|$)", text):
        if number or x:
            found[int(power or 1) if x else 0] = int(f"{sign or '+'}{number or 1}")
    return [found.get(power, 0) for power in range(max(found) + 1)]


def read_maths(kind: str, text: str) -> Spec:
    """The fields of the specification, from the question alone."""
    if kind == "linear-system":
        lines = [line.strip() for line in text.splitlines() if " = " in line]
        names = "xyzw"[: len(lines)]
        wanted = re.search(r"(?:value of|并求) (.*?)(?:\.| 的值)", text)[1]
        return {"rows": [coefficients(line.split(" = ")[0], names) for line in lines],
                "right": [int(line.split(" = ")[1]) for line in lines], "weights": coefficients(wanted, names)}
    if kind == "power-remainder":
        return {"powers": [[int(a), int(b)] for a, b in re.findall(r"(\d+)\^(\d+)", text)],
                "modulus": int(re.search(r"(?:divided by|除以) (\d+)", text)[1])}
    if kind == "counting":
        _, most, *divisors = integers(text)
        return {"most": most, "divisors": divisors}
    if kind == "integral":
        what, low, high = (re.search(r"integral of (.*) over x from (-?\d+) to (-?\d+)\.", text)
                           or re.search(r"求函数 (.*) 在区间 \[(-?\d+), (-?\d+)\] 上的定积分", text)).groups()
        return {"coefficients": polynomial(what), "low": int(low), "high": int(high)}
    if kind == "paths":
        points = [[int(x), int(y)] for x, y in re.findall(r"\((\d+), (\d+)\)", text)]
        return {"width": points[1][0], "height": points[1][1], "closed": points[2:]}
    if kind == "probability":
        counts = [int(one) for one in re.findall(r"(\d+) (?:red|blue|green|white|个[红蓝绿白]球(?=[、。]))", text)]
        drawn = re.search(r"(\d+) are drawn|取出 (\d+) 个球", text)
        wanted = re.search(r"is exactly (\d+)|恰好有 (\d+) 个红球", text)
        return {"counts": counts, "drawn": int(drawn[1] or drawn[2]), "wanted": int(wanted[1] or wanted[2])}
    rule = re.search(r"a\(n\) = (.*?)[.。] ?(?:Find|求)", text)[1]
    steps = {int(place): int(number or 1) for number, place in re.findall(r"(\d*)a\(n-(\d)\)", rule)}
    place, modulus = re.search(r"(?:remainder of|求) a\((\d+)\) (?:divided by|除以) (\d+)", text).groups()
    return {"first": [int(value) for value in re.findall(r"a\(\d\) = (\d+)", text)],
            "coefficients": [steps[step] for step in sorted(steps)], "place": int(place), "modulus": int(modulus)}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_mathematics_says_what_it_means(language: str) -> None:
    kinds = set()
    for index in range(120):
        problem = generate("maths", "wording", 1 + index % 5, index, language)
        text = problem.prompt.rpartition("\n\n")[0]
        assert read_maths(problem.kind, text) == {
            name: value for name, value in problem.spec.items() if name not in ("kind", "difficulty")}, text
        kinds.add(problem.kind)
    assert len(kinds) == 7


WISHES = {
    "en": ((r"Bring \w+ (\w+) to \w+ (\w+)\.", "move", "to"),
           (r"Make the priority of \w+ (\w+) (\w+)\.", "rank", "level"),
           (r"(\d+) more have arrived for \w+ (\w+)\.", "by", ""),
           (r"\w+ (\w+) should have a count of (\d+)\.", "to", ""),
           (r"Half of what \w+ (\w+) held is gone; correct its count\.()", "half", ""),
           (r"Throw \w+ (\w+) away\.()", "discard", ""), (r"Reserve \w+ (\w+)\.()", "reserve", ""),
           (r"Put everything of \w+ (\w+) into \w+ (\w+)\.", "merge", "to"),
           (r"Take (\d+) out of \w+ (\w+) into a new \w+ (\w+)\.", "split", ""),
           (r"\w+ (\w+) need not be reserved any longer\.()", "release", "")),
    "zh": ((r"把\w+ (\w+) 移到\w+ (\w+)。", "move", "to"), (r"把\w+ (\w+) 的优先级设为(\w+)。", "rank", "level"),
           (r"\w+ (\w+) 新到了 (\d+) 件。", "by", ""), (r"\w+ (\w+) 的数量应为 (\d+)。", "to", ""),
           (r"\w+ (\w+) 的数量少了一半，请更正。()", "half", ""), (r"丢弃\w+ (\w+)。()", "discard", ""),
           (r"预留\w+ (\w+)。()", "reserve", ""), (r"把\w+ (\w+) 的全部内容并入\w+ (\w+)。", "merge", "to"),
           (r"从\w+ (\w+) 中取出 (\d+) 件放入新的\w+ (\w+)。", "split", ""),
           (r"\w+ (\w+) 不再需要预留。()", "release", "")),
}
LEVELS = {"低": "low", "普通": "normal", "高": "high"}


def wish_of(line: str, language: str) -> Spec:
    for pattern, act, name in WISHES[language]:
        if found := re.fullmatch(pattern, line):
            numbers = [int(part) for part in found.groups() if part.isdecimal()]
            words = [part for part in found.groups() if part and not part.isdecimal()]
            if act in ("by", "to", "half"):
                return {"act": "adjust", "how": act, "id": words[0], "number": (numbers or [None])[0]}
            wish = {"act": act, "id": words[0]} | ({name: LEVELS.get(words[1], words[1])} if name else {})
            return wish | ({"number": numbers[0], "to": words[1]} if act == "split" else {})
    raise AssertionError(line)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_requests_for_calls_say_what_they_mean(language: str) -> None:
    acts = set()
    for index in range(80):
        problem = generate("tools", "wording", 5, index, language)
        wishes = [wish_of(line, language) for line in re.findall(r"(?m)^\d+\. (.*)$", problem.prompt)]
        # Half of it needs no number.
        meant = [wish | ({"number": None} if wish.get("how") == "half" else {}) for wish in problem.spec["wishes"]]
        assert wishes == meant
        acts |= {wish["act"] for wish in wishes}
        stock = {name: integers(line)[-1] for name, line in re.findall(r"(?m)^- (\w+)[:：](.*)$", problem.prompt)}
        assert stock == {name: one["count"] for name, one in problem.spec["state"].items()}
    assert acts == set(tool_use._VERBS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_about_tables_say_what_they_mean(language: str) -> None:
    words = {column[1 + (language == "zh")]: column[0] for column in (
        *table_questions._CATEGORIES, *table_questions._NUMBERS, *table_questions._PLACE)}
    signs = {"of at least": ">=", "不小于": ">=", "": "=", "为": "="}
    values = {zh: latin for latin, zh in table_questions._WORDS_ZH.items()}
    names = "|".join(sorted(words, key=len, reverse=True))
    for index in range(120):
        problem = generate("tables", "wording", 1 + index % 5, index, language)
        asked = re.sub(r"（\w+）", "", problem.prompt.split("\n\n")[-2])
        pattern = (rf"\b({names})( of at least)? (\w+)(?=,| and|[?:]| are| \()" if language == "en"
                   else rf"({names})(为|不小于 )(\w+?)(?=、| ?的)")
        start = asked.split(" with ", 1)[-1] if language == "en" else asked
        where = [[words[name], signs[sign.strip()], int(value) if value.isdecimal() else values.get(value, value)]
                 for name, sign, value in re.findall(pattern, start)]
        assert where == problem.spec["question"]["where"], (asked, where, problem.spec["question"]["where"])
