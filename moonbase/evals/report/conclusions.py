"""What may not be concluded: said from power, intervals and counts, never from an opinion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from markupsafe import Markup

from moonbase.evals.report import sorting
from moonbase.evals.report.language import Words, bare_number, number, of_hypothesis, part
from moonbase.evals.report.read import Findings, Shown
from moonbase.report.words import visible

MOST_OF_A_KIND = 4
LEFT_OUT_SHARE = 0.05
"""Answers without a score, of all answers, from which on they may move a number noticeably."""
TENTATIVE_AGREEMENT = 0.667
"""Krippendorff's bound below which labels do not bear a conclusion."""
WANTED_POWER = 0.8
SYSTEMATIC = 0.05
"""p of McNemar's test below which two judges do not merely err, but lean."""
HOSTS = "the sides had other mixes of hosts: "
"""How the note of a difference begins that says so."""
DEPENDS = 0.1
"""A difference between members of the panel from which on a number is said to depend on who labels."""


def not_concluded(findings: Findings, hypotheses: list[dict[str, Any]], words: Words) -> list[Markup]:
    """Sentences, the most important first; of many alike the first few and how many more there are."""
    said: list[Markup] = []
    for sentences in (_hypotheses(findings, hypotheses, words), _power(findings, words), _orders(findings, words),
                      _members(findings, words), _mixed(findings, words), _few(findings, words),
                      _zeros(findings, words), _left_out(findings, words), _agreement(findings, words)):
        alike = list(sentences)
        said += alike[:MOST_OF_A_KIND]
        if len(alike) > MOST_OF_A_KIND:
            more = words("not_concluded.more", count=len(alike) - MOST_OF_A_KIND)
            said[-1] += words("aside", said=more)
    return said + list(_hosts(findings, words)) + [words(f"not_concluded.{name}") for name in _not_varied(findings)]


def hypotheses_of(findings: Findings) -> list[dict[str, Any]]:
    """Those of the suite, once for every figure that decides one (`hypothesis/ID/MODEL`), each with what the results
    say about it."""
    registered = findings.suite.get("hypotheses")
    registered = [entry for entry in registered if isinstance(entry, dict)] if isinstance(registered, list) else []
    merged, said = [], list(findings.hypotheses)
    for entry in registered:
        name = str(entry.get("id"))
        own = [found for found in said if str(found.get("id")) == name]
        said = [found for found in said if found not in own]
        figures = [figure.id for figure in findings.figures
                   if not figure.member and (figure.id == f"hypothesis/{name}"
                                             or figure.id.startswith(f"hypothesis/{name}/"))]
        unsaid = [figure for figure in figures if figure not in {_figure_name(found) for found in own}]
        merged += [entry | found for found in own]
        merged += [entry | {"figure": figure} for figure in unsaid] or ([] if own else [entry])
    return [entry if entry.get("verdict") else entry | _read_off(findings, entry) for entry in merged + said]


def _figure_name(entry: dict[str, Any]) -> Any:
    name = entry.get("figure")
    return name.get("id") if isinstance(name, dict) else name


def figure_of(findings: Findings, entry: dict[str, Any]) -> Shown | None:
    """The figure that a hypothesis is about."""
    return findings.figure(_figure_name(entry))


def _read_off(findings: Findings, entry: dict[str, Any]) -> dict[str, str]:
    """What a difference's interval says of a claim, where the results give no verdict: one comparison, no number."""
    figure, kind, margin = figure_of(findings, entry), entry.get("kind"), entry.get("margin") or 0.0
    if figure is None or not figure.versus or figure.low is None or figure.high is None:
        return {}
    low, high = figure.low, figure.high
    if kind == "equivalence":
        verdict = "equivalent" if -margin < low and high < margin else \
            "different" if low > margin or high < -margin else "undecided"
    elif kind == "non_inferiority":
        verdict = "non_inferior" if low > -margin else "below" if high < -margin else "undecided"
    else:
        verdict = "above" if low > 0 else "below" if high < 0 else "undecided"
    return {"verdict": verdict, "read_off": "yes"}


def _power(findings: Findings, words: Words) -> Iterator[Markup]:
    """What was too small to be seen, in the words of the figure that computed it."""
    for figure in sorting.powers(findings):
        # A number says by itself that it is about what would be missed.
        seen = figure if figure.value is None else replace(figure, metric=figure.metric.removesuffix(" power"))
        yield words("not_concluded.small", what=words.whose(seen), figure=number(figure, words))


def side_of(entry: dict[str, Any], figure: Shown | None, words: Words) -> str:
    """Who is ruled on: one model against another, a checkpoint, or the model of the figure."""
    first, second = (name if isinstance(name := entry.get(side), str) else "" for side in ("first", "second"))
    if first and second:
        return words.plain("against", model=first, other=second)
    return second or (words.side(figure) if figure else "")


