"""Problems invented on the spot as tasks of Inspect: one task a family, graded by the family's own verifier."""

from __future__ import annotations

import base64
import json
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageUser,
    ContentImage,
    ContentText,
    ModelOutput,
    execute_tools,
)
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver
from inspect_ai.tool import Tool, ToolDef, ToolError, ToolParams, tool
from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.fresh import coding, tool_use, wide
from moonbase.evals.fresh.itemset import Configuration, forms_of, problems
from moonbase.evals.fresh.problem import Problem, verify

MESSAGES = 120
"""Of a conversation with a world's tools."""
TURNS = 24
"""In which a model may call the functions of an item of the family `tools`."""


def build(spec: Any, *, seed: int | str = 0, limit: int | None = None) -> list[Task]:
    """The tasks of a suite's part whose source is `builtin:fresh` (all families) or `builtin:fresh/FAMILY`.

    `params`: families, difficulties, languages, count (items of a family and difficulty), samples, calls, seed (instead
    of the suite's). `limit`: items of each task, spread over the difficulties. Raises UserError.
    """
    params = dict(spec.params)
    seed = params.pop("seed", seed)
    family = spec.source.partition("/")[2]
    if family:
        params["families"] = (family,)
    try:
        configuration = Configuration.model_validate(params)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"task {spec.name}: params.{where}: {first['msg']}") from None
    alone = len(configuration.families) == 1
    return [fresh_family(configuration, name, seed, limit, spec.name if alone else f"{spec.name}_{name}")
            for name in configuration.families]


def fresh_family(
    configuration: Configuration, family: str, seed: int | str, limit: int | None = None, name: str | None = None,
) -> Task:
    """One family as a task. Raises UserError where it needs what is not here."""
    if family == "code":
        coding.needs_sandbox()
    if limit is not None:
        configuration = configuration.model_copy(update={"limit": min(limit, configuration.limit or limit)})
    items = list(problems(configuration.model_copy(update={"families": (family,)}), seed))
    samples = [sample_of(one, form) for one in items for form in forms_of(configuration, family)]
    by_id = {problem.id: problem for problem in items}
    first = {"tables": show_picture, "wide": look_around}.get(family)
    steps: list[Solver] = [make_calls(by_id)] if family == "tools" else [generate()]
    return Task(name=name or f"fresh_{family}", dataset=MemoryDataset(samples, name=f"fresh/{family}"),
                solver=[*([first(by_id)] if first else []), *steps], scorer=verifier(by_id),
                epochs=Epochs(configuration.samples, reducer=[]),
                message_limit=MESSAGES if family == "wide" else None)


def sample_of(problem: Problem, form: str | None = None) -> Sample:
    """What a record is made of stands in the metadata; the input is the prompt's text, whose digest can be made.

    `form`: the condition `calls`, where the family has one.
    """
    difficulty = str(problem.difficulty)
    condition = {"language": problem.language, "difficulty": difficulty} | ({"calls": form} if form else {})
    return Sample(id=problem.id if form in (None, "tools") else f"{problem.id}/{form}", input=problem.prompt,
                  target=problem.target_text, metadata={
        "item": problem.item, "group": problem.family, "cluster": problem.item, "family": problem.family,
        "kind": problem.kind, "language": problem.language, "difficulty": difficulty, "twin": problem.twin,
        "problem": problem.id, "condition": condition})


@scorer(metrics=[], name="verifier")
def verifier(by_id: dict[str, Problem]) -> Scorer:
    """1, 0, or a share of what was asked for; None where an answer could not be scored here, and why."""
    async def score(state: TaskState, target: Target) -> Score:
        problem, text = by_id[state.metadata["problem"]], state.output.completion
        if problem.family == "code":
            try:
                value, remark = await coding.verify_async(problem.spec, problem.language, problem.target, text)
            except UserError as error:
                value, remark = None, str(error)
        else:
            value, remark = verify(problem, text)
        details = {"remark": remark, "kind": problem.kind, **state.metadata.get("counted", {})}
        return Score(value={"accuracy": value}, explanation=remark or None, metadata={"details": details})

    return score


@solver
def show_picture(by_id: dict[str, Problem]) -> Solver:
    """Add the picture of an item that has one to the question."""
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        picture = by_id[state.metadata["problem"]].png()
        if picture is not None:
            address = "data:image/png;base64," + base64.b64encode(picture).decode()
            state.messages[-1] = ChatMessageUser(content=[ContentImage(image=address),
                                                          ContentText(text=state.input_text)])
        return state

    return solve


