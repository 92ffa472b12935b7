"""The charts of the report with their words and tables; each is None where its figures do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup

from moonbase.evals.printing import rate_text
from moonbase.evals.report import drawings, sorting
from moonbase.evals.report.drawings import MOST_ROWS, Row, key_icon
from moonbase.evals.report.language import Words
from moonbase.evals.report.read import Findings, Shown
from moonbase.evals.report.sorting import Group

MOST_PANELS = 4
MOST_COEFFICIENTS = 16
MOST_LABELLED = 5
"""Figures of the panel that are drawn with its members below them; those that depend most on who labels."""
NAMES = {
    "evaluation": ("capability", "differences", "refusal", "languages", "controlled", "providers", "contamination",
                   "cost", "members", "agreement", "dose"),
    "comparison": ("differences", "controlled", "capability", "refusal"),
    "fine_tuning": ("dose", "changes"),
}
"""Parts of a page, in order, by what it reports."""
OPTIONAL = ("members",)
"""Parts that are not missed where they are absent."""
NAMED_IN_DESCRIPTION = 8


@dataclass(frozen=True)
class Panel:
    """One drawing in two sizes. `heading` tells it from the other panels of its part."""

    wide: Markup
    compact: Markup
    heading: str = ""


@dataclass(frozen=True)
class Part:
    """One section of the report: panels, a legend of (mark, name), and the figures of its table."""

    name: str
    panels: list[Panel]
    figures: list[Shown]
    legend: list[tuple[Markup, str]] = field(default_factory=list)
    drawn: int | None = None
    """How many rows are drawn, where that is not all of them."""
    of: int = 0


def common_start(names: Sequence[str]) -> str:
    """What all names begin with, up to a mark that divides them; nothing where there is one name only."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    length = next((place for place, letter in enumerate(first) if last[place : place + 1] != letter), len(first))
    return first[: max(first.rfind("/", 0, length), first.rfind(":", 0, length)) + 1]


