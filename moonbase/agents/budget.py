"""Budgets that are asked before the money is spent.

A budget is a tree: what a sub-agent spends, its parent has spent too. A model call reserves the most that it can cost,
from itself and from everyone above, and gives back what it did not use. So calls in flight can never overrun a limit
together, and a call that might is not made. Where only calls in flight are in the way, a call waits for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
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


@dataclass
class Spent:
    """What has been spent, but for seconds: those pass by themselves."""

    steps: int = 0
    tokens: int = 0
    money: float = 0.0
    critical_steps: int = 0
    subagents: int = 0


class BudgetExceeded(Exception):
    """Something was not done because it could have overrun a limit."""

    def __init__(self, what: str, spent: float, limit: float, needed: float) -> None:
        super().__init__(f"the budget of {what} is used up: {_number(spent)} of {_number(limit)} spent, "
                         f"{_number(needed)} more wanted")
        self.what, self.spent, self.limit, self.needed = what, spent, limit, needed


@dataclass(eq=False)
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
        for node in self.budget.line:
            node.spent.tokens += usage.input_tokens + usage.output_tokens
            node.spent.money += money
        self.release()
        return money

    def release(self) -> None:
        """The call was not made, or gave nothing that has to be paid."""
        if not self.open:
            return
        self.open = False
        for node in self.budget.line:
            node.in_flight -= 1
            node.reserved_tokens -= self.tokens
            # Sums of floats leave dust.
            node.reserved_money = node.reserved_money - self.money if node.in_flight else 0.0
        self.budget.line[-1].call_next()


KEPT = 0.1
"""The share of an agent's tokens, money and seconds that its sub-agents leave for its own answer."""


