"""One item, and the registry of families. A family is a module of this folder with

    make(draw, difficulty) -> spec         what is asked, as JSON values in no language, without the answer
    render(spec, language) -> str          the prompt, en or zh
    solve_a(spec, language), solve_b(...)  two solvers that share no algorithm
    gold(spec, language)                   optional: what is expected where the generator itself knows; else solve_a's
    verify(spec, language, target, text)   (score, remark) of an answer
    effort(spec) -> int                    how many elementary steps the plain way takes, for the scripted solvers

Both languages are rendered from the same spec, so twins have the same structure and the same numbers by construction.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.records import digest

FAMILIES: dict[str, str] = {
    "maths": "maths", "code": "coding", "logic": "logic", "tables": "table_questions", "wide": "wide",
    "long": "long_context", "tools": "tool_use", "gym": "gym",
}
"""Name of a family to its module."""
LANGUAGES = ("en", "zh")
DIFFICULTIES = range(1, 6)
_ATTEMPTS = 50


@dataclass(frozen=True)
class Problem:
    """`prompt` and `target` are all that a grader of an answer needs; `spec` is what both were made from."""

    id: str
    """Unique among languages: ITEM/LANGUAGE."""
    family: str
    kind: str
    difficulty: int
    index: int
    language: str
    prompt: str
    target: Any
    """JSON value."""
    twin: str
    """The id of the same item in the other language."""
    spec: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def item(self) -> str:
        """The id that both twins share."""
        return self.id.rpartition("/")[0]

    @property
    def target_text(self) -> str:
        """The target as one line of JSON, keys sorted: what goes into logs and digests."""
        return json.dumps(self.target, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @property
    def input_digest(self) -> str:
        """Of the prompt's text. A picture and the pages of a world follow from the item's id and the seed."""
        return digest(self.prompt)

    @property
    def identity(self) -> str:
        """Of everything that is asked: two items with the same identity are one."""
        return digest([self.prompt, self.spec.get("tables"), self.spec.get("world")])

    @property
    def target_digest(self) -> str:
        return digest(self.target_text)

    def png(self) -> bytes | None:
        """The picture that belongs to the prompt, drawn anew; None for most items."""
        if self.spec.get("form") != "image":
            return None
        from moonbase.evals.fresh.pictures import draw_tables

        return draw_tables(self.spec["tables"])


def family_module(name: str) -> ModuleType:
    """Raises UserError for a family that there is not."""
    if name not in FAMILIES:
        raise UserError(f"family {name!r}: not one of {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}")
    return importlib.import_module(f"moonbase.evals.fresh.{FAMILIES[name]}")


class Draw(random.Random):
    """A stream of draws that is the same for the same path, everywhere. 7 and "7" are one seed.

    `root` is a number of 48 bits that all items of a family and seed share.
    """

    root = 0

    @classmethod
    def of(cls, family: str, seed: int | str, *path: int) -> Draw:
        words = json.dumps([str(part) for part in (family, seed, *path)], ensure_ascii=False)
        draw = cls(int.from_bytes(hashlib.sha256(words.encode()).digest(), "big"))
        draw.root = int(hashlib.sha256(f"root/{family}/{seed}".encode()).hexdigest()[:12], 16)
        return draw


def generate(family: str, seed: int | str, difficulty: int, index: int, language: str = "en") -> Problem:
    """Item `index` of a family: the same for the same arguments, in every process and on every machine.

    Its id tells the family, a digest of the seed (which may still be secret), difficulty and index. Raises UserError.
    """
    module = family_module(family)
    if difficulty not in DIFFICULTIES:
        raise UserError(f"difficulty {difficulty!r}: must be a whole number from 1 to 5")
    if language not in LANGUAGES:
        raise UserError(f"language {language!r}: must be en or zh")
    tag = hashlib.sha256(f"moonbase fresh seed {seed}".encode()).hexdigest()[:8]
    item = f"{family}-{tag}-{difficulty}-{index:05d}"
    for attempt in range(_ATTEMPTS):
        spec = module.make(Draw.of(family, seed, difficulty, index, attempt), difficulty)
        if spec is not None and not getattr(module, "leaks", _never)(spec):
            break
    else:
        raise AssertionError(f"{item}: no fit item in {_ATTEMPTS} attempts")
    target = getattr(module, "gold", module.solve_a)(spec, language)
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    return Problem(f"{item}/{language}", family, spec["kind"], difficulty, index, language,
                   module.render(spec, language), target, f"{item}/{other}", spec)


def _never(spec: dict[str, Any]) -> bool:
    return False


def solve_a(problem: Problem) -> Any:
    """What the first solver says."""
    return family_module(problem.family).solve_a(problem.spec, problem.language)


def solve_b(problem: Problem) -> Any:
    """What the second solver says, which shares no algorithm with the first."""
    return family_module(problem.family).solve_b(problem.spec, problem.language)


def agree(problem: Problem) -> bool:
    """Whether both solvers say the same and it is the target."""
    return solve_a(problem) == problem.target == solve_b(problem)


def verify(problem: Problem, text: str) -> tuple[float | None, str]:
    """(score from 0 to 1, remark); (None, why) where it cannot be scored here. Never raises, whatever the text."""
    try:
        score, remark = family_module(problem.family).verify(problem.spec, problem.language, problem.target, str(text))
    except UserError as error:
        return None, str(error)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        return 0.0, f"unreadable answer ({type(error).__name__})"
    return score, remark[:300]


def answer_line(language: str, what_en: str, what_zh: str) -> str:
    """How every prompt ends."""
    if language == "zh":
        return f"\n\n最后单独用一行写出“答案：…”，其中只写{what_zh}。"
    return f'\n\nEnd with one line "Answer: …" that contains only {what_en}.'
