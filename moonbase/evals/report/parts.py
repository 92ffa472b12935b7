"""The charts of the report with their words and tables; each is None where its figures do not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from moonbase.evals.report import drawings, sorting
from moonbase.evals.report.drawings import MOST_ROWS, Row, key_icon
from moonbase.evals.report.language import Words
from moonbase.evals.report.read import Findings, Shown
from moonbase.evals.report.sorting import Group

MOST_PANELS = 4
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


class Parts:
    """Draws every part of one report in one language."""

    NAMES = ("capability", "differences", "refusal", "languages", "controlled", "providers", "contamination", "cost",
             "agreement", "dose")

    def __init__(self, findings: Findings, words: Words) -> None:
        self.findings, self.words = findings, words
        # Letters inside a drawing are Latin, which every reader's fonts have; the page around it speaks the language.
        self.inside = Words("en")
        self.styles = {model: place for place, model in enumerate(findings.models)}

    def all(self) -> tuple[list[Part], list[str]]:
        """(what there is, names of what there is not)."""
        parts = {name: getattr(self, f"_{name}")() for name in self.NAMES}
        return [part for part in parts.values() if part], [name for name, part in parts.items() if not part]

    def _title(self, name: str) -> str:
        return self.words.plain(name)

    def _describe(self, name: str, figures: Sequence[Shown]) -> str:
        """The first few numbers in words; the table has them all."""
        said = [f"{self.words.whose(figure)}: {figure.text}" for figure in figures[:NAMED_IN_DESCRIPTION]]
        if len(figures) > NAMED_IN_DESCRIPTION:
            said.append(self.words.plain("and_more", count=len(figures) - NAMED_IN_DESCRIPTION))
        return self.words.plain("gist_list", title=self._title(name), list="; ".join(said))

    def _panel(self, drawn: tuple[str, str], heading: str = "") -> Panel:
        return Panel(Markup(drawn[0]), Markup(drawn[1]), heading)

    def _models(self, models: Sequence[str], line: bool = False) -> list[tuple[Markup, str]]:
        return [(Markup(key_icon(self.styles[model], line=line)), model) for model in dict.fromkeys(models)]

    def _rows(self, figures: Sequence[Shown], own: str = "") -> list[Row]:
        """Under a heading for each thing measured, one row a model, or one for each value of the condition `own`."""
        under: dict[str, list[Row]] = {}
        values = list(dict.fromkeys(figure.facets.get(own) for figure in figures))
        for figure in figures:
            heading, label = self.inside.scope(figure), figure.model or figure.id
            style = self.styles.get(figure.model, 0)
            if own:
                heading = " · ".join(filter(None, [figure.model, self.inside.metric(figure.metric),
                                                   self.inside.facets(figure.without(own))]))
                label, style = figure.facets.get(own, ""), values.index(figure.facets.get(own))
            elif "model" in figure.versus:
                heading = self.inside.plain("against", model=figure.model, other="…") + f" · {heading}"
                label = figure.versus["model"]
            under.setdefault(heading, []).append(Row(label, ((figure, style, True),), figure.text))
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
        return self._forest("controlled", sorting.controlled(self.findings), reference=0.0, signed=True)

    def _cost(self) -> Part | None:
        return self._forest("cost", sorting.costs(self.findings), money=True)

    def _agreement(self) -> Part | None:
        figures = sorting.agreement(self.findings)
        # The raw share is no coefficient: it has another axis, and stands in the table only.
        drawn = [figure for figure in figures if figure.unit != "rate" and figure.value is not None][:MOST_ROWS]
        return self._forest("agreement", figures, self._rows(drawn), bounds=(0.667, 0.8)) if drawn else None

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
        rows = [Row(group.model, tuple((figure, self.styles.get(group.model, 0), kind == "public")
                                       for kind, figure in group.members),
                    group.difference.text if group.difference else "") for group in pairs][:MOST_ROWS]
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
        points = [(model, harmful, harmless, self.styles[model])
                  for model, harmful, harmless in sorting.refusals(self.findings)
                  if harmful.value is not None and harmless.value is not None]
        if not points:
            return None
        figures = [figure for _, harmful, harmless, _ in points for figure in (harmful, harmless)]
        drawn = drawings.plane("refusal", self._title("refusal"), self._describe("refusal", figures), points)
        return Part("refusal", [self._panel(drawn)], figures, self._models([point[0] for point in points]))

    def _by_measure(self, groups: list[Group]) -> dict[str, list[Group]]:
        """Groups that can share one pair of axes, by what they measure."""
        found: dict[str, list[Group]] = {}
        for group in groups:
            heading = " · ".join(filter(None, [self.words.metric(group.metric), self.words.facets(group.facets)]))
            found.setdefault(heading, []).append(group)
        return found

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
                                    [(group, self.styles.get(group.model, 0)) for group in alike], ("en", "zh"),
                                    ("EN", "ZH"))
            panels.append(self._panel(drawn, heading))
        return Part("languages", panels, figures, self._models([group.model for group in groups], line=True))

    def _dose(self) -> Part | None:
        groups = sorting.doses(self.findings)
        if not groups:
            return None
        panels = []
        for number, model in enumerate(list(dict.fromkeys(group.model for group in groups))[:MOST_PANELS]):
            own = [group for group in groups if group.model == model][: len(drawings.STYLES)]
            drawn = drawings.curves(f"dose-{number}", f"{self._title('dose')}: {model}",
                                    self._describe("dose", [one for group in own for one in group.figures]),
                                    [(group, style) for style, group in enumerate(own)])
            panels.append(self._panel(drawn, model))
        measures = list(self._by_measure(groups))[: len(drawings.STYLES)]
        legend = [(Markup(key_icon(style, line=True)), measure) for style, measure in enumerate(measures)]
        return Part("dose", panels, [figure for group in groups for figure in group.figures], legend)
