"""Letters and numbers: how they are read out of an answer, and how the right ones are written.

Whoever scores an answer again, without its set and without Inspect, has the right answer's digest alone. That is enough
as long as a right answer has few spellings: of a letter one, of a number those of `targets`. Sets that write theirs
otherwise (`5%`, `05`, `12 apples`) have them written anew when they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

# A bare letter is a capital, and no word: "the answer is a matter of taste".
_SAID = re.compile(r"\b(?i:answer)\b\s*(?i:is)?\s*:?\s*\**\s*(?:\(([A-Ja-j])\)|([A-J])\b(?!\s+[a-z]))")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\)?")
_ALONE = re.compile(r"\(?([A-J])\)?[.:]?")
_NUMBER = r"-?\$?\s*\d[\d,]*(?:\.\d+)?"
_MARKED = re.compile(rf"(?:####|\banswer\s*(?:is|:)|\\boxed\{{)\s*[*$\\]*\s*({_NUMBER})", re.IGNORECASE)
_ANY_NUMBER = re.compile(_NUMBER)
MOST_PLACES = 6
"""Behind the point, to which sets fill a number up with zeros."""


def letter_in(text: str) -> str | None:
    """The letter of the first "the answer is (X)", else of a box, else a last line that is nothing else.

    The first, as the authors of MMLU-Pro read: models that were shown examples go on with questions of their own.
    """
    for pattern in (_SAID, _BOXED):
        if found := pattern.search(text):
            return found[found.lastindex].upper()
    lines = [line.strip().strip("*") for line in text.splitlines() if line.strip()]
    last = _ALONE.fullmatch(lines[-1]) if lines else None
    return last[1] if last else None


def number_in(text: str) -> Decimal | None:
    """The number that an answer settles on: behind "####", "the answer is" or in a box, else the last one."""
    found = _MARKED.findall(text) or _ANY_NUMBER.findall(text)
    try:
        return Decimal(re.sub(r"[,$\s]", "", found[-1])).normalize() if found else None
    except ArithmeticError:  # No number, or one of a million digits.
        return None


def targets(found: str | Decimal | None) -> list[str]:
    """How a set can have written the right answer where `found` is it, plainest first; nothing is right where nothing
    was found."""
    if found is None:
        return []
    if isinstance(found, str):
        return [f"The answer is ({found})."]
    found = found or Decimal(0)  # Minus nothing is nothing.
    # Nothing is rounded, whatever the number's length: a format has all the digits that it needs.
    places = max(-int(found.as_tuple().exponent), 0)
    forms = ("f", ",f", ".1f", ".2f", ",.2f") if found == found.to_integral_value() else (
        "f", ",f", *(f".{more}f" for more in range(places, MOST_PLACES + 1)))
    numbers = dict.fromkeys(f"{found:{form}}" for form in forms)
    return [f"#### {sign}{number}" for number in numbers for sign in ("", "$")]


def as_target(text: str, read: Callable[[str], str | Decimal | None]) -> str:
    """A right answer as a set has it, written anew where nobody who reads it out of an answer would write it so."""
    spelled = targets(read(text))
    return text if text in spelled or not spelled else spelled[0]
