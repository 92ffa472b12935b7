"""Which figures a report shows: read off the suite and off what the records hold, in a fixed order.

Per task and model, over all conditions, and for every value of every condition: the main metric, refusals, what was
left out; the main metric by host, where several served the model; then differences over conditions, groups and models;
then judges, costs, repeated tries, and power.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from moonbase.evals.figure_functions import sides_of
from moonbase.evals.figures import FigureSpec, metric_of
from moonbase.evals.records import LABELS
from moonbase.evals.table import Table

if TYPE_CHECKING:
    from moonbase.evals.suite import Hypothesis, Suite

REFUSED = "label:refusal|api_block"
"""The answer, or the interface in its place, declines."""
HARMLESS = ("benign", "safe", "harmless")
"""Groups of requests that ought to be answered: declining them is over-refusal."""
POLITICAL = "china"
"""The group whose mirror images are about other states."""
ORIGINS = ("origin", "source", "set")
"""Conditions that tell a public set from its fresh twin, by the values `public` and `fresh`."""
FIRST_LEVELS = ("en", "off", "no", "public", "default", "base")
"""The level of a condition that others are subtracted from, where there is one."""
MOST_LEVELS = 12
LEAST_JUDGED = 10
"""Answers about which two members spoke, from which on their agreement is worth a number of its own."""
MOST_PAIRS = 28
HELD_AGAINST = ("difference", "contamination", "difference_in_differences", "members", "slope")
"""Functions whose zero means that there is nothing to be found."""


def seed_of(name: str) -> int:
    """Every figure has a seed of its own, told by its id: published, and chosen by nobody."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def spec_of(name: str, function: str, select: dict[str, str], value: str, metric: str,
            versus: dict[str, str] | None = None, **params: Any) -> FigureSpec:
    return FigureSpec(id=name, function=function, select=select, value=value, versus=versus,
                      params={"metric": metric, **params}, seed=seed_of(name))


def cluster_params(suite: Suite | None, table: Table) -> dict[str, str]:
    """What a suite clusters by, where that is not the records' own cluster: the same in every figure and comparison."""
    name = getattr(suite, "cluster", "item")
    column = name if name in table.codes else f"condition.{name}"
    return {"cluster": column} if name not in ("item", "cluster") and column in table.codes else {}


def member_value(value: str, member: str) -> str | None:
    """The same label counted on the votes of one member of the panel; None where the value is no label."""
    wanted = {"score:complied": "full", "score:refused": REFUSED.removeprefix("label:")}.get(value)
    if value.startswith("label:"):
        wanted = value.removeprefix("label:")
    return f"vote:{member}={wanted}" if wanted else None


def by_members(spec: FigureSpec, table: Table) -> Iterator[FigureSpec]:
    """A figure of the panel's labels once more for each member, where more than one of them spoke about its rows: both
    sides, and those of the controls that its parameters name."""
    rows = np.unique(np.concatenate([table.rows(side) for side in sides_of(spec)]))
    if member_value(spec.value, "") is None or len(table.members(rows, spoke=True)) < 2:
        return
    for member in table.members(rows):
        name = f"{spec.id} by {member}"
        params = spec.params | {"metric": f"{spec.params.get('metric') or metric_of(spec)}, by {member}",
                                "member": member, "panel": spec.id}
        yield FigureSpec(name, spec.function, spec.select, str(member_value(spec.value, member)), spec.versus, params,
                         seed_of(name))


def value_of(metric: str, table: Table, rows: np.ndarray) -> str | None:
    """The `value` that a suite's metric names, if these rows could have it."""
    scores = [name for name in sorted(table.numbers) if name.startswith("score:")
              and np.isfinite(table.numbers[name][rows]).any()]
    labelled = bool((table.codes["label"][rows] >= 0).any())
    if metric.startswith(("score:", "label:", "vote:")):
        return metric
    if f"score:{metric}" in scores:
        return f"score:{metric}"
    if labelled:
        if "refus" in metric:
            return REFUSED
        return f"label:{metric}" if metric in LABELS else scores[0] if scores else "label:full"
    return scores[0] if scores else f"score:{metric}" if f"score:{metric}" in table.numbers else None


