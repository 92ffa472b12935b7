"""Tasks of other packages (`inspect_evals/NAME`), built here so that a suite's parameters and limits hold for them, and
the user's local copies are read where there are any.

    DATA/huggingface/OWNER/NAME/   the files of a data set of the Hugging Face Hub, as `hf download OWNER/NAME
                                   --repo-type dataset --revision REVISION --local-dir …` lays them
    DATA/inspect_evals/            what inspect_evals fetches by itself, as it keeps it ($INSPECT_EVALS_CACHE_DIR)
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from inspect_ai import Task, task_with

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.suite import Suite, TaskSpec

HUB_COPIES, PACKAGE_COPIES = "huggingface", "inspect_evals"
"""Folders inside the data folder."""
ROLE = "role:"
"""A parameter `role:NAME` is the model in that role: some tasks take their grader as a parameter."""


def registered_task(
    suite: Suite, spec: TaskSpec, data: Path | None, limit: int | None, roles: Mapping[str, str]
) -> Task:
    """One task of another package under the suite's name for it. Raises UserError in one line."""
    where = f"suite {suite.name}, task {spec.name}"
    with local_copies(data):
        make = _maker(spec.source, where)
    params = {name: _with_roles(value, roles, where) for name, value in spec.params.items()}
    unknown = sorted(params.keys() - inspect.signature(make).parameters.keys())
    if unknown:
        raise UserError(f"{where}: {spec.source} has no parameter {unknown[0]!r}"
                        f"{did_you_mean(unknown[0], inspect.signature(make).parameters)}")
    try:
        with local_copies(data):
            task = make(**params)
    except Exception as error:
        # Inspect writes some of its messages for a terminal, in several lines and with colours.
        told = " ".join(re.sub(r"\[/?[a-z ]*\]", "", str(getattr(error, "message", error))).split())[:300]
        raise UserError(f"{where}: {spec.source} cannot be had ({type(error).__name__}"
                        f"{'' if suite.withhold else ': ' + told}); without a network it needs a local copy, which "
                        "`moonbase eval --list` names") from None
    changes: dict[str, Any] = {} if limit is None else {"dataset": task.dataset[:limit]}
    if suite.samples > 1:
        changes["epochs"] = suite.samples
    return task_with(task, name=spec.name, **changes)


@contextlib.contextmanager
def local_copies(data: Path | None) -> Iterator[None]:
    """While a task is built, sets that lie in the data folder are read from there.

    The `datasets` library takes a folder that is called as a set is for that set, seen from where the process is.
    inspect_evals reads its variable when it is imported: the first data folder of a process holds.
    """
    if data is None:
        yield
        return
    kept, hub = (data / PACKAGE_COPIES).resolve(), (data / HUB_COPIES).resolve()
    if kept.is_dir():
        os.environ.setdefault("INSPECT_EVALS_CACHE_DIR", str(kept))
    with contextlib.chdir(hub) if hub.is_dir() else contextlib.nullcontext():
        yield


def _maker(source: str, where: str) -> Callable[..., Task]:
    package, _, name = source.partition("/")
    for entry in entry_points(group="inspect_ai"):
        if entry.name == package:
            module = entry.load()
            found = getattr(module, name, None)
            if callable(found):
                return found
            raise UserError(f"{where}: {package} has no task {name!r}{did_you_mean(name, vars(module))}")
    raise UserError(f"{where}: the package {package} is not installed, or has no tasks of Inspect")


def _with_roles(value: Any, roles: Mapping[str, str], where: str) -> Any:
    if isinstance(value, list):
        return [_with_roles(one, roles, where) for one in value]
    if not isinstance(value, str) or not value.startswith(ROLE):
        return value
    role = value.removeprefix(ROLE)
    if role not in roles:
        raise UserError(f"{where}: it needs a model in the role of {role} (--role {role}=MODEL)")
    return roles[role]
