"""Which runs a time-to-loss comparison of two optimizers needs, from what earlier runs came to; no network in here.

First each optimizer's rate: a grid of rates a factor of two apart on one seed, which extends itself until its best rate
has a worse one on both sides, and one more between the best two where a parabola promises something there. The baseline
is tuned at its full length of N steps, the challenger at half of that, where it is expected to be as good. Then every
other seed at the tuned rates. The baseline's losses after N steps are the target; the challenger makes runs of other
lengths, a factor of the square root of two apart, until for every seed one of them misses the target and the next one
reaches it. A schedule's end belongs to its length, so every length is a run of its own, and what lies between two
lengths is interpolated: loss against the logarithm of tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BASELINE, CHALLENGER = "adamw", "muonclip"
OPTIMIZERS = (BASELINE, CHALLENGER)
_RUNGS = (-4, -3, -2, -1, 0, 1)
"""Lengths of the challenger's runs: N times the square root of two to these powers."""
_TUNING_RUNG = -2
_MOST_RATES = 8
_WORTH_REFINING = 0.003
"""Nats: about 1% of the tokens, where a doubling of them is worth a third of a nat."""


class Run(NamedTuple):
    """One training run. Losses of runs are held-out losses after the last step; infinity where training gave up."""

    optimizer: str
    rate: float
    steps: int
    seed: int


class Reached(NamedTuple):
    """How much it takes to reach a loss. relation: "=", or "<" where all lengths reach it, ">" where none does."""

    amount: float
    relation: str


@dataclass(frozen=True)
class Plan:
    """steps: N, the length of the baseline's runs; rates: where every grid begins; the first seed is tuned on."""

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.rates) >= 3 and list(self.rates) == sorted(self.rates) and len(self.seeds) >= 1

    @property
    def lengths(self) -> list[int]:
        """Of the challenger's runs, shortest first; all different however short the baseline's are."""
        return sorted({self._length(rung) for rung in _RUNGS})

    def tuning_steps(self, optimizer: str) -> int:
        return self.steps if optimizer == BASELINE else self._length(_TUNING_RUNG)

    def _length(self, rung: int) -> int:
        return max(1, round(self.steps * 2 ** (rung / 2)))


Losses = Mapping[Run, float]


def rate_grid(plan: Plan, optimizer: str, losses: Losses) -> tuple[dict[float, float], list[Run]]:
    """The losses of the rates that were tried, by rate, and the runs that the grid still needs.

    It is finished when nothing is needed. It gives up extending itself after `_MOST_RATES` rates, so that a best rate
    at its edge is seen by whoever asks `at_the_edge`.
    """
    rates = list(plan.rates)

    def tried(rates: Sequence[float]) -> tuple[dict[float, float], list[Run]]:
        runs = {rate: Run(optimizer, rate, plan.tuning_steps(optimizer), plan.seeds[0]) for rate in rates}
        return ({rate: losses[run] for rate, run in runs.items() if run in losses},
                [run for run in runs.values() if run not in losses])

    while True:
        known, missing = tried(rates)
        if missing:
            return known, missing
        best = best_rate(known)
        if len(rates) >= _MOST_RATES or best not in (rates[0], rates[-1]):
            break
        if best == rates[0]:
            rates.insert(0, best / 2)
        else:
            rates.append(best * 2)
    if (left_by_the_grid(known) or 0.0) > _WORTH_REFINING:
        second = min((rates[rates.index(best) + side] for side in (-1, 1)), key=lambda rate: known[rate])
        return tried([*rates, float(f"{math.sqrt(best * second):.3g}")])
    return known, []


def best_rate(grid: Mapping[float, float]) -> float:
    """The rate of least loss; the lowest where all gave up."""
    return min(grid, key=lambda rate: (grid[rate], rate))


def at_the_edge(grid: Mapping[float, float]) -> bool:
    return best_rate(grid) in (min(grid), max(grid))


def left_by_the_grid(grid: Mapping[float, float]) -> float | None:
    """By how much the vertex of the parabola through the best rate and its neighbours, over the logarithm of the rate,
    lies below the best rate's loss: about what a finer grid could still gain. None at the edge of the grid."""
    if at_the_edge(grid):
        return None
    rates = sorted(grid)
    place = rates.index(best_rate(grid))
    around = rates[place - 1:place + 2]
    if math.inf in map(grid.get, around):
        return None
    step_below, step_above = (math.log2(high / low) for low, high in itertools.pairwise(around))
    slope_below, slope_above = ((grid[high] - grid[low]) / step for (low, high), step in zip(
        itertools.pairwise(around), (step_below, step_above), strict=True))
    bend = (slope_above - slope_below) / (step_below + step_above)
    slope = (slope_below * step_above + slope_above * step_below) / (step_below + step_above)
    return slope**2 / (4 * bend) if bend > 0 else None