def levels_of(table: Table, rows: np.ndarray) -> dict[str, list[str]]:
    """Conditions of these rows that take several values, and `group`; the level to subtract from comes first."""
    found = {}
    for name in [*table.conditions, "group"]:
        levels = table.present(name, rows)
        if 2 <= len(levels) <= MOST_LEVELS:
            found[name] = sorted(levels, key=lambda level: (level not in FIRST_LEVELS, level))
    return found


def shares_items(table: Table, rows: np.ndarray, name: str, one: str, other: str, column: str = "item") -> bool:
    items = [np.unique(table.codes[column][rows[table.codes[name][rows] == table.words[name].index(level)]])
             for level in (one, other)]
    return bool(len(np.intersect1d(*items)))


class Plan:
    """The figures of one task and one model."""

    def __init__(self, suite: Suite | None, table: Table, task: str, model: str) -> None:
        self.suite, self.table, self.task, self.model = suite, table, task, model
        self.base = {"task": task, "model": model}
        self.rows = table.rows(self.base)
        self.levels = levels_of(table, self.rows)
        self.value, self.metric = main_metric(suite, table, task, self.rows)
        self.labelled = bool((table.codes["label"][self.rows] >= 0).any())
        self.params = cluster_params(suite, table)

    def spec(self, function: str, value: str, metric: str, where: dict[str, str] | None = None,
             versus: dict[str, str] | None = None, tail: str = "", **params: Any) -> FigureSpec:
        where = where or {}
        cell = [f"{name.removeprefix('condition.')}={level}" for name, level in where.items()]
        name = "/".join([self.task, self.model, *cell, tail or metric])
        return spec_of(name, function, self.base | where, value, metric, versus, **self.params, **params)

    def cells(self) -> Iterator[dict[str, str]]:
        """All rows; every level of every condition; every level within both languages. No set of rows twice."""
        seen = set()
        for where in self.all_cells():
            rows = self.table.rows(self.base | where)
            # Digests of the sets: the sets themselves would take more memory than the table.
            name = hashlib.sha256(rows.tobytes()).digest()
            if len(rows) and name not in seen:
                seen.add(name)
                yield where

    def all_cells(self) -> Iterator[dict[str, str]]:
        yield {}
        for name, levels in self.levels.items():
            yield from ({name: level} for level in levels)
        language = "condition.language"
        for name, levels in self.levels.items():
            if language in self.levels and name != language:
                yield from ({name: level, language: spoken} for level in levels for spoken in self.levels[language])

    def rates(self) -> Iterator[FigureSpec]:
        for where in self.cells():
            rows = self.table.rows(self.base | where)
            if self.value:
                groups = self.table.present("group", rows)
                mixed = 0 < len(set(groups) & set(HARMLESS)) < len(groups)
                if not (mixed and "refus" in self.value):
                    plain = self.spec("mean", self.value, self.metric, where)
                    yield plain
                    if self.spoken_of(where):
                        yield from by_members(plain, self.table)
                yield self.spec("missing", self.value, "left_out", where)
            if self.labelled:
                yield from self.refusals(where, rows)

    def by_host(self) -> Iterator[FigureSpec]:
        """The main metric of every host, over all and in each language, where two or more served the model.

        Means only: nobody assigned items to hosts, so a difference between two of them is not theirs alone.
        """
        if not self.value or "condition.provider" in self.levels:
            return
        spoken = self.levels.get("condition.language", [])
        for where in [{}, *({"condition.language": language} for language in spoken)]:
            rows = self.table.rows(self.base | where)
            sizes = {host: len(self.table.rows(self.base | where | {"provider": host}))
                     for host in self.table.present("provider", rows) if host}
            if len(sizes) < 2:
                continue
            most = sorted(sizes, key=lambda host: (-sizes[host], host))[:MOST_LEVELS]
            for host in sorted(most):
                cell = where | {"provider": host}
                groups = self.table.present("group", self.table.rows(self.base | cell))
                if "refus" in self.value and 0 < len(set(groups) & set(HARMLESS)) < len(groups):
                    yield from self.refusals(cell, self.table.rows(self.base | cell))
                else:
                    yield self.spec("mean", self.value, self.metric, cell)

    def spoken_of(self, where: dict[str, str]) -> bool:
        """Cells in which the members of the panel stand beside it: all, a language, a group in a language."""
        split = [name for name in ("condition.language", "group") if name in self.levels]
        return not where or set(where) in (set(split), {"condition.language"})

    def refusals(self, where: dict[str, str], rows: np.ndarray) -> Iterator[FigureSpec]:
        """Refusals of harmless requests are over-refusals; of all others, refusals. Never of both together."""
        groups = self.table.present("group", rows)
        harmless = [group for group in groups if group in HARMLESS]
        by_name = not groups and "over" in self.task and "refus" in self.task
        parts = [("over_refusal", harmless), ("refusal", [group for group in groups if group not in HARMLESS])]
        if not groups:
            parts = [("over_refusal" if by_name else "refusal", [])]
        for metric, members in parts:
            if members or not groups:
                within = dict(where)
                if groups and len(members) < len(groups):
                    within["group"] = "|".join(members)
                if (metric, REFUSED) != (self.metric, self.value) or within != where:
                    plain = self.spec("mean", REFUSED, metric, within, tail=f"{metric} rate")
                    yield plain
                    if not where:
                        yield from by_members(plain, self.table)
                counts = calibration_of(self.suite, within, self.table, rows)
                if counts:
                    yield self.spec("corrected_rate", REFUSED, f"{metric}_corrected", within, **counts)

    def differences(self) -> Iterator[FigureSpec]:
        """Over every condition whose levels share items; over languages within every group; against China's group."""
        if not self.value:
            return
        for name, levels in self.levels.items():
            if name == "group":
                continue
            for level in levels[1:]:
                for pair in ("item", "cluster"):
                    if shares_items(self.table, self.rows, name, levels[0], level, pair):
                        yield from self.over(name, levels[0], level, {} if pair == "item" else {"pair": pair})
                        break
        yield from self.between_groups()

    def over(self, name: str, one: str, other: str, pair: dict[str, str]) -> Iterator[FigureSpec]:
        """`pair`: how twins find each other where their items have ids of their own."""
        short, kind = name.removeprefix("condition."), "difference"
        if {one, other} == {"public", "fresh"} and short in ORIGINS:
            kind = "contamination"
        tail = f"{self.metric} {one} minus {other}"
        yield self.spec(kind, self.value, self.metric if kind == "difference" else "contamination", {name: one},
                        {name: other}, tail, **pair)
        yield self.spec("power", self.value, f"{self.metric} power", {name: one}, {name: other}, f"{tail}, power",
                        **pair)
        groups = self.levels.get("group", []) if name == "condition.language" else []
        present = [group for group in groups if all(
            len(self.table.rows(self.base | {"group": group, name: level})) for level in (one, other))]
        for group in present:
            plain = self.spec("difference", self.value, self.metric, {name: one, "group": group}, {name: other}, tail,
                              **pair)
            yield plain
            yield from by_members(plain, self.table)
        for treated, control, called in contrasts(present):
            yield self.spec("difference_in_differences", self.value, f"{self.metric} difference_in_differences",
                            {name: one, "group": treated}, {name: other}, f"{tail}, against {called}",
                            control={"group": control}, **pair)

    def between_groups(self) -> Iterator[FigureSpec]:
        groups = self.levels.get("group", [])
        spoken = self.levels.get("condition.language") or [""]
        for treated, control, called in contrasts(groups):
            for language in spoken:
                where = {"group": treated} | ({"condition.language": language} if language else {})
                sides = [self.table.rows(self.base | where | {"group": group}) for group in (treated, control)]
                if all(map(len, sides)):
                    # Mirror images share a cluster and are paired by it, as the suites' hypotheses are.
                    shared = np.intersect1d(*(self.table.codes["cluster"][rows] for rows in sides))
                    yield self.spec("difference", self.value, self.metric, where, {"group": control},
                                    f"{self.metric} against {called}", pair="cluster" if len(shared) else "none")

    def extras(self) -> Iterator[FigureSpec]:
        """Whole task only: bootstrap, judges, money, repeated tries, design effect, power against another model."""
        table, rows = self.table, self.rows
        if self.value:
            yield self.spec("bootstrap", self.value, f"{self.metric} bootstrap")
            yield self.spec("power", self.value, f"{self.metric} power")
            if len(np.unique(table.codes["cluster"][rows])) < len(rows):
                yield self.spec("design_effect", self.value, f"{self.metric} design_effect")
            if np.isfinite(table.numbers["cost"][rows]).any():
                yield self.spec("cost_per_correct", self.value, "cost_per_correct")
            tries = int(table.numbers["sample"][rows].max()) + 1
            for k in sorted({k for k in (1, 2, 4, 8, 16, 32) if k <= tries} | {tries}) if tries > 1 else ():
                yield self.spec("pass_at_k", self.value, f"{self.metric} pass@{k}", k=k)
                yield self.spec("pass_hat_k", self.value, f"{self.metric} pass^{k}", k=k)
        yield from self.agreements()

    def agreements(self) -> Iterator[FigureSpec]:
        """Of the whole task and of each language, on all labels; of each group in each language on the label that
        rates rest on, and who of two leans where: over all groups a systematic difference hides."""
        judges = self.table.members(self.rows, spoke=True)
        if len(judges) < 2:
            return
        spoken = self.levels.get("condition.language", [])
        for where in [{}, *({"condition.language": language} for language in spoken)]:
            yield self.spec("agreement", "", "krippendorff_alpha", where, kind="krippendorff_alpha", judges=judges)
            yield self.spec("agreement", "", "raw_agreement", where, kind="raw", judges=judges)
            for pair in combinations(judges, 2):
                yield self.spec("agreement", "", f"cohen_kappa {pair[0]}, {pair[1]}", where, kind="cohen_kappa",
                                judges=list(pair))
                yield from self.leaning(where, pair)
        for group in self.levels.get("group", []):
            for language in spoken or [""]:
                where = {"group": group} | ({"condition.language": language} if language else {})
                for pair in combinations(judges, 2):
                    if self.judged_by(where, pair) >= LEAST_JUDGED:
                        yield from self.leaning(where, pair, kappa=True)

    def leaning(self, where: dict[str, str], pair: tuple[str, str], kappa: bool = False) -> Iterator[FigureSpec]:
        values = [member_value(self.value or "", member) for member in pair]
        if values[0] is None:
            return
        if kappa:
            yield self.spec("agreement", "", f"cohen_kappa {pair[0]}, {pair[1]}", where, kind="cohen_kappa",
                            judges=list(pair), collapse=values[0].rpartition("=")[2])
        yield self.spec("members", values[0], f"{self.metric} members", where,
                        tail=f"{self.metric}, {pair[0]} less {pair[1]}", against=values[1], judges=list(pair))

    def judged_by(self, where: dict[str, str], pair: tuple[str, str]) -> int:
        rows = self.table.rows(self.base | where)
        return int(np.logical_and(*(self.table.codes[f"vote.{member}"][rows] >= 0 for member in pair)).sum())


