"""Agent Swarm: an orchestrator that makes sub-agents and gives them tasks in parallel (Kimi K2.5, Agent Swarm).

The orchestrator has two tools beside those of the task, `create_subagent` and `assign_task`, and a bulk form. Several
calls in one turn run at the same time. A sub-agent works in a context of its own and only its last message comes back.
Whatever happens to it, its result says so and the episode goes on. Work beyond the number of calls that a model takes
at once waits in the model's `Pool`; nothing fails for being too much.

An episode's events are written as it goes; the same program started again on its journal goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from moonbase.agents.agent import Agent, AgentResult, side_by_side
from moonbase.agents.budget import Budget, BudgetExceeded, Limits
from moonbase.agents.context import ContextStrategy, KeepAll
from moonbase.agents.folding import fold
from moonbase.agents.journal import Event, Journal
from moonbase.agents.models.base import CallOptions, ChatModel
from moonbase.agents.models.pool import Pool
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset, tool
from moonbase.agents.trace import SCHEMA, Episode
from moonbase.errors import UserError

MAX_SUBAGENTS = 100
"""At work at once, of each level, as the product has it; more wait in line. `Limits.subagents` bounds all of them."""
ORCHESTRATOR = (
    "You solve the user's task. Beside your own tools you can create sub-agents with create_subagent, each with a role "
    "of its own, and give them tasks with assign_task or assign_tasks; tasks given in one turn are worked on at the "
    "same time. A sub-agent sees nothing but its system prompt and the task that you write, and returns one message. "
    "When you have what you need, answer the user in full.")
SUB_TOOLS = ("create_subagent", "assign_task", "assign_tasks")


@dataclass
class SwarmResult:
    """How an episode ended."""

    text: str
    status: str
    reason: str | None
    episode: Episode


class Swarm:
    """`await Swarm(model, tools).run("task")`; one run each."""

    def __init__(
        self, model: ChatModel, tools: Toolset = Toolset(), *, sub_model: ChatModel | None = None,
        sub_tools: Toolset | None = None, system: str = ORCHESTRATOR,
        limits: Limits = Limits(steps=100), sub_limits: Limits = Limits(steps=100),
        context: ContextStrategy = KeepAll(), sub_context: ContextStrategy = KeepAll(),
        options: CallOptions = CallOptions(), journal: Journal | None = None,
        on_event: Callable[[Event], None] | None = None, delegate: bool = True, episode_id: str | None = None,
        details: dict[str, Any] | None = None, depth: int = 1,
        grade: Callable[[str], dict[str, float]] | None = None,
    ) -> None:
        """`sub_model`, `sub_tools`: None takes the orchestrator's. `sub_limits`: of each sub-agent, within what is left
        of `limits`. `delegate`: False makes a single agent, in the same trace. `details`: noted in the trace. `depth`:
        levels of sub-agents; at 1 they have none of their own. `grade`: the answer's rewards by name, for the trace."""
        self.model = model if isinstance(model, Pool) else Pool(model)
        self.sub_model = self.model if sub_model is None or sub_model is model else (
            sub_model if isinstance(sub_model, Pool) else Pool(sub_model))
        self.tools, self.sub_tools = tools, tools if sub_tools is None else sub_tools
        self.system, self.limits, self.sub_limits = system, limits, sub_limits
        self.context, self.sub_context, self.options = context, sub_context, options
        self.journal = journal or Journal()
        self.depth, self.episode_id, self.details = depth if delegate else 0, episode_id, details or {}
        if on_event is not None:
            self.journal.listeners.append(on_event)
        self._grade = grade or (lambda answer: {})
        self._roles: dict[str, dict[str, str]] = {}
        """Agent id -> its kinds of sub-agents: name -> system prompt."""
        self._agents: dict[str, Agent] = {}
        self._lines: dict[int, asyncio.Semaphore] = {}

    async def run(self, task: str) -> SwarmResult:
        """Work on a task. Raises UserError where the journal cannot be written."""
        events: list[Event] = list(self.journal.events)
        self.journal.listeners.append(events.append)
        self._recall(events)
        # The swarm's own tools wait for their agents, who have limits of their own.
        swarm_tools = Toolset(self._swarm_tools())
        self._toolset = self.tools + swarm_tools if self.depth else self.tools
        self._sub_toolset = self.sub_tools + swarm_tools if self.depth > 1 else self.sub_tools
        if not any(event["type"] == "episode_started" for event in events):
            self.journal.write({
                "type": "episode_started", "agent": "main", "schema": SCHEMA,
                "episode": self.episode_id or uuid.uuid4().hex, "task": task, "model": self.model.name,
                "limits": dataclasses.asdict(self.limits), "sub_limits": dataclasses.asdict(self.sub_limits),
                "seed": self.options.seed, "tools": self._toolset.names, **self.details,
                "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
        main = Agent("main", self.model, self._toolset, system=self.system, context=self.context,
                     budget=Budget(self.limits, known=self.journal.spent("main")), journal=self.journal,
                     options=self.options)
        self._agents["main"] = main
        try:
            async with self.tools + self.sub_tools.without(*self.tools.names):
                result = await main.run(task)
        except BaseException as error:
            status = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            with contextlib.suppress(UserError):  # the journal may be what failed
                self._finish(main, AgentResult(status, "", main.steps, main.usage, _reason(error)))
            raise
        self._finish(main, result)
        return SwarmResult(result.text, result.status, result.reason, fold(events))

    def _finish(self, main: Agent, result: AgentResult) -> None:
        self.journal.write({"type": "episode_finished", "agent": "main", "status": result.status, "text": result.text,
                            "reason": result.reason, "rewards": self._grade(result.text),
                            "critical": {"steps": main.budget.spent.critical_steps}})

    # --- the orchestrator's tools -------------------------------------------------------------------------------------

    def _swarm_tools(self) -> list[Any]:
        @tool(inline=True)
        def create_subagent(name: str, system_prompt: str, context: ToolContext) -> ToolResult:
            """Create a reusable kind of sub-agent, to give tasks to.

            Args:
                name: A name that no other sub-agent has.
                system_prompt: Its role, its abilities and its limits.
            """
            return self._create(name, system_prompt, context)

        @tool(timeout=math.inf)
        async def assign_task(agent: str, prompt: str, context: ToolContext) -> ToolResult:
            """Let a sub-agent work on a task and get its final message. Calls in one turn run at the same time.

            Args:
                agent: The name of a sub-agent that was created.
                prompt: The task, with everything that it has to know.
            """
            return await self._assign(agent, prompt, context, context.call_id)

        @tool(timeout=math.inf)
        async def assign_tasks(
            agent: str, template: str, items: Annotated[list[str], Field(min_length=1, max_length=10_000)],
            context: ToolContext,
        ) -> ToolResult:
            """Let sub-agents of one kind work on many similar tasks at the same time, one for each item.

            Args:
                agent: The name of a sub-agent that was created.
                template: The task, with {item} where the item belongs.
                items: What stands for {item} in each task.
            """
            return await self._assign_all(agent, template, items, context)

        return [create_subagent, assign_task, assign_tasks]

    def _create(self, name: str, system_prompt: str, context: ToolContext) -> ToolResult:
        roles = self._roles.setdefault(context.agent, {})
        if not name.strip():
            return ToolResult("Error: a sub-agent needs a name.", error=True)
        if name in roles:
            return ToolResult(f"Error: there is a sub-agent named {name!r} already; assign tasks to it, or choose "
                              "another name.", error=True)
        roles[name] = system_prompt
        return ToolResult(f"Created sub-agent {name!r}.")

    def _recall(self, events: list[Event]) -> None:
        """The kinds of sub-agents that were created in earlier lives: such a call is not made again."""
        for event in events:
            if event["type"] == "tool_call" and event["name"] == "create_subagent" and not event["error"]:
                values = json.loads(event["arguments"])
                self._roles.setdefault(event["agent"], {}).setdefault(values["name"], values["system_prompt"])

    async def _assign(self, name: str, prompt: str, context: ToolContext, id: str) -> ToolResult:
        """One sub-agent's run. Raises nothing but cancellation and errors of the program."""
        roles = self._roles.get(context.agent, {})
        if name not in roles:
            known = ", ".join(roles) or "none yet"
            return ToolResult(f"Error: no sub-agent is named {name!r}. Create it first. Sub-agents: {known}.",
                              error=True)
        above, id = self._agents[context.agent], _agent_id(id)
        # A line of its own for every level: whoever waits for sub-agents must not hold up theirs.
        async with self._lines.setdefault(id.count("/"), asyncio.Semaphore(MAX_SUBAGENTS)):
            return await self._work(name, roles[name], prompt, above, context, id)

    async def _work(
        self, name: str, system: str, prompt: str, above: Agent, context: ToolContext, id: str
    ) -> ToolResult:
        try:
            budget = above.budget.child(self.sub_limits, self.journal.started(id), self.journal.spent(id))
        except BudgetExceeded as error:
            return ToolResult(f"Error: the sub-agent was not started: {error}.", error=True)
        deep = id.count("/") >= self.depth
        agent = Agent(
            name, self.sub_model, self.sub_tools if deep else self._sub_toolset, system=system, budget=budget,
            context=self.sub_context, journal=self.journal, options=self.options, id=id, parent=above.id,
            parent_call=context.call_id, stage=above.stage, trainable=False)
        self._agents[id] = agent
        try:
            result = await agent.run(prompt)
        except UserError:
            raise  # the session cannot be written any more: no sub-agent's fault
        except Exception as error:
            # Of many that work side by side, one that breaks takes nobody with it.
            return ToolResult(f"[The sub-agent broke: {type(error).__name__}: {error}.]", error=True)
        finally:
            del self._agents[id]
        return ToolResult(_report(result), result.status != "finished")

    async def _assign_all(self, name: str, template: str, items: list[str], context: ToolContext) -> ToolResult:
        if "{item}" not in template:
            return ToolResult("Error: the template must contain {item}.", error=True)
        results = await side_by_side([
            self._assign(name, template.replace("{item}", item), context, f"{context.call_id}.{number}")
            for number, item in enumerate(items)])
        lines = [json.dumps({"item": item, "result": result.content}, ensure_ascii=False)
                 for item, result in zip(items, results, strict=True)]
        return ToolResult("\n".join(lines), all(result.error for result in results))


def _agent_id(call: str) -> str:
    """The agent that a call starts: main#3.1 starts main/3.1."""
    return call.replace("#", "/")


def _reason(error: BaseException) -> str:
    return "cancelled" if isinstance(error, asyncio.CancelledError) else f"{type(error).__name__}: {error}"


def _report(result: AgentResult) -> str:
    """What the orchestrator hears of a sub-agent."""
    if result.status == "finished":
        return result.text
    what = {"over_budget": "stopped because its budget was used up", "stuck": "went round in circles and was stopped",
            "failed": "failed"}[result.status]
    said = f" Its last words: {result.text}" if result.text.strip() else ""
    return f"[The sub-agent {what} after {result.steps} steps: {result.reason}.]{said}"
