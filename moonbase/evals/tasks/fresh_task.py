"""Problems invented on the spot as tasks of Inspect: one task a family, graded by the family's own verifier."""

from __future__ import annotations

import base64
from typing import Any

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver
from inspect_ai.tool import Tool, tool
from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.fresh import coding, wide
from moonbase.evals.fresh.itemset import Configuration, problems
from moonbase.evals.fresh.problem import Problem, verify

MESSAGES = 120
"""Of a conversation with a world's tools."""


def build(spec: Any, *, seed: int | str = 0, limit: int | None = None) -> list[Task]:
    """The tasks of a suite's part whose source is `builtin:fresh` (all families) or `builtin:fresh/FAMILY`.

    `params`: families, difficulties, languages, count (items of a family and difficulty), samples, seed (instead of the
    suite's). `limit`: items of each task, spread over the difficulties. Raises UserError.
    """
    params = dict(spec.params)
    seed, samples = params.pop("seed", seed), int(params.pop("samples", 1))
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
    return [fresh_family(configuration, name, seed, limit, samples, spec.name if alone else f"{spec.name}_{name}")
            for name in configuration.families]


def fresh_family(
    configuration: Configuration, family: str, seed: int | str, limit: int | None = None, samples: int = 1,
    name: str | None = None,
) -> Task:
    """One family as a task. Raises UserError where it needs what is not here."""
    if family == "code":
        coding.needs_sandbox()
    if limit is not None:
        configuration = configuration.model_copy(update={"limit": min(limit, configuration.limit or limit)})
    items = list(problems(configuration.model_copy(update={"families": (family,)}), seed))
    by_id = {problem.id: problem for problem in items}
    first = {"tables": show_picture, "wide": look_around}.get(family)
    steps: list[Solver] = [first(by_id)] if first else []
    return Task(name=name or f"fresh_{family}", dataset=MemoryDataset([sample_of(one) for one in items],
                                                                      name=f"fresh/{family}"),
                solver=[*steps, generate()], scorer=verifier(by_id), epochs=Epochs(samples, reducer=[]),
                message_limit=MESSAGES if family == "wide" else None)


def sample_of(problem: Problem) -> Sample:
    """What a record is made of stands in the metadata; the input is the prompt's text, whose digest can be made."""
    difficulty = str(problem.difficulty)
    return Sample(id=problem.id, input=problem.prompt, target=problem.target_text, metadata={
        "item": problem.item, "group": problem.family, "cluster": problem.item, "family": problem.family,
        "kind": problem.kind, "language": problem.language, "difficulty": difficulty, "twin": problem.twin,
        "condition": {"language": problem.language, "difficulty": difficulty}})


@scorer(metrics=[], name="verifier")
def verifier(by_id: dict[str, Problem]) -> Scorer:
    """1, 0, or a share of what was asked for; None where an answer could not be scored here, and why."""
    async def score(state: TaskState, target: Target) -> Score:
        problem, text = by_id[str(state.sample_id)], state.output.completion
        if problem.family == "code":
            try:
                value, remark = await coding.verify_async(problem.spec, problem.language, problem.target, text)
            except UserError as error:
                value, remark = None, str(error)
        else:
            value, remark = verify(problem, text)
        return Score(value={"accuracy": value}, explanation=remark or None,
                     metadata={"details": {"remark": remark, "kind": problem.kind}})

    return score


@solver
def show_picture(by_id: dict[str, Problem]) -> Solver:
    """Add the picture of an item that has one to the question."""
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        picture = by_id[str(state.sample_id)].png()
        if picture is not None:
            address = "data:image/png;base64," + base64.b64encode(picture).decode()
            state.messages[-1] = ChatMessageUser(content=[ContentImage(image=address),
                                                          ContentText(text=state.input_text)])
        return state

    return solve


@solver
def look_around(by_id: dict[str, Problem]) -> Solver:
    """Give the tools of the item's world: search and open."""
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        problem = by_id[str(state.sample_id)]
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
          difficulties: str | list[int] = "1,2,3,4,5") -> Task:
    """For `inspect eval`: one family."""
    configuration = Configuration(families=(family,), count=count, languages=tuple(_listed(languages)),
                                  difficulties=tuple(int(one) for one in _listed(difficulties)))
    return fresh_family(configuration, family, seed)


def _listed(given: str | int | list[Any]) -> list[Any]:
    """Inspect's command line makes a list of a text with commas, and a number of one that is a number."""
    return given if isinstance(given, list) else str(given).split(",")
