"""The functions that figures are computed by: each takes a specification and a table and returns a figure's fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moonbase.evals import statistics
from moonbase.evals.table import Measured, Table

if TYPE_CHECKING:
    from moonbase.evals.figures import FigureSpec

Fields = dict[str, Any]
MIXED = 0.1
"""Share of answers from which on two mixes of hosts are said to differ (total variation)."""
NAMED_HOSTS = 4
UNBOUNDED = ("cost", "seconds", "input_tokens", "output_tokens", "reasoning_tokens")


def sides_of(spec: FigureSpec) -> list[dict[str, str]]:
    """Every selection of records that a figure rests on: each of its groups, with the other side of each."""
    names = ("control", "second", "second_control") if spec.function == "difference_in_differences" else ()
    groups = [spec.params[name] for name in names if isinstance(spec.params.get(name), dict)]
    selects = [spec.select | group for group in ({}, *groups)]
    return [side for select in selects for side in (select, *([select | spec.versus] if spec.versus else []))]


def level_of(spec: FigureSpec, table: Table) -> int:
    """What a stranger can do with this figure's records, told from the records themselves; each level has those below.

    L1: all outputs are kept. L2: inputs are bound by plain digests (salted ones need the salt). L3: every call names
    the digest of the weights. L4 takes a counter-statement and is not given here.
    """
    rows = np.concatenate([table.rows(side) for side in sides_of(spec)])
    if not len(rows) or not table.numbers["output_kept"][rows].all():
        return 0
    if not all(word.startswith("sha256:") for word in table.present("input_digest", rows)):
        return 1
    return 3 if (table.codes["weights_digest"][rows] >= 0).all() else 2


def counts_of(*measured: Measured) -> Fields:
    return {"unscored": sum(side.unscored for side in measured), "abstained": sum(side.abstained for side in measured),
            "errors": sum(side.errors for side in measured)}


def clusters_of(spec: FigureSpec, table: Table, rows: np.ndarray, with_task: bool = True) -> np.ndarray:
    """`params.cluster` names the column; else the record's own cluster. Tasks do not share clusters by chance.

    Numbers mean the same in every call on one table.
    """
    column = str(spec.params.get("cluster", "cluster"))
    if column not in table.codes:
        raise ValueError(f"no column {column!r} to cluster by")
    clusters = table.codes[column][rows].astype(np.int64)
    tasks = table.codes["task"][rows].astype(np.int64)
    return clusters + tasks * (len(table.words[column]) + 1) if with_task else clusters


def confidence_of(spec: FigureSpec) -> float:
    confidence = float(spec.params.get("confidence", 0.95))
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return confidence


def span_of(spec: FigureSpec, values: np.ndarray) -> float | None:
    """Length of the range of possible values, where it is known: scores in [0, 1]."""
    there = values[np.isfinite(values)]
    return None if spec.value in UNBOUNDED or (len(there) and (there.min() < 0 or there.max() > 1)) else 1.0


def broken_note(spec: FigureSpec, table: Table, rows: np.ndarray) -> str | None:
    """Empty and broken answers count among the answers of a label's rate; say how many they are."""
    if not spec.value.startswith("label:"):
        return None
    labels = table.codes["label"][rows]
    found = {name: int((labels == table.words["label"].index(name)).sum())
             for name in ("empty", "broken") if name in table.words["label"]}
    return ", ".join(f"{count} {name}" for name, count in found.items() if count) or None


def mean(spec: FigureSpec, table: Table) -> Fields:
    """Share or mean with its clustered interval."""
    side = table.measure(spec.select, spec.value)
    found = statistics.clustered_interval(side.values, clusters_of(spec, table, side.rows), confidence_of(spec))
    unit = "rate" if span_of(spec, side.values) else "dollars" if spec.value == "cost" else "number"
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": found.method, "standard_error": found.standard_error, "unit": unit,
            "note": broken_note(spec, table, side.rows), **counts_of(side)}


