"""Logic puzzles with exactly one solution, proven for every item by going through all candidates.

order: who sits where in a row; knights: who tells the truth. The generator keeps a puzzle if one of all candidates
fits, and that one is expected. Solver A knows the words of the question alone: it parses them in their language and
goes through all candidates as columns of numbers (`logic_reading.py`). Solver B is a backtracking search on the clues
that stops at the second solution, and says what each clue means in words of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moonbase.evals.fresh.answers import final, fold, read_items
from moonbase.evals.fresh.problem import Draw, answer_line

Spec = dict[str, Any]
SEATS = (4, 5, 6, 7, 8)
ISLANDERS = (3, 4, 6, 8, 10)
_NAMES = (("Ada", "阿达"), ("Ben", "本恩"), ("Cleo", "克丽奥"), ("Dan", "丹恩"), ("Eva", "伊娃"), ("Finn", "芬恩"),
          ("Gus", "古斯"), ("Hana", "哈娜"), ("Ivo", "伊沃"), ("Jun", "小军"), ("Kim", "金敏"), ("Lea", "莉娅"),
          ("Max", "麦克斯"),
          ("Nora", "诺拉"), ("Otto", "奥托"), ("Pia", "皮娅"), ("Quin", "奎因"), ("Rosa", "罗莎"), ("Sam", "山姆"),
          ("Tara", "塔拉"), ("Uma", "乌玛"), ("Vera", "维拉"), ("Wes", "韦斯"), ("Yan", "小燕"), ("Zoe", "佐伊"))


def make(draw: Draw, difficulty: int) -> Spec | None:
    kind = draw.choice(("order", "knights"))
    spec = (_make_order if kind == "order" else _make_knights)(draw, difficulty)
    return spec and {"kind": kind, "difficulty": difficulty} | spec


def leaks(spec: Spec) -> bool:
    """Whether the people, named by the alphabet, happen to sit as they are named."""
    return spec["kind"] == "order" and any(gold(spec, language) == sorted(names(spec, language))
                                           for language in ("en", "zh"))


def names(spec: Spec, language: str) -> list[str]:
    return [_NAMES[number][language == "zh"] for number in spec["people"]]


def render(spec: Spec, language: str) -> str:
    return (_show_order if spec["kind"] == "order" else _show_knights)(spec, language == "zh", names(spec, language))


def gold(spec: Spec, language: str) -> list[str]:
    """Raises AssertionError where there is not exactly one solution."""
    if spec["kind"] == "order":
        found = [tuple(seats) for seats in _fitting(len(spec["people"]), spec["clues"]).tolist()]
    else:
        size = len(spec["people"])
        found = [truth for bits in range(1 << size)
                 if _consistent(truth := [bits >> i & 1 for i in range(size)], spec["claims"])]
    assert len(found) == 1, "a logic puzzle without exactly one solution"
    return _named(spec, language, found[0])


def solve_a(spec: Spec, language: str) -> list[str]:
    from moonbase.evals.fresh import logic_reading

    text = render(spec, language)
    return (logic_reading.seats if spec["kind"] == "order" else logic_reading.knights)(text, language)


def solve_b(spec: Spec, language: str) -> list[str]:
    search = _search_order(spec) if spec["kind"] == "order" else _search_knights(spec)
    found = list(itertools.islice(search, 2))
    assert len(found) == 1, "a logic puzzle without exactly one solution"
    return _named(spec, language, found[0])


def _named(spec: Spec, language: str, solution: Any) -> list[str]:
    """Order: who sits from left to right (`solution`: each person's seat). Knights: the knights, sorted by code
    point."""
    people = names(spec, language)
    if spec["kind"] == "order":
        return [name for _, name in sorted(zip(solution, people, strict=True))]
    return sorted(name for name, honest in zip(people, solution, strict=True) if honest)


def verify(spec: Spec, language: str, target: list[str], text: str) -> tuple[float, str]:
    said = [fold(item) for item in read_items(final(text))]
    wanted = [fold(name) for name in target]
    if spec["kind"] == "knights":
        if not wanted and said in (["none"], ["nobody"], ["无"], ["没有"], []):
            return 1.0, ""
        said, wanted = sorted(said), sorted(wanted)
    return (1.0, "") if said == wanted else (0.0, f"{', '.join(said)[:80]!r} is not the solution")


def effort(spec: Spec) -> int:
    """People and what is said of them."""
    return len(spec["people"]) + len(spec.get("clues", spec.get("claims"))) - 4


# Order. A clue is [name, person, other person or number, third].


@functools.cache
def _permutations(size: int) -> np.ndarray:
    """All assignments of seats to people, int8 [size!, size]."""
    return np.array(list(itertools.permutations(range(size))), dtype=np.int8)


def _fits(clue: list[Any], seats: Any) -> Any:
    """Of one assignment (a list: bool) or of many (columns of an array: bool [n]); `seats(i)`: the seat of person i."""
    what, a, b, c = clue
    if what == "at":
        return seats(a) == b
    if what == "not at":
        return seats(a) != b
    apart = seats(a) - seats(b)
    if what == "left":
        return apart < 0
    if what == "next":
        return abs(apart) == 1
    if what == "not next":
        return abs(apart) != 1
    if what == "apart":
        return abs(apart) == c
    # between: c sits somewhere between a and b
    return (seats(a) - seats(c)) * (seats(b) - seats(c)) < 0


def _fitting(size: int, clues: list[list[Any]]) -> np.ndarray:
    rows = _permutations(size)
    for clue in clues:
        rows = rows[_fits(clue, lambda i, rows=rows: rows[:, i])]
    return rows


def _make_order(draw: Draw, difficulty: int) -> Spec:
    size = SEATS[difficulty - 1]
    people = draw.sample(range(len(_NAMES)), size)
    seats = draw.sample(range(size), size)
    clues: list[list[Any]] = []
    rows = _permutations(size)
    easy = ("at", "left", "next") if difficulty < 3 else ("left", "next", "not next", "apart", "between", "not at")
    while len(rows) > 1:
        what = draw.choice(easy)
        a, b, c = draw.sample(range(size), 3)
        clue = {"at": [what, a, seats[a], 0], "not at": [what, a, b, 0],
                "apart": [what, a, b, abs(seats[a] - seats[b])], "between": [what, a, b, c]}.get(what, [what, a, b, 0])
        if not _fits(clue, seats.__getitem__):
            continue
        left = rows[_fits(clue, lambda i, rows=rows: rows[:, i])]
        if len(left) < len(rows):
            rows = left
            clues.append(clue)
    for clue in list(clues):
        if len(clues) > 2 and len(_fitting(size, rest := [one for one in clues if one is not clue])) == 1:
            clues = rest
    draw.shuffle(clues)
    return {"people": people, "clues": clues}


def _show_order(spec: Spec, zh: bool, people: list[str]) -> str:
    lines = []
    for what, a, b, c in spec["clues"]:
        one, other, third = people[a], people[b % len(people)], people[c % len(people)]
        lines.append({
            "at": (f"{one} sits in seat {b + 1}.", f"{one}坐在第 {b + 1} 个座位。"),
            "not at": (f"{one} does not sit in seat {b + 1}.", f"{one}不坐在第 {b + 1} 个座位。"),
            "left": (f"{one} sits somewhere to the left of {other}.", f"{one}坐在{other}左边的某个位置。"),
            "next": (f"{one} sits right beside {other}.", f"{one}与{other}相邻。"),
            "not next": (f"{one} does not sit right beside {other}.", f"{one}与{other}不相邻。"),
            "apart": (f"The seat numbers of {one} and {other} differ by {c}.", f"{one}与{other}的座位号相差 {c}。"),
            "between": (f"{third} sits somewhere between {one} and {other}.",
                        f"{third}坐在{one}与{other}之间的某个位置。"),
        }[what][zh])
    clues = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
    # Named by the alphabet, so that the naming tells nothing of the seats.
    named = ("、" if zh else ", ").join(sorted(people))
    size = len(people)
    if zh:
        start = f"{named}共 {size} 人坐成一排，座位从左到右编号为 1 到 {size}。\n\n{clues}\n\n他们从左到右依次是谁？"
    else:
        start = (f"{named} sit in a row of {size} seats, numbered 1 to {size} from left to right.\n\n{clues}\n\n"
                 "Who sits where, from left to right?")
    return start + answer_line("zh" if zh else "en", "the names from left to right, separated by commas",
                               "从左到右的名字，用逗号分隔")


def _search_order(spec: Spec) -> Iterator[list[int]]:
    """Person by person, each clue checked as soon as all whom it names are seated."""
    size = len(spec["people"])
    ready: dict[int, list[list[Any]]] = {}
    for clue in spec["clues"]:
        named = {"at": [1], "not at": [1], "between": [1, 2, 3]}.get(clue[0], [1, 2])
        ready.setdefault(max(clue[place] for place in named), []).append(clue)

    def seat(person: int, seats: list[int]) -> Iterator[list[int]]:
        if person == size:
            yield seats
            return
        for place in range(size):
            trial = [*seats, place]
            if place not in seats and all(_holds(clue, trial) for clue in ready.get(person, ())):
                yield from seat(person + 1, trial)

    yield from seat(0, [])


def _holds(clue: list[Any], seats: list[int]) -> bool:
    """What a clue says, once more and in other words than `_fits`."""
    what, a, b, c = clue
    if what in ("at", "not at"):
        return (b == seats[a]) is (what == "at")
    low, high = sorted((seats[a], seats[b]))
    return {"left": low == seats[a], "next": high == low + 1, "not next": high > low + 1, "apart": high == low + c,
            "between": what == "between" and low < seats[c] < high}[what]


# Knights and knaves. A claim is [speaker, form, one, other].


def _claim_holds(form: str, a: int, b: int) -> bool:
    return {"knight": a == 1, "knave": a == 0, "same": a == b, "different": a != b, "both": a + b == 2,
            "either": a + b >= 1, "neither": a + b == 0, "if": a <= b}[form]


def _consistent(truth: list[int], claims: list[list[Any]]) -> bool:
    return all(_claim_holds(form, truth[a], truth[b]) == truth[speaker] for speaker, form, a, b in claims)


def _make_knights(draw: Draw, difficulty: int) -> Spec | None:
    size = ISLANDERS[difficulty - 1]
    people = draw.sample(range(len(_NAMES)), size)
    truth = [draw.randint(0, 1) for _ in people]
    forms = (("knight", "knave", "same") if difficulty == 1 else ("knave", "same", "different", "both", "neither", "if",
                                                                   "either"))
    candidates = [[bits >> i & 1 for i in range(size)] for bits in range(1 << size)]
    claims: list[list[Any]] = []
    for _ in range(40 * size):
        if len(candidates) == 1:
            break
        # Everyone speaks once before anyone speaks again.
        speaker = len(claims) % size
        form = draw.choice(forms)
        a, b = draw.sample([i for i in range(size) if i != speaker or size < 3], 2)
        if _claim_holds(form, truth[a], truth[b]) != truth[speaker]:
            continue
        claim = [speaker, form, a, b]
        left = [one for one in candidates if _consistent(one, [claim])]
        if len(left) < len(candidates):
            candidates = left
            claims.append(claim)
    return {"people": people, "claims": claims} if len(candidates) == 1 and any(truth) else None


def _show_knights(spec: Spec, zh: bool, people: list[str]) -> str:
    lines = []
    for speaker, form, a, b in spec["claims"]:
        one, other = people[a], people[b]
        said = {"knight": (f"{one} is a knight.", f"{one}是骑士。"), "knave": (f"{one} is a knave.", f"{one}是无赖。"),
                "same": (f"{one} and {other} are of the same kind.", f"{one}和{other}是同一类人。"),
                "different": (f"{one} and {other} are of different kinds.", f"{one}和{other}不是同一类人。"),
                "both": (f"{one} and {other} are both knights.", f"{one}和{other}都是骑士。"),
                "either": (f"At least one of {one} and {other} is a knight.", f"{one}和{other}中至少有一个是骑士。"),
                "neither": (f"Neither {one} nor {other} is a knight.", f"{one}和{other}都不是骑士。"),
                "if": (f"If {one} is a knight, so is {other}.", f"如果{one}是骑士，那么{other}也是骑士。")}[form][zh]
        lines.append(f"{people[speaker]}：“{said}”" if zh else f'{people[speaker]}: "{said}"')
    said = "\n".join(lines)
    named = ("、" if zh else ", ").join(sorted(people))
    if zh:
        start = f"岛上的人要么是总说真话的骑士，要么是总说假话的无赖。岛民有{named}。\n\n{said}\n\n谁是骑士？"
    else:
        start = (f"On an island everyone is either a knight, who always tells the truth, or a knave, who always lies. "
                 f"Its people are {named}.\n\n{said}\n\nWho are the knights?")
    return start + answer_line("zh" if zh else "en", "the names of all knights, separated by commas",
                               "全部骑士的名字，用逗号分隔")


def _search_knights(spec: Spec) -> Iterator[list[int]]:
    """Assume, and go on while no claim whose people are all assumed is broken."""
    size = len(spec["people"])
    claims: dict[int, list[list[Any]]] = {}
    for claim in spec["claims"]:
        two = claim[1] not in ("knight", "knave")
        claims.setdefault(max(claim[0], claim[2], claim[3] if two else 0), []).append(claim)

    def assume(truth: list[bool]) -> Iterator[list[int]]:
        if len(truth) == size:
            yield [int(one) for one in truth]
            return
        for honest in (True, False):
            trial = [*truth, honest]
            if all(_said(claim, trial) is trial[claim[0]] for claim in claims.get(len(truth), ())):
                yield from assume(trial)

    yield from assume([])


def _said(claim: list[Any], truth: list[bool]) -> bool:
    """What a claim says, once more, in words of logic."""
    _, form, a, b = claim
    one = truth[a]
    if form in ("knight", "knave"):
        return one if form == "knight" else not one
    other = truth[b]
    if form in ("same", "different"):
        return (one is other) if form == "same" else (one is not other)
    if form == "if":
        return other if one else True
    return {"both": one and other, "either": one or other, "neither": not (one or other)}[form]
