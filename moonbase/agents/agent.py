"""One agent: a model is called, its tool calls are carried out, their results go back, until it answers.

Every call is asked of the budget before it is made. What goes wrong (malformed calls, failing tools, a full context, a
spent budget, a model that does not answer or goes round in circles) ends in an observation for the model or in a result
that says so; `run` raises nothing but cancellation, a full disk, and errors of the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moonbase.agents.budget import Budget, BudgetExceeded, Limits, Reservation
from moonbase.agents.context import HIDDEN, ContextStrategy, KeepAll, Room, View, rounds
from moonbase.agents.journal import Event, Journal
from moonbase.agents.models.base import (
    CallOptions,
    ChatModel,
    Completion,
    Message,
    ModelError,
    Usage,
    text_of,
    tidied,
)
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset
from moonbase.errors import UserError

Result = TypeVar("Result")

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
        self._dropped: list[list[int]] = []
        self._short: dict[int, Message] = {}
        self._fixed = self._reported = 0
        # Said with every call.
        self._limits, self._sampling = dataclasses.asdict(self.limits), dataclasses.asdict(options)

    @property
    def stage(self) -> int:
        """The main agent's step to which the current one belongs."""
        return self._stage or self.steps

    async def run(self, task: str | list[Message]) -> AgentResult:
        """Work on a task, or go on with a conversation."""
        if self.budget is None:
            self.budget = Budget(self.limits, None, self.journal.started(self.id), self.journal.spent(self.id))
        given = [{"role": "user", "content": task}] if isinstance(task, str) else list(task)
        for message in [{"role": "system", "content": self.system}] * bool(self.system) + given:
            self._append(message)
        self._fixed = len(self.messages)
        self.journal.write({
            "type": "agent_started", "agent": self.id, "name": self.name, "parent": self.parent,
            "parent_call": self.parent_call, "system": self.system, "task": text_of(given[-1]) if given else "",
            "tools": self.tools.names, "limits": self._limits, "trainable": self.trainable, "model": self.model.name})
        status, reason = "finished", None
        try:
            await self._work()
        except BudgetExceeded as error:
            status, reason = "over_budget", str(error)
        except ModelError as error:
            status, reason = "failed", f"{error.kind}: {error}"
        except _Ended as error:
            status, reason = error.status, error.reason
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            with contextlib.suppress(UserError):  # the journal may be what failed
                self._finish("cancelled" if cancelled else "failed",
                             "cancelled" if cancelled else f"{type(error).__name__}: {error}")
            raise
        return self._finish(status, reason)

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        circles, empty, before = 0, 0, None
        while True:
            completion, last = await self._step()
            calls = [] if last else completion.message.get("tool_calls")
            if calls:
                results = await self._call_tools(calls)
                done = [(call["function"]["name"], call["function"]["arguments"], result.content)
                        for call, result in zip(calls, results, strict=True)]
                circles = circles + 1 if done == before else 1
                before, empty = done, 0
                if circles >= STUCK_AFTER:
                    raise _Ended("stuck", f"the same calls with the same results {circles} times in a row")
            elif completion.finish_reason == "length" or not text_of(completion.message).strip():
                empty += 1
                if empty >= EMPTY_AFTER or last:
                    what = "was cut off" if completion.finish_reason == "length" else "was empty"
                    raise _Ended("failed", f"the reply {what}")
                self._append({"role": "user", "content": CUT if completion.finish_reason == "length" else EMPTY})
            else:
                return

    async def _step(self) -> tuple[Completion, bool]:
        """The next reply, and whether it is the last."""
        tools = self.tools.schemas()
        tokens = self.model.count_tokens(self._visible(), tools)
        if self.model.context_tokens is not None:
            tokens = await self._make_room(tokens, self.model.context_tokens)
        while True:
            last = bool(tools) and self.budget.steps_left() == 1
            if last:
                self._append({"role": "user", "content": LAST_STEP})
                tools = []
                tokens = self.model.count_tokens(self._visible(), tools)
            try:
                completion = await self._call_model(tools, tokens)
            except ModelError as error:
                # The model knows better what fits than we do: hide something, if there is a strategy for it.
                if error.kind != "context_length" or last or await self._make_room(tokens, 0) == tokens:
                    raise
                tokens = self.model.count_tokens(self._visible(), tools)
                continue
            self._append(completion.message)
            return completion, last

    async def _make_room(self, tokens: int, limit: int) -> int:
        """Let the strategy hide messages from a prompt of `tokens` until what is left fits. Returns its tokens."""
        while True:
            view = self.context.manage(self.messages, self._view, self._fixed, Room(tokens, limit))
            if view == self._view:
                return tokens
            if not self.context.summarises or self.budget.steps_left() == 1:
                self._look_at(view)
            else:
                await self._sum_up(view, limit)
            tokens = self.model.count_tokens(self._visible(), self.tools.schemas())
            if not limit:
                return tokens

    async def _sum_up(self, view: View, limit: int) -> None:
        """Go on with `view` and a summary of what it hides; of what is too long to be summed up, of its end."""
        self._append({"role": "user", "content": self.context.request})
        tokens = self.model.count_tokens(self._visible(), [])
        history = rounds(self.messages, self._view.visible, self._fixed)[:-1]
        unknown = len(history) // 2 if not limit else 0
        for number, oldest in enumerate(history):
            if number >= unknown and (not limit or tokens + limit // 16 <= limit):
                break
            self._look_at(View([index for index in self._view.visible if index not in oldest], self._view.shortened))
            tokens = self.model.count_tokens(self._visible(), [])
        completion = await self._call_model([], tokens)
        self._append(completion.message)
        self._look_at(view)
        self._append({"role": "user", "content": f"What you have found so far:\n{text_of(completion.message)}"})

    # --- calls of the model -------------------------------------------------------------------------------------------

    async def _call_model(self, tools: list[dict[str, Any]], tokens: int) -> Completion:
        """A call within budget and context, with a prompt of `tokens`; recorded, or found in the record."""
        call, journal, budget = f"{self.id}#{self.steps + 1}", self.journal, self.budget
        known = journal.recorded(call)
        budget.check_step()
        if known is not None:
            return self._repeat(known)
        started = journal.now()
        budget.check_seconds(started)
        most = self.options.max_tokens
        if self.model.context_tokens is not None:
            most = min(most, self.model.context_tokens - tokens)
            if most < 1:
                raise _Ended("failed", f"the context is full: a prompt of {tokens:,} tokens; "
                             f"the model takes {self.model.context_tokens:,}")
        reservation = None
        try:
            async with asyncio.timeout(budget.seconds_left(started)) as clock:
                reservation = await budget.reserve_in_turn(tokens, most, self.model.price)
                in_turn = journal.now() - started
                self._count_step()
                options = dataclasses.replace(self.options, max_tokens=reservation.max_output_tokens)
                completion = await self.model.complete(self._visible(), tools, options)
            paid = reservation.settle(completion.usage)
        except BaseException as error:
            # A time-out comes of a cancellation, which knows how long the call was in line.
            in_line = getattr(error.__cause__ if isinstance(error, TimeoutError) else error, "waited", 0.0)
            if isinstance(error, TimeoutError):
                error = budget.late(journal.now()) if clock.expired() else ModelError(
                    "timeout", "the model did not answer in time")
            if reservation is not None:
                reservation.release()
                self._note_call(call, started, reservation, {
                    "usage": None, "price_paid": 0.0, "completion": None, "finish_reason": None,
                    "model": self.model.name, "error": {"kind": _kind(error), "message": str(error)},
                    "attempts": getattr(error, "attempts", 1),
                    "waited": round(in_turn + in_line, 6)})
            raise error
        completion.message = tidied(completion.message)
        self.usage += completion.usage
        given = {name: getattr(completion, name) for name in ("prompt_ids", "token_ids", "logprobs")}
        self._note_call(call, started, reservation, {
            "usage": _usage(completion.usage), "price_paid": paid, "completion": completion.message,
            "finish_reason": completion.finish_reason, "model": completion.model, "error": None,
            "attempts": completion.attempts, "waited": round(in_turn + completion.waited, 6),
            "notes": completion.notes, "tools": bool(tools),
            **{name: value for name, value in given.items() if value is not None}})
        return completion

    def _count_step(self) -> None:
        self.steps += 1
        self.budget.count_step()

    def _note_call(self, call: str, started: float, reservation: Reservation, outcome: dict[str, Any]) -> None:
        ended = self.journal.now()
        spent = vars(self.budget.spent) | {"seconds": round(ended - self.budget.started, 6)}
        self.journal.write({
            "type": "model_call", "agent": self.id, "call": call, "step": self.steps, "stage": self.stage,
            "messages_added": self.messages[self._reported :], "context_dropped": self._dropped,
            "context_shortened": sorted(self._view.shortened),
            "options": {**self._sampling, "max_tokens": reservation.max_output_tokens},
            "started": round(started, 6), "ended": round(ended, 6), **outcome,
            "budget": {"spent": spent, "limits": self._limits}})
        self._reported = len(self.messages)

    def _repeat(self, known: Event) -> Completion:
        """Take a recorded call as if it had just been made. Raises UserError where it was another one."""
        if known["messages_added"] != self.messages[self._reported :]:
            raise UserError(f"{self.journal.path}: call {known['call']} was made of other messages; resume with the "
                            "task, tools, models and settings that the session began with")
        self._count_step()
        self._reported = len(self.messages)
        if known["error"] is not None:
            raise ModelError(known["error"]["kind"], known["error"]["message"])
        completion = Completion(
            known["completion"], known["finish_reason"], Usage(**known["usage"]), known["model"],
            known.get("prompt_ids"), known.get("token_ids"), known.get("logprobs"), known.get("notes", []),
            known.get("attempts", 1), known.get("waited", 0.0))
        self.usage += completion.usage
        return completion

    # --- calls of tools -----------------------------------------------------------------------------------------------

    async def _call_tools(self, calls: list[dict[str, Any]]) -> list[ToolResult]:
        """All calls of one reply at once; their results in order, as messages."""
        try:
            results = await side_by_side([self._call_tool(call["function"], f"{self.id}#{self.steps}.{number}")
                                          for number, call in enumerate(calls)])
        finally:
            self.budget.end_stage()
        for call, result in zip(calls, results, strict=True):
            self._append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
        return results

    async def _call_tool(self, function: dict[str, Any], id: str) -> ToolResult:
        journal, name, arguments = self.journal, function["name"], function["arguments"]
        known = journal.recorded(id)
        if known is not None:
            self.budget.count_stage(journal.critical_steps(id))
            return ToolResult(known["result"], known["error"])
        started = journal.now()
        result = await self.tools.call(
            name, arguments, ToolContext(self.id, self.steps, id, self.budget.seconds_left(started)))
        journal.write({
            "type": "tool_call", "agent": self.id, "call": id, "name": name, "arguments": arguments,
            "started": round(started, 6), "ended": round(journal.now(), 6), "result": result.content,
            "error": result.error})
        return result

    # --- messages -----------------------------------------------------------------------------------------------------

    def _append(self, message: Message) -> None:
        self._view.visible.append(len(self.messages))
        self.messages.append(message)

    def _look_at(self, view: View) -> None:
        self._view = View(list(view.visible), view.shortened)
        self._dropped = _gaps(view.visible, len(self.messages))

    def _visible(self) -> list[Message]:
        """What the model sees."""
        if len(self._view.visible) == len(self.messages) and not self._view.shortened:
            return list(self.messages)
        for index in self._view.shortened - self._short.keys():
            self._short[index] = self.messages[index] | {"content": HIDDEN}
        shown = self._short if self._view.shortened else {}
        return [shown.get(index) or self.messages[index] for index in self._view.visible]

    def _finish(self, status: str, reason: str | None) -> AgentResult:
        said = (text_of(message) for message in reversed(self.messages) if message["role"] == "assistant")
        text = next((text for text in said if text.strip()), "")
        self.journal.write({"type": "agent_finished", "agent": self.id, "status": status, "text": text,
                            "reason": reason, "steps": self.steps, "usage": _usage(self.usage),
                            "messages_added": self.messages[self._reported :]})
        return AgentResult(status, text, self.steps, self.usage, reason)


async def side_by_side(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All at once; their results in order. Where one raises, the others are cancelled and waited for."""
    if len(works) == 1:
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _kind(error: BaseException) -> str:
    """Of a call that gave no reply."""
    if isinstance(error, ModelError):
        return error.kind
    return {asyncio.CancelledError: "cancelled", BudgetExceeded: "budget"}.get(type(error), "program")


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens}


def _gaps(visible: list[int], count: int) -> list[list[int]]:
    """[start, stop) pairs of what is missing from 0 … `count` - 1."""
    gaps, at = [], 0
    for index in [*visible, count]:
        if index > at:
            gaps.append([at, index])
        at = index + 1
    return gaps
