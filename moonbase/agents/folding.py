"""From the events of a session (`SESSION/events.jsonl`, or as they happen) to its episode.

An event tells of something that has ended, so a stream that stops shows what was running by what is missing: an agent
without its end, a reply whose calls have no result.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any

from pydantic import ValidationError

from moonbase.agents.critical_path import Critical, critical
from moonbase.agents.trace import (
    SCHEMA,
    AgentRecord,
    BudgetRecord,
    CallError,
    CriticalRecord,
    Episode,
    LimitsRecord,
    ModelCall,
    SpentRecord,
    ToolCall,
    UsageRecord,
    wrong_schema,
)
from moonbase.errors import UserError

Event = dict[str, Any]


def fold(events: Iterable[Event]) -> Episode:
    """The episode that a stream of events tells.

    The stream may end anywhere: agents and calls that were running then are unfinished. Events that a resumed session
    repeats count once. Raises UserError, with the number of the event, for what is no such stream.
    """
    folding, place = _Folding(), ""
    try:
        for number, event in enumerate(events, 1):
            place = f"event {number}: "
            folding.take(event)
        place = ""
        return folding.episode()
    except (UserError, *_DAMAGE) as error:
        raise UserError(f"{place}{_in_one_line(error)}") from None


_DAMAGE = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, RecursionError)
"""What a field of another kind than it should be leads to."""


class _Folding:
    """Takes the events one by one."""

    def __init__(self) -> None:
        self._episode: Episode | None = None
        self._agents: dict[str, _Agent] = {}
        self._last_time = 0.0

    def take(self, event: Event) -> None:
        """The next event. Kinds that are not known are passed over. Raises UserError and what `_DAMAGE` names."""
        kind = event.get("type")
        if not isinstance(kind, str) or kind not in KINDS:
            return
        event = clean(event)
        if self._episode is None and kind != "episode_started":
            raise UserError(f"it comes before episode_started ({kind})")
        time = event.get("time", 0.0)
        if not 0 <= time < float("inf"):
            raise UserError(f"its time is {time!r}: no number of seconds since the start")
        self._last_time = max(self._last_time, time)
        getattr(self, f"_{kind}")(event)

    def episode(self) -> Episode:
        """What the events so far tell."""
        episode = self._episode
        if episode is None:
            raise UserError("there is no episode_started event: is this a session's events.jsonl?")
        started_by: dict[str, list[str]] = {}
        for agent in self._agents.values():
            if agent.record.parent_call is not None:
                started_by.setdefault(agent.record.parent_call, []).append(agent.record.id)
        starts = {name: agent.record.started for name, agent in self._agents.items()}
        for agent in self._agents.values():
            agent.complete(started_by, starts)
        episode.agents = [agent.record for agent in self._agents.values()]
        # A session that was cut off did not stop before its last call had ended.
        ends = [call.ended for agent in episode.agents for call in agent.calls if call.ended is not None]
        episode.seconds = max([self._last_time, *ends])
        _count(episode, critical(episode))
        return episode

    # One method for each kind of event.

    def _episode_started(self, event: Event) -> None:
        if event.get("schema") != SCHEMA:
            raise UserError(wrong_schema(event.get("schema")))
        if self._episode is not None:
            if self._episode.id != event["episode"]:
                raise UserError(f"a second episode, {event['episode']!r}, in the stream of {self._episode.id!r}")
            return
        self._episode = Episode(
            id=event["episode"], task=text_of(event.get("task")), started_at=event.get("started_at") or "",
            model=event.get("model") or "", limits=_limits(event.get("limits")),
            sub_limits=_limits(event.get("sub_limits")), seed=event.get("seed"), tools=event.get("tools") or [])

    def _agent_started(self, event: Event) -> None:
        name = event["agent"]
        if name in self._agents:
            return
        parent = event.get("parent")
        parent_call = event.get("parent_call")
        if parent is not None and parent not in self._agents:
            raise UserError(f"agent {name!r} has a parent that never started, {parent!r}")
        self._agents[name] = _Agent(AgentRecord(
            id=name, name=event.get("name") or name, parent=parent, parent_call=parent_call,
            system=event.get("system") or "", task=text_of(event.get("task")), tools=event.get("tools") or [],
            model=event.get("model") or "", trainable=bool(event.get("trainable")),
            limits=_limits(event.get("limits")), started=event.get("time", 0.0)))

    def _model_call(self, event: Event) -> None:
        self._agent(event).take_model_call(event)

    def _tool_call(self, event: Event) -> None:
        self._agent(event).take_tool_call(event)

    def _agent_finished(self, event: Event) -> None:
        record = self._agent(event).record
        record.ended = event.get("time", 0.0)
        _set(record, status=event["status"], text=event.get("text") or "", reason=event.get("reason") or "")

    def _episode_finished(self, event: Event) -> None:
        # The critical path is counted anew from the calls.
        _set(self._episode, status=event["status"], text=event.get("text") or "", rewards=event.get("rewards") or {})

    def _agent(self, event: Event) -> _Agent:
        try:
            return self._agents[event["agent"]]
        except KeyError:
            raise UserError(f"{event['type']} of an agent that never started, {event.get('agent')!r}") from None


KINDS = frozenset({"episode_started", "agent_started", "model_call", "tool_call", "agent_finished", "episode_finished"})


class _Agent:
    """An agent's record as it grows."""

    def __init__(self, record: AgentRecord) -> None:
        self.record = record
        self.calls: dict[str, ModelCall | ToolCall] = {}
        self.results: dict[str, str] = {}
        self.told: dict[str, int] = {}
        """Call id -> how many messages there were before it."""

    def take_model_call(self, event: Event) -> None:
        name, messages = event["call"], self.record.messages
        if name in self.calls:
            if self.calls[name].error is None:
                return
            # A resumed session tried again what had failed, or had been interrupted, in its last life.
            del messages[self.told[name] :]
        self.told[name] = len(messages)
        added = event.get("messages_added") or []
        if added and messages and added[0].get("role") == "assistant" and added[0] == messages[-1]:
            added = added[1:]
        completion, reply = event.get("completion"), None
        for message in added if completion is None else [*added, completion]:
            _check_message(message)
        messages.extend(added)
        sees = _ranges_left(len(messages), event.get("context_dropped") or [])
        if completion is not None:
            reply = len(messages)
            messages.append(completion)
        budget, error, logprobs = event.get("budget"), event.get("error"), event.get("logprobs")
        if logprobs is not None:
            # JSON has no infinity.
            logprobs = [None if value is None or value == float("-inf") else value for value in logprobs]
        given, drawn = len(event.get("prompt_ids") or ()), len(event.get("token_ids") or ())
        self.calls[name] = ModelCall(
            id=name, step=event["step"], stage=event.get("stage", event["step"]), started=event["started"],
            waited=event.get("waited") or 0.0, ended=event["ended"],
            model=event.get("model") or self.record.model, sampling=event.get("options") or {},
            usage=_known(UsageRecord, event.get("usage")), money=event.get("price_paid") or 0.0,
            finish_reason=event.get("finish_reason"), error=None if error is None else _known(CallError, error),
            attempts=event.get("attempts") or 1, sees=sees, message=reply,
            shortened=event.get("context_shortened") or [],
            budget=None if budget is None else BudgetRecord(spent=_known(SpentRecord, budget.get("spent")),
                                                            limits=_limits(budget.get("limits"))),
            prompt_ids=event.get("prompt_ids"), token_ids=event.get("token_ids"), logprobs=logprobs,
            # A reply's ids are all that was drawn, and nothing else is.
            sampled=[(given, given + drawn)] if drawn else None)

    def take_tool_call(self, event: Event) -> None:
        name = event["call"]
        if name not in self.calls:
            self.results[name] = event.get("result") or ""
            self.calls[name] = ToolCall(
                id=name, step=_place(name)[0], stage=self.stage(_place(name)[0]), name=event["name"],
                arguments=event.get("arguments") or "", started=event["started"], ended=event["ended"],
                error=bool(event.get("error")))

    def stage(self, step: int) -> int | None:
        """Of the step's model call."""
        call = self.calls.get(f"{self.record.id}#{step}")
        return None if call is None else call.stage

    def complete(self, started_by: dict[str, list[str]], starts: dict[str, float]) -> None:
        """Find the result of every call, and the calls that were running when the stream stopped.

        started_by: tool call id -> ids of its sub-agents; starts: agent id -> when it started.
        """
        record = self.record
        replies = [call for call in self.calls.values() if call.kind == "model" and call.message is not None]
        for number, reply in enumerate(replies):
            last = number + 1 == len(replies)
            stop = len(record.messages) if last else replies[number + 1].message
            asked = record.messages[reply.message].get("tool_calls") or []
            results = _results(asked, record.messages, reply.message + 1, stop)
            for index, one in enumerate(asked):
                name = f"{record.id}#{reply.step}.{index}"
                call = self.calls.get(name)
                if call is None and (name in started_by or (last and record.status == "unfinished")):
                    function = one.get("function") or {}
                    started = min((starts[child] for child in started_by.get(name, ())), default=reply.ended)
                    call = self.calls[name] = ToolCall(
                        id=name, step=reply.step, stage=reply.stage, name=function.get("name") or "?",
                        arguments=function.get("arguments") or "", started=started)
                if call is None:
                    continue
                call.message = results.get(index)
                if call.message is None and last and name in self.results:
                    # The agent ended before a model could read it.
                    call.message = len(record.messages)
                    record.messages.append(
                        {"role": "tool", "tool_call_id": one.get("id"), "content": self.results[name]})
        for name, children in started_by.items():
            if name in self.calls:
                self.calls[name].children = children
        record.calls = sorted(self.calls.values(), key=lambda call: (call.step, call.kind, _place(call.id)))


