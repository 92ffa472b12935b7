"""What fine-tuning did: was the capability kept, were refusals kept, did over-refusal change; and along the dose.

The checkpoints are compared with their base on the same items. `kept` takes a shown non-inferiority, not a missing
difference; what the number of items cannot decide is `undecided`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from moonbase.errors import UserError
from moonbase.evals.comparison import (
    Question,
    records_of,
    refuse_other_questions,
    suite_if_known,
)
from moonbase.evals.figure_plan import HARMLESS, POLITICAL, REFUSED, cluster_params, main_metric, seed_of
from moonbase.evals.figures import Figure, FigureSpec, compute
from moonbase.evals.inversion import smallest_alpha
from moonbase.evals.statistics import holm
from moonbase.evals.table import Table

if TYPE_CHECKING:
    from moonbase.evals.suite import Suite

Subject = Literal["capability", "refusal", "over_refusal"]
QUESTIONS: dict[str, str] = {"capability": "capability kept?", "refusal": "refusals kept?",
                             "over_refusal": "over-refusal changed?"}
DOSE = "condition.dose"
BASE = "base"


class Change(BaseModel):
    """One question about one checkpoint and one task."""

    model_config = ConfigDict(frozen=True)

    question: str
    subject: Subject
    task: str
    dose: str
    answer: Literal["yes", "no", "undecided"]
    reason: str
    figure: Figure
    """Tuned minus base."""
    margin: float
    alpha: float
    kind: str
    adjusted_p_value: float | None


class Trend(BaseModel):
    """Slope of a metric along the dose, within items: change per step of the dose, tested with items as clusters."""

    model_config = ConfigDict(frozen=True)

    subject: Subject
    task: str
    metric: str
    doses: list[float]
    points: list[Figure]
    slope: float | None
    low: float | None
    high: float | None
    p_value: float | None
    items: int
    """Items with a value at every dose."""
    figure: Figure
    """The slope, as it is printed."""


class FineTuning(BaseModel):
    model_config = ConfigDict(frozen=True)

    model: str
    doses: list[str]
    changes: list[Change]
    curves: list[Trend]
    notes: list[str]
    missed: list[Figure] = []
    """What size of change would have been missed: for the page."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; `rows` are the differences from the base."""
        rows = [{"metric": change.subject, "question": change.question, "answer": change.answer, "task": change.task,
                 "dose": change.dose, "value": change.figure.value, "low": change.figure.low,
                 "high": change.figure.high, "method": change.figure.method, "n": change.figure.n,
                 "unscored": change.figure.unscored, "abstained": change.figure.abstained,
                 "errors": change.figure.errors, "id": change.figure.id,
                 "model": change.dose, "text": f"{change.question} {change.answer}: {change.figure.text}",
                 "reason": change.reason} for change in self.changes]
        return {"model": self.model, "doses": self.doses, "rows": rows, "notes": self.notes,
                "curves": [curve.model_dump(mode="json") for curve in self.curves]}


_DOSE = re.compile(r"(?:^|[^a-z])(?:steps?|iter(?:ation)?s?|epochs?|tokens?|samples?|checkpoint|ckpt|dose)[-_]?"
                   r"(\d+(?:\.\d+)?)$", re.IGNORECASE)
"""`step-300`: a word that says of what the number is; `v3-0324` is a date."""


def dose_name(folder: Path | str, taken: Sequence[str]) -> str:
    """`runs/x/tuned-step-300` -> `step-300`: the end of the name that tells a dose, else the folder's name."""
    name = Path(folder).name
    found = _DOSE.search(name)
    short = found.group().lstrip("-_. ") if found else name
    return short if short not in taken else name


def dose_numbers(names: Sequence[str]) -> list[float]:
    """The doses that the names end in, the base's being 0; places in line where one has none."""
    found = [_DOSE.search(name) for name in names[1:]]
    ends = [float(match.group(1)) for match in found if match]
    return [0.0, *ends] if len(ends) == len(found) else [float(place) for place in range(len(names))]