def corrected_rate(spec: FigureSpec, table: Table) -> Fields:
    """`mean` corrected by a judge's errors on human labels.

    params true_positives of positives, true_negatives of negatives: counts of labels that the judge got right.
    """
    plain = mean(spec, table)
    counts = [int(spec.params[name]) for name in ("true_positives", "positives", "true_negatives", "negatives")]
    if plain["value"] is None:
        return plain
    side = table.measure(spec.select, spec.value)
    shape = statistics.clustered_interval(side.values, clusters_of(spec, table, side.rows))
    found = statistics.corrected_rate(plain["value"], shape.effective_n or shape.n, *counts, confidence_of(spec))
    low, high, note = found.low, found.high, plain["note"]
    if found.clipped and found.value is not None:
        # The judge errs less here than on the human labels: its correction must not be surer than no correction.
        low, high = min(low, plain["low"]), max(high, plain["high"])
        note = "the judge's errors on human labels are more than fit these answers"
    return plain | {"value": found.value, "low": low, "high": high, "method": found.method, "note": note,
                    "standard_error": found.standard_error, "unit": "share",
                    "details": {"uncorrected": plain["value"], "sensitivity": found.sensitivity,
                                "specificity": found.specificity}}


@dataclass(frozen=True)
class Pairs:
    """Means of both sides for every key that either side has; NaN where a side has no value."""

    first_K: np.ndarray
    second_K: np.ndarray
    clusters_K: np.ndarray
    sides: tuple[Measured, Measured]
    only_first: int
    only_second: int
    """Keys that the other side was never asked."""
    confounded: tuple[str, ...]
    """Conditions in which the two sides never agree, besides the one that is compared."""
    hosts: str | None
    """`hosts_note` of the two sides."""


def pairs_of(spec: FigureSpec, table: Table, select: dict[str, str], versus: dict[str, str]) -> Pairs:
    """Align two sides by task, item and every condition that is not being compared; repeated samples are averaged.

    `params.pair` names the column that pairs instead of `item`: `cluster` for twins with ids of their own.
    """
    first, second = table.measure(select, spec.value), table.measure(select | versus, spec.value)
    pair = str(spec.params.get("pair", "item"))
    if pair not in table.codes:
        raise ValueError(f"no column {pair!r} to pair by")
    names = [pair] + ([] if "task" in versus else ["task"])
    confounded = []
    for name in table.conditions:
        if name in versus:
            continue
        one, two = np.unique(table.codes[name][first.rows]), np.unique(table.codes[name][second.rows])
        if len(one) and len(two) and not len(np.intersect1d(one, two)):
            confounded.append(name.removeprefix("condition."))
        else:
            names.append(name)
    rows = np.concatenate([first.rows, second.rows])
    keys, split = table.combined(names, rows), len(first.rows)
    count = int(keys.max()) + 1 if len(keys) else 0
    means, asked = [], []
    for side, part in ((first, keys[:split]), (second, keys[split:])):
        there = np.isfinite(side.values)
        sizes = np.bincount(part[there], minlength=count)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(np.where(sizes > 0, np.bincount(part[there], side.values[there], count) / sizes, math.nan))
        asked.append(np.bincount(part, minlength=count) > 0)
    clusters = np.zeros(count, np.int64)
    clusters[keys] = clusters_of(spec, table, rows, with_task="task" not in versus)
    both = asked[0] & asked[1]
    whole = np.isfinite(means[0]) & np.isfinite(means[1])
    hosts = hosts_note(table, *(side.rows[whole[part] & np.isfinite(side.values)] for side, part in (
        (first, keys[:split]), (second, keys[split:]))), versus)
    return Pairs(means[0][both], means[1][both], clusters[both], (first, second), int((asked[0] & ~both).sum()),
                 int((asked[1] & ~both).sum()), tuple(confounded), hosts)


def hosts_note(table: Table, first: np.ndarray, second: np.ndarray, versus: dict[str, str]) -> str | None:
    """Where another mix of hosts served one model in the rows of each side: what hosts do otherwise is part of the
    difference then. `NAME a:b`: answers of that host on the first side and on the second."""
    if "model" in versus or "provider" in versus or "provider" not in table.codes:
        return None
    names = table.words["provider"]
    there = [table.codes["provider"][rows] for rows in (first, second)]
    counts = [np.bincount(codes[codes >= 0], minlength=len(names)) for codes in there]
    sizes = [int(each.sum()) for each in counts]
    # Shares over their common denominator: whole numbers, so that every machine finds the same.
    gaps = np.abs(counts[0] * sizes[1] - counts[1] * sizes[0])
    if not all(sizes) or int(gaps.sum()) < 2.0 * MIXED * sizes[0] * sizes[1]:
        return None
    order = [place for place in np.argsort(-gaps, kind="stable") if gaps[place] > 0]
    said = [f"{names[place]} {counts[0][place]}:{counts[1][place]}" for place in order[:NAMED_HOSTS]]
    return f"the sides had other mixes of hosts: {', '.join(said + ['…'] * (len(order) > NAMED_HOSTS))}"


