"""Two or more models on the same items: aligned, refused where the questions differ, and a verdict per hypothesis.

A verdict is of the model named first against the one named second, as the hypotheses of suites are worded. Its
p-values are corrected for the number of verdicts (Holm); a difference that was not found is `undecided` unless a
margin was set beforehand and equivalence was shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moonbase.errors import UserError
from moonbase.evals.figure_plan import (
    HARMLESS,
    POLITICAL,
    REFUSED,
    between,
    by_itself,
    cluster_params,
    hypothesis_specs,
    main_metric,
    models_of,
    seed_of,
)
from moonbase.evals.figures import Figure, FigureSpec, compute
from moonbase.evals.inversion import Interval, against_reference, interval_at, smallest_alpha
from moonbase.evals.statistics import holm, n_needed, power
from moonbase.evals.table import Table

if TYPE_CHECKING:
    from moonbase.evals.suite import Hypothesis, Suite

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Bearing = Literal["supported", "contradicted", "undecided", ""]
NAMED = 5
"""Items that a refusal names."""
NARROWEST = 2e-4
"""Confidence below which no interval is asked for."""
NOT_THE_QUESTION = ("condition.provider", "condition.thinking", "condition.dose")
"""Conditions that do not change what is asked: under all of them an item has one input digest."""


class Judged(BaseModel):
    """One hypothesis about one pair of models (or one model), decided."""

    model_config = ConfigDict(frozen=True)

    id: str
    statement: str
    kind: str
    margin: float | None
    alpha: float
    pre_registered: bool
    first: str = ""
    second: str = ""
    """The verdict is of `first` against `second`; `second` is empty for a hypothesis about one model."""
    figure: Figure
    p_value: float | None
    adjusted_p_value: float | None
    """By Holm over all verdicts of the comparison."""
    verdict: Verdict
    reason: str
    statement_is: Bearing = ""
    """What the verdict says of the statement: `worse` supports one that claims a fall. Empty: the statement is about
    one model by itself, and the verdict compares its effect in two."""
    power: float | None = None
    """To find a difference of the margin (5 points where there is none) with these items, before correction."""
    n_needed: int | None = None
    """Items with which that power would be 80%."""
    text: str = ""
    """The verdict in one line."""


class Comparison(BaseModel):
    model_config = ConfigDict(frozen=True)

    models: list[str]
    rows: list[Figure]
    """Model named earlier minus model named later, for every pair and task."""
    verdicts: list[Judged]
    notes: list[str]
    figures: list[Figure] = []
    """Both sides of every row, and what differences would have been missed: for the page."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = [{"metric": row.metric, "value": row.value, "low": row.low, "high": row.high, "n": row.n,
                 "p_value": row.p_value, "method": row.method, "unscored": row.unscored, "abstained": row.abstained,
                 "errors": row.errors, "model": row.model, "versus": row.versus.get("model", ""),
                 "condition": row.condition, "id": row.id, "text": row.text} for row in self.rows]
        return {"models": self.models, "rows": rows, "notes": self.notes,
                "verdicts": [verdict.model_dump(mode="json") for verdict in self.verdicts]}


# Reading and aligning


def records_of(folder: Path | str) -> Path:
    path = Path(folder)
    return path / "records.jsonl" if path.is_dir() else path


def suite_if_known(folder: Path | str) -> Suite | None:
    from moonbase.evals.suite import suite_of

    return suite_of(Path(folder)) if (Path(folder) / "suite.json").is_file() else None


def read_together(folders: Sequence[Path | str]) -> Table:
    """One table of all folders; a model that several folders have is called `MODEL (FOLDER)` in each."""
    tables = [Table.read(records_of(folder)) for folder in folders]
    names = [Path(folder).name or str(folder) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"compare: {next(name for name in names if names.count(name) > 1)} is named twice")
    models = [table.present("model") for table in tables]
    shared = {model for place, found in enumerate(models) for model in found
              if any(model in other for other in models[:place] + models[place + 1 :])}
    renamed = [table.renamed("model", {model: f"{model} ({name})" for model in shared}) if table.size else table
               for table, name in zip(tables, names, strict=True)]
    return Table.joined(renamed, names)


