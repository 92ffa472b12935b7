"""Logic puzzles solved from the words of their question, in English or Chinese: nothing here knows how they were made.

Shapes: C candidates (orders of seats, or assignments of truth), P people.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# What is said of seats: a pattern, and what it means of the seats of those whom it names, counted from 1.
_SEATS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (r"(N) does not sit in seat (#)\.", r"(N)不坐在第 (#) 个座位。", lambda a, number: a != number),
    (r"(N) sits in seat (#)\.", r"(N)坐在第 (#) 个座位。", lambda a, number: a == number),
    (r"(N) sits somewhere to the left of (N)\.", r"(N)坐在(N)左边的某个位置。", lambda a, b: b > a),
    (r"(N) does not sit right beside (N)\.", r"(N)与(N)不相邻。", lambda a, b: (a - b) ** 2 > 1),
    (r"(N) sits right beside (N)\.", r"(N)与(N)相邻。", lambda a, b: (a - b) ** 2 == 1),
    (r"The seat numbers of (N) and (N) differ by (#)\.", r"(N)与(N)的座位号相差 (#)。",
     lambda a, b, number: (a - b) ** 2 == number**2),
    (r"(N) sits somewhere between (N) and (N)\.", r"(N)坐在(N)与(N)之间的某个位置。",
     lambda a, b, c: (np.minimum(b, c) < a) & (a < np.maximum(b, c))),
)
_SAID: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (r"(N) is a knight\.", r"(N)是骑士。", lambda a: a),
    (r"(N) is a knave\.", r"(N)是无赖。", lambda a: ~a),
    (r"(N) and (N) are of the same kind\.", r"(N)和(N)是同一类人。", lambda a, b: ~(a ^ b)),
    (r"(N) and (N) are of different kinds\.", r"(N)和(N)不是同一类人。", lambda a, b: a ^ b),
    (r"(N) and (N) are both knights\.", r"(N)和(N)都是骑士。", lambda a, b: a & b),
    (r"At least one of (N) and (N) is a knight\.", r"(N)和(N)中至少有一个是骑士。", lambda a, b: a | b),
    (r"Neither (N) nor (N) is a knight\.", r"(N)和(N)都不是骑士。", lambda a, b: ~(a | b)),
    (r"If (N) is a knight, so is (N)\.", r"如果(N)是骑士，那么(N)也是骑士。", lambda a, b: ~a | b),
)


@functools.cache
def _orders(size: int) -> np.ndarray:
    """int8 [C, P]: everyone's seat, from 1."""
    return np.array(list(itertools.permutations(range(1, size + 1))), np.int8)


def _holds(line: str, table: Any, place: int, people: list[str], columns: np.ndarray) -> np.ndarray:
    """bool [C]: where a line is true. Raises ValueError for a line that says nothing known."""
    for row in table:
        found = re.fullmatch(row[place].replace("(N)", "(.+?)").replace("#", r"\d+"), line)
        if found and all(word.isdecimal() or word in people for word in found.groups()):
            return row[2](*(int(word) if word.isdecimal() else columns[:, people.index(word)]
                            for word in found.groups()))
    raise ValueError(f"no such clue: {line}")


def seats(text: str, language: str) -> list[str]:
    """Who sits where, from left to right. Raises ValueError where that is not settled."""
    zh = language == "zh"
    people = re.split(", |、", re.match(r"(.*?)共 \d" if zh else r"(.*?) sit in", text)[1])
    columns = _orders(len(people))
    for line in re.findall(r"(?m)^\d+\. (.*)$", text):
        columns = columns[_holds(line, _SEATS, int(zh), people, columns)]
    (row,) = columns
    return [people[place] for place in np.argsort(row)]


def knights(text: str, language: str) -> list[str]:
    """The knights, sorted by code point. Raises ValueError where that is not settled."""
    zh = language == "zh"
    people = re.split(", |、", re.search(r"岛民有(.*?)。" if zh else r"Its people are (.*?)\.", text)[1])
    columns = np.array(list(itertools.product((False, True), repeat=len(people))))
    for speaker, line in re.findall("(?m)^(.*?)：“(.*)”$" if zh else '(?m)^(.*?): "(.*)"$', text):
        columns = columns[_holds(line, _SAID, int(zh), people, columns) == columns[:, people.index(speaker)]]
    (row,) = columns
    return sorted(name for name, honest in zip(people, row, strict=True) if honest)