def contrasts(groups: list[str]) -> list[tuple[str, str, str]]:
    """(treated, control, what the control is called): China against mirrored states and against harmless twins."""
    if POLITICAL not in groups:
        return []
    mirrored = [group for group in groups if group != POLITICAL and group not in HARMLESS]
    harmless = [group for group in groups if group in HARMLESS]
    controls = (mirrored, "mirrored"), (harmless, "benign")
    found = [(POLITICAL, "|".join(members), called) for members, called in controls if members]
    return found + [(POLITICAL, group, group) for group in mirrored if len(mirrored) > 1]


def main_metric(suite: Suite | None, table: Table, task: str, rows: np.ndarray) -> tuple[str | None, str]:
    """(value, name) of a task's metric: the task's own, else the suite's, else the first score that there is."""
    names = [one.metric for one in getattr(suite, "tasks", ()) if one.name == task]
    names += [suite.metric] if suite is not None else []
    for name in [*names, "accuracy"]:
        value = value_of(name, table, rows)
        if value:
            shown = name.rpartition(":")[2] if value.rpartition(":")[2] == name.rpartition(":")[2] or (
                value == REFUSED) else value.rpartition(":")[2]
            return value, shown
    return None, "accuracy"


def calibration_of(suite: Suite | None, where: dict[str, str], table: Table, rows: np.ndarray) -> dict[str, int] | None:
    """The panel's errors on human labels, where they were measured in the one language of these rows.

    They are of requests that are or look harmful; questions about states are answered, and evaded, in other words.
    """
    if POLITICAL in table.present("group", table.rows({"task": table.word("task", int(rows[0])) or ""})):
        return None
    languages = table.present("condition.language", rows) or ["en"]
    try:
        from moonbase.evals.refusal.calibration import published_counts
    except ImportError:
        return None
    judges = tuple(getattr(suite, "judges", ())) or ("rules",)
    return published_counts(languages[0], judges) if len(languages) == 1 else None


