"""What is measured, written down before anything runs: a suite is a short YAML file, and frozen once it is read.

A suite names its tasks, its main metric, what clusters its items, the hypotheses that are tested, the smallest number
of items from which it says anything, and who judges. For safety it is crossed: language × thinking × whether the prompt
says that this is a test × repetitions; the provider is crossed by naming a model at several of them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from moonbase.errors import UserError, did_you_mean

SCHEMA = "moonbase.suite/1"
FOLDER = Path(__file__).with_name("suites")
CROSSED: dict[str, tuple[str, ...] | None] = {
    "language": ("en", "zh"), "thinking": ("on", "off", "default"), "reveals_test": ("yes", "no"), "samples": None}
"""What a suite can be crossed by, with the levels there are; `samples` has one: how often each item is asked."""
NEEDS = ("network", "docker", "package", "data", "role")
"""First words of a need: `network` (`network unless FILE-OR-FOLDER`: a copy in the data folder will do), `docker`,
`package NAME`, `data FILE-OR-FOLDER`, `role NAME` (a second model)."""


class Strict(BaseModel):
    """Frozen; an unknown field is a slip of the pen."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSpec(Strict):
    """One part of a suite."""

    name: str
    source: str
    """`builtin:NAME`, a task of ours; `file:NAME`, prompts of the user's own copy of a public set, which `params`
    describe; `inspect_evals/NAME`, or another registered task of Inspect."""
    params: dict[str, Any] = Field(default_factory=dict)
    needs: tuple[str, ...] = ()
    metric: str = "accuracy"
    limit: int | None = None
    """The first so many items only."""
    stored: str | None = None
    """Dataset of stored answers to it, for models `replay/DATASET:MODEL`."""
    about: str = ""
    scores: dict[str, str] = Field(default_factory=dict)
    """Metric to what a scorer of another package calls it; `*` is the least of all that it gives: all are right."""
    grades: dict[str, float] = Field(default_factory=dict)
    """What words of such a scorer stand for, beside Inspect's own letters."""

    @field_validator("needs")
    @classmethod
    def _known_needs(cls, needs: tuple[str, ...]) -> tuple[str, ...]:
        for need in needs:
            if need.split(" ")[0] not in NEEDS:
                raise ValueError(f"{need!r} begins with none of {', '.join(NEEDS)}")
        return needs


class Hypothesis(Strict):
    """What is claimed before the run, and the figure by which it is decided."""

    id: str
    statement: str
    figure: Any
    """A `figures.FigureSpec`."""
    kind: Literal["superiority", "non_inferiority", "equivalence"] = "superiority"
    margin: float | None = Field(None, ge=0, allow_inf_nan=False)
    alpha: float = Field(0.05, gt=0, lt=1)

    @field_validator("figure", mode="before")
    @classmethod
    def _as_figure(cls, figure: Any) -> Any:
        from moonbase.evals.figures import FigureSpec

        if not isinstance(figure, Mapping):
            return figure
        try:
            return FigureSpec(**figure)
        except (TypeError, ValidationError) as error:
            raise ValueError(str(error).splitlines()[-1]) from None

    @field_serializer("figure")
    def _as_values(self, figure: Any) -> Any:
        return dataclasses.asdict(figure) if dataclasses.is_dataclass(figure) else figure

    @model_validator(mode="after")
    def _margin_where_needed(self) -> Hypothesis:
        if self.kind != "superiority" and self.margin is None:
            raise ValueError(f"hypothesis {self.id}: {self.kind} needs a margin")
        return self


class Suite(Strict):
    """A whole evaluation, apart from who is evaluated."""

    schema_: Literal["moonbase.suite/1"] = Field(SCHEMA, alias="schema")
    name: str
    title: str
    about: str = ""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    metric: str
    cluster: str = "item"
    """What makes items depend on one another: `item`, or a field of the items."""
    hypotheses: tuple[Hypothesis, ...] = ()
    smallest_n: int = 30
    judges: tuple[str, ...] = ()
    """Who labels answers: `rules`, and models of Inspect; empty where there is an exact answer."""
    withhold: bool = False
    """Items are hazardous: records hold salted digests, no text; Inspect's logs go to a private folder."""
    groups: dict[str, str] = Field(default_factory=dict)
    """Name of a group of items and what it is."""
    crossed: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @field_validator("crossed", mode="before")
    @classmethod
    def _known_levels(cls, crossed: Any) -> Any:
        found = {}
        if not isinstance(crossed, Mapping | None):
            raise ValueError(f"write FACTOR: [LEVEL, ...] with factors of {', '.join(CROSSED)}")
        for factor, levels in (crossed or {}).items():
            if factor not in CROSSED:
                raise ValueError(f"{factor!r} is none of {', '.join(CROSSED)}")
            # YAML reads on, off, yes and no as truth values.
            levels = [_word(factor, level) for level in (levels if isinstance(levels, list | tuple) else [levels])]
            known = CROSSED[factor]
            for level in levels:
                if level not in known if known else not (level.isdecimal() and int(level) > 0):
                    raise ValueError(f"{factor}: {level!r} is none of {', '.join(known or ['1', '2', '3 …'])}")
            found[factor] = tuple(dict.fromkeys(levels))
        return found

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        for kind, names in (("tasks", [task.name for task in self.tasks]), ("hypotheses",
                                                                            [one.id for one in self.hypotheses])):
            if len(set(names)) != len(names):
                raise ValueError(f"two {kind} have one name")
        return self

    @property
    def samples(self) -> int:
        """How often each item is asked under each condition."""
        return int((*self.crossed.get("samples", ()), "1")[0])

    def levels(self, factor: str, default: str) -> tuple[str, ...]:
        """Of a factor; the default alone where the suite is not crossed by it."""
        return self.crossed.get(factor) or (default,)

    def canonical(self) -> dict[str, Any]:
        """As JSON values, in the published names."""
        values = self.model_dump(by_alias=True, mode="json")
        for task in values["tasks"]:
            # Younger than the format: a suite that has none reads as it always did.
            for name in ("scores", "grades"):
                if not task[name]:
                    del task[name]
        return values


