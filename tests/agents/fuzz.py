"""Episodes in which everything goes wrong, watched by an accountant who sees nothing but the calls of the model.

`python -m tests.agents.fuzz 10000 [first seed]` plays that many and prints what came of them.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from moonbase.agents.budget import Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import KINDS, CallOptions, Completion, ModelError, Price, Usage, estimate_tokens
from moonbase.agents.models.pool import Pool
from moonbase.agents.simulation import simulate
from moonbase.agents.swarm import Swarm
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset, tool

KEPT = 0.1
"""Of a parent's tokens, money and seconds, as the documentation says."""
LONGEST = 1e6
"""Simulated seconds after which an episode counts as hung."""


@dataclass
class Account:
    """What the accountant knows of one agent."""

    limits: Limits
    parent: Account | None = None
    born_at: int = 0
    """The parent's step that asked for it."""
    first_call: float | None = None
    steps: int = 0
    tokens: int = 0
    money: float = 0.0
    in_flight: dict[int, tuple[int, float]] = field(default_factory=dict)
    children: list[Account] = field(default_factory=list)

    def line(self) -> list[Account]:
        return [self, *(self.parent.line() if self.parent else [])]

    def below(self) -> list[Account]:
        return [self, *(one for child in self.children for one in child.below())]

    def critical_steps(self) -> int:
        """Σ over own steps of 1 + the most of any child that this step asked for."""
        longest: dict[int, int] = {}
        for child in self.children:
            longest[child.born_at] = max(longest.get(child.born_at, 0), child.critical_steps())
        return self.steps + sum(longest.values())

    def used(self) -> tuple[int, float]:
        """Tokens and dollars, calls in flight at the most that they can cost."""
        nodes = self.below()
        flying = [one for node in nodes for one in node.in_flight.values()]
        return (sum(node.tokens for node in nodes) + sum(tokens for tokens, _ in flying),
                sum(node.money for node in nodes) + sum(money for _, money in flying))


class Accountant:
    """Knows the limits, the tasks that models handed out, and every call. Complains of what is over a limit."""

    def __init__(self, limits: Limits, sub_limits: Limits, price: Price) -> None:
        self.limits, self.sub_limits, self.price = limits, sub_limits, price
        self.accounts = {"task 0": Account(limits)}
        self.complaints: list[str] = []
        self.calls = 0
        self.overrun = False
        """Whether a reply was longer than was asked for: what waits in line then was let in on wrong figures."""

    def account(self, messages: list[dict[str, Any]]) -> Account:
        return self.accounts[next(message["content"] for message in messages if message["role"] == "user")]

    def hand_out(self, task: str, parent: Account) -> None:
        self.accounts[task] = Account(self.sub_limits, parent, parent.steps)

    def begin(self, account: Account, input_tokens: int, max_tokens: int) -> int:
        self.calls += 1
        if account.first_call is None:
            account.first_call = asyncio.get_running_loop().time()
            if account.parent is not None:
                account.parent.children.append(account)
        account.steps += 1
        dearest = max(self.price.input, self.price.cached or 0)
        money = (input_tokens * dearest + max_tokens * self.price.output) / 1e6
        account.in_flight[self.calls] = (input_tokens + max_tokens, money)
        self.check(account)
        if max_tokens < 1:
            self.complaints.append("a call that may say nothing")
        return self.calls

    def end(self, account: Account, call: int, usage: Usage | None) -> None:
        del account.in_flight[call]
        if usage is not None:
            account.tokens += usage.input_tokens + usage.output_tokens
            account.money += self.price.of(usage)
        now = asyncio.get_running_loop().time()
        for node in account.line():
            share = 1 if node is account else 1 - KEPT
            if node.limits.seconds is not None and now - node.first_call > node.limits.seconds * share + 1e-6:
                self.complaints.append(f"a call ended {now - node.first_call} s after the first of {node.limits}")

    def check(self, account: Account) -> None:
        for node in account.line():
            share = 1 if node is account else 1 - KEPT
            (tokens, money), limits = node.used(), node.limits
            facts = {"tokens": (tokens, share), "money": (money / (1 + 1e-9), share),
                     "critical_steps": (node.critical_steps(), 1), "subagents": (len(node.below()) - 1, 1)}
            facts["steps"] = (node.steps, 1)
            for name, (value, part) in facts.items():
                limit = getattr(limits, name)
                if limit is not None and value > limit * part:
                    self.complaints.append(f"{name}: {value} of {limit} × {part}")
            now = asyncio.get_running_loop().time()
            if limits.seconds is not None and now - node.first_call >= limits.seconds * share:
                self.complaints.append(f"a call began after {now - node.first_call} of {limits.seconds} s")