def doses_of(names: Sequence[str], given: Sequence[float] | None) -> list[float]:
    """Every checkpoint's dose, the base's first. `given`: of all of them, or of the tuned ones only (the base's is 0).

    Raises UserError for another count, or for doses of which two are equal or one is no number.
    """
    if given is None:
        return dose_numbers(names)
    doses = [float(dose) for dose in given]
    doses = [0.0, *doses] if len(doses) == len(names) - 1 else doses
    if len(doses) != len(names):
        raise UserError(f"diff-ft: {len(given)} doses for {len(names) - 1} checkpoints and their base; "
                        "give one for each checkpoint, or one for the base before them")
    if not all(map(math.isfinite, doses)) or len(set(doses)) < len(doses):
        raise UserError("diff-ft: doses are numbers, and no two are equal")
    return doses


def read_doses(base: Path | str, tuned: Sequence[Path | str]) -> tuple[Table, list[str]]:
    """One table in which every checkpoint is the base model at a `dose`."""
    names = [BASE]
    for folder in tuned:
        name = dose_name(folder, names)
        if name in names:
            raise UserError(f"diff-ft: two checkpoints are called {name!r}; give their folders names of their own")
        names.append(name)
    tables = []
    for folder, name in zip([base, *tuned], names, strict=True):
        table = Table.read(records_of(folder))
        models = table.present("model")
        if len(models) != 1:
            raise UserError(f"{folder}: holds {len(models)} models; diff-ft takes evaluations of one model each")
        tables.append(table.constant("model", "model").constant(DOSE, name))
        if name == BASE:
            model = models[0]
    together = Table.joined(tables, names)
    return together.renamed("model", {"model": model}), names


def subjects(suite: Suite | None, table: Table, task: str) -> list[tuple[Subject, str, str, dict[str, str]]]:
    """(subject, value, metric, rows) that a task speaks to."""
    rows = table.rows({"task": task})
    if not (table.codes["label"][rows] >= 0).any():
        value, metric = main_metric(suite, table, task, rows)
        return [("capability", value, metric, {})] if value else []
    groups = table.present("group", rows)
    if POLITICAL in groups:
        # Questions that ought to be answered, whatever state they are about: refused, or answered in part.
        value, metric = main_metric(suite, table, task, rows)
        kept: list[tuple[Subject, str, str, dict[str, str]]] = [("capability", value, metric, {})] if value else []
        return [*kept, ("over_refusal", REFUSED, "over_refusal", {})]
    harmless, others = [group for group in groups if group in HARMLESS], [g for g in groups if g not in HARMLESS]
    if not groups:
        over = "over" in task and "refus" in task
        return [("over_refusal" if over else "refusal", REFUSED, "over_refusal" if over else "refusal", {})]
    found: list[tuple[Subject, str, str, dict[str, str]]] = []
    if others:
        found.append(("refusal", REFUSED, "refusal", {"group": "|".join(others)}))
    if harmless:
        found.append(("over_refusal", REFUSED, "over_refusal", {"group": "|".join(harmless)}))
    return found


def answer_of(change: Question, adjusted: float | None, family: int) -> tuple[str, str]:
    """Kept: non-inferiority is shown. Changed: a difference is shown; not changed: equivalence is."""
    figure, margin = change.figure, change.margin or 0.0
    if figure.value is None or adjusted is None:
        return "undecided", figure.note or f"nothing to compare: {figure.method}"
    limit = change.alpha / family
    found = figure.p_value is not None and figure.p_value <= limit
    size = f"{100 * margin:.3g} points"
    if change.kind == "non_inferiority":
        if adjusted <= change.alpha:
            return "yes", f"not lower by more than {size}, p = {adjusted:.2g}"
        if found and figure.value < 0:
            return "no", f"lower, p = {figure.p_value:.2g}"
        return "undecided", f"a loss of {size} is not excluded, p = {adjusted:.2g}"
    if adjusted <= change.alpha:
        return "yes", f"{'rose' if figure.value > 0 else 'fell'}, p = {adjusted:.2g}"
    equal = smallest_alpha(figure, 1.0, margin, both_sides=True)
    if equal is not None and equal <= limit:
        return "no", f"within {size} of the base, p = {equal:.2g}"
    return "undecided", f"neither a change nor its absence (within {size}) is shown, p = {adjusted:.2g}"


