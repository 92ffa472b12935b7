"""The worlds of `agents` as tasks of Inspect: a swarm, or one agent, works in them through whatever model is evaluated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inspect_ai import Epochs, Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.model import ModelUsage as InspectUsage
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolCall, ToolInfo, ToolParams

from moonbase.agents.budget import Limits
from moonbase.agents.models.base import (
    CallOptions,
    Completion,
    Message,
    ModelError,
    Price,
    Usage,
    estimate_tokens,
    text_of,
)
from moonbase.agents.swarm import Swarm
from moonbase.agents.worlds import world as worlds
from moonbase.errors import UserError
from moonbase.evals.suite import Suite, TaskSpec
from moonbase.evals.tasks.calls import _one_type


class InspectChat:
    """A model of Inspect as the agents want one, so that Inspect logs, limits and counts every call."""

    price = Price()
    context_tokens = None

    def __init__(self, model: Model) -> None:
        self.model, self.name = model, str(model)

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """One reply. Raises ModelError."""
        infos = [ToolInfo(name=tool["function"]["name"], description=tool["function"].get("description", ""),
                          parameters=ToolParams.model_validate(_one_type(tool["function"]["parameters"])))
                 for tool in tools]
        output = await self.model.generate(
            [_to_inspect(message) for message in messages], tools=infos,
            tool_choice="none" if options.tool_choice == "none" else "auto",
            config=GenerateConfig(max_tokens=options.max_tokens))
        if not output.choices or output.error:
            raise ModelError("server", output.error or "no reply")
        usage = output.usage or InspectUsage()
        # Inspect counts what came out of a cache apart.
        cached = usage.input_tokens_cache_read or 0
        return Completion(_from_inspect(output.message),
                          {"max_tokens": "length", "tool_calls": "tool_calls"}.get(str(output.stop_reason), "stop"),
                          Usage(usage.input_tokens + cached, usage.output_tokens, cached), self.name)

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """An estimate."""
        return estimate_tokens(messages, tools)

    async def close(self) -> None:
        """Inspect's own."""


def _to_inspect(message: Message) -> ChatMessage:
    role, text = message["role"], text_of(message)
    if role == "system":
        return ChatMessageSystem(content=text)
    if role == "tool":
        return ChatMessageTool(content=text, tool_call_id=message.get("tool_call_id"))
    if role == "user":
        return ChatMessageUser(content=text)
    import json

    calls = []
    for call in message.get("tool_calls") or ():
        try:
            arguments, problem = json.loads(call["function"]["arguments"] or "{}"), None
        except ValueError as error:
            arguments, problem = {}, str(error)
        if not isinstance(arguments, dict):
            arguments, problem = {}, "the arguments are no object"
        calls.append(ToolCall(id=call["id"], function=call["function"]["name"], arguments=arguments,
                              parse_error=problem))
    return ChatMessageAssistant(content=text, tool_calls=calls or None)


def _from_inspect(message: ChatMessageAssistant) -> Message:
    import json

    calls = [{"id": call.id, "type": "function", "function": {
        "name": call.function, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        for call in message.tool_calls or ()]
    return {"role": "assistant", "content": message.text} | ({"tool_calls": calls} if calls else {})


# WideWorld: tables and chains of questions over a procedural web


def wideworld(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """Tasks of one family; the world and the tasks come from the seed. `params`: family, count, pages, steps, rows,
    delegate (a swarm; false: one agent alone)."""
    from moonbase.agents.worlds.wideworld import make_tasks, make_world

    params = spec.params
    world = make_world(seed, pages=params.get("pages", 2000), grammar="test")
    count = min(one for one in (params.get("count", 20), limit) if one is not None)
    tasks = {task.id: task for task in make_tasks(world, params.get("family", "wide"), count, seed,
                                                  rows=params.get("rows"), columns=params.get("columns"))}
    samples = [Sample(id=task.id.replace("/", "_"), input=task.prompt, metadata={
        "item": task.id, "group": task.family, "cluster": "", "condition": {
            "language": "en", "delegation": "yes" if params.get("delegate", True) else "no"}})
        for task in tasks.values()]
    limits = Limits(steps=params.get("steps", 60))
    return Task(name=spec.name, dataset=MemoryDataset(samples, name=spec.name),
                solver=work_in_world(world, limits, params.get("delegate", True)), scorer=table_scorer(tasks),
                epochs=Epochs(suite.samples, reducer=[]))


@solver
def work_in_world(world: worlds.World, limits: Limits, delegate: bool) -> Solver:
    """A swarm, or an agent alone, with the world's search and pages."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        swarm = Swarm(InspectChat(get_model()), worlds.world_tools(world), limits=limits, delegate=delegate)
        result = await swarm.run(state.input_text)
        state.output = ModelOutput.from_content(str(state.model), result.text)
        state.metadata["details"] = {
            "status": result.status, "reason": result.reason,
            "critical_steps": result.episode.critical.steps if result.episode.critical else None}
        return state

    return solve


@scorer(metrics=[], name="table")
def table_scorer(tasks: dict[str, worlds.Task]) -> Scorer:
    """F1 over cells and rows, and whether all of it is right."""
    from moonbase.agents.worlds.grading import score as grade

    async def score(state: TaskState, target: Target) -> Score:
        found = grade(tasks[state.metadata["item"]], state.output.completion)
        return Score(value={"item_f1": found.item_f1, "row_f1": found.row_f1, "accuracy": float(found.exact)},
                     metadata={"details": state.metadata.get("details", {}) | {"notes": list(found.notes)[:5]}})

    return score


# The shop of τ²-bench


def retail(suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool) -> Task:
    """The test split of the shop; another model, role `user`, plays the customer."""
    from moonbase.agents.worlds.retail import load_retail

    if data is None:
        raise UserError(f"suite {suite.name}, task {spec.name}: name the folder of local copies with --data")
    shop = load_retail(data / spec.params.get("folder", "tau2/retail"))
    samples = [Sample(id=task.id, input=f"retail task {task.id}", metadata={
        "item": task.id, "group": "retail", "cluster": "", "condition": {"language": "en"}})
        for task in shop.tasks_of("test")[:limit]]

    @solver(name="keep_shop")
    def keep_shop() -> Solver:
        from moonbase.agents.worlds.retail_dialogue import ModelUser, play_retail

        async def solve(state: TaskState, generate: Generate) -> TaskState:
            user = ModelUser(shop.tasks[str(state.sample_id)], InspectChat(get_model(role="user")))
            result = await play_retail(shop, str(state.sample_id), InspectChat(get_model()), user,
                                       limits=Limits(steps=spec.params.get("steps", 100)))
            said = [text_of(message) for message in result.messages if message["role"] == "assistant"]
            state.output = ModelOutput.from_content(str(state.model), said[-1] if said else "")
            state.metadata["details"] = {"status": result.status, "reason": result.reason, "reward": result.reward}
            return state

        return solve

    return Task(name=spec.name, dataset=MemoryDataset(samples, name=spec.name), solver=keep_shop(),
                scorer=reward_scorer(), epochs=Epochs(suite.samples, reducer=[]))


@scorer(metrics=[], name="reward")
def reward_scorer() -> Scorer:
    """The world's own verdict, which the solver kept."""

    async def score(state: TaskState, target: Target) -> Score:
        details = state.metadata.get("details", {})
        return Score(value={"accuracy": details.get("reward")}, metadata={"details": details})

    return score
