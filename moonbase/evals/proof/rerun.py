"""Asking a model again what records were asked before: Inspect runs it, on the same suite cut down to those items."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.records import Record, read_records
from moonbase.evals.suite import Suite, read_plan, suite_of


def rerun(bundle: Path, records: Iterable[Record], model: str, work: Path, data: Path | None) -> Iterator[Record]:
    """New records of the same items, samples and conditions. Raises UserError where they cannot be asked here.

    `work`: an empty folder; Inspect's logs go there. `data`: the user's own copies of public sets.
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
    tasks = [task for task in _cut(suite, plan, data, records)]
    logs = work / "logs"
    with contextlib.redirect_stdout(sys.stderr):
        inspect_eval(tasks, model=model, log_dir=str(logs), display="none", log_level="critical", log_format="eval",
                     fail_on_error=False, score_display=False, log_model_api=tells_by_call([model]))
    collect(suite, [model], logs, work, {})
    wanted = {_key(record.item, record.condition, record.sample) for record in records}
    return (record for record in read_records(work / "records.jsonl")
            if _key(record.item, record.condition, record.sample) in wanted)


def _cut(suite: Suite, plan: dict[str, Any], data: Path | None, records: list[Record]) -> Iterator[Any]:
    """The suite's tasks with nothing but the items of `records`, as often as the last of their samples needs."""
    from inspect_ai import Epochs

    from moonbase.evals.tasks import build_tasks

    limit = plan.get("limit")
    for task in build_tasks(suite, data, plan.get("seed", 0), limit if isinstance(limit, int) else None):
        if isinstance(task, str):
            raise UserError(f"{task}: a task of another package; run it again with Inspect itself")
        name = ((task.metadata or {}).get("moonbase") or {}).get("task", task.name)
        asked = {_key(record.item, record.condition) for record in records if record.task == name}
        task.dataset = task.dataset.filter(lambda sample, asked=asked: _of_sample(sample) in asked)
        if len(task.dataset):
            last = max(record.sample for record in records if record.task == name)
            task.epochs = last + 1
            task.epochs_reducer = Epochs(1, reducer=[]).reducer
            yield task


def _of_sample(sample: Any) -> tuple[Any, ...]:
    given = sample.metadata or {}
    condition = {name: str(value) for name, value in (given.get("condition") or {}).items()}
    return _key(str(given.get("item", sample.id)), condition)


def _key(item: str, condition: dict[str, str], *sample: int) -> tuple[Any, ...]:
    return item, tuple(sorted(condition.items())), *sample