def _results(asked: list[dict[str, Any]], messages: list[dict[str, Any]], start: int, stop: int) -> dict[int, int]:
    """Place among a reply's calls -> index of the message with the result.

    Models repeat ids, so only the messages up to the next reply are looked at, and equal ids go by their order.
    """
    found: dict[int, int] = {}
    for at in range(start, stop):
        if messages[at].get("role") != "tool":
            continue
        for index, one in enumerate(asked):
            if index not in found and one.get("id") == messages[at].get("tool_call_id"):
                found[index] = at
                break
    return found


def _count(episode: Episode, path: Critical) -> None:
    """Set what was spent, and mark the critical path."""
    on_path: dict[str, list[str]] = {}
    for measure, chain in path.chains.items():
        for name in chain:
            on_path.setdefault(name, []).append(measure)
    below = {agent.id: 0 for agent in episode.agents}
    for agent in reversed(episode.agents):
        if agent.parent is not None:
            below[agent.parent] += 1 + below[agent.id]
    total = SpentRecord(seconds=episode.seconds, critical_steps=path.steps)
    for agent in episode.agents:
        end = episode.seconds if agent.ended is None else agent.ended
        spent = SpentRecord(seconds=max(0.0, end - agent.started), critical_steps=path.steps_of.get(agent.id, 0),
                            subagents=below[agent.id])
        for call in agent.calls:
            call.on_critical_path = on_path.get(call.id, [])
            if call.kind == "model":
                spent.steps += 1
                spent.tokens += call.usage.input_tokens + call.usage.output_tokens
                spent.money += call.money
        agent.spent = spent
        total.steps, total.tokens = total.steps + spent.steps, total.tokens + spent.tokens
        total.money += spent.money
        total.subagents += agent.parent is not None
    episode.spent = total
    episode.critical = CriticalRecord(steps=path.steps, tokens=path.tokens, seconds=path.seconds)


