"""Needles in a long text that lead to one another: who has the parcel in the end, what does the last label say?

The text is written in pieces, so that a prompt of 256k tokens never exists twice in memory; false chains cross the text
as well. Solver A follows the chain backwards through the drawn links; solver B reads the finished text, streaming, with
regular expressions and nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from moonbase.evals.fresh.answers import final, fold
from moonbase.evals.fresh.problem import Draw, answer_line

Spec = dict[str, Any]
TOKENS = (4_000, 16_000, 64_000, 128_000, 256_000)
HOPS = (1, 2, 3, 4, 6)
DECOYS = (2, 4, 8, 16, 32)
CHARACTERS_PER_TOKEN = {"en": 3.79, "zh": 1.79}
"""Measured on texts of this family with the tokenizer of Kimi K2.5; what a prompt really has depends on the
tokenizer."""
_HEADS = ("Bar", "Cal", "Dor", "Fen", "Gar", "Hul", "Jor", "Kel", "Lam", "Mir", "Nor", "Pel", "Ros", "Sar", "Tor",
          "Val")
_MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "in", "or", "ul")
_ENDS = ("beck", "dale", "fin", "gard", "holt", "lis", "mund", "nath", "rick", "stan", "tor", "wyn")
_CODE = "BCDFGHJKLMNPQRSTVWXZ"
_FILL = (
    ("In the year {n} the road to {a} was paved again, and the toll stayed at {m} coins.",
     "{n} 年，通往 {a} 的道路重新铺设，通行费仍为 {m} 枚硬币。"),
    ("{a} kept a garden of {n} fruit trees behind the old mill.", "{a} 在老磨坊后面种了 {n} 棵果树。"),
    ("The council heard {a} for {m} minutes and then adjourned until spring.",
     "议会听取了 {a} {m} 分钟的发言，随后休会到春天。"),
    ("A letter of {m} pages from {a} to {b} speaks of nothing but the weather.",
     "{a} 写给 {b} 的一封 {m} 页的信只谈天气。"),
    ("Rain fell for {m} days, and {a} counted {n} barrels in the cellar.",
     "雨下了 {m} 天，{a} 在地窖里数出 {n} 只木桶。"),
    ("{a} and {b} once walked to the coast and came back after {m} days.", "{a} 和 {b} 曾步行到海边，{m} 天后返回。"),
    ("The library bought {n} books that {a} had catalogued.", "图书馆购买了 {a} 编目的 {n} 本书。"),
    ("At the fair {b} sold {m} baskets, which {a} thought too few.", "集市上 {b} 卖出 {m} 只篮子，{a} 认为太少。"),
)
_PASS = ("{a} handed the {thing} parcel to {b}.", "{a} 把{thing}包裹交给了 {b}。")
_END = ("The {thing} parcel that {a} kept bears the label {code}.", "{a} 留下的{thing}包裹上写着标签 {code}。")
_THINGS = (("red", "红色"), ("grey", "灰色"), ("striped", "条纹"), ("small", "小号"), ("sealed", "密封"),
           ("blue", "蓝色"),
           ("oval", "椭圆"), ("heavy", "沉重"))


def make(draw: Draw, difficulty: int) -> Spec:
    hops = HOPS[difficulty - 1]
    people = draw.sample([a + b + c for a in _HEADS for b in _MIDDLES for c in _ENDS], 40 + (hops + 1) * (
        DECOYS[difficulty - 1] + 1))
    fillers, people = people[:40], people[40:]
    chains = []
    things = draw.sample(range(len(_THINGS)), len(_THINGS))
    for number in range(DECOYS[difficulty - 1] + 1):
        chain, people = people[: hops + 1], people[hops + 1 :]
        code = "".join(draw.choice(_CODE) for _ in range(3)) + f"-{draw.randint(100, 999)}"
        chains.append({"thing": things[number % len(things)], "people": chain, "code": code})
    # Each needle has its place in the text, in thousandths of its length; needles of a chain come in any order.
    needles = [[place, number, step] for number in range(len(chains)) for step in range(hops + 1)
               for place in (draw.randint(20, 980),)]
    return {"kind": f"{hops}-hop", "difficulty": difficulty, "tokens": TOKENS[difficulty - 1], "chains": chains,
            "fillers": fillers, "needles": sorted(needles), "text_seed": draw.getrandbits(60)}


def pieces(spec: Spec, language: str) -> Iterator[str]:
    """The text, paragraph by paragraph."""
    draw = random.Random(spec["text_seed"])
    zh = language == "zh"
    characters = spec["tokens"] * CHARACTERS_PER_TOKEN[language]
    fillers, needles = spec["fillers"], list(reversed(spec["needles"]))
    written, paragraph = 0, []
    while written < characters:
        while needles and needles[-1][0] * characters <= 1000 * written:
            _, number, step = needles.pop()
            sentence = _needle(spec["chains"][number], step, zh)
            paragraph.append(sentence)
            written += len(sentence)
        sentence = _FILL[draw.randrange(len(_FILL))][zh].format(
            a=fillers[draw.randrange(40)], b=fillers[draw.randrange(40)], n=draw.randrange(1200, 2000),
            m=draw.randrange(2, 90))
        written += len(sentence) + (not zh)
        paragraph.append(sentence)
        if len(paragraph) >= 8:
            yield ("" if zh else " ").join(paragraph) + "\n\n"
            paragraph = []
    paragraph += [_needle(spec["chains"][number], step, zh) for _, number, step in reversed(needles)]
    yield ("" if zh else " ").join(paragraph)


def _needle(chain: dict[str, Any], step: int, zh: bool) -> str:
    people, thing = chain["people"], _THINGS[chain["thing"]][zh]
    if step == len(people) - 1:
        return _END[zh].format(thing=thing, a=people[step], code=chain["code"])
    return _PASS[zh].format(thing=thing, a=people[step], b=people[step + 1])


def render(spec: Spec, language: str) -> str:
    chain, zh = spec["chains"][0], language == "zh"
    first, thing = chain["people"][0], _THINGS[chain["thing"]][zh]
    if zh:
        start, question = "请阅读下面的文字，然后回答最后的问题。\n\n", (
            f"\n\n问题：{first} 最初拿着一个{thing}包裹，它被一个人一个人地转交下去。"
            "最后留下它的人那里，包裹上写的标签是什么？")
    else:
        start = "Read the text and answer the question at its end.\n\n"
        question = (f"\n\nQuestion: {first} had a {thing} parcel, which was handed on from one to the next. What is "
                    "the label on it where it was kept in the end?")
    return "".join([start, *pieces(spec, language), question, answer_line(language, "the label", "标签")])


def solve_a(spec: Spec, language: str) -> str:
    return spec["chains"][0]["code"]


def solve_b(spec: Spec, language: str) -> str:
    """Reads what a model reads; two paragraphs are never in memory at once."""
    thing = _THINGS[spec["chains"][0]["thing"]][language == "zh"]
    if language == "zh":
        passed = re.compile(rf"(\w+) 把{thing}包裹交给了 (\w+)。")
        kept = re.compile(rf"([A-Za-z]+) 留下的{thing}包裹上写着标签 (\S+?)。")
    else:
        passed = re.compile(rf"(\w+) handed the {thing} parcel to (\w+)\.")
        kept = re.compile(rf"The {thing} parcel that (\w+) kept bears the label (\S+)\.")
    next_of: dict[str, str] = {}
    label_of: dict[str, str] = {}
    for piece in pieces(spec, language):
        next_of.update(passed.findall(piece))
        label_of.update(kept.findall(piece))
    person = spec["chains"][0]["people"][0]
    while person in next_of:
        person = next_of[person]
    return label_of[person]


def verify(spec: Spec, language: str, target: str, text: str) -> tuple[float, str]:
    said = fold(final(text)).strip(" .。\"'“”‘’`")
    said = said.replace("标签", "").replace("label", "").strip(" :")
    return (1.0, "") if said == fold(target) else (0.0, f"{said[:60]!r} is not the label")


def effort(spec: Spec) -> int:
    """Each step of the chain, and the places where a wrong one may be taken."""
    return 2 * len(spec["chains"][0]["people"]) + len(spec["chains"]) // 2
