"""Running a suite: Inspect runs it, and what it logged becomes records.

A run can be killed at any time and started again with the same arguments: Inspect keeps every answer as it comes (in
`private/`, beside its logs), and asks only for those that are missing. Everything about a run is in its folder:

    suite.json       what was settled before it ran
    logs/            Inspect's logs; in private/logs/ where the suite withholds its texts
    private/         texts that are withheld, the salt of their digests, answers of a run that goes on; never published
    records.jsonl    one line a sample
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.collect import HEEDED, collect
from moonbase.evals.progress import inspect_progress
from moonbase.evals.records import read_records
from moonbase.evals.suite import Suite, missing_needs, out_of_reach, read_plan
from moonbase.files import explain_os_error, make_folder, write_text

PLAN_SCHEMA = "moonbase.plan/1"
_NO_INSPECT = 'evaluation needs Inspect: pip install "moonbase[evals]"'
PRIVATE = "private"
OUR_PREFIX, STORED_PREFIX = "moonbase/", "replay/"
STORED_SAMPLES = 32
"""Samples at a time where nothing is waited for: more of them only take memory."""
RETRIES = 8
"""Of a call whose host is away or has too much to do, a quarter of an hour in all; Inspect alone would never give up. A
sample that failed so is asked again when the run is."""
COLLECTIONS = (50_000, 20, 100)
"""Of Python's garbage collector while Inspect runs: a third of the time went into looking through its objects."""


@dataclass(frozen=True)
class EvalFolder:
    """A folder with an evaluation whose records are written."""

    path: Path
    records: int
    errors: int
    """Samples that failed; running again asks for them again, and for nothing else. A stored failure stays one."""


def run_suite(
    suite: Suite, models: Sequence[str], folder: Path, *, seed: int = 0, limit: int | None = None,
    data: Path | None = None, price: Mapping[str, Sequence[float]] | None = None, max_connections: int | None = None,
    model_args: Mapping[str, Mapping[str, Any]] | None = None, roles: Mapping[str, str] | None = None,
    judges: Sequence[str] = (), temperature: float | None = None, quiet: bool = False,
) -> EvalFolder:
    """Run a suite on models, or go on with it; then write the records.

    `limit`: items of each task; `price`: of a model, dollars per million input and output tokens; `model_args`: of a
    model, what Inspect hands to its provider; `roles`: models that grade or play a user, by role; `judges`: models
    that label answers beside the suite's own; `temperature`: of every model that answers. Tasks that need what is not
    here are left out, which suite.json and standard error say. Raises UserError: another evaluation is in the folder, a
    model that is not pinned, a suite of which nothing can run here, a model that does not work at all.
    """
    models = [inspect_name(model) for model in models]
    if judges:
        judges = [judge if judge == "rules" else inspect_name(judge) for judge in judges]
        _check_judges(judges)
        suite = suite.model_copy(update={"judges": tuple(dict.fromkeys([*suite.judges, *judges]))})
    roles = {role: inspect_name(model) for role, model in (roles or {}).items()}
    suite, left_out = runnable(suite, data, roles)
    _check_stored(models, data)
    settle(suite, models, folder, seed=seed, limit=limit, price=price, model_args=model_args, roles=roles,
           left_out=left_out, temperature=temperature)
    for name, missing in left_out.items():
        print(f"left out: {name} needs {'; '.join(missing)}", file=sys.stderr)
    logs = log_folder(suite, folder)
    problems = []
    with _alone(folder), _disk_troubles(folder):
        for stored, group in group_models(models).items():
            try:
                problems += _run_group(suite, group, logs, folder, stored, seed=seed, limit=limit, data=data,
                                       quiet=quiet, max_connections=max_connections, model_args=model_args or {},
                                       roles=roles or {}, temperature=temperature)
            except KeyboardInterrupt:
                print(f"interrupted; answers that are there are kept. To go on: the same command with --out {folder}",
                      file=sys.stderr)
                raise
        found = collect(suite, list(models), logs, folder, price or {})
    if not found.records or found.errors == found.records:
        why = next((one.reason for one in read_records(folder / "records.jsonl") if one.reason), None) or (
            problems[0] if problems else "")
        raise UserError(f"{folder}: no answer of any model{': ' + _bare(why) if why else ''}. Mend it and run "
                        "again: what is there is kept")
    for (model, thinking), (missed, asked) in found.unheeded.items():
        print(f"thinking {thinking}: {missed} of {asked} answers of {model} were given "
              f"{'with' if thinking == 'off' else 'without any'} reasoning (details.{HEEDED} in the records)",
              file=sys.stderr)
    return EvalFolder(folder, found.records, found.errors)


