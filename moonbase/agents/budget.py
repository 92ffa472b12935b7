"""Budgets that are asked before the money is spent.

A budget is a tree: what a sub-agent spends, its parent has spent too. A model call reserves the most that it can cost,
from itself and from everyone above, and gives back what it did not use. So calls in flight can never overrun a limit
together, and a call that might is not made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from moonbase.agents.models.base import Price, Usage
from moonbase.errors import UserError


@dataclass(frozen=True)
class Limits:
    """The most that may be spent; None leaves it open."""

    steps: int | None = None
    """Model calls of this agent itself."""
    tokens: int | None = None
    """Into and out of models, sub-agents' included; so are seconds and money."""
    seconds: float | None = None
    money: float | None = None
    """Dollars."""
    critical_steps: int | None = None
    """Σ over stages of (own step + most steps of any sub-agent of the stage), facts of Kimi K2.5."""
    subagents: int | None = None
    """Sub-agent runs, those of sub-agents included."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"limit {field.name}={value!r} must be 0 or more")

    def tightened(self, other: Limits) -> Limits:
        """The smaller of each two."""
        values = {}
        for field in dataclasses.fields(self):
            both = [value for value in (getattr(self, field.name), getattr(other, field.name)) if value is not None]
            values[field.name] = min(both) if both else None
        return Limits(**values)


@dataclass
class Spent:
    """What has been spent."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    money: float = 0.0
    critical_steps: int = 0
    subagents: int = 0


class BudgetExceeded(Exception):
    """Something was not done because it could have overrun a limit."""

    def __init__(self, what: str, spent: float, limit: float, needed: float) -> None:
        super().__init__(f"the budget of {what} is used up: {_number(spent)} of {_number(limit)} spent, "
                         f"{_number(needed)} more wanted")
        self.what, self.spent, self.limit, self.needed = what, spent, limit, needed


@dataclass
class Reservation:
    """Room for one call; `settle` or `release` it."""

    budget: Budget
    input_tokens: int
    max_output_tokens: int
    """What the call may generate: what was asked for, cut to what is left."""
    price: Price
    tokens: int
    money: float
    open: bool = True

    def settle(self, usage: Usage) -> float:
        """The call is over and cost this. Returns dollars."""
        money = self.price.of(usage)
        self.release()
        for node in self.budget.line():
            node.spent.tokens += usage.input_tokens + usage.output_tokens
            node.spent.money += money
        return money

    def release(self) -> None:
        """The call was not made, or gave nothing that has to be paid."""
        if self.open:
            self.open = False
            for node in self.budget.line():
                node.reserved_tokens -= self.tokens
                node.reserved_money -= self.money


KEPT = 0.1
"""The share of an agent's tokens, money and seconds that its sub-agents leave for its own answer."""


class Budget:
    """What one agent may spend, within what its parents may."""

    def __init__(self, limits: Limits = Limits(), parent: Budget | None = None, started: float = 0.0) -> None:
        """`started`: the loop's time from which seconds count."""
        self.limits, self.parent, self.started = limits, parent, started
        self.spent = Spent()
        self.reserved_tokens = 0
        self.reserved_money = 0.0

    def child(self, limits: Limits, started: float) -> Budget:
        """For a sub-agent. Raises BudgetExceeded where no more of them may be started."""
        for node in self.line():
            _check("sub-agents", node.spent.subagents, node.limits.subagents, 1)
        for node in self.line():
            node.spent.subagents += 1
        return Budget(limits, self, started)

    def line(self) -> list[Budget]:
        """This one and everyone above."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes

    def seconds_left(self, now: float) -> float | None:
        """Until the first limit of this one or anyone above; None without one."""
        left = [self._of(node, node.limits.seconds) - (now - node.started)
                for node in self.line() if node.limits.seconds is not None]
        return min(left) if left else None

    def take_step(self, now: float, critical: bool) -> None:
        """One more model call of this agent; `critical`: it counts for the critical path as it is. Raises
        BudgetExceeded and counts nothing where it may not be made."""
        self.check_seconds(now)
        _check("steps", self.spent.steps, self.limits.steps, 1)
        if critical:
            _check("critical steps", self.spent.critical_steps, self.limits.critical_steps, 1)
            self.spent.critical_steps += 1
        self.spent.steps += 1

    def add_critical_steps(self, steps: int) -> None:
        """A cohort of sub-agents is over; its longest took so many steps."""
        self.spent.critical_steps += steps

    def add(self, spent: dict[str, float]) -> None:
        """What was spent below it before it was restored, in the names of `Spent`."""
        for node in self.line():
            for name in ("tokens", "money", "subagents"):
                setattr(node.spent, name, getattr(node.spent, name) + spent.get(name, 0))

    def critical_steps_left(self) -> int | None:
        """What a sub-agent started now may take at most: one is kept for the answer."""
        limit = self.limits.critical_steps
        return None if limit is None else limit - self.spent.critical_steps - 1

    def steps_left(self) -> int | None:
        """Of this agent itself."""
        left = [limit - spent for limit, spent in ((self.limits.steps, self.spent.steps),
                                                   (self.limits.critical_steps, self.spent.critical_steps))
                if limit is not None]
        return min(left) if left else None

    def _of(self, node: Budget, limit: float) -> float:
        """How much of a limit of `node` this agent may use: all of its own, and what those above do not keep."""
        return limit if node is self else limit * (1 - KEPT)

    def check_seconds(self, now: float) -> None:
        """Raises BudgetExceeded where time is up."""
        for node in self.line():
            if node.limits.seconds is not None and now - node.started >= self._of(node, node.limits.seconds):
                raise BudgetExceeded("seconds", round(now - node.started, 3), node.limits.seconds, 0)

    def reserve(self, input_tokens: int, max_output_tokens: int, price: Price = Price()) -> Reservation:
        """Room for a call. Raises BudgetExceeded where not even one token could be generated."""
        output = max_output_tokens
        for node in self.line():
            if node.limits.tokens is not None:
                limit = int(self._of(node, node.limits.tokens))
                left = limit - node.spent.tokens - node.reserved_tokens - input_tokens
                if left < 1:
                    raise BudgetExceeded("tokens", node.spent.tokens + node.reserved_tokens, limit, input_tokens + 1)
                output = min(output, left)
            if node.limits.money is not None:
                ceiling = self._of(node, node.limits.money)
                left_money = ceiling - node.spent.money - node.reserved_money - _most(price, input_tokens, 0)
                if left_money < price.output / 1e6:
                    raise BudgetExceeded("money", node.spent.money + node.reserved_money, ceiling,
                                         _most(price, input_tokens, 1))
                if price.output > 0:
                    output = min(output, int(left_money * 1e6 / price.output * (1 - 1e-12)))
        reservation = Reservation(self, input_tokens, output, price, input_tokens + output,
                                  _most(price, input_tokens, output))
        for node in self.line():
            node.reserved_tokens += reservation.tokens
            node.reserved_money += reservation.money
        return reservation


def _most(price: Price, input_tokens: int, output_tokens: int) -> float:
    """Dollars, if nothing is cached (or if that should cost more)."""
    dearest = max(price.input, price.cached or 0.0)
    return (input_tokens * dearest + output_tokens * price.output) / 1e6


def _check(what: str, spent: float, limit: float | None, needed: float) -> None:
    if limit is not None and spent + needed > limit:
        raise BudgetExceeded(what, spent, limit, needed)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
