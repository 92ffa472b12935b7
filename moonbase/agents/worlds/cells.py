"""What a cell of a table says, whatever way it is written: numbers, percentages, dates, text.

Numbers may have separators of thousands, a unit, a word such as "million"; a comma is a decimal point where it cannot
be anything else (12,5 and 1.234,50). Dates are ISO, 4 May 1712, May 4, 1712, 4.5.1712, 1712/05/04, May 1712 or 1712;
5/4/1712 is read as month/day. A cell that is none of what its column holds is compared as text.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Hashable
from decimal import Decimal, DecimalException

from moonbase.agents.worlds.world import Column

CELL_LIMIT = 2000
"""Characters of a cell that are read."""
EMPTY = ("text", "")
NEAR_DAYS = 31
"""What date_near of WideSearch allows."""
_NOTHING = frozenset(("", "-", "--", "—", "–", "/", "n/a", "na", "nan", "nil", "none", "null", "unknown"))
_MONTHS = {name: number for number, names in enumerate((
    "january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
    "september sept sep", "october oct", "november nov", "december dec"), 1) for name in names.split()}
_MULTIPLES = {"thousand": 3, "k": 3, "million": 6, "mn": 6, "billion": 9, "bn": 9, "trillion": 12}
# Of each dimension the units and how many of the first one they are.
_DIMENSIONS = (
    {"m": "1", "metre": "1", "metres": "1", "meter": "1", "meters": "1", "km": "1000", "kilometres": "1000",
     "kilometers": "1000", "cm": "0.01", "mm": "0.001", "ft": "0.3048", "feet": "0.3048", "mi": "1609.344",
     "miles": "1609.344"},
    {"km2": "1", "sq km": "1", "square kilometres": "1", "square kilometers": "1", "ha": "0.01", "hectares": "0.01",
     "m2": "0.000001"},
    {"kg": "1", "g": "0.001", "t": "1000", "tonnes": "1000"},
    {"s": "1", "seconds": "1", "min": "60", "minutes": "60", "h": "3600", "hours": "3600"},
    {"marks": "1", "million marks": "1000000", "billion marks": "1000000000", "thousand marks": "1000"},
)
_UNITS = {unit: (dimension, Decimal(factor)) for dimension, units in enumerate(_DIMENSIONS)
          for unit, factor in units.items()}
_NUMBER = re.compile(r"([+-]?)(\d[\d.,' _]*)(?:e([+-]?\d{1,3}))?(.*)", re.DOTALL)
_WRAPPED = re.compile(r"(\*\*|__|\*|_|`|\"|')(.+)\1", re.DOTALL)
_BREAK = re.compile(r"<br\s*/?>")
_LINKED = re.compile(r"\[([^\[\]]*)\]\([^()]*\)")
_ISO = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:t[\d:.]+(?:z|[+-][\d:]+)?)?")
_DOTTED = re.compile(r"(\d{1,2})\. ?(\d{1,2})\. ?(\d{4})")
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_DAY_FIRST = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?\.?(?: of)? ([a-z]+)\.?,? (\d{4})")
_MONTH_FIRST = re.compile(r"([a-z]+)\.? (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})")
_MONTH = re.compile(r"([a-z]+)\.?,? (\d{4})|(\d{4})-(\d{1,2})")


def plain_text(cell: str) -> str:
    """In small letters, NFKC, one space between words, without links, Markdown emphasis and quotation marks ."""
    text = unicodedata.normalize("NFKC", cell[:CELL_LIMIT]).casefold()
    text = text.replace("−", "-").replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    # A table written in Markdown has no other way of breaking a line.
    text = " ".join(_LINKED.sub(r"\1", _BREAK.sub(" ", text)).split())
    while found := _WRAPPED.fullmatch(text):
        text = found[2].strip()
    return "" if text in _NOTHING else text


def canonical(column: Column, cell: str) -> tuple[str, Hashable]:
    """What a cell says: two cells of a column agree where this is equal (but for a column's tolerance)."""
    text = plain_text(cell)
    if not text:
        return EMPTY
    if column.type in ("number", "percent", "auto"):
        number = read_number(text, "%" if column.type == "percent" else column.unit, strict=column.type == "auto")
        if number is not None:
            return "number", number
    if column.type in ("date", "auto"):
        date = read_date(text)
        if date is not None:
            return "date", date
    return "text", text


def values_agree(column: Column, gold: tuple[str, Hashable], value: tuple[str, Hashable]) -> bool:
    """Whether a cell says what the gold cell says, of what `metrics.value_of` made of both."""
    if gold[0] == value[0] == "day":
        return abs(gold[1] - value[1]) <= NEAR_DAYS
    if column.tolerance and gold[0] == value[0] == "number":
        return abs(gold[1] - value[1]) <= Decimal(str(column.tolerance)) * abs(gold[1])
    return gold == value


def read_number(text: str, unit: str = "", strict: bool = False) -> Decimal | None:
    """The number that a text (of `plain_text`) is, in `unit`; None where it is none or has another unit.

    `strict`: nothing may stand behind the number but `unit` and a percent sign.
    """
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    digits = _plain_digits(found[2].rstrip())
    behind = found[4].strip()
    # Decimal keeps 28 digits. And "12, maybe" is no number.
    if digits is None or len(digits) > 28 or (found[2].endswith((",", ".")) and behind):
        return None
    wanted = plain_text(unit)
    shift = int(found[3] or 0)
    # The unit may have the word itself: "31.5 million marks" in million marks is 31.5.
    if behind and behind != wanted and behind not in _UNITS and not strict:
        word, _, rest = behind.partition(" ")
        if word in _MULTIPLES:
            shift, behind = shift + _MULTIPLES[word], rest.strip()
    try:
        number = Decimal(f"{found[1]}{digits}").scaleb(shift)
        if behind and behind != wanted and not (behind == "%" and not wanted):
            ours, theirs = _UNITS.get(wanted), _UNITS.get(behind)
            if strict or ours is None or theirs is None or ours[0] != theirs[0]:
                return None
            number = number * theirs[1] / ours[1]
        return number.normalize() + 0
    except DecimalException:
        return None


def _plain_digits(text: str) -> str | None:
    """Digits with a point for the decimals, out of 1,234.50, 1.234,50, 1 234.5, 1'234 or 12,5."""
    text = text.rstrip(".,")
    grouped = r"\d{1,3}(?:%s\d{3})+"
    if len(text) > 40:
        return None
    for mark, point in ((",", "."), (" ", "."), ("'", "."), ("_", "."), ("\\.", ","), (" ", ","), ("'", ",")):
        # 1.234 is a number with three decimals: points are separators only where there are two, or a comma follows.
        whole = grouped % mark
        found = re.fullmatch(rf"({whole})(?:{re.escape(point)}(\d+))?", text)
        if found and not (mark == "\\." and found[2] is None and text.count(".") == 1):
            digits = re.sub(r"\D", "", found[1])
            return f"{digits}.{found[2]}" if found[2] else digits
    if re.fullmatch(r"\d+(?:[.,]\d+)?", text):
        return text.replace(",", ".")
    return None


def read_date(text: str) -> tuple[int, ...] | None:
    """(year, month, day), (year, month) or (year,) of a text (of `plain_text`), as far as it goes; None for others."""
    if found := _ISO.fullmatch(text):
        year, month, day = found.groups()
    elif found := _DOTTED.fullmatch(text):
        day, month, year = found.groups()
    elif found := _SLASHED.fullmatch(text):
        month, day, year = found.groups()
        if int(month) > 12:
            month, day = day, month
    elif (found := _DAY_FIRST.fullmatch(text)) and found[2] in _MONTHS:
        day, month, year = found[1], _MONTHS[found[2]], found[3]
    elif (found := _MONTH_FIRST.fullmatch(text)) and found[1] in _MONTHS:
        month, day, year = _MONTHS[found[1]], found[2], found[3]
    elif found := _MONTH.fullmatch(text):
        number = _MONTHS.get(found[1], 0) if found[1] else int(found[4])
        return (int(found[2] or found[3]), number) if 1 <= number <= 12 else None
    elif re.fullmatch(r"\d{4}", text):
        return (int(text),)
    else:
        return None
    try:
        date = datetime.date(int(year), int(month), int(day))
    except ValueError:
        return None
    return date.year, date.month, date.day
