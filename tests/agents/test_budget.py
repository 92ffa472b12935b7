"""Budgets beside an accountant who adds everything up anew at every question."""

from __future__ import annotations

import asyncio
import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.agents.budget import Budget, BudgetExceeded, Limits
from moonbase.agents.models.base import Price, Usage
from moonbase.agents.simulation import simulate
from moonbase.errors import UserError

KEPT = Fraction(1, 10)
PRICES = (Price(), Price(3, 15), Price(0.25, 2, 0.05), Price(1, 0), Price(0, 7, 2))


def dollars(price: Price, fresh: int, cached: int, output: int) -> Fraction:
    """Exact."""
    of_cached = price.input if price.cached is None else price.cached
    return (fresh * Fraction(price.input) + cached * Fraction(of_cached) + output * Fraction(price.output)) / 10**6


class Accountant:
    """The tree as lists: every payment and every call in flight, by node."""

    def __init__(self) -> None:
        self.parents: list[int | None] = []
        self.limits: list[Limits] = []
        self.paid: list[tuple[int, int, Fraction]] = []
        self.flying: dict[int, tuple[int, int, Fraction]] = {}

    def line(self, node: int | None) -> list[int]:
        return [] if node is None else [node, *self.line(self.parents[node])]

    def used(self, node: int) -> tuple[int, Fraction]:
        rows = [row for row in [*self.paid, *self.flying.values()] if node in self.line(row[0])]
        return sum(tokens for _, tokens, _ in rows), sum((money for *_, money in rows), Fraction(0))

    def most(self, node: int, input_tokens: int, wanted: int, price: Price) -> int:
        """The most output for which nothing on the line is over its limit; 0 where there is none. By trying."""
        def fits(output: int) -> bool:
            dearest = max(Fraction(price.input), Fraction(price.cached or 0))
            cost = (input_tokens * dearest + output * Fraction(price.output)) / 10**6
            for one in self.line(node):
                tokens, money = self.used(one)
                share = 1 if one == node else 1 - KEPT
                limits = self.limits[one]
                if limits.tokens is not None and tokens + input_tokens + output > limits.tokens * share:
                    return False
                if limits.money is not None and money + cost > Fraction(limits.money) * share:
                    return False
            return True

        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


limits = st.builds(Limits, tokens=st.none() | st.integers(0, 5000), money=st.none() | st.floats(0, 0.05),
                   subagents=st.none() | st.integers(0, 4))
moves = st.lists(st.tuples(st.sampled_from(["child", "reserve", "reserve", "reserve", "settle", "release"]),
                           st.integers(0, 9), st.integers(0, 1000), st.integers(1, 2000), st.sampled_from(PRICES),
                           limits, st.floats(0, 1)), max_size=40)


@settings(max_examples=400, deadline=None)
@given(root=limits, moves=moves)
def test_no_limit_is_ever_overrun(root: Limits, moves: list) -> None:
    """Random trees and interleavings: what is let through fits at every node, and what is refused did not fit."""
    nodes, accountant, open_calls, names = [Budget(root)], Accountant(), [], itertools.count()
    accountant.parents.append(None)
    accountant.limits.append(root)
    for kind, at, input_tokens, wanted, price, own_limits, part in moves:
        at %= len(nodes)
        if kind == "child":
            started = [sum(at_above in accountant.line(node) for node in range(1, len(nodes))) - (at_above > 0)
                       for at_above in accountant.line(at)]
            full = any(accountant.limits[one].subagents is not None and count >= accountant.limits[one].subagents
                       for one, count in zip(accountant.line(at), started, strict=True))
            try:
                nodes.append(nodes[at].child(own_limits, 0.0))
            except BudgetExceeded as error:
                assert full and error.what == "sub-agents"
            else:
                assert not full
                accountant.parents.append(at)
                accountant.limits.append(own_limits)
        elif kind == "reserve":
            most = accountant.most(at, input_tokens, wanted, price)
            try:
                reservation = nodes[at].reserve(input_tokens, wanted, price)
            except BudgetExceeded:
                assert most <= 1  # a single token may be lost to rounding
                continue
            assert most - 1 <= reservation.max_output_tokens <= most
            number, output = next(names), reservation.max_output_tokens
            dearest = max(Fraction(price.input), Fraction(price.cached or 0))
            accountant.flying[number] = (at, input_tokens + output,
                                         (input_tokens * dearest + output * Fraction(price.output)) / 10**6)
            open_calls.append((number, reservation, at))
        elif open_calls:
            number, reservation, owner = open_calls.pop(at % len(open_calls))
            del accountant.flying[number]
            if kind == "settle":
                output, cached = int(part * reservation.max_output_tokens), int(part * reservation.input_tokens)
                cost = dollars(reservation.price, reservation.input_tokens - cached, cached, output)
                paid = reservation.settle(Usage(reservation.input_tokens, output, cached))
                assert paid == pytest.approx(float(cost), abs=1e-15)
                accountant.paid.append((owner, reservation.input_tokens + output, cost))
            else:
                reservation.release()
                reservation.release()  # once more changes nothing
        for number, node in enumerate(nodes):
            tokens, money = accountant.used(number)
            assert node.spent.tokens + node.reserved_tokens == tokens
            assert node.spent.money + node.reserved_money == pytest.approx(float(money), abs=1e-12)
            node_limits = accountant.limits[number]
            assert node_limits.tokens is None or tokens <= node_limits.tokens
            assert node_limits.money is None or money <= Fraction(node_limits.money) * (1 + Fraction(1, 10**9))
    for _, reservation, _ in open_calls:
        reservation.release()
    assert all(node.in_flight == node.reserved_tokens == node.reserved_money == 0 for node in nodes)


