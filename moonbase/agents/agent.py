"""One agent: a model is called, its tool calls are carried out, their results go back, until it answers.

Every call is asked of the budget before it is made. What goes wrong (malformed calls, failing tools, a full context, a
spent budget, a model that does not answer or goes round in circles) ends in an observation for the model or in a result
that says so; `run` raises nothing but cancellation, a full disk, and errors of the program.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from moonbase.agents.budget import Budget, BudgetExceeded, Limits
from moonbase.agents.context import HIDDEN, ContextStrategy, KeepAll, Room, View
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import CallOptions, ChatModel, Completion, Message, ModelError, Usage
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset

LAST_STEP = "This is your last step: no tool can be called any more. Answer now, with what you have."
EMPTY = "Your reply was empty. Call a tool, or give your answer."
CUT = "Your reply was cut off at the limit of tokens. Go on with a shorter one."
STUCK_AFTER = 4
"""The same calls with the same results so many times in a row are going round in circles."""
EMPTY_AFTER = 3


@dataclass
class AgentResult:
    """How an agent ended."""

    status: str
    """finished, over_budget, stuck, failed or cancelled."""
    text: str
    """Its answer, or what it said last."""
    steps: int
    usage: Usage
    reason: str | None = None
    """Why it did not finish."""


class _Ended(Exception):
    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Agent:
    """`await Agent("helper", model, tools).run("task")`. One run each."""

    def __init__(
        self, name: str, model: ChatModel, tools: Toolset = Toolset(), *, system: str = "", limits: Limits = Limits(),
        budget: Budget | None = None, context: ContextStrategy = KeepAll(), journal: Journal | None = None,
        options: CallOptions = CallOptions(), id: str = "main", parent: str | None = None,
        parent_call: str | None = None, stage: int | None = None, trainable: bool = True,
    ) -> None:
        """`budget`: a ready one, instead of `limits`; `parent_call`: the tool call that started it; `stage`: the main
        agent's step to which this run belongs."""
        self.name, self.model, self.tools, self.system = name, model, tools, system
        self.limits = budget.limits if budget is not None else limits
        self.budget, self.context, self.options = budget, context, options
        self.journal = journal or Journal()
        self.id, self.parent, self.parent_call, self.trainable = id, parent, parent_call, trainable
        self._stage = stage
        self.messages: list[Message] = []
        self.steps = 0
        self.usage = Usage()
        self._view = View([], set())
        self._fixed = 0
        self._reported = 0
        self._no_tools: list[dict[str, Any]] = []

    @property
    def stage(self) -> int:
        """The main agent's step to which the current one belongs."""
        return self._stage or self.steps

    async def run(self, task: str | list[Message]) -> AgentResult:
        """Work on a task, or go on with a conversation."""
        if self.budget is None:
            self.budget = Budget(self.limits, started=self.journal.now())
        given = [{"role": "user", "content": task}] if isinstance(task, str) else list(task)
        for message in [{"role": "system", "content": self.system}] * bool(self.system) + given:
            self._append(message)
        self._fixed = len(self.messages)
        self.journal.write({
            "type": "agent_started", "agent": self.id, "name": self.name, "parent": self.parent,
            "parent_call": self.parent_call, "system": self.system, "task": _text(given[-1]) if given else "",
            "tools": self.tools.names, "limits": dataclasses.asdict(self.limits), "trainable": self.trainable,
            "model": self.model.name})
        status, reason = "finished", None
        try:
            await self._work()
        except BudgetExceeded as error:
            status, reason = "over_budget", str(error)
        except ModelError as error:
            status, reason = "failed", f"{error.kind}: {error}"
        except _Ended as error:
            status, reason = error.status, error.reason
        except asyncio.CancelledError:
            self._finish("cancelled", "cancelled")
            raise
        return self._finish(status, reason)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        circles, empty, before = 0, 0, None
        while True:
            last = self.budget.steps_left() == 1 and self.steps > 0 and bool(self.tools.names)
            if last:
                self._append({"role": "user", "content": LAST_STEP})
            completion = await self._step(last)
            calls = [] if last else completion.message.get("tool_calls") or []
            if calls:
                results = await self._call_tools(calls)
                said = json.dumps([[call["function"] for call in calls], [result.content for result in results]])
                circles = circles + 1 if said == before else 1
                before = said
                if circles >= STUCK_AFTER:
                    raise _Ended("stuck", f"the same calls with the same results {circles} times in a row")
            elif completion.finish_reason == "length" or not _text(completion.message).strip():
                empty += 1
                if empty >= EMPTY_AFTER or last:
                    what = "was cut off" if completion.finish_reason == "length" else "was empty"
                    raise _Ended("failed", f"the reply {what}")
                self._append({"role": "user", "content": CUT if completion.finish_reason == "length" else EMPTY})
            else:
                return

    async def _step(self, last: bool) -> Completion:
        """One model call with everything around it."""
        tools = self._no_tools if last else self.tools.schemas()
        await self._make_room(tools)
        completion = await self._call_model(self._visible(), tools)
        self._append(completion.message)
        return completion

    async def _make_room(self, tools: list[dict[str, Any]]) -> None:
        """Let the strategy hide something where the context is getting full."""
        limit = self.model.context_tokens
        if limit is None:
            return
        tokens = self.model.count_tokens(self._visible(), tools)
        view = self.context.manage(self.messages, self._view, self._fixed, Room(tokens, limit))
        if view is self._view or (view.visible == self._view.visible and view.shortened == self._view.shortened):
            return
        if self.context.summarises:
            request = {"role": "user", "content": self.context.request}
            completion = await self._call_model([*self._visible(), request], self._no_tools, extra=request)
            self._view = view
            self._append({"role": "user", "content": f"What you have found so far:\n{_text(completion.message)}"})
        self._view = view

    async def _call_model(
        self, messages: list[Message], tools: list[dict[str, Any]], extra: Message | None = None
    ) -> Completion:
        """A call within budget and context; recorded, or found in the record. `extra`: a message shown only now."""
        budget, journal = self.budget, self.journal
        call = f"{self.id}#{self.steps + 1}"
        known = journal.recorded(call)
        budget.take_step(journal.now() if known is None else 0.0, critical=True)
        self.steps += 1
        if known is not None:
            completion = _completion_of(known)
            tokens = completion.usage.input_tokens + completion.usage.output_tokens
            budget.add({"tokens": tokens, "money": known["price_paid"]})
            self.usage += completion.usage
            self._reported = len(self.messages)
            return completion
        prompt_tokens = self.model.count_tokens(messages, tools)
        room = self.options.max_tokens
        if self.model.context_tokens is not None:
            room = min(room, self.model.context_tokens - prompt_tokens)
            if room < 1:
                raise _Ended("failed", f"the context is full: a prompt of {prompt_tokens:,} tokens; "
                             f"the model takes {self.model.context_tokens:,}")
        reservation = budget.reserve(prompt_tokens, room, self.model.price)
        options = dataclasses.replace(self.options, max_tokens=reservation.max_output_tokens)
        started = journal.now()
        event = {
            "type": "model_call", "agent": self.id, "call": call, "step": self.steps,
            "stage": self.stage, "messages_added": self.messages[self._reported :],
            "context_dropped": _ranges(set(range(len(self.messages))) - set(self._view.visible)),
            "context_shortened": sorted(self._view.shortened), "extra": extra,
            "options": {**dataclasses.asdict(options), "tools": bool(tools)}, "started": round(started, 6)}
        try:
            seconds = budget.seconds_left(started)
            try:
                async with asyncio.timeout(seconds):
                    completion = await self.model.complete(messages, tools, options)
            except TimeoutError:
                budget.check_seconds(journal.now() + 1e-3)
                raise ModelError("timeout", "the model did not answer in time") from None
        except (ModelError, BudgetExceeded, asyncio.CancelledError) as error:
            reservation.release()
            kind = getattr(error, "kind", "cancelled" if isinstance(error, asyncio.CancelledError) else "budget")
            journal.write(event | {
                "ended": round(journal.now(), 6), "usage": None, "price_paid": 0.0, "completion": None,
                "finish_reason": None, "model": self.model.name, "error": {"kind": kind, "message": str(error)},
                "attempts": getattr(error, "attempts", 1), "budget": self._account()})
            self._reported = len(self.messages)
            raise
        paid = reservation.settle(completion.usage)
        self.usage += completion.usage
        journal.write(event | {
            "ended": round(journal.now(), 6), "usage": dataclasses.asdict(completion.usage), "price_paid": paid,
            "completion": completion.message, "finish_reason": completion.finish_reason, "model": completion.model,
            "error": None, "attempts": getattr(completion, "attempts", 1), "notes": completion.notes,
            "budget": self._account()} | {
                name: value for name in ("prompt_ids", "token_ids", "logprobs")
                if (value := getattr(completion, name)) is not None})
        self._reported = len(self.messages)
        return completion

    async def _call_tools(self, calls: list[dict[str, Any]]) -> list[ToolResult]:
        """All calls of one reply at once; their results in order, as messages."""
        step = self.steps
        running = [asyncio.ensure_future(self._call_tool(call, f"{self.id}#{step}.{number}"))
                   for number, call in enumerate(calls)]
        try:
            results = await asyncio.gather(*running)
        except BaseException:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise
        for call, result in zip(calls, results, strict=True):
            self._append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
        self.budget.add_critical_steps(max(result.critical_steps for result in results))
        return results

    async def _call_tool(self, call: dict[str, Any], id: str) -> ToolResult:
        journal, function = self.journal, call["function"]
        known = journal.recorded(id)
        if known is not None:
            self.budget.add(known.get("spent") or {})
            return ToolResult(known["result"], known["error"], known.get("critical_steps", 0), known.get("spent"))
        started = journal.now()
        left = self.budget.seconds_left(started)
        if left is not None and left <= 0:
            self.budget.check_seconds(started)
        context = ToolContext(self.id, self.steps, id, left)
        result = await self.tools.call(function["name"], function["arguments"], context)
        event = {"type": "tool_call", "agent": self.id, "call": id, "name": function["name"],
                 "arguments": function["arguments"], "started": round(started, 6), "ended": round(journal.now(), 6),
                 "result": result.content, "error": result.error}
        if result.critical_steps or result.spent:
            event |= {"critical_steps": result.critical_steps, "spent": result.spent}
        journal.write(event)
        return result

    def _append(self, message: Message) -> None:
        self._view.visible.append(len(self.messages))
        self.messages.append(message)

    def _visible(self) -> list[Message]:
        """What the model sees."""
        shortened = self._view.shortened
        if not shortened and len(self._view.visible) == len(self.messages):
            return list(self.messages)
        return [self.messages[index] | {"content": HIDDEN} if index in shortened else self.messages[index]
                for index in self._view.visible]

    def _account(self) -> dict[str, Any]:
        return {"spent": dataclasses.asdict(self.budget.spent), "limits": dataclasses.asdict(self.limits)}

    def _finish(self, status: str, reason: str | None) -> AgentResult:
        said = [_text(message) for message in self.messages if message["role"] == "assistant"]
        text = next((text for text in reversed(said) if text.strip()), "")
        result = AgentResult(status, text, self.steps, self.usage, reason)
        self.journal.write({"type": "agent_finished", "agent": self.id, "status": status, "text": text,
                            "reason": reason, "steps": self.steps, "usage": dataclasses.asdict(self.usage),
                            "messages_added": self.messages[self._reported :]})
        return result


def _completion_of(event: dict[str, Any]) -> Completion:
    """A recorded call's reply."""
    return Completion(event["completion"], event["finish_reason"], Usage(**event["usage"]), event["model"],
                      event.get("prompt_ids"), event.get("token_ids"), event.get("logprobs"))


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content


def _ranges(indices: set[int]) -> list[list[int]]:
    """[start, stop) pairs."""
    pairs: list[list[int]] = []
    for index in sorted(indices):
        if pairs and pairs[-1][1] == index:
            pairs[-1][1] += 1
        else:
            pairs.append([index, index + 1])
    return pairs
