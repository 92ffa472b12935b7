"""Sentences that figures and verdicts carry in English, in other languages: methods, notes, reasons, suites' own words.

`words/phrases.zh.yaml` has an English pattern and its translation a line; what has none stays as it is, for it came
from outside. Only the words change: names and numbers are carried over.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_MARKS = {"; ": "；", ": ": "：", ", ": "，"}
_BLANK = re.compile(r"\{(\w+)\}")
_WORDY = ("said", "first", "second")
_PLAIN = r"[^\s;]+?"
_NAMES = r"[^;]+?"
"""A list of names ends where the next remark begins."""
LONGEST = 2000
"""Letters; what is longer is no phrase of ours."""


@cache
def _table(language: str) -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """(phrases word for word, patterns in the order of the file)."""
    import yaml

    path = Path(__file__).parent / "words" / f"phrases.{language}.yaml"
    exact, patterns = {}, []
    for english, other in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if not _BLANK.search(english):
            exact[english] = other
            continue
        parts = _BLANK.split(english)
        # Names of blanks stand at odd places; one that begins with `said` is a phrase itself, others are numbers.
        pattern = "".join(f"(?P<{part}>{_blank(part)})" if place % 2 else re.escape(part)
                          for place, part in enumerate(parts))
        patterns.append((re.compile(pattern, re.DOTALL), other))
    return exact, patterns


def _blank(name: str) -> str:
    return _NAMES if name == "names" else ".+?" if name.startswith(_WORDY) else _PLAIN


def say(text: str, language: str) -> str:
    """`text` in `language`, as far as there are words for it: the whole, else its parts between punctuation."""
    if language == "en" or not text or len(text) > LONGEST:
        return text
    exact, patterns = _table(language)
    if text in exact:
        return exact[text]
    for pattern, other in patterns:
        if found := pattern.fullmatch(text):
            values = {name: say(part, language) if name.startswith("said") else part
                      for name, part in found.groupdict().items()}
            return other.format(**values)
    for mark in ("; ", ": ", ", "):
        parts = text.split(mark)
        if len(parts) > 1:
            said = [say(part, language) for part in parts]
            # Lists of names keep their own commas.
            return (_MARKS[mark] if said != parts else mark).join(said)
    return text
