"""The metrics that WideSearch (Wong et al. 2025, §3.4 and its evaluator) names for the columns of its tables:

    exact_match   the texts without case, spaces and asterisks are equal
    number_near   the first numbers differ by no more than the tolerance, relative to the gold; 33.2% is 0.332, units
                  are not looked at, and two cells without any number agree
    date_near     the dates are within 31 days; a month or year alone is its first day, and two cells without a date
                  agree only where both are empty or their texts are equal (the evaluator lets any two of them agree)
    url_match     the hosts are the same
    llm_judge     no model judges here. Two cells agree where they are one date, one number, or the same items in any
                  order, without case, spaces, punctuation and the marks of nothing (/, -, NA): a lower bound of what a
                  judge would pass

A cell is reduced to what its metric looks at, and the common grader counts (it asks that keys agree by the same rules
and, unlike the evaluator, does not forgive rows that are there twice).
"""

from __future__ import annotations

import datetime
import functools
import re
import unicodedata
from collections.abc import Hashable
from decimal import Decimal
from urllib.parse import urlsplit

from moonbase.agents.worlds.cells import CELL_LIMIT, EMPTY, canonical, plain_text, read_date, read_number, values_agree
from moonbase.agents.worlds.world import Column

METRICS = ("exact_match", "number_near", "date_near", "url_match", "llm_judge")
_DIGITS = 400
"""Of a number that are read."""
_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+\.?\d*)%?")
_LIST_MARK = re.compile(r"(?:\d{1,2}[.)、]|[-•·*])\s*(?=\D)")
_CHINESE_DATE = re.compile(r"(\d{4})年(?:(\d{1,2})月(?:(\d{1,2})[日号])?)?")
_ADDRESS = re.compile(r"https?://[^\s<>)\]|\"']+")


def value_of(column: Column, cell: str) -> tuple[str, Hashable]:
    """What a cell says, for `cells.values_agree`: by the metric that is its column's type, else `cells.canonical`."""
    return _remembered(column, cell) if len(cell) <= CELL_LIMIT else _read(column, cell)


@functools.lru_cache(maxsize=1 << 15)
def _remembered(column: Column, cell: str) -> tuple[str, Hashable]:
    """A task is graded many times, and its gold cells are the same."""
    return _read(column, cell)


def _read(column: Column, cell: str) -> tuple[str, Hashable]:
    if column.type not in METRICS:
        return canonical(column, cell)
    text = re.sub(r"<br\s*/?>", "\n", cell)
    if column.type == "number_near":
        found = _NUMBER.search(unicodedata.normalize("NFKC", text).replace(",", ""))
        if found is None:
            return EMPTY
        number = Decimal(found[0].rstrip("%")[:_DIGITS])
        return "number", number / 100 if found[0].endswith("%") else number
    if column.type == "date_near":
        date = _day(text)
        return ("text", _squeeze(text)) if date is None else ("day", date.toordinal())
    if column.type == "url_match":
        return "text", " ".join(sorted({_host(url) for url in _ADDRESS.findall(text)}))
    return "text", _meaning(text) if column.type == "llm_judge" else _squeeze(text)


def cells_agree(column: Column, gold: str, cell: str) -> bool:
    """Whether a cell says what the gold cell says."""
    return values_agree(column, value_of(column, gold), value_of(column, cell))


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return url


def _squeeze(text: str) -> str:
    """Without case, white space, asterisks and the characters of no width."""
    return "".join(letter for letter in _folded(text)
                   if not letter.isspace() and letter != "*" and unicodedata.category(letter) != "Cf")


def _folded(text: str) -> str:
    """In small letters and NFKC, of any length; nothing where the cell says that there is nothing."""
    return unicodedata.normalize("NFKC", text).casefold() if plain_text(text) else ""


def _day(text: str) -> datetime.date | None:
    """The date that a cell is; of a month or a year the first day."""
    plain = "".join(letter for letter in plain_text(text) if unicodedata.category(letter) != "Cf")
    found = _CHINESE_DATE.fullmatch(plain.replace(" ", ""))
    parts = tuple(int(part) for part in found.groups() if part) if found else read_date(plain)
    try:
        return datetime.date(*parts, *(1,) * (3 - len(parts))) if parts else None
    except ValueError:
        return None


def _meaning(text: str) -> str:
    """A date, a number, or the items of a list in order of their letters."""
    plain = plain_text(text)
    date, number = _day(text), read_number(plain.removeprefix("$"), "%", strict=True)
    if date is not None and len(plain) > 4:
        return date.isoformat()
    if number is not None:
        return f"{number:f}"
    items = re.split(r"[\n;,、/]+", _folded(text))
    kept = ("".join(letter for letter in _LIST_MARK.sub("", item.strip(), count=1) if letter.isalnum())
            for item in items)
    return " ".join(sorted(filter(None, kept)))
