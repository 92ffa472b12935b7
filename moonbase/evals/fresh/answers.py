"""What an answer says, in whatever of the usual ways it is written, in English or Chinese.

Everything here is bounded in time by the length that is read, and none of it raises: what cannot be read is None.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

READ = 50_000
"""Characters at the end of an answer that are read."""
_MARK = re.compile(r"(?:final answer|answer|最终答案|答案|回答)[ \t*_]{0,4}(?:[:=]|is\b|是|为)[ \t*_]{0,4}",
                   re.IGNORECASE)
_DIGITS = {sign: value for value, signs in enumerate(("零〇", "一壹", "二贰两", "三叁", "四肆", "五伍", "六陆", "七柒",
                                                    "八捌", "九玖")) for sign in signs}
_TENS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_CHINESE = "".join([*_DIGITS, *_TENS, *_MYRIADS])
_PLAIN = r"\d{1,3}(?:[, '_]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"({_PLAIN})(?:e([+-]?\d{{1,2}}))?([万萬亿億]{{0,2}})")
# No digit, no sign of a second number, no denial behind the number: a unit and nothing else.
_UNIT = re.compile(r"[ ]?[^\W\d_]{0,12}(?:[²³]|\^[23])?(?: [^\W\d_]{1,12}){0,2}[.。!！]?")
# What may stand before a number and says no other: "about", "that is", ≈, =.
_AHEAD = re.compile(r"(?:[≈~=]|\\approx|(?:about|approximately|approx|roughly|around)\b\.?|i\.e\.,?|"
                    r"(?:大?约|近似|即)[为是]?(?:等于)?) *")
_CURRENCY = re.compile(r"^\\?[$€£¥] *")
_DENIALS = ("not", "or", "maybe", "no", "或", "不", "非", "错", "and", "to")
MOST_NUMBER = 80
"""Characters of a number."""


def plain(text: str) -> str:
    """NFKC, one kind of minus sign, without Markdown emphasis, dollar signs and LaTeX spaces at both ends."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").replace("—", "-")
    text = text.replace("\\,", "").replace("\\!", "").replace("{,}", ",").replace("\\left", "").replace("\\right", "")
    return text.strip().strip("*_`$ \t").strip()


def final(text: str) -> str:
    r"""The answer proper: the last \boxed{…}, else what follows the last "Answer:" or 答案：, else the last line."""
    text = unicodedata.normalize("NFKC", text[-READ:])
    boxed = _boxed(text)
    marks = list(_MARK.finditer(text))
    if boxed is not None and not (marks and marks[-1].start() > boxed[0]):
        return plain(boxed[1])
    if marks:
        behind = text[marks[-1].end() :].strip()
        inner = _boxed(behind)
        return plain(inner[1] if inner else behind.partition("\n")[0])
    lines = [line for line in text.splitlines() if line.strip()]
    return plain(lines[-1]) if lines else ""


def _boxed(text: str) -> tuple[int, str] | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return start, text[start + 7 : place]
    return None


def chinese_number(text: str) -> int | None:
    """三百二十一 → 321; 一二三 → 123; 两万零五 → 20005; None for anything else."""
    if not text or len(text) > 40 or any(sign not in _CHINESE for sign in text):
        return None
    if all(sign in _DIGITS for sign in text):
        return int("".join(str(_DIGITS[sign]) for sign in text))
    total = section = digit = 0
    for sign in text:
        if sign in _DIGITS:
            digit = _DIGITS[sign]
        elif sign in _TENS:
            section += (digit or 1) * _TENS[sign]
            digit = 0
        else:
            # 万 counts what stands since the last 亿; 亿 all that stands before it (三万亿).
            section, scale = section + digit, _MYRIADS[sign]
            total = (total + section) * scale if scale == 10**8 else total + section * scale
            section = digit = 0
    return total + section + digit


def read_number(text: str) -> Fraction | None:
    """1,234; 3/4; 1 1/2; \\frac{3}{4}; 0.75; 75%; 1.2e3; 四分之三; 百分之七十五; 3.5万; -7; each with a unit behind it.

    $, "about" or ≈ may stand before it, and the same number may come twice: 229/4 (57.25), 229/4 ≈ 57.25. A decimal
    says exactly what it says: 0.33 is not 1/3. None for what is no number, or more than one.
    """
    text = plain(text).lower().rstrip(".。 ")
    value = _once(text)
    return value if value is not None else _twice(text)


def _once(text: str) -> Fraction | None:
    if "=" in text[-MOST_NUMBER:]:
        text = text.rpartition("=")[2].strip()
    if found := _AHEAD.match(text):
        text = text[found.end() :]
        if re.search(rf"[{''.join(_DIGITS)}]{{2}}", text):
            return None  # 约三五个: three to five.
    text = _CURRENCY.sub("", text, count=1)
    if not text or len(text) > MOST_NUMBER:
        return None
    negative = text[0] in "-负負"
    text = text[1:].lstrip() if text[0] in "+-负負" else text
    text = _CURRENCY.sub("", text, count=1)
    value = _unsigned(text) if text else None
    return None if value is None else -value if negative else value


