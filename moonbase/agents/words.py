"""A text as the words by which it is found: one rule for pages of worlds and for documents of one's own.

Words are compared without case and accents. Scripts that put no spaces between words (Chinese, Japanese, Thai, …) are
cut into single characters and pairs of neighbours; so is Korean, whose words carry their particles.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")
# Thai and Lao, Burmese, Khmer, kana, Han, Hangul.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
                      "\U00020000-\U0003ffff]+")
"""A run of characters of such scripts."""


@functools.cache
def _marks() -> dict[int, None]:
    """Accents, vowel signs and the like, for `str.translate`; all of them are in the first two planes."""
    return {code: None for code in range(0x20000) if unicodedata.category(chr(code)).startswith("M")}


def words(text: str) -> list[str]:
    """What is compared: words without case and accents; of scripts without spaces, characters and pairs of them."""
    if text.isascii():
        return _WORD.findall(text.lower())
    folded = unicodedata.normalize("NFKD", text).translate(_marks())
    found: list[str] = []
    # Composed again, or else a syllable of Hangul would be three letters.
    for word in _WORD.findall(unicodedata.normalize("NFC", folded).casefold()):
        if word.isascii():
            found.append(word)
            continue
        end = 0
        for run in UNSPACED.finditer(word):
            if run.start() > end:
                found.append(word[end : run.start()])
            characters = run[0]
            found += characters
            found += map(str.__add__, characters, characters[1:])
            end = run.end()
        if end < len(word):
            found.append(word[end:])
    return found