def pairs_note(pairs: Pairs) -> str | None:
    incomplete = int((np.isnan(pairs.first_K) | np.isnan(pairs.second_K)).sum())
    parts = [f"{incomplete} of {len(pairs.first_K)} pairs left out: a side has no value"] if incomplete else []
    if pairs.only_first or pairs.only_second:
        parts.append(f"asked on one side only: {pairs.only_first} and {pairs.only_second}")
    if pairs.confounded:
        parts.append(f"the sides also differ in: {', '.join(pairs.confounded)}")
    if pairs.hosts:
        parts.append(pairs.hosts)
    return "; ".join(parts) or None


def difference(spec: FigureSpec, table: Table) -> Fields:
    """select minus versus, paired by item (`params.pair`), or between different items (`pair: none`)."""
    if not spec.versus:
        raise ValueError("a difference needs `versus`")
    if spec.params.get("pair") == "none":
        return group_difference(spec, table)
    pairs = pairs_of(spec, table, spec.select, spec.versus)
    span = span_of(spec, np.concatenate([pairs.first_K, pairs.second_K]))
    found = statistics.paired_difference(pairs.first_K, pairs.second_K, pairs.clusters_K, confidence_of(spec), span)
    return {"value": found.difference, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": found.method, "standard_error": found.standard_error, "p_value": found.p_value,
            "unit": "points" if span else "difference", "note": pairs_note(pairs), **counts_of(*pairs.sides),
            "details": {"first": found.first, "second": found.second, "only_first": found.only_first,
                        "only_second": found.only_second, "degrees": found.degrees,
                        "unpaired_standard_error": found.unpaired_standard_error}}


def group_difference(spec: FigureSpec, table: Table) -> Fields:
    """Between different items: rates that share no cluster get Newcombe's interval, all else the robust contrast."""
    sides = table.measure(spec.select, spec.value), table.measure(spec.select | (spec.versus or {}), spec.value)
    rows = np.concatenate([side.rows for side in sides])
    values = np.concatenate([side.values for side in sides])
    cells = np.repeat([0, 1], [len(side.rows) for side in sides])
    clusters = clusters_of(spec, table, rows, with_task="task" not in (spec.versus or {}))
    span = span_of(spec, values)
    found = statistics.contrast(values, cells, clusters, (1.0, -1.0), confidence_of(spec), span)
    low, high, method, there = found.low, found.high, found.method, np.isfinite(values)
    if found.value is not None and found.clusters == found.n and np.isin(values[there], (0.0, 1.0)).all():
        events, sizes = (np.bincount(cells[there], weights, 2) for weights in (values[there], None))
        shape = statistics.newcombe(events[0], int(sizes[0]), events[1], int(sizes[1]), confidence_of(spec))
        low, high, method = shape.low, shape.high, "Newcombe, different items; t"
    return {"value": found.value, "low": low, "high": high, "n": found.n, "clusters": found.clusters,
            "method": method, "standard_error": found.standard_error, "p_value": found.p_value,
            "unit": "points" if span else "difference",
            "note": found.method if found.value is None else hosts_note(
                table, *(side.rows[np.isfinite(side.values)] for side in sides), spec.versus or {}),
            **counts_of(*sides),
            "details": {"first": found.means[0], "second": found.means[1], "degrees": found.degrees}}


