"""A pattern of the rule set: which family it counts for, what it matches, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

STEM = 6
"""Letters of a word by which a cue is known."""


@dataclass(frozen=True)
class Pattern:
    """One expression. Whether it can match at all is seen from its cues, before it is searched for."""

    family: str
    expression: str
    cues: str
    """Words, by their stems (in Chinese: strings), one of which every match contains. Empty: always searched for."""
    reason: str
    compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)
    stems: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compiled", re.compile(self.expression))
        object.__setattr__(self, "stems", frozenset(cue[:STEM] for cue in self.cues.split()))


FAMILIES = (
    "inability", "apology", "identity", "policy", "norm", "moralising", "opinion", "equality", "redirect", "premise",
    "direct", "offer", "turn", "hedge", "outline", "official_line", "criticism",
)
