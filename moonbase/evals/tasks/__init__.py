"""Inspect's part of a suite: its tasks. Only this folder and `providers/` import Inspect when they are loaded.

Every sample's metadata say what its record is made of: `item` (the same under every condition), `group`, `cluster`,
`condition`, and `replay_key`, by which a stored answer to it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from inspect_ai import Task

from moonbase.errors import UserError
from moonbase.evals.suite import Suite, TaskSpec


def build_tasks(
    suite: Suite, data_folder: Path | None, seed: int = 0, limit: int | None = None, *, stored: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[Task]:
    """A suite as tasks of Inspect, named as in the suite.

    `limit`: items of each task at most. `stored`: dataset of the stored answers of models that only repeat these: tasks
    and items without any are left out, and so are conditions that nobody could have set. `roles`: models by role, for
    tasks of other packages that take their grader as a parameter. Raises UserError.
    """
    tasks: list[Task] = []
    asked = [spec for spec in suite.tasks if stored is None or spec.stored == stored]
    if not asked:
        raise UserError(f"suite {suite.name}: replay/{stored} has no answers to any task of it")
    for spec in asked:
        limits = [one for one in (spec.limit, limit) if one is not None]
        built = build_task(suite, spec, data_folder, seed, min(limits, default=None),
                           stored is not None, roles or {})
        for task in built:
            task.metadata = {**(task.metadata or {}), "moonbase": {"suite": suite.name, "task": spec.name}}
            if stored is not None:
                from moonbase.evals.tasks.refusal_scorer import stored_judges

                task.scorer = [*(task.scorer or []), *stored_judges(stored, data_folder)]
        tasks += built
    return tasks


def build_task(
    suite: Suite, spec: TaskSpec, data: Path | None, seed: int, limit: int | None, stored: bool,
    roles: Mapping[str, str],
) -> list[Task]:
    """One part of a suite; several tasks where it has several families. Raises UserError."""
    kind, _, name = spec.source.partition(":")
    if kind == "file":
        from moonbase.evals.tasks.prompts import file_task

        return [file_task(suite, spec, data, limit, stored)]
    if kind == "builtin" and name.startswith("fresh"):
        from moonbase.evals.tasks import fresh_task

        return _as_list(fresh_task.build(spec, seed=seed, limit=limit))
    if kind == "builtin":
        return [_builtin(name, suite)(suite, spec, data, seed, limit, stored)]
    if "/" in spec.source and not kind.startswith(("file", "builtin")):
        from moonbase.evals.tasks.registered import registered_task

        return [registered_task(suite, spec, data, limit, roles)]
    raise UserError(f"suite {suite.name}, task {spec.name}: source {spec.source!r} is none of builtin:NAME, file:NAME "
                    "and PACKAGE/TASK")


def _builtin(name: str, suite: Suite) -> Callable[..., Task]:
    from moonbase.evals.tasks import calls, exact, humaneval, own_sets, prompts, twins_task, worlds

    found = {"paired-states": own_sets.paired_states, "alarming-words": own_sets.alarming_words,
             "public-twins": twins_task.public_twins,
             "paired-politics": prompts.paired_politics, "benign-tools": calls.benign_tools, "bfcl": calls.bfcl,
             "mmlu-pro": exact.mmlu_pro, "gsm8k": exact.gsm8k, "choices": exact.choices,
             "humaneval": humaneval.humaneval, "wideworld": worlds.wideworld, "retail": worlds.retail}
    if name not in found:
        raise UserError(f"suite {suite.name}: there is no task builtin:{name}; there are {', '.join(sorted(found))} "
                        "and fresh/FAMILY")
    return found[name]


def _as_list(built: Any) -> list[Task | str]:
    return list(built) if isinstance(built, Iterable) and not isinstance(built, str) else [built]