def between_models(suite: Suite | None, table: Table, task: str) -> Iterator[FigureSpec]:
    rows = table.rows({"task": task})
    value, metric = main_metric(suite, table, task, rows)
    models = table.present("model", rows)
    if value is None or len(models) * (len(models) - 1) // 2 > MOST_PAIRS:
        return
    for one, other in combinations(models, 2):
        name = f"{task}/{one} minus {other}/{metric}"
        sides, params = {"task": task, "model": one}, cluster_params(suite, table)
        yield spec_of(name, "difference", sides, value, metric, {"model": other}, **params)
        yield spec_of(f"{name}, power", "power", sides, value, f"{metric} power", {"model": other}, **params)


def models_of(table: Table) -> list[str]:
    """In the order in which they were asked: who of two comes first is part of a hypothesis about both."""
    if "model" not in table.codes:  # no records
        return []
    order = np.sort(np.unique(table.codes["model"], return_index=True)[1])
    return [str(table.word("model", int(row))) for row in order]


def by_itself(figure: FigureSpec) -> bool:
    """A rate, a mean or a cost held against nothing: it decides nothing until another model's stands beside it."""
    return figure.function not in HELD_AGAINST and "reference" not in figure.params


def between(figure: FigureSpec, first: str, second: str, more: dict[str, str]) -> FigureSpec | None:
    """A hypothesis' figure as a difference, first model minus second; None where it cannot be made one.

    `more`: parameters that the figure has unless it says otherwise.
    """
    name, params = f"{figure.id}/{first} minus {second}", more | figure.params
    select, seed = figure.select | {"model": first}, seed_of(f"{figure.id}/{first} minus {second}")
    if figure.versus is None and figure.function in ("mean", "corrected_rate", "bootstrap"):
        return FigureSpec(name, "difference", select, figure.value, {"model": second}, params, seed)
    if figure.versus and "model" not in figure.versus and figure.function in ("difference", "contamination"):
        mine = {name: value for name, value in params.items() if name not in ("second", "second_control")}
        return FigureSpec(name, "difference_in_differences", select, figure.value, figure.versus,
                          mine | {"control": {"model": second}}, seed)
    return None