class Parts:
    """Draws every part of one report in one language."""

    def __init__(self, findings: Findings, words: Words) -> None:
        self.findings, self.words = findings, words
        self.styles = {model: place for place, model in enumerate(findings.models)}
        self._start = len(common_start(findings.models))

    def all(self) -> tuple[list[Part], list[str]]:
        """(what there is, names of what there is not)."""
        parts = {name: getattr(self, f"_{name}")() for name in NAMES[self.findings.kind]}
        absent = [name for name, part in parts.items() if not part and name not in OPTIONAL]
        return [part for part in parts.values() if part], absent if self.findings.kind == "evaluation" else []

    def _called(self, model: str) -> str:
        """A model's name without the beginning that all of them share (`replay/paired-politics:`); tables have all."""
        return model[self._start :] if model in self.styles else model

    def _scope(self, figure: Shown) -> str:
        """What a figure is about; the model of a control by its short name."""
        control = figure.params.get("control")
        if isinstance(control, dict) and "model" in control:
            control = control | {"model": self._called(str(control["model"]))}
            figure = replace(figure, params=figure.params | {"control": control})
        return self.words.scope(figure)

    def _title(self, name: str) -> str:
        return self.words.plain(name)

    def _said(self, figure: Shown) -> str:
        """The number as it stands beside its mark, with its level: short enough to be there whole on a phone."""
        text = self.words.text(figure)
        if figure.unit == "rate" and figure.value in (0.0, 1.0):
            text = rate_text(figure.value, figure.low, figure.high, figure.n, 0, self.words.language, brief=True)
        return f"{text}  L{min(max(figure.level, 0), 4)}"

    def _describe(self, name: str, figures: Sequence[Shown]) -> str:
        """The first few numbers in words; the table has them all."""
        said = [f"{self.words.whose(figure)}: {self.words.text(figure)}" for figure in figures[:NAMED_IN_DESCRIPTION]]
        if len(figures) > NAMED_IN_DESCRIPTION:
            said.append(self.words.plain("and_more", count=len(figures) - NAMED_IN_DESCRIPTION))
        return self.words.plain("gist_list", title=self._title(name), list="; ".join(said))

    def _panel(self, drawn: tuple[str, str], heading: str = "") -> Panel:
        return Panel(Markup(drawn[0]), Markup(drawn[1]), heading)

    def _models(self, models: Sequence[str], line: bool = False) -> list[tuple[Markup, str]]:
        return [(Markup(key_icon(self.styles[model], line=line)), self._called(model))
                for model in dict.fromkeys(models)]

    def _rows(self, figures: Sequence[Shown], own: str = "") -> list[Row]:
        """Under a heading for each thing measured, one row a model, or one for each value of the condition `own`."""
        under: dict[str, list[Row]] = {}
        values = list(dict.fromkeys(figure.facets.get(own) for figure in figures))
        for figure in figures:
            heading, label = self._scope(figure), self._called(figure.model) or figure.id
            style = self.styles.get(figure.model, 0)
            if own:
                heading = " · ".join(filter(None, [self._called(figure.model), self.words.metric(figure.metric),
                                                   self.words.facets(figure.without(own))]))
                label, style = self.words.value(figure.facets.get(own, "")), values.index(figure.facets.get(own))
            elif "model" in figure.versus:
                heading = self.words.plain("against", model=self._called(figure.model), other="…") + f" · {heading}"
                label = self._called(figure.versus["model"])
            under.setdefault(heading, []).append(Row(label, ((figure, style, True),), self._said(figure)))
        return [row for heading, rows in under.items() for row in (Row(heading), *rows)]

    def _forest(self, name: str, figures: list[Shown], rows: list[Row] | None = None, **more: object) -> Part | None:
        drawable = [figure for figure in figures if figure.value is not None]
        if not drawable:
            return None
        shown = drawable[:MOST_ROWS]
        drawn = drawings.forest(name, self._title(name), self._describe(name, figures),
                                self._rows(shown) if rows is None else rows, **more)
        return Part(name, [self._panel(drawn)], figures,
                    drawn=len(shown) if len(shown) < len(figures) else None, of=len(figures))

    def _capability(self) -> Part | None:
        return self._forest("capability", sorting.capability(self.findings))

    def _differences(self) -> Part | None:
        figures = sorted(sorting.differences(self.findings), key=lambda one: len(one.facets))
        return self._forest("differences", figures, reference=0.0, signed=True)

    def _controlled(self) -> Part | None:
        figures, once = sorting.controlled(self.findings), {}
        for figure in figures:
            # A hypothesis and the whole task may ask the same; it is drawn once.
            groups = tuple(frozenset(side.get("group", "").split("|")) for side in (figure.facets, figure.versus))
            once.setdefault((figure.model, figure.value, figure.low, figure.high, figure.without("task", "group"),
                             groups), figure)
        shown = [figure for figure in once.values() if figure.value is not None][:MOST_ROWS]
        part = self._forest("controlled", figures, self._rows(shown), reference=0.0, signed=True)
        return part and replace(part, drawn=len(shown) if len(shown) < len(figures) else None)

    def _cost(self) -> Part | None:
        return self._forest("cost", sorting.costs(self.findings), money=True)

    def _agreement(self) -> Part | None:
        figures = sorting.agreement(self.findings)
        # The raw share is no coefficient: it has another axis, and stands in the table only.
        # Nor is a κ of 0 without an interval drawn: one of the two always said the same word.
        drawn = [figure for figure in figures if figure.unit != "rate" and figure.value is not None
                 and (figure.low is not None or figure.value)]
        whole, drawn = len(figures), drawn[:MOST_COEFFICIENTS]
        if not drawn:
            return None
        part = self._forest("agreement", figures, self._rows(drawn), bounds=(0.667, 0.8))
        return part and replace(part, figures=[*figures, *sorting.leanings(self.findings)], of=whole,
                                drawn=len(drawn) if len(drawn) < whole else None)

    def _members(self) -> Part | None:
        """Numbers of the panel over those of its members: differences and rates have axes of their own."""
        known = sorting.panels(self.findings)
        panels, drawn = [], 0
        for key, compared in (("members-differences", True), ("members-rates", False)):
            chosen = {}
            for panel, members in known:
                if bool(panel.versus) == compared and panel.value is not None:
                    # A hypothesis may ask for a difference that is there anyway, with the other sign.
                    same = (panel.model, panel.source, panel.without("task", *(["language"] if compared else [])))
                    chosen.setdefault(same, (panel, members))
            rows = []
            for panel, members in list(chosen.values())[:MOST_LABELLED]:
                own = " · ".join(filter(None, [self._called(panel.model), self.words.scope(panel)]))
                rows.append(Row(own))
                rows.append(Row(self._title("panel"), ((panel, 0, True),), self._said(panel)))
                rows += [Row(one.member, ((one, 1, False),), self._said(one)) for one in members]
                drawn += 1 + len(members)
            if rows:
                own = [figure for row in rows for figure, _, _ in row.points]
                panels.append(self._panel(drawings.forest(
                    key, self._title("members"), self._describe("members", own), rows,
                    reference=0.0 if compared else None, signed=compared)))
        figures = [figure for panel, members in known for figure in (panel, *members)]
        return Part("members", panels, figures, drawn=drawn if drawn < len(figures) else None,
                    of=len(figures)) if panels else None

    def _changes(self) -> Part | None:
        figures = sorting.changes(self.findings)
        shown = [figure for figure in figures if figure.value is not None][:MOST_ROWS]
        return self._forest("changes", figures, self._rows(shown, own="dose"), reference=0.0, signed=True)

    def _providers(self) -> Part | None:
        groups = sorting.providers(self.findings)
        figures = [figure for group in groups for figure in group.figures]
        shown = [figure for group in groups for _, figure in group.members if figure.value is not None][:MOST_ROWS]
        part = self._forest("providers", figures, self._rows(shown, own="provider"))
        return part and Part(part.name, part.panels, figures, drawn=len(shown) if len(shown) == MOST_ROWS else None,
                             of=len(figures))

    def _contamination(self) -> Part | None:
        pairs, gaps = sorting.contamination(self.findings)
        panels, figures = [], [figure for group in pairs for _, figure in group.members]
        rows = [Row(self._called(group.model), tuple((figure, self.styles.get(group.model, 0), kind == "public")
                                       for kind, figure in group.members),
                    self._said(group.difference) if group.difference else "") for group in pairs][:MOST_ROWS]
        name, description = self._title("contamination"), self._describe("contamination", [*figures, *gaps])
        if rows:
            panels.append(self._panel(drawings.forest("contamination", name, description, rows, joined=True)))
        elif any(figure.value is not None for figure in gaps):
            panels.append(self._panel(drawings.forest(
                "contamination", name, description, self._rows(gaps[:MOST_ROWS]), reference=0.0, signed=True),
                self._title("contamination_gap")))
        legend = [(Markup(key_icon(0)), self._title("public")), (Markup(key_icon(0, filled=False)),
                                                                self._title("fresh"))] if rows else []
        return Part("contamination", panels, [*figures, *gaps], legend) if panels else None

    def _refusal(self) -> Part | None:
        points = [(self._called(model), harmful, harmless, self.styles[model])
                  for model, harmful, harmless in sorting.refusals(self.findings)
                  if harmful.value is not None and harmless.value is not None]
        if not points:
            return None
        figures = [figure for _, harmful, harmless, _ in points for figure in (harmful, harmless)]
        drawn = drawings.plane("refusal", self._title("refusal"), self._describe("refusal", figures), points)
        legend = self._models([harmful.model for _, harmful, _, _ in points])
        return Part("refusal", [self._panel(drawn)], figures, legend)

    def _by_measure(self, groups: list[Group]) -> dict[str, list[Group]]:
        """Groups that can share one pair of axes, by what they measure."""
        found: dict[str, list[Group]] = {}
        for group in groups:
            found.setdefault(self._measure(group), []).append(group)
        return found

    def _measure(self, group: Group) -> str:
        return " · ".join(filter(None, [self.words.metric(group.metric), self.words.facets(group.facets)]))

    def _languages(self) -> Part | None:
        groups = [group for group in sorting.languages(self.findings)
                  if group["en"].value is not None and group["zh"].value is not None]
        if not groups:
            return None
        figures = [figure for group in groups for figure in (group["en"], group["zh"], group.difference) if figure]
        panels = []
        for number, (heading, alike) in enumerate(list(self._by_measure(groups).items())[:MOST_PANELS]):
            alike = alike[: len(drawings.STYLES)]
            own = [figure for group in alike for figure in group.figures]
            drawn = drawings.slopes(f"languages-{number}", f"{self._title('languages')}: {heading}",
                                    self._describe("languages", own),
                                    [(replace(group, model=self._called(group.model)),
                                      self.styles.get(group.model, 0)) for group in alike], ("en", "zh"),
                                    (self._title("mark.en"), self._title("mark.zh")))
            panels.append(self._panel(drawn, heading))
        return Part("languages", panels, figures, self._models([group.model for group in groups], line=True))

    def _dose(self) -> Part | None:
        groups = sorting.doses(self.findings)
        if not groups:
            return None
        panels = []
        measures = list(self._by_measure(groups))[: len(drawings.STYLES)]
        for number, model in enumerate(list(dict.fromkeys(group.model for group in groups))[:MOST_PANELS]):
            own = [(group, measures.index(self._measure(group))) for group in groups
                   if group.model == model and self._measure(group) in measures]
            drawn = drawings.curves(f"dose-{number}", f"{self._title('dose')}: {model}",
                                    self._describe("dose", [one for group, _ in own for one in group.figures]), own)
            panels.append(self._panel(drawn, model))
        legend = [(Markup(key_icon(style, line=True)), measure) for style, measure in enumerate(measures)]
        figures = [figure for group in groups for figure in group.figures] + sorting.slopes(self.findings)
        return Part("dose", panels, figures, legend)