@solver
def make_calls(by_id: dict[str, Problem]) -> Solver:
    """Let the model call the item's functions until it calls no more, or `TURNS` and `MOST_CALLS` are used up.

    Its answer is then the JSON list of the calls that were carried out, so that whoever has the record can carry them
    out again; without any call it is what the model said. A call that the interface refuses changes nothing, and the
    model is told why. Under the condition `calls: text` the functions stand in the question instead.
    """
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        problem = by_id[state.metadata["problem"]]
        if state.metadata["condition"]["calls"] == "text":
            state.messages[-1] = ChatMessageUser(
                content=state.input_text + tool_use.in_text(problem.spec, problem.language))
            return await generate(state)
        desk, asked = tool_use.Desk(problem.spec), 0
        functions = [function_of(desk, schema) for schema in tool_use.schemas(problem.spec, problem.language)]
        state.tools = [function.as_tool() for function in functions]
        for _ in range(TURNS):
            state = await generate(state, tool_calls="none")
            calls = state.output.message.tool_calls if state.output.choices and not state.output.error else None
            if not calls or asked + len(calls) > tool_use.MOST_CALLS:
                break
            asked += len(calls)
            state.messages += (await execute_tools(state.messages, functions)).messages
        if asked and not state.output.error:
            state.output = answered(state.output, json.dumps(desk.done, ensure_ascii=False))
        state.metadata["counted"] = {"calls": len(desk.done), "refused_calls": asked - len(desk.done)}
        return state

    return solve


def function_of(desk: tool_use.Desk, schema: dict[str, Any]) -> ToolDef:
    """One of the item's functions as a tool of Inspect; it answers with what has changed."""
    async def execute(**kwargs: Any) -> str:
        try:
            return json.dumps(desk.call(schema["name"], kwargs), ensure_ascii=False)
        except ValueError as error:
            raise ToolError(str(error)) from None

    return ToolDef(execute, schema["name"], schema["description"], ToolParams.model_validate(schema["parameters"]))


def answered(output: ModelOutput, text: str) -> ModelOutput:
    """The output with another text in place of what was said and called last."""
    message = ChatMessageAssistant(content=text, model=output.model, source="generate")
    choice = output.choices[0].model_copy(update={"message": message})
    return output.model_copy(update={"choices": [choice], "completion": text})


@solver
def look_around(by_id: dict[str, Problem]) -> Solver:
    """Give the tools of the item's world: search and open."""
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        problem = by_id[state.metadata["problem"]]
        world = wide.world_of(problem.spec, problem.language)
        state.tools = [search(world), open_page(world)]
        return state

    return solve


@tool(name="search")
def search(world: Any) -> Tool:
    async def execute(query: str, k: int = 10) -> str:
        """Search the pages. Answers the best matching pages: title, address and the beginning of each.

        Args:
            query: Words to look for.
            k: How many results, 1 to 50.
        """
        hits = world.search(query, max(1, min(int(k), 50)))
        lines = [f"{rank}. {hit.title} <{hit.url}>\n   {hit.snippet}" for rank, hit in enumerate(hits, 1)]
        return "\n".join(lines) or "No results. Try other words."

    return execute


@tool(name="open")
def open_page(world: Any) -> Tool:
    async def execute(url: str) -> str:
        """Open a page and read its text.

        Args:
            url: The address as a search result or a link shows it.
        """
        return world.open(url)

    return execute


@task
def fresh(family: str = "maths", count: int = 20, seed: int | str = 0, languages: str | list[str] = "en,zh",
          difficulties: str | list[int] = "1,2,3,4,5", calls: str | list[str] = "tools") -> Task:
    """For `inspect eval`: one family."""
    configuration = Configuration(families=(family,), count=count, languages=tuple(_listed(languages)),
                                  difficulties=tuple(int(one) for one in _listed(difficulties)),
                                  calls=tuple(_listed(calls)))
    return fresh_family(configuration, family, seed)


def _listed(given: str | int | list[Any]) -> list[Any]:
    """Inspect's command line makes a list of a text with commas, and a number of one that is a number."""
    return given if isinstance(given, list) else str(given).split(",")
