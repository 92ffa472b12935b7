"""All items of an evaluation by fresh problems: what a configuration and a seed make, without doubles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from moonbase.evals.fresh.problem import FAMILIES, LANGUAGES, Problem, family_module, generate


class Configuration(BaseModel):
    """What is committed to, beside the generator and the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    families: tuple[str, ...] = Field(tuple(FAMILIES), min_length=1)
    difficulties: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1)
    languages: tuple[str, ...] = Field(LANGUAGES, min_length=1)
    count: int = Field(20, ge=1, le=10_000)
    """Items of each family and difficulty; each is asked in every language."""
    limit: int | None = Field(None, ge=1)
    """Of each family at most so many, counted with their twins, from each difficulty in turn."""

    samples: int = Field(1, ge=1, le=1000)
    """How often each item is asked."""
    calls: tuple[Literal["tools", "text"], ...] = Field(("tools",), min_length=1)
    """Family `tools`: the functions as the model's own tools, or written in the question; both: each item twice."""

    @field_validator("families")
    @classmethod
    def _known_families(cls, families: tuple[str, ...]) -> tuple[str, ...]:
        for name in families:
            if name not in FAMILIES:
                raise ValueError(f"{name!r} is none of {', '.join(FAMILIES)}")
        return tuple(dict.fromkeys(families))

    @field_validator("difficulties")
    @classmethod
    def _known_difficulties(cls, difficulties: tuple[int, ...]) -> tuple[int, ...]:
        if not set(difficulties) <= {1, 2, 3, 4, 5}:
            raise ValueError("difficulties go from 1 to 5")
        return tuple(dict.fromkeys(difficulties))

    @field_validator("calls")
    @classmethod
    def _each_once(cls, calls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(calls))

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if not set(languages) <= set(LANGUAGES):
            raise ValueError("languages are en and zh")
        return tuple(dict.fromkeys(languages))


def forms_of(configuration: Configuration, family: str) -> tuple[str | None, ...]:
    """The values of the condition `calls` under which a family's items are asked; (None,) where there is none."""
    return configuration.calls if family == "tools" else (None,)


def problems(configuration: Configuration, seed: int | str) -> Iterator[Problem]:
    """Family by family, difficulty by difficulty, twins beside each other. An item that asks what an earlier one of its
    family asks is passed over, and the next index takes its place. Raises UserError."""
    for family in configuration.families:
        asked: set[str] = set()
        if configuration.limit is None:
            for difficulty in configuration.difficulties:
                yield from _of_one(configuration, family, difficulty, seed, asked)
            continue
        each = len(configuration.difficulties) * len(configuration.languages)
        count = min(configuration.count, -(-configuration.limit // each))
        fewer = configuration.model_copy(update={"count": count})
        rows = [list(_of_one(fewer, family, difficulty, seed, asked)) for difficulty in configuration.difficulties]
        yield from _spread(rows, len(configuration.languages))[: configuration.limit]


def _spread(rows: list[list[Problem]], languages: int) -> list[Problem]:
    """From each row in turn one item in all its languages."""
    return [problem for place in range(0, len(rows[0]), languages) for row in rows
            for problem in row[place : place + languages]]


def _of_one(configuration: Configuration, family: str, difficulty: int, seed: int | str, asked: set[str]
            ) -> Iterator[Problem]:
    found, first = 0, configuration.languages[0]
    for index in range(20 * configuration.count + 100):
        problem = generate(family, seed, difficulty, index, first)
        if problem.identity in asked:
            continue
        asked.add(problem.identity)
        yield problem
        for language in configuration.languages[1:]:
            yield generate(family, seed, difficulty, index, language)
        found += 1
        if found == configuration.count:
            return
    raise AssertionError(f"family {family}: fewer than {configuration.count} items of difficulty {difficulty} differ")


def effort(problem: Problem) -> int:
    """How many elementary steps the plain way to the answer takes."""
    return max(1, family_module(problem.family).effort(problem.spec))