def _twice(text: str) -> Fraction | None:
    """A number and the same in brackets or behind ≈, or a letter ≈ a number; None where the two are not equal."""
    if text.endswith(")"):
        left, sign, right = text[:-1].rpartition("(")
    else:
        left, sign, right = text.replace("\\approx", "≈").rpartition("≈")
    value = _once(plain(right))
    if not sign or value is None:
        return None
    if sign == "(" and (left.endswith(")") or (left[-1:] != " " and value.denominator == 1)):
        return None  # 3(3) is a product.
    named = sign == "≈" and re.fullmatch("[a-z]", plain(left))
    return value if named or value == _once(plain(left)) else None


def _unsigned(text: str) -> Fraction | None:
    if found := re.fullmatch(r"\\[dt]?frac ?\{([^{}]+)\} ?\{([^{}]+)\}", text):
        return _ratio(found[1], found[2])
    if found := re.fullmatch(rf"([\d,{_CHINESE}]+)分之([\d,.{_CHINESE}]+)", text):
        return _ratio(found[2], found[1])
    if found := re.fullmatch(r"百分之(.+)", text):
        value = _simple(found[1])
        return None if value is None else value / 100
    if found := re.fullmatch(r"([\d, ]*\d)[ ]?[/÷][ ]?([\d, ]*\d)", text):
        whole, _, numerator = found[1].rpartition(" ")
        if whole and not re.fullmatch(r"\d{3}", numerator):
            left, part = _simple(whole), _ratio(numerator, found[2])
            return None if left is None or part is None else left + part
        return _ratio(found[1], found[2])
    if text.endswith("%"):
        value = _simple(text[:-1].strip())
        return None if value is None else value / 100
    if text[0] == "(" and text[-1] == ")":
        return read_number(text[1:-1])
    return _simple(text)


def _ratio(numerator: str, denominator: str) -> Fraction | None:
    above, below = _simple(numerator), _simple(denominator)
    return above / below if above is not None and below else None


def _simple(text: str) -> Fraction | None:
    text = text.strip()
    found = _NUMBER.match(text)
    if found and found[0]:
        value = Fraction(re.sub(r"[, '_]", "", found[1])) * Fraction(10) ** int(found[2] or 0)
        for sign in found[3]:
            value *= _MYRIADS[sign]
        rest = text[found.end() :]
    else:
        start = re.match(rf"[{_CHINESE}]+", text)
        whole = chinese_number(start[0]) if start else None
        if whole is None:
            return None
        value, rest = Fraction(whole), text[start.end() :]
        if found := re.match(rf"点([{''.join(_DIGITS)}]+)", rest):
            decimals = "".join(str(_DIGITS[sign]) for sign in found[1])
            value, rest = value + Fraction(int(decimals), 10 ** len(decimals)), rest[found.end() :]
    if not _UNIT.fullmatch(rest) or any(sign in _CHINESE for sign in rest):
        return None
    return None if any(word in rest.split() or (not word.isascii() and word in rest) for word in _DENIALS) else value


def read_items(text: str) -> list[str]:
    """The items of a list, without brackets and quotation marks: separated by , ; 、 > → or else by blanks."""
    text = re.sub(r"(?<=\s)(?:and|和|与|&)(?=\s)", ",", plain(text)[:READ].strip("[](){}<>【】").strip())
    for separator in (r"[,;、]", r"->|→|>", r"\s+"):
        items = [item.strip(" \t\"'“”‘’`*[](){}.。") for item in re.split(separator, text)]
        items = [re.sub(r"^(?:and |和|\d+[.)] ?)", "", item).strip() for item in items if item]
        if len(items) > 1:
            return [item for item in items if item]
    return [item for item in items if item]


def fold(text: str) -> str:
    """For comparing words: NFKC, small letters, one blank between words."""
    return " ".join(unicodedata.normalize("NFKC", str(text)[:2000]).casefold().split())


def read_json(text: str) -> Any | None:
    """The last JSON array or object of an answer, in a fence or not; None where there is none."""
    text = text[-READ:]
    decoder = json.JSONDecoder()
    fences = re.findall(r"```[a-zA-Z]{0,10}[ \t]*\n(.*?)```", text, re.DOTALL)
    for body in (*reversed(fences), text):
        for start in _openings(body):
            try:
                value, _ = decoder.raw_decode(body, start)
            except (ValueError, RecursionError):
                continue
            return value
    return None


def _openings(text: str) -> Sequence[int]:
    """Where JSON may begin: the outermost first, and not more than 40 tries."""
    return [found.start() for found in re.finditer(r"[\[{]", text)][:40]


def read_code(text: str) -> str | None:
    """The last fenced block that defines a function, or the whole answer where it does without fences."""
    fences = re.findall(r"```[a-zA-Z0-9]{0,10}[ \t]*\n(.*?)```", text[-READ:], re.DOTALL)
    for body in reversed(fences):
        if "def " in body:
            return body
    return text[-READ:] if "def " in text and "```" not in text else None
