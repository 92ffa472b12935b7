"""Which figures belong to which part of the report, told by what each was computed from, never by its number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moonbase.evals.report.read import Findings, Shown

RATES = ("mean", "corrected_rate", "pass_at_k", "pass_hat_k")
DIFFERENCES = ("difference", "contamination", "difference_in_differences")
ORIGINS = ("origin", "source", "set")
"""Names of the condition that tells a public set from its fresh twin."""
DOSES = ("dose", "step", "checkpoint", "epoch")
_CHECKPOINT = re.compile(r"^(.+?)[/ _-]*(?:step|checkpoint|epoch)[-_]?(\d+)$")


@dataclass(frozen=True)
class Group:
    """Figures that differ in one thing only: `members` by its value; `difference` where that was computed, too."""

    model: str
    metric: str
    facets: tuple[tuple[str, str], ...]
    members: tuple[tuple[str, Shown], ...]
    difference: Shown | None = None

    def __getitem__(self, name: str) -> Shown:
        return dict(self.members)[name]

    @property
    def figures(self) -> list[Shown]:
        return [figure for _, figure in self.members] + ([self.difference] if self.difference else [])


def is_rate(figure: Shown) -> bool:
    """A share or a mean of one model; those of single members of the panel have a part of their own."""
    return bool(figure.model) and figure.function in RATES and not figure.versus and not figure.member


def is_label(figure: Shown) -> bool:
    return figure.source.startswith(("label:", "vote:"))


def capability(findings: Findings) -> list[Shown]:
    """Scores, the coarsest first: a figure over all conditions before its parts; not those that have a chart of their
    own, by provider, by origin and by dose."""
    elsewhere = {figure.id for group in [*providers(findings), *contamination(findings)[0], *doses(findings)]
                 for figure in group.figures}
    found = [figure for figure in findings.figures
             if is_rate(figure) and not is_label(figure) and figure.id not in elsewhere]
    order = {model: place for place, model in enumerate(findings.models)}
    return sorted(found, key=lambda figure: (len(figure.facets), figure.metric, figure.without(), order[figure.model]))


def refusals(findings: Findings) -> list[tuple[str, Shown, Shown]]:
    """(model, refusals of requests that are not harmless, refusals of those that are), the coarsest of each.

    Corrected for the judges' errors where both are; of one task where one task has both kinds.
    """
    found: dict[tuple[str, str, bool], dict[bool, Shown]] = {}
    for figure in sorted(findings.figures, key=lambda figure: len(figure.facets)):
        plain = figure.metric.removesuffix("_corrected").removesuffix(" rate")
        if is_rate(figure) and plain in ("refusal", "over_refusal"):
            for task in (figure.facets.get("task", ""), "any"):
                corrected = figure.function == "corrected_rate"
                found.setdefault((figure.model, task, corrected), {}).setdefault(plain == "over_refusal", figure)
    chosen = []
    for model in findings.models:
        both = [(task == "any", not corrected, pair) for (name, task, corrected), pair in found.items()
                if name == model and len(pair) == 2]
        if both:
            pair = min(both, key=lambda one: one[:2])[2]
            chosen.append((model, pair[False], pair[True]))
    return chosen


def crossed(findings: Findings, names: Iterable[str], least: int = 2) -> list[Group]:
    """Groups of figures that are alike but for one condition, which has at least `least` values; and the difference
    over that condition, where one was computed. Coarsest first."""
    groups: list[Group] = []
    for name in names:
        parts: dict[tuple, dict[str, Shown]] = {}
        differences: dict[tuple, Shown] = {}
        for figure in findings.figures:
            if figure.function in ("difference", "contamination") and set(figure.versus) == {name} \
                    and not figure.member:
                differences.setdefault((figure.model, figure.source, figure.without(name)), figure)
            elif name in figure.facets and is_rate(figure):
                key = (figure.model, figure.metric, figure.source, figure.function, figure.without(name))
                parts.setdefault(key, {})[figure.facets[name]] = figure
        groups += [Group(model, metric, facets, tuple(members.items()),
                         differences.get((model, source, facets)) if function == "mean" else None)
                   for (model, metric, source, function, facets), members in parts.items() if len(members) >= least]
    return sorted(groups, key=lambda group: len(group.facets))


def languages(findings: Findings) -> list[Group]:
    """Both English and Chinese, where about the same items were asked in both: lines between others would mislead.

    Where English was asked more (mirrored questions about other states), the English figure is that of the group which
    was asked in Chinese.
    """
    found = []
    for group in crossed(findings, ["language"]):
        if not {"en", "zh"} <= {name for name, _ in group.members} or "provider" in dict(group.facets):
            continue
        chinese, english = group["zh"], group["en"]
        same = [figure for figure in findings.figures if is_rate(figure) and figure.facets.get("language") == "en"
                and (figure.model, figure.metric, figure.source, figure.function) == (
                    chinese.model, chinese.metric, chinese.source, chinese.function)
                and set(group.facets) <= set(figure.without("language")) and _alike(figure.n, chinese.n)
                and "provider" not in figure.facets]
        if not _alike(english.n, chinese.n):
            if len(same) != 1:
                continue
            english = same[0]
        facets = english.without("language")
        if facets not in {one.facets for one in found if (one.model, one.metric) == (group.model, group.metric)}:
            found.append(Group(group.model, group.metric, facets, (("en", english), ("zh", chinese)),
                               group.difference if english is group["en"] else None))
    return found


def _alike(n: int, other: int) -> bool:
    return max(n, other) <= 1.2 * min(n, other)


def providers(findings: Findings) -> list[Group]:
    """The same model as several hosts served it."""
    return crossed(findings, ["provider"])


def contamination(findings: Findings) -> tuple[list[Group], list[Shown]]:
    """(public beside fresh, the gaps that were computed)."""
    pairs = []
    for group in crossed(findings, ORIGINS):
        if {"public", "fresh"} <= {name for name, _ in group.members}:
            members = (("public", group["public"]), ("fresh", group["fresh"]))
            pairs.append(Group(group.model, group.metric, group.facets, members, group.difference))
    return pairs, [figure for figure in findings.figures if figure.function == "contamination"]


def costs(findings: Findings) -> list[Shown]:
    return [figure for figure in findings.figures if figure.function == "cost_per_correct"]


def agreement(findings: Findings) -> list[Shown]:
    """Coefficients, the worst first; the raw share of equal labels, which chance inflates, comes last."""
    found = [figure for figure in findings.figures if figure.function == "agreement"]
    return sorted(found, key=lambda figure: (figure.params.get("kind") == "raw", figure.value is None,
                                             figure.low is None, figure.value or 0.0))


def leanings(findings: Findings) -> list[Shown]:
    """Who of two members of the panel says a label oftener of the same answers, the largest difference first."""
    found = [figure for figure in findings.figures if figure.function == "members"]
    return sorted(found, key=lambda figure: -abs(figure.value or 0.0))


def leaning_of(findings: Findings, figure: Shown) -> Shown | None:
    """The same two judges on the same answers."""
    return next((one for one in findings.figures if one.function == "members" and one.model == figure.model
                 and one.facets == figure.facets and one.params.get("judges") == figure.params.get("judges")), None)


def panels(findings: Findings) -> list[tuple[Shown, list[Shown]]]:
    """(a figure of the panel's labels, the same by each member), where most depends on who labels first."""
    found: dict[str, list[Shown]] = {}
    for figure in findings.figures:
        if figure.member:
            found.setdefault(str(figure.params.get("panel")), []).append(figure)
    known = [(panel, members) for name, members in found.items() if (panel := findings.figure(name))]
    return sorted(known, key=lambda pair: (-round(spread(pair), 6), not pair[0].versus, len(pair[0].facets)))


def spread(panel: tuple[Shown, list[Shown]]) -> float:
    """Between the smallest and the largest value that the panel and its members give."""
    values = [figure.value for figure in (panel[0], *panel[1]) if figure.value is not None]
    return max(values) - min(values) if values else 0.0


def doses(findings: Findings) -> list[Group]:
    """Curves over fine-tuning: figures alike but for a dose, smallest first. The dose is a condition, or the number at
    the end of a model's name (`runs/tuned/step-300`)."""
    found = [(group.model, group.metric, group.facets, group.members, group.difference)
             for group in crossed(findings, DOSES)]
    named: dict[tuple, list[tuple[str, Shown]]] = {}
    for figure in findings.figures:
        match = _CHECKPOINT.match(figure.model)
        if match and is_rate(figure):
            key = (match.group(1), figure.metric, figure.source, figure.function, figure.without())
            named.setdefault(key, []).append((match.group(2), figure))
    found += [(model, metric, facets, tuple(members), None)
              for (model, metric, _, _, facets), members in named.items()]
    curves = []
    for model, metric, facets, members, difference in found:
        points = sorted(((dose, name, figure) for name, figure in members
                         if (dose := at_dose(name, figure)) is not None), key=lambda point: point[0])
        if len(points) >= 2:
            curves.append(Group(model, metric, facets, tuple((name, figure) for _, name, figure in points), difference))
    return sorted(curves, key=lambda group: len(group.facets))


def dose_of(name: str) -> float | None:
    """`step-300` -> 300."""
    match = re.search(r"\d+(\.\d+)?$", name)
    return 0.0 if name in ("base", "none") else float(match.group()) if match else None


def at_dose(name: str, figure: Shown) -> float | None:
    """Where a figure stands on the curve: as it was told, else as its name says."""
    told = figure.params.get("dose")
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) else dose_of(name)