def refuse_other_questions(table: Table) -> None:
    """Raises UserError where one item's input differs between rows that should have asked the same."""
    names = ["task", "item", *(name for name in table.conditions if name not in NOT_THE_QUESTION)]
    keys = table.combined(names, numbers=["sample"])
    order = np.lexsort((table.codes["input_digest"], keys))
    same_key = keys[order][1:] == keys[order][:-1]
    other = same_key & (table.codes["input_digest"][order][1:] != table.codes["input_digest"][order][:-1])
    if not other.any():
        return
    rows = order[1:][other]
    items = list(dict.fromkeys(f"{table.word('task', row)}/{table.word('item', row)}" for row in sorted(rows)))
    salted = any(word.startswith("hmac-") for word in table.present("input_digest", rows))
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    hint = "; each was run with a salt of its own (--salt-from takes the other's)" if salted else ""
    raise UserError(f"not the same questions (input digests differ): {', '.join(items[:NAMED])}{more}{hint}. "
                    "Run both with the same suite, seed and data")


# Deciding


@dataclass(frozen=True)
class Question:
    """A hypothesis made ready: what to compute, and which sign is good."""

    id: str
    statement: str
    kind: str
    margin: float | None
    alpha: float
    pre_registered: bool
    first: str
    second: str
    figure: Figure
    sign: float
    expects: str = "better"
    """What the statement claims: `better`, `worse`, `different`; "" where it does not speak of this comparison."""
    interval: Interval | None = None
    """Where the figure does not tell by itself what its interval is at another confidence."""
    by_itself: bool = False
    """A rate of one model, which nothing is held against: it is reported, and decides nothing."""

    @property
    def p_value(self) -> float | None:
        if self.by_itself:
            return None
        if self.kind == "superiority":
            return self.figure.p_value
        if self.margin is None or self.figure.value is None:
            return None
        return smallest_alpha(self.figure, self.sign, self.margin, self.kind == "equivalence", self.interval)


BY_ITSELF = "one model by itself; moonbase compare A B holds it against another"


def points(value: float) -> str:
    return f"{100 * value:.3g} points"


def counted(figure: Figure) -> str:
    """`49 pairs are`: of what a figure's n is a number."""
    if figure.versus:
        unit = "answer" if "different items" in figure.method or figure.spec.params.get("pair") == "none" else "pair"
    else:
        unit = "item" if figure.function in ("pass_at_k", "pass_hat_k", "slope") else "answer"
    return f"{figure.n} {unit}{' is' if figure.n == 1 else 's are'}"


def decide(question: Question, adjusted: float | None, family: int, smallest_n: int = 0) -> tuple[Verdict, str]:
    """(verdict, reason in words). `family`: number of verdicts; what Holm does not cover is held to α / family."""
    figure, margin, alpha = question.figure, question.margin, question.alpha
    if figure.value is None:
        return "undecided", f"no value: {figure.note or 'nothing to compare'}"
    if question.by_itself:
        return "undecided", BY_ITSELF
    if figure.n < smallest_n:
        return "undecided", f"{counted(figure)} fewer than the {smallest_n} that the suite asks for"
    if adjusted is None:
        return "undecided", f"no test: {figure.method}"
    good = question.sign * figure.value
    found = figure.p_value is not None and figure.p_value * family <= alpha
    if question.kind == "superiority":
        if adjusted <= alpha:
            return ("better" if good > 0 else "worse"), f"p = {adjusted:.2g} after correction"
        if margin is not None:
            equal = smallest_alpha(figure, question.sign, margin, True, question.interval)
            if equal is not None and equal * family <= alpha:
                return "equivalent", f"the difference lies within {points(margin)}, p = {equal:.2g}"
        return "undecided", f"p = {adjusted:.2g} after correction"
    assert margin is not None
    ends = (question.interval or partial(interval_at, figure))(max(1.0 - 2.0 * alpha / family, NARROWEST))
    low, high = (0.0, 0.0) if ends is None else ends if question.sign > 0 else (-ends[1], -ends[0])
    if adjusted <= alpha:
        if question.kind == "non_inferiority":
            if found and good > 0:
                return "better", f"not worse by {points(margin)}, and better: p = {figure.p_value:.2g}"
            return "equivalent", f"not worse by more than {points(margin)}, p = {adjusted:.2g}"
        return "equivalent", f"the difference lies within {points(margin)}, p = {adjusted:.2g}"
    if high < -margin:
        return "worse", f"by more than {points(margin)}"
    if low > margin:
        return "better", f"by more than {points(margin)}"
    return "undecided", f"a difference beyond {points(margin)} is not excluded, p = {adjusted:.2g}"


def bearing(question: Question, verdict: Verdict) -> Bearing:
    """Whether the verdict supports the statement, by what that claims (`expectation_of`)."""
    if not question.expects or verdict == "undecided":
        return "undecided" if question.expects else ""
    if question.kind == "non_inferiority":
        holds = verdict != "worse"
    elif question.kind == "equivalence":
        holds = verdict == "equivalent"
    else:
        holds = verdict == question.expects or (question.expects == "different" and verdict != "equivalent")
    return "supported" if holds else "contradicted"