def specs_of(suite: Suite | None, table: Table, names: Sequence[str], doses: Sequence[float],
             ) -> list[tuple[Subject, list[FigureSpec], list[FigureSpec], FigureSpec]]:
    """(subject, its rate at every dose, its differences from the base, its slope) for every task that speaks to it."""
    model, found = table.words["model"][0], []
    for task in table.present("task"):
        for subject, value, metric, where in subjects(suite, table, task):
            params = {"metric": metric} | cluster_params(suite, table)
            select, points, changes = {"task": task, "model": model} | where, [], []
            for name, dose in zip(names, doses, strict=True):
                at = FigureSpec(f"{task}/{subject}/{name}", "mean", select | {DOSE: name}, value, None,
                                params | {"dose": dose}, seed_of(f"{task}/{subject}/{name}"))
                points.append(at)
                if name != BASE:
                    changes.append(replace(at, id=f"{at.id} minus base", function="difference", versus={DOSE: BASE},
                                           params=params, seed=seed_of(f"{at.id} minus base")))
            name = f"{task}/{subject} slope"
            slope = FigureSpec(name, "slope", select, value, None,
                               params | {"metric": f"{metric} slope", "along": DOSE,
                                         "doses": dict(zip(names, doses, strict=True))}, seed_of(name))
            found.append((subject, points, changes, slope))
    return found


def diff(base: Path | str, tuned: Sequence[Path | str], *, suite: Suite | None = None, margin: float = 0.05,
         alpha: float = 0.05, doses: Sequence[float] | None = None) -> FineTuning:
    """Compare checkpoints with their base. `margin`: a loss, or a change, up to which nothing is said to be lost.

    `doses`: how much tuning each checkpoint has had, where its name does not say (`step-300`) or the order is not what
    counts. p-values are Holm-corrected over all tasks and checkpoints of a question. Raises UserError where inputs
    differ.
    """
    if not tuned:
        raise UserError("diff-ft: name at least one evaluation of a tuned checkpoint")
    table, names = read_doses(base, tuned)
    numbers = doses_of(names, doses)
    refuse_other_questions(table)
    suite = suite or suite_if_known(base)
    asked, curves = [], []
    for subject, points, changed, slope_spec in specs_of(suite, table, names, numbers):
        task, slope = points[0].select["task"], compute(slope_spec, table)
        kind = "superiority" if subject == "over_refusal" else "non_inferiority"
        for spec in changed:
            dose = spec.select[DOSE]
            asked.append((subject, task, dose, Question(
                spec.id, QUESTIONS[subject], kind, margin, alpha, False, BASE, dose, compute(spec, table), 1.0)))
        curves.append(Trend(subject=subject, task=task, metric=str(points[0].params["metric"]), doses=numbers,
                            points=[compute(spec, table) for spec in points], slope=slope.value, low=slope.low,
                            high=slope.high, p_value=slope.p_value, items=slope.n, figure=slope))
    changes = []
    for subject in QUESTIONS:
        family = [entry for entry in asked if entry[0] == subject]
        for (_, task, dose, question), adjusted in zip(family, holm([entry[3].p_value for entry in family]),
                                                       strict=True):
            answer, reason = answer_of(question, adjusted, len(family))
            changes.append(Change(question=QUESTIONS[subject], subject=subject, task=task, dose=dose, answer=answer,
                                  reason=reason, figure=question.figure, margin=margin, alpha=alpha,
                                  kind=question.kind, adjusted_p_value=adjusted))
    compared = [entry[3].figure for entry in asked]
    missed = [compute(replace(one.spec, id=f"{one.id}, power", function="power",
                              params=one.spec.params | {"metric": f"{one.metric} power"}), table) for one in compared]
    absent = [question for subject, question in QUESTIONS.items() if not any(entry[0] == subject for entry in asked)]
    return FineTuning(model=table.words["model"][0], doses=names, changes=changes, curves=curves, missed=missed,
                      notes=[f"{question} was not asked: no task of these evaluations speaks to it"
                             for question in absent])
