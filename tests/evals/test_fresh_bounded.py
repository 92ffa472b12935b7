"""Difficulty is difficulty: solvers with bounded means, none of which knows an answer, do worse where it is higher."""

from __future__ import annotations

import itertools

import pytest

from moonbase.evals.fresh import bounded, generate
from moonbase.evals.fresh.long_context import gold, make
from moonbase.evals.fresh.problem import Draw, Problem
from moonbase.evals.statistics import newcombe


def items(family: str, difficulty: int, count: int) -> list[Problem]:
    if family != "long":
        return [generate(family, "bounded", difficulty, index) for index in range(count)]
    # Without their texts of up to a megabyte: these solvers look at where the needles are.
    specs = [make(Draw.of(family, "bounded", difficulty, index), difficulty) for index in range(count)]
    return [Problem("long/en", family, "", difficulty, 0, "en", "", gold(spec, "en"), "", spec) for spec in specs]


@pytest.mark.parametrize("family", bounded.FAMILIES)
@pytest.mark.parametrize("count", [None, pytest.param(200, marks=pytest.mark.slow)])
def test_bounded_solvers_fall_with_difficulty_and_the_weak_before_the_strong(family: str, count: int | None) -> None:
    """Nothing rises beyond chance from one difficulty to the next (99.9% intervals of the difference, Newcombe), the
    hardest is below the easiest beyond chance (95%), and so is the weak solver below the strong one."""
    count = count or {"maths": 60, "logic": 14}.get(family, 20)
    sets = [items(family, difficulty, count) for difficulty in range(1, 6)]
    solved = {strength: [sum(bounded.right(problem, strength) for problem in level) for level in sets]
              for strength in ("weak", "strong")}
    print(f"\n{family}: {solved} of {count}")
    for levels in solved.values():
        for easier, harder in itertools.pairwise(levels):
            assert newcombe(harder, count, easier, count, 0.999).low <= 0, levels
        assert newcombe(levels[0], count, levels[-1], count, 0.95).low > 0, levels
    for weak, strong in zip(solved["weak"], solved["strong"], strict=True):
        assert newcombe(weak, count, strong, count, 0.999).low <= 0, solved
    assert newcombe(sum(solved["strong"]), 5 * count, sum(solved["weak"]), 5 * count, 0.95).low > 0, solved


def test_bounded_solvers_are_bounded_and_no_oracles() -> None:
    """Given all means, they solve what they did not: it is the bounds that fail, not the way."""
    for family, name, enough in (("logic", "SUPPOSED", 10**6), ("tables", "ROWS", 10**3), ("code", "STEPS", 99)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(getattr(bounded, name), "strong", enough)
            assert all(bounded.right(generate(family, "all means", 5, index), "strong") for index in range(6)), family
