"""What the runtime of agents costs by itself: many agents in one process, a model that answers at once.

Everything that a step needs is in it: the budget, the line in front of the model, a tool call with validated arguments,
the journal in memory, the trace. All run on one core; there is no peer that does the same.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from typing import Any

from moonbase.agents.agent import Agent
from moonbase.agents.budget import Budget, Limits
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import Message
from moonbase.agents.models.pool import Pool
from moonbase.agents.models.scripted import ScriptedModel
from moonbase.agents.swarm import Swarm
from moonbase.agents.tools.tool import Toolset, tool
from moonbase.bench.rows import plain_row

AGENTS = 1000
STEPS = 10
LONG_STEPS = 1000
METHOD = ("CPU time of one process; the model answers at once. A step has the budget, the line in front of the model, "
          "a tool call with checked arguments and the journal in memory. kB: what Python allocated (tracemalloc).")


def measure(preset: str, peer: str | None, agents: int = AGENTS, long_steps: int = LONG_STEPS) -> list[dict[str, Any]]:
    """Rows for many agents side by side, a swarm of as many, one long agent, and the memory of idle ones. No preset is
    needed: there is no model."""
    many = _milliseconds(_side_by_side(agents, STEPS), agents * STEPS)
    swarm = _milliseconds(_swarm(agents, STEPS), agents * STEPS)
    long = _milliseconds(_side_by_side(1, long_steps), long_steps)
    rows = [(f"{agents:,} agents, {STEPS} steps each", "CPU ms/step", many),
            (f"a swarm of {agents:,} sub-agents, {STEPS} steps each, with its trace", "CPU ms/step", swarm),
            (f"1 agent, {long_steps:,} steps", "CPU ms/step", long),
            (f"{agents:,} idle agents", "kB/agent", asyncio.run(_idle(agents)))]
    return [plain_row(*row) for row in rows]


@tool(inline=True)
def look_up(key: str, count: int = 1) -> str:
    """Look something up.

    Args:
        key: Of what.
        count: How many.
    """
    return f"{key}: {'value ' * count}"


def _call(index: int, name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"id": f"functions.{name}:{index}", "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}


def _answers_after(steps: int) -> Any:
    """A policy: a tool call in each step, then an answer. Counts steps by the prompt's length."""
    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        done = len(messages) // 2 - 1
        if done < steps:
            return {"content": f"Step {done}.", "tool_calls": [_call(done, "look_up", key=f"key {done}", count=20)]}
        return {"content": "The answer."}

    return policy


async def _side_by_side(agents: int, steps: int) -> None:
    pool = Pool(ScriptedModel(_answers_after(steps)), concurrency=64, most=64)
    budget = Budget(Limits(tokens=10**9, money=1e6, seconds=1e6))
    tools = Toolset([look_up])
    runs = [Agent(f"agent {number}", pool, tools, system="You are a helper.", id=f"main/1.{number}", journal=Journal(),
                  budget=budget.child(Limits(steps=steps + 1, tokens=10**8), 0.0)).run("Find it out.")
            for number in range(agents)]
    results = await asyncio.gather(*runs)
    assert all(result.status == "finished" and result.steps == steps + 1 for result in results)


async def _swarm(agents: int, steps: int) -> None:
    work = _answers_after(steps)

    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        if "You are a helper." in messages[0]["content"]:
            return work(messages, tools)
        said = sum(message["role"] == "assistant" for message in messages)
        turns = [_call(0, "create_subagent", name="helper", system_prompt="You are a helper."),
                 _call(1, "assign_tasks", agent="helper", template="Find out {item}.",
                       items=[str(number) for number in range(agents)])]
        return {"tool_calls": [turns[said]]} if said < len(turns) else {"content": "The answer."}

    model = Pool(ScriptedModel(policy), concurrency=64, most=64)
    swarm = Swarm(model, Toolset([look_up]), limits=Limits(tokens=10**9, subagents=agents))
    result = await swarm.run("Find everything out.")
    assert result.status == "finished" and len(result.episode.agents) == agents + 1


def _milliseconds(program: Any, steps: int) -> float:
    gc.collect()
    began = time.process_time()
    asyncio.run(program)
    return (time.process_time() - began) / steps * 1e3


async def _idle(agents: int) -> float:
    """kB of an agent that waits for its model, its share of the journal included."""
    class Silent(ScriptedModel):
        async def complete(self, *arguments: Any) -> Any:
            await asyncio.Event().wait()

    model, tools, journal = Silent(_answers_after(1)), Toolset([look_up]), Journal()
    gc.collect()
    tracemalloc.start()
    runs = [asyncio.ensure_future(Agent("idle", model, tools, system="You are a helper.", id=f"main/1.{number}",
                                        journal=journal).run("Find it out.")) for number in range(agents)]
    for _ in range(10):
        await asyncio.sleep(0)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)
    return size / agents / 1e3