def _hypotheses(findings: Findings, hypotheses: list[dict[str, Any]], words: Words) -> Iterator[Markup]:
    """One sentence for each statement that is open for some model, and one where nothing could be computed."""
    if not hypotheses:
        yield words("not_concluded.no_hypotheses")
    for statement in dict.fromkeys(str(entry.get("statement") or entry.get("id")) for entry in hypotheses):
        entries = [entry for entry in hypotheses if statement in (entry.get("statement"), entry.get("id"))]
        entries = [entry for entry in entries if entry.get("verdict") in (None, "none", "undecided")]
        alone = [figure for entry in entries if (figure := figure_of(findings, entry)) and sorting.by_itself(figure)]
        if alone:
            yield words("not_concluded.one_model", statement=words.say(statement).rstrip(".。"),
                        models=words.listed(list(dict.fromkeys(figure.model for figure in alone))))
        figures = [figure_of(findings, entry) for entry in entries]
        entries = [entry for entry, figure in zip(entries, figures, strict=True) if figure not in alone]
        figures = [figure for figure in figures if figure not in alone]
        known = [(entry, figure) for entry, figure in zip(entries, figures, strict=True)
                 if figure and figure.value is not None]
        if known:
            told = Markup("; ").join(_told(entry, figure, words) for entry, figure in known)
            yield words("not_concluded.undecided", statement=words.say(statement).rstrip(".。"), figure=told)
        if unknown := [side_of(entry, figure, words) or "–" for entry, figure in zip(entries, figures, strict=True)
                       if not figure or figure.value is None]:
            yield words("not_concluded.unknown", statement=words.say(statement).rstrip(".。"),
                        models=", ".join(dict.fromkeys(unknown)))


def _told(entry: dict[str, Any], figure: Shown, words: Words) -> Markup:
    """Model, figure, and what the results say of the power."""
    said = Markup("{} {}").format(visible(side_of(entry, figure, words)), number(figure, words))
    power, wanted = entry.get("power"), entry.get("n_needed")
    if isinstance(power, int | float) and power < WANTED_POWER:
        said += words("list_mark") + words("not_concluded.power", power=of_hypothesis(entry, "power", f"{power:.0%}"))
    if isinstance(wanted, int | float):
        told = of_hypothesis(entry, "n_needed", f"{wanted:,}")
        said += words("list_mark") + words("not_concluded.n_needed", n_needed=told)
    return said


def _main(findings: Findings) -> list[Shown]:
    """The main metric, once a model, over all conditions."""
    metric = findings.suite.get("metric")
    found: dict[str, Shown] = {}
    for figure in sorted(findings.figures, key=lambda figure: len(figure.facets)):
        named = metric in (None, figure.metric, figure.source.partition(":")[2])
        if figure.function == "mean" and not figure.member and named:
            found.setdefault(figure.model, figure)
    return [found[model] for model in findings.models if model in found]


def _orders(findings: Findings, words: Words) -> Iterator[Markup]:
    """Pairs of models of which the data do not say who is ahead."""
    compared = set()
    for figure in sorting.differences(findings):
        compared.add((figure.metric, frozenset((figure.model, figure.versus["model"]))))
        if figure.low is not None and figure.high is not None and figure.low <= 0 <= figure.high:
            yield words("not_concluded.order", model=figure.model, other=figure.versus["model"],
                        metric=words.scope(figure), figure=number(figure, words))
    for one, other in combinations(_main(findings), 2):
        if (one.metric, frozenset((one.model, other.model))) in compared or one.facets != other.facets:
            continue
        ends = (one.low, one.high, other.low, other.high)
        if None not in ends and one.low <= other.high and other.low <= one.high:
            yield words("not_concluded.order_unpaired", model=one.model, other=other.model,
                        metric=words.scope(one), figure=number(one, words), second=number(other, words))


def _means(findings: Findings) -> list[Shown]:
    """Plain shares and means, the coarsest first: what is said of one is not said again of its bootstrap. Those of
    single hosts, which have a sentence of their own, are left out."""
    hosts = {figure.id for group in sorting.providers(findings) for _, figure in group.members}
    return sorted((figure for figure in findings.figures if figure.function == "mean" and not figure.member
                   and figure.id not in hosts), key=lambda figure: len(figure.facets))


def _few(findings: Findings, words: Words) -> Iterator[Markup]:
    smallest = findings.suite.get("smallest_n")
    if isinstance(smallest, int):
        for figure in _means(findings):
            if 0 < figure.n < smallest:
                yield words("not_concluded.few", what=words.whose(figure), n=part(figure, "n"), smallest=smallest,
                            figure=number(figure, words))