def difference_in_differences(spec: FigureSpec, table: Table) -> Fields:
    """(select - versus) minus the same among `params.control`, an override of `select`: {"group": "us|eu|russia"}.

    With params `second` and `second_control`, two more overrides, the triple difference: that, minus the same of the
    second pair (Olden & Moen 2022). {"group": "us"} and {"group": "benign", "condition.twin_of": "us"}, say. Paired as
    `difference` is.
    """
    names = ("control", "second", "second_control") if "second" in spec.params else ("control",)
    overrides = [{}, *(spec.params.get(name) for name in names)]
    if not spec.versus or not all(isinstance(one, dict) for one in overrides):
        raise ValueError(f"a difference in differences needs `versus` and params {', '.join(names)}")
    weights = (1.0, -1.0, -1.0, 1.0)[:len(overrides)]
    if spec.params.get("pair") == "none":
        return unpaired_differences(spec, table, dict(zip(("treated", *names), overrides, strict=True)), weights)
    groups = [pairs_of(spec, table, spec.select | one, spec.versus) for one in overrides]
    values = np.concatenate([group.first_K - group.second_K for group in groups])
    cells = np.repeat(range(len(groups)), [len(group.first_K) for group in groups])
    clusters = np.concatenate([group.clusters_K for group in groups])
    span = span_of(spec, np.concatenate([side for group in groups for side in (group.first_K, group.second_K)]))
    found = statistics.contrast(values, cells, clusters, weights, confidence_of(spec), 2.0 if span else None)
    called = ("treated", *names)
    notes = [note for group in groups if (note := pairs_note(group))]
    notes += [f"no pair in the {name.replace('_', ' ')} group" for name, group in zip(called, groups, strict=True)
              if not len(group.first_K)]
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": f"{'triple difference' if len(groups) == 4 else 'difference in differences'}, {found.method}",
            "standard_error": found.standard_error, "p_value": found.p_value,
            "unit": "points" if span else "difference", "note": "; ".join(notes) or None,
            **counts_of(*(side for group in groups for side in group.sides)),
            "details": {**dict(zip(called, found.means, strict=True)), "degrees": found.degrees}}


def unpaired_differences(spec: FigureSpec, table: Table, groups: dict[str, dict[str, str]],
                         weights: Sequence[float]) -> Fields:
    """`difference_in_differences` between different items (`pair: none`): each group's is of the means of its sides.

    groups: name to override of `select`. The sides are cells of one contrast, so answers that share a cluster count
    together, on whichever side they are.
    """
    versus = spec.versus or {}
    sides = [table.measure(select, spec.value) for one in groups.values()
             for select in (spec.select | one, spec.select | one | versus)]
    rows, values = (np.concatenate([getattr(side, name) for side in sides]) for name in ("rows", "values"))
    cells, span = np.repeat(range(len(sides)), [len(side.rows) for side in sides]), span_of(spec, values)
    signed = [part for weight in weights for part in (weight, -weight)]
    found = statistics.contrast(values, cells, clusters_of(spec, table, rows, with_task="task" not in versus), signed,
                                confidence_of(spec), span)
    means = found.means
    gaps = {name: means[place] - means[place + 1] if None not in means[place:place + 2] else None
            for name, place in zip(groups, range(0, len(sides), 2), strict=True)}
    notes = [hosts_note(table, *(side.rows[np.isfinite(side.values)] for side in sides[place:place + 2]), versus)
             for place in range(0, len(sides), 2)]
    notes += [f"no pair in the {name.replace('_', ' ')} group" for name, gap in gaps.items() if gap is None]
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": f"{'triple difference' if len(groups) == 4 else 'difference in differences'}, {found.method}",
            "standard_error": found.standard_error, "p_value": found.p_value,
            "unit": "points" if span else "difference", "note": "; ".join(filter(None, notes)) or None,
            **counts_of(*sides), "details": {**gaps, "degrees": found.degrees}}


def agreement(spec: FigureSpec, table: Table) -> Fields:
    """params kind: krippendorff_alpha, cohen_kappa or raw; judges: names (all that voted); collapse: "full|partial"."""
    rows = table.rows(spec.select)
    judges = spec.params.get("judges") or table.members(rows, spoke=True)
    words = sorted({word for judge in judges for word in table.words.get(f"vote.{judge}", ())})
    collapse = spec.params.get("collapse")
    votes = np.full((len(judges), len(rows)), -1)
    for number, judge in enumerate(judges):
        column = f"vote.{judge}"
        if column in table.codes:
            places = [int(word in str(collapse).split("|")) if collapse else words.index(word)
                      for word in table.words[column]]
            votes[number] = np.array([*places, -1])[table.codes[column][rows]]
    kind = str(spec.params.get("kind", "krippendorff_alpha"))
    if kind == "cohen_kappa":
        if len(judges) != 2:
            raise ValueError(f"Cohen's kappa is of two judges, not {len(judges)}")
        found = statistics.cohen_kappa(votes[0], votes[1], confidence_of(spec))
    elif kind == "krippendorff_alpha":
        found = statistics.krippendorff_alpha(votes, seed=spec.seed, confidence=confidence_of(spec))
    elif kind == "raw":
        found = statistics.raw_agreement(votes, confidence_of(spec))
    else:
        raise ValueError(f"kind {kind!r} is none of krippendorff_alpha, cohen_kappa, raw")
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.n,
            "method": found.method, "standard_error": found.standard_error, "abstained": found.abstained,
            "unscored": len(rows) - found.n, "unit": "rate" if kind == "raw" else "coefficient",
            "note": f"judges: {', '.join(judges)}" if judges else "no judge voted"}