def test_a_reply_longer_than_asked_for_is_paid_and_stops_the_next() -> None:
    budget = Budget(Limits(tokens=100))
    budget.reserve(10, 50).settle(Usage(10, 500))
    assert budget.spent.tokens == 510
    with pytest.raises(BudgetExceeded, match="tokens is used up: 510 of 100 spent, 6 more wanted"):
        budget.reserve(5, 1)


def test_sub_agents_leave_a_tenth_for_the_answer() -> None:
    main = Budget(Limits(tokens=1000, money=1.0, seconds=100))
    child = main.child(Limits(), 50.0)
    grandchild = child.child(Limits(), 60.0)
    assert main.reserve(0, 10**6).max_output_tokens == 1000
    main = Budget(Limits(tokens=1000, seconds=100))
    child = main.child(Limits(seconds=40), 50.0)
    grandchild = child.child(Limits(), 60.0)
    assert child.reserve(0, 10**6).max_output_tokens == 900
    assert (main.seconds_left(60), child.seconds_left(60), grandchild.seconds_left(60)) == (40, 30, 26)
    with pytest.raises(BudgetExceeded, match="seconds"):
        grandchild.check_seconds(86)
    child.check_seconds(86)


def test_steps_and_critical_steps() -> None:
    """Two stages: 1 + the longer of two, then 1 + nothing."""
    main = Budget(Limits(steps=10, critical_steps=10))
    main.count_step()
    first, second = main.child(Limits(steps=3), 0), main.child(Limits(critical_steps=50), 0)
    assert (first.steps_left(), second.steps_left()) == (3, 8)  # of ten, one is taken and one is kept
    for _ in range(3):
        first.check_step()
        first.count_step()
    with pytest.raises(BudgetExceeded, match="steps"):
        first.check_step()
    for _ in range(5):
        second.count_step()
    main.end_stage()
    main.count_step()
    main.end_stage()
    assert (main.spent.critical_steps, main.spent.steps, main.steps_left()) == (1 + 5 + 1, 2, 3)
    for _ in range(2):
        main.count_step()
    with pytest.raises(BudgetExceeded, match="critical steps"):
        main.child(Limits(), 0)  # one is left, and kept


def test_a_call_waits_for_calls_in_flight_instead_of_failing() -> None:
    """Three that would need more than there is together: one after the other, in order."""
    async def program() -> list[tuple[str, float, int]]:
        main, done = Budget(Limits(tokens=1000)), []

        async def work(name: str) -> None:
            child = main.child(Limits(), 0)
            reservation = await child.reserve_in_turn(100, 500)
            await asyncio.sleep(1)
            reservation.settle(Usage(100, 10))
            done.append((name, asyncio.get_running_loop().time(), reservation.max_output_tokens))

        await asyncio.gather(*map(work, "abc"))
        assert main.spent.tokens == 330
        return done

    assert simulate(program()) == [("a", 1.0, 500), ("b", 2.0, 500), ("c", 3.0, 500)]


def test_waiting_ends_when_it_is_hopeless_or_cancelled() -> None:
    async def program() -> None:
        main = Budget(Limits(tokens=1000))
        held = main.reserve(100, 800)
        waiting = [asyncio.ensure_future(main.reserve_in_turn(100, 300)) for _ in range(3)]
        await asyncio.sleep(1)
        waiting[0].cancel()  # the first in line gives its turn on
        await asyncio.sleep(1)
        assert not waiting[1].done()
        held.settle(Usage(100, 850))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result).__name__ for result in results] == ["CancelledError", "BudgetExceeded", "BudgetExceeded"]
        assert main.in_flight == 0 and not main._waiting

    simulate(program())


def test_a_limit_is_a_number() -> None:
    with pytest.raises(UserError, match="limit tokens=-1 must be 0 or more"):
        Limits(tokens=-1)
    with pytest.raises(UserError, match="limit seconds=nan"):
        Limits(seconds=float("nan"))
