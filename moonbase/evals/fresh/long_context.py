"""Needles in a long text that lead to one another: who has the parcel in the end, what does the last label say?

The text is written in pieces, so that a prompt of 256k tokens never exists twice in memory; false chains cross the text
as well. What is expected is the drawn chain's label. Both solvers read the finished text and know nothing of how it was
drawn: A parses every statement of every parcel by one grammar and takes the forward closure from the person that is
asked for; B streams, keeps the sentences about parcels of that kind, and walks back from every label.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
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
           ("blue", "蓝色"), ("oval", "椭圆形"), ("heavy", "超重"))


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


def question(spec: Spec, language: str) -> str:
    """What is asked at the end of the text."""
    chain, zh = spec["chains"][0], language == "zh"
    first, thing = chain["people"][0], _THINGS[chain["thing"]][zh]
    if zh:
        return (f"\n\n问题：最初，{first} 拿着一个{thing}包裹，之后它在人们手中依次转交。"
                "最后留下它的人手里，包裹上写的标签是什么？")
    return (f"\n\nQuestion: In the beginning {first} had {'an' if thing[0] in 'aeiou' else 'a'} {thing} parcel, which "
            "was then handed on from one person to the next. What does its label say where it was kept in the end?")


def render(spec: Spec, language: str) -> str:
    start = ("请阅读下面的文字，然后回答最后的问题。\n\n" if language == "zh"
             else "Read the text and answer the question at its end.\n\n")
    return "".join([start, *pieces(spec, language), question(spec, language),
                    answer_line(language, "the label", "标签")])


def gold(spec: Spec, language: str) -> str:
    """The drawn chain's label."""
    return spec["chains"][0]["code"]


_GRAMMAR = {
    "en": (r"(?P<giver>[A-Z][a-z]+) handed the (?P<passed>\w+) parcel to (?P<taker>[A-Z][a-z]+)\.",
           r"The (?P<kept>\w+) parcel that (?P<keeper>[A-Z][a-z]+) kept bears the label (?P<label>\S+)\.",
           r"Question: In the beginning ([A-Z][a-z]+) had an? (\w+) parcel, "),
    "zh": (r"(?P<giver>[A-Z][a-z]+) 把(?P<passed>\w+?)包裹交给了 (?P<taker>[A-Z][a-z]+)。",
           r"(?P<keeper>[A-Z][a-z]+) 留下的(?P<kept>\w+?)包裹上写着标签 (?P<label>[^ 。]+)。",
           r"问题：最初，([A-Z][a-z]+) 拿着一个(\w+?)包裹，"),
}


def solve_a(spec: Spec, language: str) -> str:
    """Reads what a model reads, as a whole."""
    return read_forwards(render(spec, language), language)


def read_forwards(text: str, language: str) -> str:
    """All statements of a text as facts, and what follows from them about the parcel that is asked for."""
    passing, keeping, asking = _GRAMMAR[language]
    passed: dict[tuple[str, str], set[str]] = {}
    labels: dict[tuple[str, str], str] = {}
    for found in re.finditer(f"{passing}|{keeping}", text):
        if found["giver"]:
            passed.setdefault((found["passed"], found["giver"]), set()).add(found["taker"])
        else:
            labels[found["kept"], found["keeper"]] = found["label"]
    first, thing = re.search(asking, text[-1000:]).groups()
    held = new = {first}
    while new:
        new = {taker for person in new for taker in passed.get((thing, person), ())} - held
        held = held | new
    (label,) = {labels[thing, person] for person in held if (thing, person) in labels}
    return label


def solve_b(spec: Spec, language: str) -> str:
    """Reads what a model reads; two paragraphs are never in memory at once."""
    return read_backwards(pieces(spec, language), question(spec, language), language)


def read_backwards(paragraphs: Iterable[str], asked: str, language: str) -> str:
    """From each label back to who had that parcel first, until it is the person of the question."""
    zh = language == "zh"
    words = asked.replace("，", " ").replace("问题：最初 ", "").split()
    first, thing = (words[0], words[1].removeprefix("拿着一个")) if zh else (words[4], " ".join(words[7:9]).strip(","))
    stop, gives, keeps = ("。", f" 把{thing}交给了 ", f" 留下的{thing}上写着标签 ") if zh else (
        ". ", f" handed the {thing} to ", "The " + thing + " that ")
    told = [sentence for paragraph in paragraphs if thing in paragraph
            for sentence in paragraph.replace("\n", " ").split(stop) if gives in sentence or keeps in sentence]
    given = [sentence.rstrip(".").split(gives) for sentence in told if gives in sentence]
    for sentence in told:
        if keeps in sentence:
            person, label = (sentence.split(keeps) if zh
                             else sentence.rstrip(". ").removeprefix(keeps).split(" kept bears the label "))
            while person.strip() != first and (before := [one for one, other in given if other == person.strip()]):
                (person,) = before
            if person.strip() == first:
                return label
    raise AssertionError("no label leads back to the first person")


def verify(spec: Spec, language: str, target: str, text: str) -> tuple[float, str]:
    said = fold(final(text)).strip(" .。\"'“”‘’`")
    said = said.replace("标签", "").replace("label", "").strip(" :")
    return (1.0, "") if said == fold(target) else (0.0, f"{said[:60]!r} is not the label")


def effort(spec: Spec) -> int:
    """Each step of the chain, and the places where a wrong one may be taken."""
    return 2 * len(spec["chains"][0]["people"]) + len(spec["chains"]) // 2