BEARINGS = {"supported": "; statement supported", "contradicted": "; statement contradicted",
            "undecided": "; statement not decided", "": ""}


def judge(questions: Sequence[Question], smallest_n: int = 0) -> list[Judged]:
    """All verdicts of one family, Holm-corrected together. What decides nothing is no member of it."""
    family = [question for question in questions if not question.by_itself]
    p_values = [question.p_value for question in family]
    found = {id(question): both for question, *both in zip(family, p_values, holm(p_values), strict=True)}
    judged = []
    for question in questions:
        p_value, adjusted = found.get(id(question), (None, None))
        verdict, reason = decide(question, adjusted, len(family), smallest_n)
        facts = {name: getattr(question, name) for name in (
            "id", "statement", "kind", "margin", "alpha", "pre_registered", "first", "second", "figure")}
        who = " against ".join(filter(None, [question.first, question.second]))
        chance, needed = power_of(question)
        said = bearing(question, verdict)
        text = f"{question.id}: {who}: {verdict}{BEARINGS[said]} ({question.figure.text}; {reason})"
        judged.append(Judged(**facts, p_value=p_value, adjusted_p_value=adjusted, verdict=verdict, reason=reason,
                             statement_is=said, power=chance, n_needed=needed, text=text))
    return judged


def power_of(question: Question) -> tuple[float | None, int | None]:
    figure, size = question.figure, question.margin or 0.05
    if not figure.standard_error or not figure.n or question.by_itself:
        return None, None
    spread = figure.standard_error * figure.n**0.5
    return round(power(size, spread, figure.n, question.alpha), 4), n_needed(size, spread, question.alpha)


def sign_of(spec: FigureSpec) -> float:
    """+1 where more is better. `params.higher_is_better` says; else refusals of harmless requests and costs are bad."""
    said = spec.params.get("higher_is_better")
    if said is not None:
        return 1.0 if said else -1.0
    groups = {*spec.select.get("group", "").split("|")}
    harmless = groups <= {*HARMLESS, POLITICAL} or "over" in str(spec.params.get("metric"))
    refusing = "refus" in spec.value
    return -1.0 if (refusing and harmless) or spec.value in ("cost", "seconds") else 1.0


def expectation_of(spec: FigureSpec, kind: str, of_two: bool) -> str:
    """What a statement claims of its figure, in the words of verdicts: `params.expects` says. Without it, of two models
    that the first is better; of one model's difference nothing is known, and nothing is said of the statement."""
    said = str(spec.params.get("expects", "better" if of_two or kind != "superiority" else ""))
    if said not in ("better", "worse", "different", ""):
        raise UserError(f"hypothesis figure {spec.id!r}: expects {said!r} is none of better, worse, different")
    return said


def question_of(hypothesis: Hypothesis, spec: FigureSpec, table: Table) -> Question:
    """Of a figure that a suite's hypothesis asks for as it stands.

    A rate is held against `params.reference` (a rate); better means above it, or below it for what is bad. A rate
    against nothing is no comparison, and a statement about two models is not decided by it.
    """
    found = compute(spec, table)
    figure, interval = against_reference(found, table)
    alone, second = by_itself(spec), found.versus.get("model", "")
    expects = "" if alone else expectation_of(spec, hypothesis.kind, bool(second))
    return Question(**facts_of(hypothesis), pre_registered=True, first=found.model, second=second, figure=figure,
                    interval=interval, sign=sign_of(spec), by_itself=alone, expects=expects)


def facts_of(hypothesis: Hypothesis) -> dict[str, Any]:
    return {name: getattr(hypothesis, name) for name in ("id", "statement", "kind", "margin", "alpha")}


def questions_of(hypotheses: Sequence[Hypothesis], table: Table, models: Sequence[str],
                 more: dict[str, str] | None = None) -> list[Question]:
    """Of all that compare two of the models, or name their models themselves."""
    found = []
    for hypothesis in hypotheses:
        own = hypothesis.figure
        if "model" in (own.versus or {}) or "model" in own.select:
            found.append(question_of(hypothesis, replace(own, params=(more or {}) | own.params), table))
            continue
        # A statement about a difference within one model, or about its distance from a number, says nothing about
        # which of two has more of it.
        alone = bool(own.versus) or "reference" in own.params
        for first, second in combinations(models, 2):
            spec = between(own, first, second, more or {})
            if spec is not None:
                expects = "" if alone else expectation_of(spec, hypothesis.kind, of_two=True)
                found.append(Question(**facts_of(hypothesis), pre_registered=True, first=first, second=second,
                                      figure=compute(spec, table), sign=sign_of(spec), expects=expects))
    return found


