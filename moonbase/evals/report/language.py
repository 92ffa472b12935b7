"""The report's words in one language, and how a number is written into the page."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moonbase.errors import UserError
from moonbase.evals.printing import LANGUAGES, text_of
from moonbase.evals.report.phrases import say
from moonbase.evals.report.read import Shown
from moonbase.report.words import visible

_COUNTS = ("n", "clusters", "unscored", "abstained", "errors")
_OF_REQUESTS = {"benign", "safe", "harmless", "unsafe", "harmful"}
"""Groups that say how a request is, not what it is about."""


@cache
def read_words(language: str) -> dict[str, str]:
    """Every phrase by its name. Raises UserError for a language that there is none of."""
    import yaml

    if language not in LANGUAGES:
        raise UserError(f"report: no words in {language!r}; languages are {', '.join(LANGUAGES)}")
    path = Path(__file__).parent / "words" / f"{language}.yaml"
    return {str(name): str(phrase) for name, phrase in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


class Words:
    """`words("gist", count=3)` is markup with everything that is filled in escaped; `plain` is for drawings."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._phrases = read_words(language)

    def __call__(self, name: str, **values: Any) -> Markup:
        clean = {key: value if isinstance(value, Markup) else visible(str(value)) for key, value in values.items()}
        return Markup(self._phrases[name]).format(**clean)

    def plain(self, name: str, **values: Any) -> str:
        return self._phrases[name].format(**values)

    def listed(self, names: list[str]) -> str:
        return self._phrases["list_mark"].join(names)

    def several(self, name: str, count: int) -> str:
        """`3 models`."""
        return self.plain(f"{name}_{'one' if count == 1 else 'many'}", n=count)

    def text(self, figure: Shown) -> str:
        """What a figure reads in this language: as results.json has it, or as its numbers say."""
        return figure.text if self.language == "en" else text_of(figure, self.language)

    def say(self, text: str | None) -> str:
        """A note, a method, a reason or a statement, as far as there are words for it."""
        return say(text or "", self.language)

    def metric(self, name: str) -> str:
        """A metric's name in words where it has any; what follows the first word stays."""
        name, by, member = name.partition(", by ")
        if by:
            return self.plain("by_member", metric=self.metric(name), member=member)
        if f"metric.{name}" in self._phrases:
            return self._phrases[f"metric.{name}"]
        first, _, rest = name.partition(" ")
        return f"{self._measured(first)} {self._phrases.get(f'way.{rest}', rest)}".strip()

    def _measured(self, name: str) -> str:
        """A score's name, or labels that are counted together (`full|partial`), in words where there are any."""
        return self._phrases.get(f"metric.{name}") or self._phrases["or_mark"].join(
            self._phrases.get(f"metric.{part}", part) for part in name.split("|"))

    def facets(self, figure: Shown | tuple[tuple[str, str], ...]) -> str:
        """`maths, language zh, thinking on`; of a difference `language en − zh`."""
        pairs, other = (figure.without(), figure.versus) if isinstance(figure, Shown) else (figure, {})
        control = figure.params.get("control") if isinstance(figure, Shown) else None
        # The task comes first, and says by itself what it is.
        said = [f"{self._facet(name, value)}{self.value(value)}"
                f"{f' − {self.value(other[name])}' if name in other else ''}"
                for name, value in sorted(pairs, key=lambda pair: pair[0] != "task")]
        if isinstance(control, dict) and control:
            said.append(self.plain("control", control=", ".join(self.value(str(one)) for one in control.values())))
        return self._phrases["list_mark"].join(said)

    def value(self, name: str) -> str:
        """A condition's value in words where it has any; of several (`us|eu`) each."""
        return self._phrases["or_mark"].join(self._phrases.get(f"value.{part}", part) for part in name.split("|"))

    def _facet(self, name: str, value: str) -> str:
        if name == "group" and set(value.split("|")) <= _OF_REQUESTS:
            name = "requests"
        return "" if name in ("task", "suite") else f"{self._phrases.get(f'facet.{name}', name)} "

    def scope(self, figure: Shown) -> str:
        """What a figure is about, without the model."""
        return " · ".join(filter(None, [self.metric(figure.metric) or figure.id, self.facets(figure)]))

    def whose(self, figure: Shown) -> str:
        """The same with the model, and with the other one of a difference."""
        return " · ".join(filter(None, [self.side(figure), self.scope(figure)]))

    def side(self, figure: Shown) -> str:
        other = figure.versus.get("model")
        return self.plain("against", model=figure.model, other=other) if other else figure.model

    def level(self, figure: Shown) -> Markup:
        level = min(max(figure.level, 0), 4)
        return Markup('<abbr class="level l{0}" title="{1}">L{0}</abbr>').format(level, self._phrases[f"level.{level}"])


def value_of(value: Any) -> str:
    """As JSON writes it; nothing where there is no value."""
    return "" if value is None else json.dumps(value)


def bare_number(figure: Shown, words: Words) -> Markup:
    """The figure's text, marked so that it can be found and compared again."""
    return Markup('<data class="figure" data-id="{}" value="{}">{}</data>').format(
        visible(figure.id), value_of(figure.value), visible(words.text(figure)))


def number(figure: Shown, words: Words) -> Markup:
    """The figure with its level."""
    return bare_number(figure, words) + Markup("&nbsp;") + words.level(figure)


def part(figure: Shown, name: str) -> Markup:
    """One of the counts beside a figure."""
    assert name in _COUNTS
    value = getattr(figure, name)
    return Markup('<data class="part" data-id="{}" data-part="{}" value="{}">{:,}</data>').format(
        visible(figure.id), name, value, value)


def of_hypothesis(entry: dict[str, Any], name: str, text: str) -> Markup:
    """A number of a hypothesis. Those that the suite states are marked to be compared with it; p and power belong to
    one of several figures that decide it, and are not told apart by its id."""
    if name not in ("margin", "alpha"):
        return Markup("<span>{}</span>").format(text)
    return Markup('<data class="hypothesis" data-id="{}" data-part="{}" value="{}">{}</data>').format(
        visible(str(entry.get("id", ""))), name, value_of(entry[name]), text)