def hypothesis_specs(suite: Suite | None, table: Table) -> Iterator[tuple[Hypothesis, FigureSpec]]:
    """The figure that decides each pre-registered hypothesis: for every model where it names none; for every two of
    them, in the order in which they were named, where one alone decides nothing."""
    models, more = models_of(table), cluster_params(suite, table)
    pairs = list(combinations(models, 2))
    for hypothesis in getattr(suite, "hypotheses", ()):
        figure = hypothesis.figure
        named = "model" in figure.select or "model" in (figure.versus or {})
        if by_itself(figure) and not named and len(pairs) <= MOST_PAIRS:
            own = replace(figure, id=f"hypothesis/{hypothesis.id}")
            specs = [spec for pair in pairs if (spec := between(own, *pair, more)) is not None]
            if specs:
                yield from ((hypothesis, spec) for spec in specs)
                continue
        for model in [""] if named else sorted(models):
            name = "/".join(filter(None, ["hypothesis", hypothesis.id, model]))
            select = figure.select | ({"model": model} if model else {})
            yield hypothesis, FigureSpec(name, figure.function, select, figure.value, figure.versus,
                                         more | figure.params, figure.seed or seed_of(name))


def of_hypotheses(suite: Suite | None, table: Table) -> Iterator[FigureSpec]:
    """These figures, and the same by each member of the panel: a verdict is of the panel's alone."""
    for _, spec in hypothesis_specs(suite, table):
        yield spec
        if spec.function in ("mean", "difference", "difference_in_differences"):
            yield from by_members(spec, table)


def specs_of(suite: Suite | None, table: Table) -> list[FigureSpec]:
    """Every figure of a report; ids differ."""
    found = list(of_hypotheses(suite, table))
    for task in table.present("task"):
        for model in table.present("model", table.rows({"task": task})):
            plan = Plan(suite, table, task, model)
            for part in (plan.rates, plan.by_host, plan.differences, plan.extras):
                found += part()
        found += between_models(suite, table, task)
    # Two ways to the same cell name it alike: the first stays.
    return list({spec.id: spec for spec in reversed(found)}.values())[::-1]