class Budget:
    """What one agent may spend, within what its parents may."""

    def __init__(
        self, limits: Limits = Limits(), parent: Budget | None = None, started: float = 0.0,
        known: Spent | None = None,
    ) -> None:
        """`started`: the journal's time from which seconds count. `known`: tokens, money and sub-agents of earlier
        lives, those below it included; they count from the start, since they are found again in no certain order."""
        self.limits, self.parent, self.started = limits, parent, started
        self.line: tuple[Budget, ...] = (self, *(parent.line if parent is not None else ()))
        """This one and everyone above."""
        self.spent = Spent() if known is None else Spent(
            tokens=known.tokens, money=known.money, subagents=known.subagents)
        self.in_flight = self.reserved_tokens = 0
        self.reserved_money = 0.0
        self._cohort: list[Spent] = []
        self._waiting: deque[asyncio.Event] = deque()

    def child(self, limits: Limits, started: float, known: Spent | None = None) -> Budget:
        """For a sub-agent, which may take no more critical steps than are left. `known`: it was started in an earlier
        life already, and has spent this. Raises BudgetExceeded where no more of them may be started."""
        whole = self.limits.critical_steps
        if whole is not None:
            # One is kept for the answer.
            left = whole - self.spent.critical_steps - 1
            if left < 1:
                raise BudgetExceeded("critical steps", self.spent.critical_steps, whole, 2)
            own = limits.critical_steps
            limits = dataclasses.replace(limits, critical_steps=left if own is None else min(left, own))
        if known is None:
            for node in self.line:
                _check("sub-agents", node.spent.subagents, node.limits.subagents, 1)
            for node in self.line:
                node.spent.subagents += 1
        child = Budget(limits, self, started, known)
        self._cohort.append(child.spent)
        return child

    # --- steps --------------------------------------------------------------------------------------------------------

    def check_step(self) -> None:
        """Raises BudgetExceeded where this agent may call its model no more."""
        _check("steps", self.spent.steps, self.limits.steps, 1)
        _check("critical steps", self.spent.critical_steps, self.limits.critical_steps, 1)

    def count_step(self) -> None:
        """This agent calls its model."""
        self.spent.steps += 1
        self.spent.critical_steps += 1

    def end_stage(self) -> None:
        """The sub-agents that were started since the last step are done; the longest of them counts."""
        self.spent.critical_steps += max((spent.critical_steps for spent in self._cohort), default=0)
        self._cohort.clear()

    def steps_left(self) -> int | None:
        """Of this agent itself."""
        left = [limit - spent for limit, spent in ((self.limits.steps, self.spent.steps),
                                                   (self.limits.critical_steps, self.spent.critical_steps))
                if limit is not None]
        return min(left) if left else None

    def count_stage(self, critical_steps: int) -> None:
        """So many were taken by sub-agents of this stage in an earlier life."""
        self._cohort.append(Spent(critical_steps=critical_steps))

    # --- seconds ------------------------------------------------------------------------------------------------------

    def seconds_left(self, now: float) -> float | None:
        """Until the first limit of this one or anyone above; None without one."""
        left = [self._of(node, node.limits.seconds) - (now - node.started)
                for node in self.line if node.limits.seconds is not None]
        return min(left) if left else None

    def check_seconds(self, now: float) -> None:
        """Raises BudgetExceeded where time is up."""
        left = self.seconds_left(now)
        if left is not None and left <= 0:
            raise self.late(now)

    def late(self, now: float) -> BudgetExceeded:
        """That the time is up, or as good as; of the limit that comes first."""
        limited = [node for node in self.line if node.limits.seconds is not None]
        first = min(limited, key=lambda node: self._of(node, node.limits.seconds) - (now - node.started))
        return BudgetExceeded("seconds", round(now - first.started, 3), self._of(first, first.limits.seconds), 0)

    # --- tokens and money ---------------------------------------------------------------------------------------------

    def reserve(self, input_tokens: int, max_output_tokens: int, price: Price = Price()) -> Reservation:
        """Room for a call. Raises BudgetExceeded where not even one token could be generated."""
        output = self._output_left(input_tokens, max_output_tokens, price)
        reservation = Reservation(self, input_tokens, output, price, input_tokens + output,
                                  _most(price, input_tokens, output))
        for node in self.line:
            node.in_flight += 1
            node.reserved_tokens += reservation.tokens
            node.reserved_money += reservation.money
        return reservation

    async def reserve_in_turn(self, input_tokens: int, max_output_tokens: int, price: Price = Price()) -> Reservation:
        """Room for a call, as much as there is when calls in flight have given back what they do not use: where they
        leave less now, wait, first come, first served. Raises BudgetExceeded where no waiting helps."""
        root = self.line[-1]
        if not root._waiting and self._fits(input_tokens, max_output_tokens, price):
            return self.reserve(input_tokens, max_output_tokens, price)
        turn = asyncio.Event()
        root._waiting.append(turn)
        try:
            while root._waiting[0] is not turn or not self._fits(input_tokens, max_output_tokens, price):
                turn.clear()
                await turn.wait()
            return self.reserve(input_tokens, max_output_tokens, price)
        finally:
            root._waiting.remove(turn)
            root.call_next()

    def call_next(self) -> None:
        """Let the first in line look whether it fits now."""
        if self._waiting:
            self._waiting[0].set()

    def _fits(self, input_tokens: int, max_output_tokens: int, price: Price) -> bool:
        """Whether calls in flight take nothing from it. Raises BudgetExceeded where there is no room without them."""
        alone = self._output_left(input_tokens, max_output_tokens, price, in_flight=False)
        try:
            return self._output_left(input_tokens, max_output_tokens, price) == alone
        except BudgetExceeded:
            return False

    def _of(self, node: Budget, limit: float) -> float:
        """How much of a limit of `node` this agent may use: all of its own, and what those above do not keep."""
        return limit if node is self else limit * (1 - KEPT)

    def _output_left(self, input_tokens: int, max_output_tokens: int, price: Price, in_flight: bool = True) -> int:
        """Tokens that a call may generate. `in_flight`: beside the calls that are. Raises BudgetExceeded for none."""
        output = max_output_tokens
        for node in self.line:
            if node.limits.tokens is not None:
                limit = int(self._of(node, node.limits.tokens))
                taken = node.spent.tokens + node.reserved_tokens * in_flight
                left = limit - taken - input_tokens
                if left < 1:
                    raise BudgetExceeded("tokens", taken, limit, input_tokens + 1)
                output = min(output, left)
            if node.limits.money is not None:
                ceiling = self._of(node, node.limits.money)
                paid = node.spent.money + node.reserved_money * in_flight
                left_money = ceiling - paid - _most(price, input_tokens, 0)
                if left_money < price.output / 1e6:
                    raise BudgetExceeded("money", paid, ceiling, _most(price, input_tokens, 1))
                if price.output > 0:
                    output = min(output, max(1, int(left_money * 1e6 / price.output * (1 - 1e-12))))
        return output


def _most(price: Price, input_tokens: int, output_tokens: int) -> float:
    """Dollars, if nothing is cached (or if that should cost more)."""
    dearest = max(price.input, price.cached or 0.0)
    return (input_tokens * dearest + output_tokens * price.output) / 1e6


def _check(what: str, spent: float, limit: float | None, needed: float) -> None:
    if limit is not None and spent + needed > limit:
        raise BudgetExceeded(what, spent, limit, needed)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