def _zeros(findings: Findings, words: Words) -> Iterator[Markup]:
    for figure in _means(findings):
        if figure.unit == "rate" and figure.value in (0, 1) and figure.n > 0:
            yield words(f"not_concluded.{'always' if figure.value else 'never'}", what=words.whose(figure),
                        figure=number(figure, words))


def _left_out(findings: Findings, words: Words) -> Iterator[Markup]:
    for figure in _means(findings):
        if not figure.n and figure.left_out:
            yield words("not_concluded.nothing_scored", what=words.whose(figure), figure=number(figure, words))
        elif figure.left_out > LEFT_OUT_SHARE * (figure.n + figure.left_out):
            left_out = Markup(" + ").join(part(figure, name) for name in ("unscored", "abstained", "errors")
                                          if getattr(figure, name))
            yield words("not_concluded.unscored", what=words.whose(figure), left_out=left_out, n=part(figure, "n"),
                        figure=number(figure, words))


def _agreement(findings: Findings, words: Words) -> Iterator[Markup]:
    for figure in sorting.agreement(findings):
        # Where one of two always says the same word κ is 0 by definition, however often they agree.
        told = figure.value is not None and figure.low is not None
        if figure.unit == "coefficient" and told and (figure.value or 0.0) < TENTATIVE_AGREEMENT:
            said = words("not_concluded.agreement", what=words.whose(figure), figure=bare_number(figure, words))
            leaning = sorting.leaning_of(findings, figure)
            if leaning and leaning.p_value is not None and leaning.p_value < SYSTEMATIC:
                first, second = leaning.params.get("judges", ["", ""])
                said += words("sentence_gap") + words("not_concluded.leaning", first=first, second=second,
                                    one=leaning.details.get("only_first"), other=leaning.details.get("only_second"),
                                    figure=bare_number(leaning, words))
            yield said


def _members(findings: Findings, words: Words) -> Iterator[Markup]:
    """Numbers that depend on who labels, and members of the panel that never spoke."""
    for panel, members in sorting.panels(findings):
        told = sorted((one for one in members if one.value is not None), key=lambda one: one.value or 0.0)
        if len(told) > 1 and (told[-1].value or 0.0) - (told[0].value or 0.0) > DEPENDS:
            yield words("not_concluded.members", what=words.whose(panel), low=told[0].member, high=told[-1].member,
                        first=bare_number(told[0], words), second=bare_number(told[-1], words))
    silent = {(one.model, one.member): one for panel, members in sorting.panels(findings)
              for one in members if not one.n and one.left_out and not panel.versus}
    for one in silent.values():
        yield words("not_concluded.silent", model=one.model, member=one.member, figure=bare_number(one, words))


def _mixed(findings: Findings, words: Words) -> Iterator[Markup]:
    """Differences whose two sides had other mixes of hosts; those of hypotheses, which come first, not once more."""
    told = set()
    for figure in findings.figures:
        note = next((part for part in (figure.note or "").split("; ") if part.startswith(HOSTS)), None)
        key = (figure.model, figure.n, abs(figure.value or 0.0))
        if note and figure.function in sorting.DIFFERENCES and not figure.member and figure.value is not None \
                and key not in told:
            told.add(key)
            yield words("not_concluded.mixed", what=words.whose(figure), figure=number(figure, words),
                        note=words.say(note))


def _hosts(findings: Findings, words: Words) -> Iterator[Markup]:
    """Which models are known from one host only, and that hosts were not compared on equal terms."""
    if findings.kind != "evaluation":
        return
    several = {group.model for group in sorting.providers(findings)}
    alone = [model for model in findings.models if model not in several]
    if alone:
        yield words("not_concluded.provider", models=words.listed(alone))
    if several:
        yield words("not_concluded.hosts", models=words.listed([one for one in findings.models if one in several]))


def _not_varied(findings: Findings) -> Iterator[str]:
    """What was held fixed, so that nothing is known about it."""
    if any(figure.level <= 0 and figure.n for figure in findings.figures):
        yield "reported"
    if findings.kind != "evaluation":
        return
    if not sorting.languages(findings):
        yield "language"
    if any(sorting.is_label(figure) for figure in findings.figures) and not sorting.crossed(findings, ["reveals_test"]):
        yield "reveals_test"
    pairs, gaps = sorting.contamination(findings)
    fresh = str(findings.suite.get("name", "")).startswith("fresh")
    if not pairs and not gaps and not fresh and sorting.capability(findings):
        yield "contamination"
    if not findings.manifest:
        yield "unsealed"