class Door(Pool):
    """The accountant's place: he sees the calls that are asked for, before they queue."""

    def __init__(self, model: Chaos, accountant: Accountant, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.accountant = accountant

    async def complete(self, messages: Any, tools: Any, options: CallOptions) -> Completion:
        account, usage = self.accountant.account(messages), None
        call = self.accountant.begin(account, self.count_tokens(messages, tools), options.max_tokens)
        try:
            completion = await super().complete(messages, tools, options)
            usage = completion.usage
            return completion
        finally:
            self.accountant.end(account, call, usage)


class Chaos:
    """A model that says anything, or nothing."""

    name = "chaos"

    def __init__(self, dice: random.Random, accountant: Accountant, context_tokens: int | None, hangs: bool) -> None:
        self.dice, self.accountant, self.price = dice, accountant, accountant.price
        self.context_tokens, self.hangs = context_tokens, hangs
        self.trouble = dice.choice([0.0, 0.0, 0.02, 0.1, 0.4])
        self.handed_out = 0

    def count_tokens(self, messages: Any, tools: Any) -> int:
        return estimate_tokens(messages, tools)

    async def close(self) -> None:
        pass

    async def complete(self, messages: Any, tools: Any, options: CallOptions) -> Completion:
        dice, account = self.dice, self.accountant.account(messages)
        if not self.accountant.overrun:
            self.accountant.check(account)
        await asyncio.sleep(dice.choice([0, 0.1, dice.expovariate(0.1)]))
        if dice.random() < self.trouble:
            await self.fail(options)
        # Whom the reply creates or charges is known by its text, so each task is another.
        message, reason = self.say(account, [one["function"]["name"] for one in tools]), "stop"
        prompt = estimate_tokens(messages, tools)
        output = min(dice.choice([0, 1, dice.randint(1, 100)]), options.max_tokens)
        if dice.random() < 0.02:
            output, self.accountant.overrun = options.max_tokens + dice.randint(1, 2000), True
        if dice.random() < 0.05:
            message, reason = {"content": "cut of"}, "length"
        return Completion(message, reason, Usage(prompt, output, dice.randint(0, prompt)), self.name)

    async def fail(self, options: CallOptions) -> None:
        dice = self.dice
        what = dice.choice(["error", "busy", "busy", "hang", "late", "bug", "cancelled", "timeout"])
        if what == "error":
            raise ModelError(dice.choice(sorted(KINDS)), "no")
        if what == "busy":
            raise ModelError("rate_limit", "not now", 429, dice.choice([None, 0.0, 3.0, 100.0]))
        if what == "bug":
            raise KeyError("choices")
        if what == "cancelled":
            raise asyncio.CancelledError
        if what == "timeout":
            raise TimeoutError
        if what == "hang" and self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(options.timeout)
        raise ModelError("timeout", "nothing for a long time")

    def say(self, account: Account, names: list[str]) -> Any:
        dice = self.dice
        if not names or dice.random() < (0.15 if account.parent else 0.05):
            odd = dice.random() < 0.2
            return {"role": "assistant", "content": dice.choice(["", None, "  ", ["odd"], 7]) if odd else "The answer."}
        calls = [self.call(account, names) for _ in range(dice.choice([1, 1, 2, 5]))]
        if dice.random() < 0.1:
            # Not of tasks, by which the accountant tells agents apart.
            calls += [call for call in calls[:1] if not call["function"]["name"].startswith("assign")]
        if dice.random() < 0.05:
            calls = dice.choice([[None], "calls", [{}], [{"id": 3, "function": {"name": None, "arguments": {"a": 1}}}]])
        return {"role": "assistant", "content": dice.choice([None, "Let me see."]), "tool_calls": calls}

    def call(self, account: Account, names: list[str]) -> Any:
        dice, name = self.dice, self.dice.choice([*names, "no_such_tool"])
        if "assign_task" in names and dice.random() < 0.5:
            ways = ["assign_task", "assign_task", "assign_tasks"]
            name = dice.choice(ways if account.steps > 1 else ["create_subagent"])
        role = dice.choice(["a", "a", "a", "b"])
        arguments: Any = {"seconds": dice.choice([0, 1, 1000]), "size": dice.choice([0, 10, 100_000])}
        if name == "create_subagent":
            arguments = {"name": role, "system_prompt": "You help."}
        if name in ("assign_task", "assign_tasks"):
            tasks = [f"task {self.handed_out + 1 + number}" for number in range(dice.choice([1, 2, 6]))]
            self.handed_out += len(tasks)
            for task in tasks:
                self.accountant.hand_out(task, account)
            arguments = {"agent": role, "prompt": tasks[0]} if name == "assign_task" else {
                "agent": role, "template": "{item}", "items": tasks}
        text = json.dumps(arguments)
        if dice.random() < 0.05:
            text = dice.choice([text[:-2], "", "[1]", "null", '{"x": NaN}', "{" * 2000])
        return {"id": dice.choice(["same", f"call:{dice.random()}"]), "type": "function",
                "function": {"name": name, "arguments": text}}


def odd_tools(dice: random.Random) -> Toolset:
    """Tools that hang, raise, answer nonsense or too much."""

    @tool
    async def wait(seconds: float, size: int) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "x" * size

    @tool
    async def hang(seconds: float = 0, size: int = 0) -> str:
        """Never answer."""
        await asyncio.Event().wait()

    @tool(inline=True)
    def fail(seconds: float = 0, size: int = 0) -> str:
        """Raise something."""
        raise dice.choice([ValueError("no"), KeyError(3), asyncio.CancelledError(), TimeoutError(), RecursionError(),
                           SystemExit(2), StopIteration()])

    @tool
    def babble(context: ToolContext, seconds: float = 0, size: int = 0) -> Any:
        """Answer nonsense."""
        return dice.choice([None, object(), b"\xff", {1: {2}}, float("nan"), "\ud800", ToolResult(None), "\0", size])

    return Toolset([wait, hang, fail, babble], timeout=30, limit=dice.choice([100, 32_000]))


@dataclass
class Outcome:
    """How an episode went."""

    status: str
    complaints: list[str]
    events: list[dict[str, Any]]
    calls: int
    agents: int


def random_limits(dice: random.Random) -> tuple[Limits, Limits]:
    """Of the whole and of each sub-agent; half of them wide, so that much can happen, and none without any end."""
    wide = dice.random() < 0.5

    def some(*values: Any) -> Any:
        return dice.choice([None, *values]) if not wide or dice.random() < 0.2 else None

    steps = 15 if wide else some(1, 2, 5, 12)
    seconds = some(0, 5, 60, 5000) if steps is not None else dice.choice([5, 60, 5000])
    limits = Limits(steps=steps, tokens=some(0, 300, 5000, 100_000), seconds=seconds, money=some(0.0, 0.01, 0.3),
                    critical_steps=some(1, 3, 8, 30), subagents=30 if wide else dice.choice([0, 3, 12, 30]))
    sub_limits = Limits(steps=dice.choice([1, 2, 5, 12]), tokens=some(300, 5000), seconds=some(20, 500),
                        money=some(0.01, 0.1), critical_steps=some(2, 10), subagents=some(0, 3))
    return limits, sub_limits


def play(seed: int) -> Outcome:
    """One episode, the same for the same seed."""
    dice = random.Random(seed)
    limits, sub_limits = random_limits(dice)
    price = dice.choice([Price(), Price(1, 5), Price(0.3, 20, 0.1), Price(0, 15), Price(2, 0, 3)])
    accountant = Accountant(limits, sub_limits, price)
    model = Chaos(dice, accountant, dice.choice([None, 600, 6000]), hangs=limits.seconds is not None)
    door = Door(model, accountant, concurrency=dice.choice([1, 8]), most=8, attempts=3, seed=seed)
    events: list[dict[str, Any]] = []
    journal = Journal()
    journal.listeners.append(events.append)
    names = sorted(STRATEGIES)
    swarm = Swarm(door, odd_tools(dice), limits=limits, sub_limits=sub_limits, system="You lead.",
                  options=CallOptions(max_tokens=dice.choice([1, 50, 300, 1000]), timeout=100.0), journal=journal,
                  depth=dice.choice([0, 1, 1, 2, 3]), context=STRATEGIES[dice.choice(names)],
                  sub_context=STRATEGIES[dice.choice(names)])
    status = simulate(_episode(swarm, dice, accountant.complaints))
    complaints = accountant.complaints + _lost(events, status)
    if door.running or door.waiting:
        complaints.append(f"{door.running} calls run and {door.waiting} wait after the end")
    budget = swarm._agents["main"].budget
    if budget.in_flight or budget.reserved_tokens or budget.reserved_money:
        complaints.append("something is reserved after the end")
    main = accountant.accounts["task 0"]
    tokens, money = main.used()
    if (tokens, main.critical_steps()) != (budget.spent.tokens, budget.spent.critical_steps):
        complaints.append(f"{budget.spent} spent; the accountant has {tokens} tokens, {main.critical_steps()} critical")
    if abs(money - budget.spent.money) > 1e-9:
        complaints.append(f"{budget.spent} spent; the accountant has {money} dollars")
    return Outcome(status, complaints, events, accountant.calls, len(main.below()))


async def _episode(swarm: Swarm, dice: random.Random, complaints: list[str]) -> str:
    """Its status; cancelled in the middle now and then, twice even."""
    running = asyncio.ensure_future(swarm.run("task 0"))
    if dice.random() < 0.15:
        await asyncio.wait([running], timeout=dice.choice([0, 0.05, 3, 30]))
        running.cancel()
        if dice.random() < 0.5:
            await asyncio.sleep(0)
            running.cancel()
    done, _ = await asyncio.wait([running], timeout=LONGEST)
    if not done:
        complaints.append("hung")
        running.cancel()
    try:
        result = await running
    except asyncio.CancelledError:
        status = "cancelled"
    except KeyError:
        status = "bug"
    else:
        status = result.status
        if not (result.text.strip() if status == "finished" else result.reason):
            complaints.append(f"{status} with nothing to say")
        spent, critical = result.episode.spent, result.episode.critical.steps
        budget = swarm._agents["main"].budget.spent
        if (spent.tokens, critical, spent.subagents) != (budget.tokens, budget.critical_steps, budget.subagents):
            complaints.append(f"the trace has {spent}, {critical} critical steps; the budget {budget}")
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        complaints.append(f"tasks are left: {left}")
    return status


def _lost(events: list[dict[str, Any]], status: str) -> list[str]:
    """Agents without an end, calls without a result."""
    lost = []
    ends = {event["agent"]: event["status"] for event in events if event["type"] == "agent_finished"}
    starts = [event["agent"] for event in events if event["type"] == "agent_started"]
    finishes = [event["agent"] for event in events if event["type"] == "agent_finished"]
    if sorted(starts) != sorted(finishes):
        lost.append(f"agents started {starts}, finished {finishes}")
    if status not in ("cancelled",) and (not events or events[-1]["type"] != "episode_finished"):
        lost.append("no episode_finished")
    answered = {event["call"] for event in events if event["type"] == "tool_call"}
    ids = [event["call"] for event in events if event["type"] in ("tool_call", "model_call")]
    if len(ids) != len(set(ids)):
        lost.append("a call was noted twice")
    for event in events:
        if event["type"] == "model_call" and event["error"] is None and event["tools"]:
            for number in range(len(event["completion"].get("tool_calls") or ())):
                if f"{event['call']}.{number}" not in answered and ends[event["agent"]] != "cancelled":
                    lost.append(f"no result of {event['call']}.{number}, agent {ends[event['agent']]}")
    return lost


def main(count: int, first: int) -> int:
    """Play, print, and return how many went wrong."""
    statuses: collections.Counter[str] = collections.Counter()
    calls = agents = wrong = 0
    began = time.process_time()
    for seed in range(first, first + count):
        outcome = play(seed)
        statuses[outcome.status] += 1
        calls, agents = calls + outcome.calls, agents + outcome.agents
        if outcome.complaints:
            wrong += 1
            print(f"seed {seed}: {outcome.status}: {outcome.complaints[:3]}")
    print(f"{count} episodes, {agents:,} agents, {calls:,} calls, {wrong} episodes with complaints; "
          f"{time.process_time() - began:.0f} s of CPU; {dict(statuses.most_common())}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0) > 0)
