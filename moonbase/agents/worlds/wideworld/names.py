"""Invented names in two grammars that share nothing: what is learnt by heart in training is of no use in a test.

Each grammar has consonants of its own, so that no syllable of one can stand in a word of the other; only the five
vowels are common.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Grammar:
    """A word is onset + vowel + [coda] + onset + vowel + ending, its first letter large."""

    name: str
    onsets: tuple[str, ...]
    codas: tuple[str, ...]
    endings: tuple[str, ...]

    def word(self, draw: random.Random) -> str:
        """One word."""
        coda = draw.choice(self.codas) if draw.random() < 0.4 else ""
        first = draw.choice(self.onsets) + draw.choice(VOWELS)
        second = draw.choice(self.onsets) + draw.choice(VOWELS)
        return (first + coda + second + draw.choice(self.endings)).capitalize()

    def stem(self, word: str) -> str:
        """The word in small letters without its ending."""
        word = word.lower()
        fitting = [ending for ending in self.endings if word.endswith(ending)]
        return word.removesuffix(max(fitting, key=len)) if fitting else word


VOWELS = ("a", "e", "i", "o", "u")
GRAMMARS = {
    "train": Grammar("train", ("b", "br", "d", "dr", "f", "fr", "k", "kr", "m", "p", "pr", "r", "v"),
                     ("m", "r", "k", "b"),
                     ("m", "rk", "dova", "bra", "mir", "pek", "vard", "ko", "fer", "rim", "dram")),
    "test": Grammar("test", ("g", "gl", "h", "j", "l", "n", "s", "sl", "t", "sh", "w", "z"),
                    ("l", "n", "s", "t"),
                    ("l", "nt", "shta", "gen", "zol", "lis", "wen", "nja", "ho", "tas", "gult")),
}


class Names:
    """Names of two words, none given twice."""

    def __init__(self, grammar: Grammar, draw: random.Random, taken: Iterable[str] = ()) -> None:
        """`taken`: words that no name shall have."""
        self.grammar, self._draw = grammar, draw
        self._words = set(taken)
        self._given: set[str] = set()

    def _fresh_word(self) -> str:
        while (word := self.grammar.word(self._draw)) in self._words:
            pass
        self._words.add(word)
        return word

    def many(self, count: int) -> list[str]:
        """`count` names; first words repeat within them as given names do, second words as family names."""
        firsts = [self._fresh_word() for _ in range(max(12, count // 25))]
        seconds = [self._fresh_word() for _ in range(max(20, count // 6))]
        names: list[str] = []
        while len(names) < count:
            name = f"{self._draw.choice(firsts)} {self._draw.choice(seconds)}"
            if name not in self._given:
                self._given.add(name)
                names.append(name)
        return names

    def twin(self, name: str) -> str | None:
        """A name that differs in its last few letters alone; None where there is none left."""
        first, second = name.split(" ")
        stem = second[: len(self.grammar.stem(second))]
        endings = [ending for ending in self.grammar.endings if f"{first} {stem}{ending}" not in self._given]
        if not endings:
            return None
        twin = f"{first} {stem}{self._draw.choice(endings)}"
        self._given.add(twin)
        return twin
