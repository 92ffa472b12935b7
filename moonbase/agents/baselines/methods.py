"""Ways to do a wide task, run in simulated time: alone, alone with a context strategy, fanned out by hand, as a swarm.

The time that calls take is that of an endpoint of the size of Kimi K2; `ENDPOINT` and `TOOL_SECONDS` hold the numbers,
docs/swarm.md says where they come from.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moonbase.agents.agent import Agent
from moonbase.agents.baselines.policies import HELPER, TEMPLATE, Policy, Wide
from moonbase.agents.baselines.reading import look, read_question, table
from moonbase.agents.budget import Budget, Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import CallOptions, Message, Price
from moonbase.agents.models.pool import Pool
from moonbase.agents.models.scripted import Latency, ScriptedModel
from moonbase.agents.simulation import simulate
from moonbase.agents.swarm import ORCHESTRATOR, Swarm
from moonbase.agents.tools.tool import Tool, ToolContext, ToolResult, Toolset
from moonbase.agents.trace import Episode
from moonbase.agents.worlds.grading import score
from moonbase.agents.worlds.world import Task, World, world_tools

ENDPOINT = Latency(per_call=0.5, per_input_token=1 / 5_000, per_cached_token=1 / 50_000, per_output_token=1 / 50)
TOOL_SECONDS = 0.5
PRICE = Price(input=0.60, output=3.00, cached=0.10)
"""Dollars per million tokens: an example, of the size that hosts of open models ask for."""
CONTEXT_TOKENS = 32_768
OPTIONS = CallOptions(max_tokens=8192)
ALONE = "You solve the user's task with your tools. When you have what you need, answer the user in full."


def endpoint(policy: Policy, systems: tuple[str, ...]) -> ScriptedModel:
    """A scripted model that has served agents with these system prompts before."""
    return ScriptedModel(policy, ENDPOINT, PRICE, CONTEXT_TOKENS, warm=systems)


@dataclass(frozen=True)
class Outcome:
    """How a task went."""

    item_f1: float
    critical_steps: int
    seconds: float
    """Simulated."""
    tokens: int
    dollars: float
    status: str
    text: str
    episode: Episode | None = None


@dataclass(frozen=True)
class Method:
    """A way to do a task."""

    name: str
    run: Callable[[World, Task], Outcome]
    alone: bool = False
    """A single agent that makes one call a turn."""


def _alone(name: str, context: str, policy: Wide) -> Method:
    def run(world: World, task: Task) -> Outcome:
        rows = len(task.answer)
        return _play(task, lambda: Swarm(
            endpoint(policy, (ALONE,)), slow(world_tools(world)), system=ALONE, delegate=False, options=OPTIONS,
            context=STRATEGIES[context], limits=Limits(steps=100 + 5 * rows), episode_id=f"{task.id} {name}"))

    return Method(name, run, alone=policy.calls_per_turn == 1)


def _swarm(policy: Wide) -> Method:
    def run(world: World, task: Task) -> Outcome:
        return _play(task, lambda: Swarm(
            endpoint(policy, (ORCHESTRATOR, HELPER)), slow(world_tools(world)), options=OPTIONS,
            limits=Limits(steps=100, subagents=policy.most_helpers), sub_limits=Limits(steps=100),
            episode_id=f"{task.id} swarm"))

    return Method("swarm", run)


def _play(task: Task, make: Callable[[], Swarm]) -> Outcome:
    async def play() -> Any:
        return await make().run(task.prompt)

    result = simulate(play())
    spent = result.episode.spent
    return Outcome(score(task, result.text).item_f1, result.episode.critical.steps, result.episode.seconds,
                   spent.tokens, spent.money, result.status, result.text, result.episode)


def _fan_out(world: World, task: Task) -> Outcome:
    """By hand: a program reads the list, starts one agent for each member and puts their rows together."""
    return simulate(_fan_out_program(world, task))


async def _fan_out_program(world: World, task: Task) -> Outcome:
    question, tools, journal = read_question(task.prompt), slow(world_tools(world)), Journal()
    pool = Pool(endpoint(Wide(calls_per_turn=8), (HELPER,)))
    budget = Budget(started=journal.now())

    async def call(name: str, **arguments: Any) -> str:
        context = ToolContext("program", 0, "program")
        return (await tools.tools[name].call(arguments, context)).content

    hits = await call("search", query=f"{question.group} members", k=5)
    address = hits.partition("<")[2].partition(">")[0].rpartition("/")[0]
    members: list[str] = []
    part = parts = 1
    while part <= parts and (question.first is None or len(members) < question.first):
        page = await call("open", url=f"{address}/{part}")
        found = look([_called(address, part), {"role": "tool", "tool_call_id": "0", "content": page}], 0)
        parts, part = found.num_parts, part + 1
        members += [name for listed in found.parts.values() for _, name in listed]
    template = TEMPLATE.format(columns=" | ".join(question.columns), rule=task.prompt.rpartition("\n\n")[2])
    agents = [Agent("helper", pool, tools, system=HELPER, budget=budget.child(Limits(steps=100), journal.now()),
                    journal=journal, options=OPTIONS, id=f"main/{number}")
              for number in range(len(members[: question.first]))]
    results = await asyncio.gather(*(agent.run(template.replace("{item}", name))
                                     for agent, name in zip(agents, members, strict=False)))
    rows = [line.strip("| ").split(" | ") for result in results for line in result.text.splitlines()]
    text = table(question.columns, rows)
    return Outcome(score(task, text).item_f1, max(result.steps for result in results), journal.now(),
                   budget.spent.tokens, budget.spent.money, "finished", text)


def _called(address: str, part: int) -> Message:
    return {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": {
        "name": "open", "arguments": f'{{"url": "{address}/{part}"}}'}}]}


METHODS: tuple[Method, ...] = (
    *(_alone(f"single, {name}", name, Wide(notes=name == "hide-tool-result")) for name in STRATEGIES),
    _alone("single, 8 calls a turn", "summary", Wide(calls_per_turn=8)),
    Method("fan-out by hand", _fan_out),
    _swarm(Wide(calls_per_turn=8)),
)


def slow(tools: Toolset, seconds: float = TOOL_SECONDS) -> Toolset:
    """The same tools, each call of which takes so long."""
    def delayed(known: Tool) -> Tool:
        async def call(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
            await asyncio.sleep(seconds)
            answer = await known.call(arguments, context)
            return ToolResult(answer) if isinstance(answer, str) else answer

        return dataclasses.replace(known, call=call)

    return Toolset([delayed(one) for one in tools.tools.values()], timeout=tools.timeout, limit=tools.limit)