def _word(factor: str, level: Any) -> str:
    if isinstance(level, bool):
        return (("no", "yes") if factor == "reveals_test" else ("off", "on"))[level]
    return str(level)


# Reading


def load_suite(name_or_path: str | Path) -> Suite:
    """One of ours by name, or a YAML file. Raises UserError that names the file, the field and the mend."""
    path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"there is no suite {str(name_or_path)!r}: it is one of {', '.join(suite_names())}, or a "
                        ".yaml file")
    try:
        return _checked(yaml.safe_load(path.read_text(encoding="utf-8")), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({str(error).splitlines()[0]})") from None


def suite_of(folder: Path) -> Suite:
    """The suite that an evaluation was run by. Raises UserError."""
    return _checked(read_plan(folder)["suite"], folder / "suite.json")


def read_plan(folder: Path) -> dict[str, Any]:
    """suite.json of an evaluation: suite, models, seed and what else was settled before it ran. Raises UserError."""
    path = folder / "suite.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: name the folder of an evaluation") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("suite"), dict):
        raise UserError(f"{path}: it holds no suite")
    return plan


def _checked(values: Any, path: Path) -> Suite:
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        # A misspelled field is a missing one, too: the slip is what helps.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = f"no such field{did_you_mean(str(first['loc'][-1]), _fields_at(first['loc']))}"
        elif not where and first["type"] == "model_type":
            said = "a suite is a list of fields and their values (schema, name, title, metric, tasks, ...)"
        raise UserError(f"{path}: {where + ': ' if where else ''}{said}") from None


def _fields_at(place: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that there are beside one."""
    kind = {"tasks": TaskSpec, "hypotheses": Hypothesis}.get(str(place[0]), Suite) if len(place) > 1 else Suite
    return [field.alias or name for name, field in kind.model_fields.items()]


def suite_names() -> list[str]:
    """Of ours, in the alphabet's order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


# What can run here


@dataclasses.dataclass(frozen=True)
class Availability:
    """Whether a part of a suite can run here."""

    suite: str
    title: str
    task: str
    source: str
    offline: bool
    """It needs no network, and everything that it needs is here."""
    missing: tuple[str, ...]
    """What it needs and is not here, a line each."""
    needs: tuple[str, ...]
    metric: str
    about: str


def list_suites(data: Path | None = None) -> list[Availability]:
    """Every part of every suite of ours, and what it lacks. `data`: the folder of local copies of public sets."""
    found = []
    for name in suite_names():
        suite = load_suite(name)
        for task in suite.tasks:
            missing = missing_needs(task, data)
            offline = not missing and not any(
                need == "docker" or (need.startswith("network") and not has_copy(need, data)) for need in task.needs)
            found.append(Availability(name, suite.title, task.name, task.source, offline, missing, task.needs,
                                      task.metric, task.about))
    return found


def has_copy(need: str, data: Path | None) -> bool:
    """Whether the data folder has what `network unless PATH` names."""
    path = need.partition(" unless ")[2]
    return bool(path) and data is not None and (data / path).exists()


def out_of_reach(task: TaskSpec, data: Path | None) -> list[str]:
    """What a task would have to download on a machine without a network; nothing where it has a copy, or there is one.
    """
    wanting = [need for need in task.needs if need.startswith("network") and not has_copy(need, data)]
    if not wanting or is_online():
        return []
    return [" or ".join(["a network", *(f"a copy at {path} in the data folder (--data)" for path in
                                        [need.partition(" unless ")[2] for need in wanting] if path)])]


def is_online() -> bool:
    """Whether public sets can be downloaded; asked of the host that has most of them, where no proxy stands between."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT"):
        return True
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def missing_needs(task: TaskSpec, data: Path | None, roles: Iterable[str] | None = None) -> tuple[str, ...]:
    """What of a task's needs is not here, each with the mend. Whether there is a network is found out by running.

    `roles`: those that a model was named for; None: it is not yet time to ask.
    """
    missing = []
    for need in task.needs:
        kind, _, what = need.partition(" ")
        if kind == "package" and importlib.util.find_spec(what) is None:
            missing.append(f"package {what} (pip install {what.replace('_', '-')})")
        elif kind == "docker" and shutil.which("docker") is None:
            missing.append("docker")
        elif kind == "data" and (data is None or not (data / what).exists()):
            missing.append(f"{what} in the data folder (--data)")
        elif kind == "role" and roles is not None and what not in roles:
            missing.append(f"a model in the role of {what} (--role {what}=MODEL)")
    return tuple(missing)