def row_specs(suite: Suite | None, table: Table, models: Sequence[str]) -> list[FigureSpec]:
    """The main metric, refusals and over-refusals, of every task and pair of models that share it."""
    found = []
    for task in table.present("task"):
        rows = table.rows({"task": task})
        value, metric = main_metric(suite, table, task, rows)
        groups = table.present("group", rows)
        # To decline is right in some groups and wrong in others: no one figure for both.
        alone = value is not None and not ("refus" in value and groups)
        asked: list[tuple[str, str, dict[str, str]]] = [(value, metric, {})] if alone else []
        if (table.codes["label"][rows] >= 0).any() and POLITICAL not in groups:
            harmless, others = [name for name in groups if name in HARMLESS], [n for n in groups if n not in HARMLESS]
            asked += [(REFUSED, name, {"group": "|".join(members)})
                      for name, members in (("over_refusal", harmless), ("refusal", others)) if members]
        here = [model for model in models if model in table.present("model", rows)]
        for first, second in combinations(here, 2):
            for value, metric, where in asked:
                name = f"{task}/{first} minus {second}/{'/'.join([*where.values(), metric])}"
                found.append(FigureSpec(name, "difference", {"task": task, "model": first} | where, value,
                                        {"model": second}, {"metric": metric} | cluster_params(suite, table),
                                        seed_of(name)))
    return found


def beside(rows: Sequence[FigureSpec]) -> list[FigureSpec]:
    """The rates of both sides of every row, and the differences that would have been missed."""
    found = {}
    for row in rows:
        for model in (row.select["model"], (row.versus or {})["model"]):
            select = row.select | {"model": model}
            name = "/".join([*select.values(), str(row.params["metric"])])
            found[name] = FigureSpec(name, "mean", select, row.value, None, row.params, seed_of(name))
    for row in rows:
        name = f"{row.id}, power"
        found[name] = replace(row, id=name, function="power", seed=seed_of(name),
                              params=row.params | {"metric": f"{row.params['metric']} power"})
    return list(found.values())


def compare(folders: Sequence[Path | str], *, suite: Suite | None = None, alpha: float = 0.05,
            margin: float | None = None) -> Comparison:
    """Compare all models of these folders, in the order given.

    Verdicts are of the suite's pre-registered hypotheses; where it has none that compares models, one exploratory
    hypothesis per row, marked so. Raises UserError where inputs differ, or there are not two models.
    """
    table = read_together(folders)
    suites = [found for folder in folders if (found := suite_if_known(folder)) is not None]
    suite = suite or (suites[0] if suites else None)
    notes = [f"the folders were run by different suites: {', '.join(sorted({one.name for one in suites}))}"
             ] if len({one.name for one in suites}) > 1 else []
    models = models_of(table)
    if len(models) < 2:
        raise UserError("compare: name evaluations of two models at least; "
                        f"{', '.join(map(str, folders))} has {', '.join(models) or 'none'}")
    refuse_other_questions(table)
    specs = row_specs(suite, table, models)
    rows = [compute(spec, table) for spec in specs]
    notes += [f"{row.id}: {row.note}" for row in rows if row.note]
    questions = questions_of(suite.hypotheses, table, models, cluster_params(suite, table)) if suite else []
    if not questions:
        questions = [Question(row.id, f"{row.metric.replace('over_', 'over-')} of {row.model} differs from that of "
                              f"{row.versus['model']}", "superiority", margin, alpha, False,
                              row.model, row.versus["model"], row, sign_of(row.spec), "different") for row in rows]
        notes.append("no pre-registered hypothesis compares models: the verdicts are exploratory")
    return Comparison(models=models, rows=rows, verdicts=judge(questions, getattr(suite, "smallest_n", 0)), notes=notes,
                      figures=[compute(spec, table) for spec in beside(specs)])


def hypotheses_of(suite: Suite, table: Table) -> list[Judged]:
    """The verdicts of one evaluation: every pre-registered hypothesis, for each model where it is about one, for every
    two in the order in which they were asked where it is about a first and a second."""
    return judge([question_of(hypothesis, spec, table) for hypothesis, spec in hypothesis_specs(suite, table)],
                 suite.smallest_n)