def _bare(reason: str) -> str:
    """`UserError('...')` as the line that it is."""
    found = re.fullmatch(r"UserError\((['\"])(.*)\1\)", reason.strip())
    return (found.group(2) if found else reason.strip()).rstrip(".")


def _check_judges(judges: Sequence[str]) -> None:
    try:
        from moonbase.evals.tasks.judge_scorer import check_judges
    except ImportError:
        raise UserError(_NO_INSPECT) from None
    check_judges([judge for judge in judges if judge != "rules"])


def inspect_name(model: str) -> str:
    """A model as Inspect names it: a folder or a preset is one of ours. Raises UserError for a folder that is absent,
    or holds no whole model."""
    from moonbase.evals.providers.engines import check_source

    ours = model.startswith("preset:") or Path(model).is_dir()
    if not ours and model.startswith(("/", ".", "~", "runs/")):
        raise UserError(f"{model}: no such folder")
    if ours or model.startswith(OUR_PREFIX):
        check_source(model if ours else model.removeprefix(OUR_PREFIX))
    if not ours:
        return model
    # A slash at the end, as shells complete names, makes no other model.
    return OUR_PREFIX + (model if model.startswith("preset:") else os.path.normpath(model))


def _check_stored(models: Sequence[str], data: Path | None) -> None:
    """Raises UserError for stored answers that are not in the data folder."""
    from moonbase.evals.providers.stored import check_answers

    for model in models:
        if model.startswith(STORED_PREFIX):
            check_answers(model.removeprefix(STORED_PREFIX), data)


def runnable(suite: Suite, data: Path | None, roles: Mapping[str, str]) -> tuple[Suite, dict[str, list[str]]]:
    """The suite without the tasks that cannot run here, and what these lack. Raises UserError where none is left."""
    missing = {task.name: list(missing_needs(task, data, roles)) or out_of_reach(task, data) for task in suite.tasks}
    left_out = {name: lacks for name, lacks in missing.items() if lacks}
    kept = tuple(task for task in suite.tasks if task.name not in left_out)
    if not kept:
        needs = "; ".join(dict.fromkeys(lack for lacks in left_out.values() for lack in lacks))
        raise UserError(f"suite {suite.name}: nothing of it can run here; it needs {needs}")
    return suite.model_copy(update={"tasks": kept}), left_out