def slopes(findings: Findings) -> list[Shown]:
    return [figure for figure in findings.figures if figure.function == "slope"]


def changes(findings: Findings) -> list[Shown]:
    """From a base to each of its checkpoints."""
    return [figure for figure in findings.figures if figure.function == "difference"
            and set(figure.versus) & set(DOSES) and not figure.member]


def differences(findings: Findings) -> list[Shown]:
    """Between models. Where a hypothesis asks for what its only task shows anyway, it is shown once."""
    found = [figure for figure in findings.figures
             if figure.function in DIFFERENCES and "model" in figure.versus and not figure.member]

    def same(one: Shown, other: Shown) -> bool:
        names = ("function", "model", "versus", "value", "low", "high", "n")
        return "task" in other.facets and one.facets.items() <= other.facets.items() and all(
            getattr(one, name) == getattr(other, name) for name in names)

    return [one for one in found if "task" in one.facets or not any(same(one, other) for other in found)]


def by_itself(figure: Shown) -> bool:
    """A rate or a mean that nothing is held against: no verdict follows from it."""
    return figure.function not in (*DIFFERENCES, "members", "slope") and "reference" not in figure.params


def controlled(findings: Findings) -> list[Shown]:
    """What is left of a difference once controls are subtracted; and groups of items against their controls."""
    return [figure for figure in findings.figures if not figure.member and (
        figure.function == "difference_in_differences"
        or (figure.function in DIFFERENCES and "group" in figure.versus))]


def powers(findings: Findings) -> list[Shown]:
    """What size of difference would have been missed; those that need more items than there are come first."""
    found = [figure for figure in findings.figures if figure.function == "power"]

    def urgency(figure: Shown) -> tuple[bool, bool, int]:
        needed = figure.details.get("n_needed")
        return (isinstance(needed, int | float) and needed <= figure.n, "model" not in figure.versus,
                len(figure.facets))

    return sorted(found, key=urgency)
