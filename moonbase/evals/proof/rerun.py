"""Asking a model again what records were asked before: Inspect runs it, on the same suite cut down to those items, and
each is decoded as its record says that it was."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.records import Record, read_records
from moonbase.evals.suite import Suite, read_plan, suite_of

SETTINGS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
            "max_tokens": "max_tokens", "presence_penalty": "presence_penalty",
            "frequency_penalty": "frequency_penalty", "stop": "stop_seqs", "stop_seqs": "stop_seqs"}
"""Name in a record's decoding to the setting of Inspect. How much a model thinks is set by the suite's own solver."""


def rerun(bundle: Path, records: Iterable[Record], model: str, work: Path, data: Path | None) -> Iterator[Record]:
    """New records of the same items, samples and conditions. Raises UserError where they cannot be asked here.

    `work`: an empty folder; whatever Inspect writes goes there. `data`: the user's own copies of public sets.
    """
    try:
        from inspect_ai import eval as inspect_eval
    except ImportError:
        raise UserError('evaluation needs Inspect: pip install "moonbase[evals]"') from None
    from moonbase.evals.collect import collect
    from moonbase.evals.providers.endpoints import check_model_name
    from moonbase.evals.run import tells_by_call

    check_model_name(model)
    records = list(records)
    plan, whole = read_plan(bundle), suite_of(bundle)
    suite = whole.model_copy(update={"tasks": tuple(
        task for task in whole.tasks if task.name in {record.task for record in records})})
    logs = work / "logs"
    with inspect_state(work / "state"), contextlib.redirect_stdout(sys.stderr):
        inspect_eval(list(_cut(suite, plan, data, records)), model=_model(model, records), log_dir=str(logs),
                     display="none", log_level="critical", log_format="eval", fail_on_error=False,
                     score_display=False, log_model_api=tells_by_call([model]), ctl_server=False, acp_server=False)
    collect(suite, [model], logs, work, {})
    wanted = {_key(record.item, record.condition, record.sample) for record in records}
    return (record for record in read_records(work / "records.jsonl")
            if _key(record.item, record.condition, record.sample) in wanted)


def _model(name: str, records: list[Record]) -> Any:
    """One of ours speaks and thinks as the records say, where they all say the same; others by their names."""
    from inspect_ai.model import get_model

    if not name.startswith("moonbase/"):
        return name
    given = {}
    for setting in ("style", "thinking"):
        found = [record.call.decoding.get(setting) for record in records]
        if found[0] is not None and all(one == found[0] for one in found):
            given[setting] = found[0]
    return get_model(name, memoize=False, **given)


@contextlib.contextmanager
def inspect_state(folder: Path) -> Iterator[None]:
    """Inspect keeps traces, caches and running samples in the user's folders: for the while, in `folder`.

    Weights that others have downloaded (Hugging Face, torch) are found where they were.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = {"XDG_DATA_HOME": str(folder / "data"), "XDG_CACHE_HOME": str(folder / "cache"),
                "HF_HOME": os.environ.get("HF_HOME", str(cache / "huggingface")),
                "TORCH_HOME": os.environ.get("TORCH_HOME", str(cache / "torch"))}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cut(suite: Suite, plan: dict[str, Any], data: Path | None, records: list[Record]) -> Iterator[Any]:
    """The suite's tasks with nothing but the items of `records`, as often as the last of their samples needs."""
    from inspect_ai import Epochs

    from moonbase.evals.tasks import build_tasks

    limit = plan.get("limit")
    for task in build_tasks(suite, data, plan.get("seed", 0), limit if isinstance(limit, int) else None):
        name = ((task.metadata or {}).get("moonbase") or {}).get("task", task.name)
        ours = [record for record in records if record.task == name]
        asked = {_key(record.item, record.condition) for record in ours}
        task.dataset = task.dataset.filter(lambda sample, asked=asked: key_of(sample.id, sample.metadata) in asked)
        if len(task.dataset):
            task.epochs = max(record.sample for record in ours) + 1
            task.epochs_reducer = Epochs(1, reducer=[]).reducer
            task.solver = _decoded(task.solver, {_key(record.item, record.condition, record.sample): settings_of(
                record.call.decoding) for record in ours})
            yield task


def settings_of(decoding: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of how its answer was decoded, as Inspect sets it."""
    found = {SETTINGS[name]: value for name, value in decoding.items() if name in SETTINGS and value is not None}
    if isinstance(decoding.get("logit_bias"), dict):
        found["logit_bias"] = {int(token): bias for token, bias in decoding["logit_bias"].items()}
    return found


def _decoded(inner: Any, settings: Mapping[tuple[Any, ...], dict[str, Any]]) -> Any:
    """A task's solver, each call of the model decoded as the sample's record says."""
    from inspect_ai.solver import Generate, Solver, TaskState, chain, solver

    @solver(name="decoded")
    def decoded() -> Solver:
        steps = chain(inner) if isinstance(inner, list) else inner

        async def solve(state: TaskState, generate: Generate) -> TaskState:
            own = settings.get((*key_of(state.sample_id, state.metadata), state.epoch - 1), {})

            async def again(state: TaskState, *arguments: Any, **given: Any) -> TaskState:
                return await generate(state, *arguments, **{**given, **own})

            return await steps(state, again)

        return solve

    return decoded()


def key_of(id: Any, metadata: dict[str, Any] | None) -> tuple[Any, ...]:
    """What a sample of Inspect and its record share: the item and the condition."""
    given = metadata or {}
    condition = {name: str(value) for name, value in (given.get("condition") or {}).items()}
    return _key(str(given.get("item", id)), condition)


def _key(item: str, condition: Mapping[str, str], *sample: int) -> tuple[Any, ...]:
    return item, tuple(sorted(condition.items())), *sample