def _place(call: str) -> tuple[int, ...]:
    """The numbers after the sign # of a call's id; what is no number counts as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in call.rpartition("#")[2].split("."))


def _ranges_left(count: int, dropped: list[list[int]]) -> list[tuple[int, int]]:
    """[start, stop) ranges of 0..count without the dropped ones."""
    left, at = [], 0
    for start, stop in sorted(dropped):
        if start > at:
            left.append((at, min(start, count)))
        at = max(at, stop)
    return [*left, (at, count)] if at < count else left


def _check_message(message: Any) -> None:
    """Raises UserError for what is no message of the OpenAI chat API as far as a trace looks into one."""
    calls = message.get("tool_calls") if isinstance(message, dict) else 0
    if not isinstance(calls, list | NoneType) or not all(
            isinstance(call, dict) and isinstance(call.get("function"), dict | NoneType) for call in calls or ()):
        raise UserError(f"no message of a chat: {str(message)[:80]!r}")


def _limits(found: dict[str, Any] | None) -> LimitsRecord:
    """JSON has no infinity: no limit is null in a trace."""
    return _known(LimitsRecord, {name: None if value == float("inf") else value
                                 for name, value in (found or {}).items()})


def _known(record: type, found: dict[str, Any] | None) -> Any:
    """A record from what it knows of a dict: an event may say more than the trace keeps."""
    return record(**{name: value for name, value in (found or {}).items() if name in record.model_fields})


def _set(record: Any, **values: Any) -> None:
    """Assign, validated as if they had been given at first."""
    for name, value in values.items():
        record.__pydantic_validator__.validate_assignment(record, name, value)


def text_of(task: Any) -> str:
    """A task is a text, or messages of which the last from the user is the task."""
    if task is None or isinstance(task, str):
        return task or ""
    said = [message.get("content") for message in task if message.get("role") == "user"]
    content = said[-1] if said else ""
    if isinstance(content, list):
        content = "\n".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def clean(value: Any) -> Any:
    """The same with U+FFFD for half characters (lone surrogates), which no UTF-8 file can hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # Token ids and log-probabilities, of which there are many, need no look.
        return list(value) if value and isinstance(value[0], int | float) else [clean(item) for item in value]
    return value


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