def members(spec: FigureSpec, table: Table) -> Fields:
    """How much oftener one member of the panel says a label than another (params `against`, a `value`) of the same
    answers: κ says how well two agree, this says who leans where."""
    first, second = table.measure(spec.select, spec.value), table.measure(spec.select, str(spec.params["against"]))
    found = statistics.paired_difference(first.values, second.values, clusters_of(spec, table, first.rows),
                                         confidence_of(spec))
    missing = len(first.rows) - found.n - first.errors
    return {"value": found.difference, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": found.method, "standard_error": found.standard_error, "p_value": found.p_value, "unit": "points",
            "unscored": missing, "errors": first.errors,
            "details": {"first": found.first, "second": found.second, "only_first": found.only_first,
                        "only_second": found.only_second, "degrees": found.degrees}}


def cost_per_correct(spec: FigureSpec, table: Table) -> Fields:
    """Dollars of all answers, wrong and failed ones too, over the number of right ones; bootstrap over clusters."""
    side = table.measure(spec.select, spec.value)
    cost = table.numbers["cost"][side.rows]
    unknown, right = int(np.isnan(cost).sum()), np.nan_to_num(side.values)
    fields = {"value": None, "n": len(cost), "unit": "dollars", "method": "ratio", **counts_of(side)}
    if unknown or not len(cost):
        return fields | {"details": {"unknown": unknown}}
    if right.sum() == 0:
        return fields | {"details": {"spent": float(cost.sum())}}
    found = statistics.hierarchical(cost, clusters_of(spec, table, side.rows), seed=spec.seed, denominators=right,
                                    confidence=confidence_of(spec))
    return fields | {"value": found.value, "low": found.low, "high": found.high, "clusters": found.clusters,
                     "method": f"ratio, {found.method}", "standard_error": found.standard_error,
                     "note": f"${cost.sum():,.4g} for {right.sum():,.6g} correct"}


def repeated(spec: FigureSpec, table: Table) -> Fields:
    """pass@k or pass^k over the samples of an item; `params.k`, `params.threshold` (a score that counts as solved)."""
    side = table.measure(spec.select, spec.value)
    k, there = int(spec.params["k"]), np.isfinite(side.values)
    rows, solved = side.rows[there], side.values[there] >= float(spec.params.get("threshold", 1.0))
    keys = table.combined(["task", "item", "model", *table.conditions], rows)
    count = int(keys.max()) + 1 if len(keys) else 0
    tries, correct = np.bincount(keys, minlength=count), np.bincount(keys, solved, count)
    estimate = (statistics.pass_at_k if spec.function == "pass_at_k" else statistics.pass_hat_k)(correct, tries, k)
    clusters = np.zeros(count, np.int64)
    clusters[keys] = clusters_of(spec, table, rows)
    found = statistics.clustered_interval(estimate.values_I, clusters, confidence_of(spec))
    name = f"pass@{k}" if spec.function == "pass_at_k" else f"pass^{k}"
    note = f"{estimate.too_few} of {count} items have fewer than {k} scored samples" if estimate.too_few else None
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": f"{name}, {found.method}", "standard_error": found.standard_error, "unit": "rate", "note": note,
            **counts_of(side)}