def settle(
    suite: Suite, models: Sequence[str], folder: Path, *, seed: int, limit: int | None,
    price: Mapping[str, Sequence[float]] | None = None, model_args: Mapping[str, Mapping[str, Any]] | None = None,
    roles: Mapping[str, str] | None = None, left_out: Mapping[str, Sequence[str]] | None = None,
    temperature: float | None = None,
) -> None:
    """Write suite.json before anything runs; in a folder that has one, check that it is the same evaluation.

    Raises UserError, also for a model that a router would choose, and for one whose thinking cannot be as the suite
    crosses it.
    """
    from moonbase.evals.providers.endpoints import check_model_name
    from moonbase.evals.providers.thinking import thinking_settings

    if len(set(models)) != len(models):
        raise UserError("a model is named twice")
    for model in [*models, *(roles or {}).values(), *(one for one in suite.judges if one != "rules")]:
        check_model_name(model, (model_args or {}).get(model))
    for model in models:
        # Stored answers are under no condition of ours.
        for thinking in () if model.startswith(STORED_PREFIX) else suite.levels("thinking", "default"):
            thinking_settings(model, thinking, (model_args or {}).get(model))
    make_folder(folder)
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder}: this evaluation is sealed; run it anew in another folder (--out)")
    # What is not JSON, or differs after it was read back, would look like another evaluation.
    plan = json.loads(json.dumps({
        "schema": PLAN_SCHEMA, "suite": suite.canonical(), "models": list(models), "seed": seed, "limit": limit,
        "price": {name: list(dollars) for name, dollars in (price or {}).items()},
        # Their values may be keys and passwords.
        "model_args": {name: sorted(arguments) for name, arguments in (model_args or {}).items()},
        "roles": dict(roles or {}), "left_out": dict(left_out or {}),
        **({} if temperature is None else {"temperature": temperature})}))
    if (folder / "suite.json").exists() and _has_run(folder):
        before = read_plan(folder)
        other = [name for name in dict.fromkeys([*plan, *before]) if before.get(name) != plan.get(name)]
        if other:
            raise UserError(f"{folder}: another evaluation is there ({', '.join(other)} differ): go on with it as it "
                            "was, or choose another folder (--out)")
        return
    write_text(folder / "suite.json", json.dumps(plan, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _has_run(folder: Path) -> bool:
    """Whether anything was asked: a plan that came to nothing (a slip in a name, a missing key) binds nobody."""
    return (folder / "records.jsonl").exists() or any(
        any(folder.glob(f"{logs}/*.eval")) for logs in ("logs", f"{PRIVATE}/logs"))


def log_folder(suite: Suite, folder: Path) -> Path:
    """Where Inspect's logs are: where texts are withheld, in the part of the folder that nobody else may read."""
    private = make_folder(folder / PRIVATE)
    private.chmod(0o700)
    return make_folder(private / "logs" if suite.withhold else folder / "logs")


def group_models(models: Sequence[str]) -> dict[str | None, list[str]]:
    """Models that answer under None; those that repeat stored answers under the name of the dataset of these."""
    groups: dict[str | None, list[str]] = {}
    for model in models:
        stored = model.removeprefix(STORED_PREFIX).partition(":")[0] if model.startswith(STORED_PREFIX) else None
        groups.setdefault(stored, []).append(model)
    return groups


def tells_by_call(models: Sequence[str]) -> bool:
    """Whether who answered is told by the raw call alone, which the logs must keep then: ours tell it themselves."""
    return any(not model.startswith((OUR_PREFIX, STORED_PREFIX)) for model in models)


def _run_group(
    suite: Suite, models: Sequence[str], logs: Path, folder: Path, stored: str | None, *, seed: int,
    limit: int | None, data: Path | None, max_connections: int | None, model_args: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, str], temperature: float | None, quiet: bool,
) -> list[str]:
    """One set of Inspect's evaluations. Returns what went wrong in tasks, a line each."""
    try:
        from inspect_ai import eval_set
        from inspect_ai.model import get_model
    except ImportError:
        raise UserError(_NO_INSPECT) from None
    from moonbase.evals.tasks import build_tasks

    with contextlib.redirect_stdout(sys.stderr):
        tasks = build_tasks(suite, data, seed, limit, stored=stored, roles=roles)
    seen = contextlib.nullcontext() if quiet else inspect_progress(
        lambda message: _bare(_problem(message, suite.withhold)), warn=not suite.withhold)
    with _inspect_state(folder / PRIVATE), _rare_collections(), contextlib.redirect_stdout(sys.stderr), seen:
        arguments = {model: dict(model_args.get(model, {})) for model in models}
        if stored is not None and data is not None:
            arguments = {model: {"data": str(data), **given} for model, given in arguments.items()}
        named = [_model(get_model, model, given) for model, given in arguments.items()]
        done, found = eval_set(
            tasks, str(logs), model=named, log_dir_allow_dirty=True,
            # A sample that fails leaves the others alone, and is tried again when the run is.
            fail_on_error=True, continue_on_fail=True, retry_attempts=0, retry_immediate=False,
            # Texts of prompts may stand in warnings.
            display="none", log_level="critical" if quiet or suite.withhold else "warning",
            log_format="eval", log_model_api=tells_by_call(models), score_display=False,
            # A paid answer is on the disk as soon as it is there; a stored one is found again for nothing.
            log_realtime=stored is None, log_buffer=None if stored is None else 1000,
            max_samples=STORED_SAMPLES if stored is not None else max_connections,
            ctl_server=False, acp_server=False, model_roles=dict(roles) or None,
            **({} if stored is not None else {"max_retries": RETRIES}),
            **({} if stored is not None or temperature is None else {"temperature": temperature}),
            **({} if max_connections is None else {"max_connections": max_connections}))
    # Inspect ends an interrupted run as if it were whole: done, and without a log.
    if not found or any(log.status == "cancelled" for log in found):
        raise KeyboardInterrupt
    if done:
        return []
    for log in found:
        if log.error and not quiet:
            print(f"failed: {log.eval.task}, {log.eval.model}: {_bare(_problem(log.error.message, suite.withhold))}",
                  file=sys.stderr)
    return [_problem(log.error.message if log.error else log.status, suite.withhold) for log in found
            if log.status != "success"]


def _model(get_model: Callable[..., Any], name: str, given: dict[str, Any]) -> Any:
    """Inspect's model of that name. Raises UserError in one line: no such provider, no key, no package."""
    try:
        return get_model(name, **given)
    except UserError:
        raise
    except Exception as error:
        # Inspect writes some of its messages for a terminal, in several lines and with colours.
        told = " ".join(re.sub(r"\[/?[a-z ]*\]", "", str(getattr(error, "message", error))).split())
        raise UserError(f"model {name}: {told}") from None


def _problem(message: str, withhold: bool) -> str:
    """In one line; only its kind where it may hold a text."""
    return message.partition("(")[0][:80] if withhold else (message.strip().splitlines() or [""])[0][:300]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs in one folder would pay for every answer twice. The lock goes with the process, however that ends."""
    import fcntl

    with open(folder / PRIVATE / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another run is at work in this folder; wait for it, or choose another one "
                            "(--out)") from None
        yield


@contextlib.contextmanager
def _disk_troubles(folder: Path) -> Iterator[None]:
    """A disk that is full ends the run in one line; logging alone would print a traceback for every line."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        # Inspect closes and packs its trace when the process ends, and would fail then.
        for handler in logging.getLogger().handlers:
            trace = getattr(handler, "trace_logger", None)
            if isinstance(trace, logging.FileHandler):
                with contextlib.suppress(OSError):
                    trace.close()
                Path(trace.baseFilename).unlink(missing_ok=True)
        raise explain_os_error(error, folder) from None
    finally:
        logging.raiseExceptions = before


@contextlib.contextmanager
def _inspect_state(private: Path) -> Iterator[None]:
    """Inspect keeps the answers of a running evaluation in the user's data folder: here that is the run's own, so that
    withheld texts stay together, and a run that was killed can be gone on with wherever its folder is taken to."""
    before = os.environ.get("XDG_DATA_HOME")
    os.environ["XDG_DATA_HOME"] = str(private.resolve() / "state")
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_DATA_HOME"]
        else:
            os.environ["XDG_DATA_HOME"] = before


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    # What is there stays there meanwhile, garbage too: to look for that first takes as long as a short run.
    gc.freeze()
    gc.set_threshold(*COLLECTIONS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
