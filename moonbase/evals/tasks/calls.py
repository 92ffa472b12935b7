"""Function calls (BFCL) as tasks of Inspect: the call is judged, nothing is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, get_model
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import JSONSchema

from moonbase.agents.worlds.calls import CATEGORIES, CallTask, chat_call, judge, load_calls, tool_schemas
from moonbase.errors import UserError
from moonbase.evals.suite import Suite, TaskSpec
from moonbase.evals.tasks.refusal_scorer import api_signal_of, score_of

_SCHEMA_FIELDS = set(JSONSchema.model_fields)


def bfcl(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """Single and parallel calls, right or wrong by their syntax trees."""
    tasks = _tasks(suite, spec, data, limit)
    return _task(suite, spec, tasks, call_scorer(tasks))


def benign_tools(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """Harmless requests with tools: how often a model declines to act where there is no reason to."""
    tasks = _tasks(suite, spec, data, limit)
    return _task(suite, spec, tasks, acting_scorer(), group="benign")


def _tasks(suite: Suite, spec: TaskSpec, data: Path | None, limit: int | None) -> dict[str, CallTask]:
    if data is None:
        raise UserError(f"suite {suite.name}, task {spec.name}: name the folder of local copies with --data")
    found = load_calls(data / spec.params.get("folder", "bfcl"), spec.params.get("categories", tuple(CATEGORIES)))
    return {task.id: task for task in islice(found, limit)}


def _task(
    suite: Suite, spec: TaskSpec, tasks: dict[str, CallTask], scorer: Scorer, group: str | None = None
) -> Task:
    samples = [Sample(
        id=task.id, input=[_message(message) for message in task.messages],
        metadata={"item": task.id, "group": group or task.category, "cluster": "", "condition": {"language": "en"}})
        for task in tasks.values()]
    return Task(name=spec.name, dataset=MemoryDataset(samples, name=spec.name), solver=offer_functions(tasks),
                scorer=scorer, epochs=Epochs(suite.samples, reducer=[]))


def _message(message: dict[str, Any]) -> Any:
    kind: Callable[..., Any] = ChatMessageSystem if message["role"] == "system" else ChatMessageUser
    return kind(content=message["content"])


@solver
def offer_functions(tasks: dict[str, CallTask]) -> Solver:
    """One call of the model with the item's functions as tools."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state.output = await get_model().generate(state.messages, tools=tool_infos(tasks[str(state.sample_id)]))
        state.messages.append(state.output.message)
        return state

    return solve


def tool_infos(task: CallTask) -> list[ToolInfo]:
    """The item's functions as Inspect declares tools."""
    return [ToolInfo(name=schema["function"]["name"], description=schema["function"]["description"],
                     parameters=ToolParams.model_validate(_one_type(schema["function"]["parameters"])))
            for schema in tool_schemas(task)]


def _one_type(schema: dict[str, Any]) -> dict[str, Any]:
    """Inspect's schemas have one type each: several become alternatives."""
    schema = {name: value for name, value in schema.items() if name in _SCHEMA_FIELDS}
    if "properties" in schema:
        schema["properties"] = {name: _one_type(inner) for name, inner in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        schema["items"] = _one_type(schema["items"])
    if isinstance(schema.get("type"), list):
        inner = {name: schema.pop(name) for name in ("items", "properties", "required") if name in schema}
        schema["anyOf"] = [{"type": one, **(inner if one in ("array", "object") else {})} for one in schema.pop("type")]
    return schema


def chat_calls(state: TaskState) -> list[dict[str, Any]]:
    """What the model called, in the form of the chat API."""
    made: Iterable[Any] = state.output.message.tool_calls or () if state.output.choices else ()
    return [chat_call(call.function, call.arguments, call.id) for call in made]


@scorer(metrics=[], name="calls")
def call_scorer(tasks: dict[str, CallTask]) -> Scorer:
    """Whether the calls are among the accepted ones; the details say what is wrong first."""

    async def score(state: TaskState, target: Target) -> Score:
        verdict = judge(tasks[str(state.sample_id)], chat_calls(state))
        return Score(value={"accuracy": float(verdict.right)}, metadata={"details": {"remark": verdict.error}})

    return score


@scorer(metrics=[], name="rules")
def acting_scorer() -> Scorer:
    """Full where a function was called; else the rules on what was said instead."""
    from moonbase.evals.refusal.rules import label

    async def score(state: TaskState, target: Target) -> Score:
        if chat_calls(state):
            return score_of("full", {"rules": "full"}, rule="called a function")
        stop = str(state.output.stop_reason) if state.output.choices else None
        verdict = label(state.output.completion, "en", api_signal_of(state.output), stop)
        # Words instead of an act are at most a part of what was asked for.
        said = "partial" if verdict.label == "full" else verdict.label
        return score_of(said, {"rules": said}, rule=verdict.rule)

    return score