def slope(spec: FigureSpec, table: Table) -> Fields:
    """Change per unit along a column (params `along`), whose words are `doses` (word to number), within items.

    Least-squares slope of each item that has a value at every dose, then their mean by Student's t: the slopes of items
    are independent though the answers of one are not. Items that share a cluster count by clusters.
    """
    along, doses = str(spec.params["along"]), {str(word): float(dose) for word, dose in spec.params["doses"].items()}
    numbers = np.array(list(doses.values()))
    side = table.measure(spec.select, spec.value)
    names = ["task", "item", *(name for name in table.conditions if name != along)]
    keys, places = table.combined(names, side.rows), dict(zip(doses, range(len(doses)), strict=True))
    at = np.array([*(places.get(word, -1) for word in table.words[along]), -1])[table.codes[along][side.rows]]
    count = int(keys.max()) + 1 if len(keys) else 0
    there = np.isfinite(side.values) & (at >= 0)
    cells = (keys * len(doses) + at)[there]
    sizes = np.bincount(cells, minlength=count * len(doses))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.bincount(cells, side.values[there], count * len(doses)) / sizes
    means_ID = means.reshape(count, len(doses))
    whole = np.isfinite(means_ID).all(1)
    centred = numbers - numbers.mean()
    clusters = np.zeros(count, np.int64)
    clusters[keys] = clusters_of(spec, table, side.rows)
    slopes = means_ID[whole] @ centred / (centred @ centred)
    found = statistics.contrast(slopes, np.zeros(len(slopes), int), clusters[whole], (1.0,), confidence_of(spec))
    value, note = found.value, f"{count - int(whole.sum())} of {count} items lack a dose" if not whole.all() else None
    low, high = (found.low, found.high) if len(slopes) > 1 else (None, None)
    return {"value": value if len(slopes) > 1 else None, "low": low, "high": high, "n": len(slopes),
            "clusters": found.clusters, "method": f"slope within items, {found.method}", "unit": "slope", "note": note,
            "standard_error": found.standard_error, "p_value": found.p_value, **counts_of(side),
            "details": {"bounded": span_of(spec, side.values) is not None}}


def bootstrap(spec: FigureSpec, table: Table) -> Fields:
    """The mean once more, by hierarchical bootstrap: a check on the interval that assumes least."""
    side = table.measure(spec.select, spec.value)
    found = statistics.hierarchical(side.values, clusters_of(spec, table, side.rows), seed=spec.seed,
                                    resamples=int(spec.params.get("resamples", 2000)), confidence=confidence_of(spec),
                                    within=bool(spec.params.get("within", False)))
    unit = "rate" if span_of(spec, side.values) else "number"
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "clusters": found.clusters,
            "method": found.method, "standard_error": found.standard_error, "unit": unit, **counts_of(side)}


def missing(spec: FigureSpec, table: Table) -> Fields:
    """How many answers have no value, and why."""
    side = table.measure(spec.select, spec.value)
    total, absent = len(side.rows), int(np.isnan(side.values).sum())
    return {"value": absent / total if total else None, "n": total, "clusters": total, "method": "count",
            "unit": "share", **counts_of(side)}


def design_effect(spec: FigureSpec, table: Table) -> Fields:
    """How many answers are worth one independent answer; and how much of the noise more samples would take away."""
    side = table.measure(spec.select, spec.value)
    clusters = clusters_of(spec, table, side.rows)
    effect, levels = statistics.design_effect(side.values, clusters), statistics.two_level(side.values, clusters)
    n = int(np.isfinite(side.values).sum())
    return {"value": effect, "n": n, "clusters": levels.items, "method": "clustered over plain variance",
            "unit": "effect", **counts_of(side),
            "details": {"between": levels.between, "within": levels.within, "samples": levels.samples}}


def power(spec: FigureSpec, table: Table) -> Fields:
    """Smallest difference that is found 4 times in 5, and the pairs that `params.margin` (0.05) would need.

    Of the difference that the specification names; without `versus`, of this model and another one with the same
    spread on other items.
    """
    margin, target = float(spec.params.get("margin", 0.05)), float(spec.params.get("power", 0.8))
    alpha = float(spec.params.get("alpha", 0.05))
    found = difference(spec, table) if spec.versus else mean(spec, table)
    error, bounded = found["standard_error"], found["unit"] in ("points", "rate")
    fields = {name: found[name] for name in ("n", "clusters", "unscored", "abstained", "errors", "note")}
    fields |= {"unit": "points" if bounded else "difference", "method": f"normal, α {alpha:g}, power {target:g}"}
    if not error:
        return fields | {"value": None}
    error *= 1.0 if spec.versus else math.sqrt(2.0)
    smallest, spread = statistics.detectable(error, alpha, target), error * math.sqrt(found["n"])
    needed = statistics.n_needed(margin, spread, alpha, target)
    return fields | {"value": smallest, "standard_error": error,
                     "details": {"n_needed": needed, "margin": margin, "power": target, "alpha": alpha}}


FUNCTIONS: dict[str, Callable[[FigureSpec, Table], Fields]] = {
    "mean": mean, "corrected_rate": corrected_rate, "difference": difference, "contamination": difference,
    "difference_in_differences": difference_in_differences, "agreement": agreement, "members": members,
    "cost_per_correct": cost_per_correct, "pass_at_k": repeated, "pass_hat_k": repeated, "bootstrap": bootstrap,
    "missing": missing, "slope": slope, "design_effect": design_effect, "power": power,
}