def tuned_rates(plan: Plan, losses: Losses) -> dict[str, float]:
    """The tuned rate of every optimizer whose grid is finished."""
    grids = {optimizer: rate_grid(plan, optimizer, losses) for optimizer in OPTIMIZERS}
    return {optimizer: best_rate(known) for optimizer, (known, missing) in grids.items() if not missing}


def targets(plan: Plan, losses: Losses) -> dict[int, float] | None:
    """The tuned baseline's loss after N steps by seed; None until all seeds are there."""
    rate = tuned_rates(plan, losses).get(BASELINE)
    found = {seed: losses.get(Run(BASELINE, rate, plan.steps, seed)) for seed in plan.seeds} if rate else {}
    return None if not found or None in found.values() else found  # type: ignore[return-value]


def points(plan: Plan, losses: Losses, seed: int) -> dict[int, float]:
    """The challenger's losses at its tuned rate, by length."""
    rate = tuned_rates(plan, losses).get(CHALLENGER)
    found = {steps: losses.get(Run(CHALLENGER, rate, steps, seed)) for steps in plan.lengths} if rate else {}
    return {steps: loss for steps, loss in found.items() if loss is not None}


def needed(plan: Plan, losses: Losses) -> list[Run]:
    """The runs that can be told to be missing now, most urgent first; none are left when the comparison is finished."""
    found = [run for optimizer in OPTIMIZERS for run in rate_grid(plan, optimizer, losses)[1]]
    tuned = tuned_rates(plan, losses)
    for optimizer, rate in tuned.items():
        runs = [Run(optimizer, rate, plan.tuning_steps(optimizer), seed) for seed in plan.seeds]
        found += [run for run in runs if run not in losses]
    wanted = targets(plan, losses)
    if wanted is None or CHALLENGER not in tuned:
        return found
    mean = sum(wanted.values()) / len(wanted)
    for seed, own in wanted.items():
        if known := points(plan, losses, seed):
            lengths = _next_lengths(plan.lengths, known, min(mean, own), max(mean, own))
            found += [Run(CHALLENGER, tuned[CHALLENGER], steps, seed) for steps in lengths]
    return found


def _next_lengths(lengths: Sequence[int], known: Mapping[int, float], low: float, high: float) -> list[int]:
    """What is missing until one length misses even the higher loss and a longer one reaches even the lower."""
    first, last = (lengths.index(end(known)) for end in (min, max))
    found = []
    if known[lengths[last]] > low and last + 1 < len(lengths):
        found.append(lengths[last + 1])
    if known[lengths[first]] <= high and first > 0:
        found.append(lengths[first - 1])
    return found


def reached(known: Mapping[float, float], target: float) -> Reached:
    """Where the loss comes down to `target`, from losses by amount (steps or tokens), between two neighbours along the
    line of loss against the logarithm of the amount. Noise may cross it twice; the last time counts."""
    amounts = sorted(known)
    missing = [amount for amount in amounts if not known[amount] <= target]
    if not missing:
        return Reached(amounts[0], "<")
    if missing[-1] == amounts[-1]:
        return Reached(amounts[-1], ">")
    before = missing[-1]
    after = amounts[amounts.index(before) + 1]
    if math.isinf(known[before]):
        return Reached(after, "<")
    share = (known[before] - target) / (known[before] - known[after])
    return Reached(before * (after / before) ** share, "=")


def imagined(plan: Plan, factor: float = 1.7) -> list[Run]:
    """The runs of a comparison that goes as expected, to say beforehand what it will cost: the challenger is ahead by
    `factor`, and each grid extends itself once and is refined."""
    losses: dict[Run, float] = {}
    best = plan.rates[-1] * 2**0.3
    while missing := needed(plan, losses):
        for run in missing:
            tokens = run.steps * (factor if run.optimizer == CHALLENGER else 1.0)
            losses[run] = abs(math.log2(run.rate / best)) - math.log(tokens)
    return list(losses)
