"""One episode in the shop of τ²-bench: an agent with its tools, a user who writes to it, and the reward.

Both sides say a message at a time. The user speaks first; the agent calls tools until it answers in words; the user
hears that answer and nothing else, and says STOP when there is nothing more to say. The reward is 1.0 where the
database is then the one that the task's gold actions leave, and 0.0 otherwise; an episode that did not come to its end
(limits, failures) gets 0.0 as well, as in τ²-bench.

    result = await play_retail(data, "0", connect("http://127.0.0.1:8000"), ModelUser(data.tasks["0"], user_model))
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from moonbase.agents.agent import Agent
from moonbase.agents.budget import Limits
from moonbase.agents.context import ContextStrategy, KeepAll
from moonbase.agents.folding import fold
from moonbase.agents.journal import Event, Journal
from moonbase.agents.models.base import CallOptions, ChatModel, Message, ModelError, Usage, text_of
from moonbase.agents.models.pool import Pool
from moonbase.agents.trace import SCHEMA, Episode
from moonbase.agents.worlds.retail import STOP, RetailData, RetailTask, RetailUser, RetailWorld, user_prompt
from moonbase.agents.worlds.retail_tools import retail_tools, reward

GREETING = "Hi! How can I help you today?"
"""What a user hears before the first word (τ²-bench begins so)."""
SILENCE = "(The customer says nothing.)"


@dataclass
class RetailResult:
    """How an episode ended."""

    reward: float
    status: str
    """As of an agent: finished (the user stopped), over_budget, stuck, failed."""
    reason: str | None
    messages: list[Message]
    """The whole dialogue as the agent has it."""
    world: RetailWorld
    episode: Episode


class ModelUser:
    """A model that plays the user under `user_prompt`. What it uses is on no agent's budget: see `usage`."""

    def __init__(self, task: RetailTask, model: ChatModel, options: CallOptions = CallOptions()) -> None:
        self.model = model if isinstance(model, Pool) else Pool(model)
        self.options, self.usage = options, Usage()
        self.messages: list[Message] = [{"role": "system", "content": user_prompt(task)}]

    async def say(self, heard: str | None) -> str:
        """The model's next words. Raises ModelError."""
        self.messages.append({"role": "user", "content": GREETING if heard is None else heard})
        completion = await self.model.complete(self.messages, [], self.options)
        self.usage += completion.usage
        said = text_of(completion.message).strip()
        self.messages.append({"role": "assistant", "content": said})
        return said


async def play_retail(
    data: RetailData, task: str | RetailTask, model: ChatModel, user: RetailUser, *, limits: Limits = Limits(steps=200),
    context: ContextStrategy = KeepAll(), options: CallOptions = CallOptions(temperature=0.0),
    on_event: Callable[[Event], None] | None = None,
) -> RetailResult:
    """Play a task (or its id) to its end. `limits`: of the agent; every answer is a step, so they bound the dialogue.

    Raises UserError for an unknown task, nothing else but cancellation: what goes wrong is in the result.
    """
    world = RetailWorld.for_task(data, task)
    journal, events = Journal(), []
    journal.listeners += [events.append] if on_event is None else [events.append, on_event]
    clerk = _Clerk(
        user.say, "clerk", model if isinstance(model, Pool) else Pool(model), retail_tools(world), system=data.policy,
        limits=limits, context=context, journal=journal, options=options)
    journal.write(_started(world.task, clerk, limits))
    try:
        opening = await _words_of(user.say, None)
    except ModelError as error:
        # Nobody wrote: the clerk has nothing to do.
        status, reason, text = "failed", f"{error.kind}: {error}", ""
    else:
        result = await clerk.run(opening)
        status, reason, text = result.status, result.reason, result.text
    earned = reward(world) if status == "finished" else 0.0
    journal.write({"type": "episode_finished", "agent": "main", "status": status, "text": text, "reason": reason,
                   "rewards": {"database": earned}, "critical": {"steps": clerk.steps}})
    return RetailResult(earned, status, reason, clerk.messages, world, fold(events))


class _Clerk(Agent):
    """An agent whose answer goes to the user, and whose work goes on with what the user says to it."""

    def __init__(self, say: Callable[[str | None], Awaitable[str]], *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._say = say

    async def _work(self) -> None:
        while True:
            await super()._work()
            said = await _words_of(self._say, text_of(self.messages[-1]))
            if STOP in said:
                return
            self._append({"role": "user", "content": said})


async def _words_of(say: Callable[[str | None], Awaitable[str]], heard: str | None) -> str:
    """The user's words; never none, which an endpoint would refuse. Raises ModelError that names the side."""
    try:
        said = await say(heard)
    except ModelError as error:
        raise ModelError(error.kind, f"the model that plays the user: {error}", status=error.status) from None
    return said.strip() or SILENCE


def _started(task: RetailTask, clerk: Agent, limits: Limits) -> Event:
    return {"type": "episode_started", "agent": "main", "schema": SCHEMA, "episode": f"retail-{task.id}",
            "task": task.scenario, "model": clerk.model.name, "limits": dataclasses.asdict(limits),
            "sub_limits": dataclasses.asdict(Limits()), "seed": clerk.options.seed, "tools": clerk.tools.names,
            "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
