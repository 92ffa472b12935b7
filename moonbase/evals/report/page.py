"""From an evaluation folder to its page: what is said, in which order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moonbase.evals.report.conclusions import figure_of, hypotheses_of, not_concluded, side_of
from moonbase.evals.report.language import LANGUAGES, Words, number, of_hypothesis, part
from moonbase.evals.report.parts import Parts
from moonbase.evals.report.read import Findings, Shown, read_findings
from moonbase.evals.report.sorting import is_rate
from moonbase.evals.report.table import write_table
from moonbase.files import write_text
from moonbase.report.words import compact, visible

_HERE = Path(__file__).parent
_MOST_TILES = 6
_MOST_FIELDS = 60
_SYMBOLS = {"better": "▲", "worse": "▼", "equivalent": "=", "non_inferior": "≥", "undecided": "?", "above": "▲",
            "below": "▼", "different": "≠", "none": "–", "yes": "✓", "no": "✗"}
_BEARINGS = {"supported": "✓", "contradicted": "✗", "undecided": "?"}
_CORRECTED = re.compile(r"p = \S+ after correction")
"""A reason that is among the numbers already."""
_ENDS_IN_P = re.compile(r"[,，] ?p = (\S+)$")
# Parts of the manifest that are long, or stand elsewhere on the page.
_LEFT_TO_THE_FILE = ("installed", "hypotheses", "figures", "suite")


def write_report(folder: str | Path, language: str = "en") -> Path:
    """Write report.html (or report.zh.html) and results.csv into an evaluation folder; returns the page's path.

    The same results.json, suite.json and manifest.json give the same bytes. Raises UserError where results.json is
    absent or broken, or where the folder cannot be written.
    """
    folder = Path(folder)
    page = render_report(folder, language)
    path = folder / Words(language).plain("file")
    write_text(path, page)
    write_table(folder)
    return path


def write_reports(folder: str | Path) -> list[Path]:
    """The report in every language."""
    return [write_report(folder, language) for language in LANGUAGES]


def render_report(folder: str | Path, language: str = "en") -> str:
    """The whole page as text, from what the folder holds."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    import moonbase.report

    findings, words = read_findings(folder), Words(language)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)))
    shared = Path(moonbase.report.__file__).parent / "style.css"
    style = Markup("\n".join(path.read_text(encoding="utf-8") for path in (shared, _HERE / "style.css")))
    environment.globals |= {
        "words": words, "number": lambda figure: number(figure, words), "part": part, "level": words.level}
    return environment.get_template("template.html.jinja").render(style=style, **_content(findings, words))


def _content(findings: Findings, words: Words) -> dict[str, Any]:
    suite, models = findings.suite, findings.models
    parts, absent = Parts(findings, words).all()
    hypotheses = hypotheses_of(findings)
    compared = findings.plan.get("compared")
    asked = ("checkpoints", len(compared) - 1) if findings.kind == "fine_tuning" and isinstance(compared, list) else \
        ("models", len(models))
    tasks = suite.get("tasks")
    tasks = len(tasks) if isinstance(tasks, list) else \
        len({figure.facets["task"] for figure in findings.figures if "task" in figure.facets}) or 1
    plain, tuning = findings.kind == "evaluation", findings.kind == "fine_tuning"
    title, about = words.say(_text(suite.get("title"))), words.say(_text(suite.get("about")))
    if not plain:
        title, about = words.plain(f"{findings.kind}.title", models=words.listed(findings.models)), title
    return {
        "kind": "" if plain else f"{findings.kind}.",
        "title": title or _text(suite.get("name")) or words.plain("overline"),
        "about": about, "sealed": bool(findings.manifest), "models": models,
        "lead": words.plain("lead", models=words.several(*asked), tasks=words.several("tasks", tasks)),
        "notes": _notes(findings, words), "tiles": [] if tuning else _tiles(findings), "parts": parts, "absent": absent,
        "hypotheses": _hypotheses(findings, hypotheses, words),
        "not_concluded": not_concluded(findings, hypotheses, words), "figures": findings.figures,
        "suite_fields": _fields({name: value for name, value in (suite | findings.plan).items()
                                 if name not in ("hypotheses", "title", "about")}),
        "manifest_fields": _fields(findings.manifest),
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _notes(findings: Findings, words: Words) -> list[str]:
    notes = []
    if findings.kind != "evaluation":
        notes.append("no_bundle")
    elif not findings.manifest:
        notes.append("no_manifest")
    if not findings.suite:
        notes.append("no_suite")
    if findings.manifest.get("dirty") is True:
        notes.append("dirty")
    if any(figure.left_out for figure in findings.figures):
        notes.append("left_out_note")
    short = [words.plain("missing", model=model, task=task, found=numbers[0], wanted=numbers[1])
             for model, tasks in (findings.manifest.get("missing") or {}).items() for task, numbers in tasks.items()]
    return [words.plain(name) for name in notes] + short + [words.say(note) for note in findings.notes]


def _tiles(findings: Findings) -> list[Shown]:
    """The suite's main metric, one tile a model, over all conditions."""
    metric, found = findings.suite.get("metric"), {}
    means = sorted((figure for figure in findings.figures if figure.function == "mean" and is_rate(figure)),
                   key=lambda figure: len(figure.facets))
    named = [figure for figure in means if metric in (figure.metric, figure.source.partition(":")[2])]
    # Where the metric goes by another name in the records, the first that is measured over everything.
    for figure in named or [figure for figure in means if figure.metric == means[0].metric]:
        found.setdefault(figure.model, figure)
    # Models of which the same was asked; a checkpoint of a curve is not one of them.
    least = min((len(figure.facets) for figure in found.values()), default=0)
    found = {model: figure for model, figure in found.items() if len(figure.facets) == least}
    return [found[model] for model in findings.models if model in found][:_MOST_TILES]


def _hypotheses(findings: Findings, entries: list[dict[str, Any]], words: Words) -> list[tuple[str, list[Any]]]:
    """Each statement with the rulings on it, one a model or a pair of them."""
    found: dict[str, list[Any]] = {}
    for entry in entries:
        one = _hypothesis(findings, entry, words)
        found.setdefault(one["statement"], []).append(one)
    return list(found.items())


def _hypothesis(findings: Findings, entry: dict[str, Any], words: Words) -> dict[str, Any]:
    """One hypothesis with its verdict and every number that the results give for it."""
    verdict = entry.get("verdict") if entry.get("verdict") in _SYMBOLS else "none"
    kind = _text(entry.get("kind"))
    note = _reason(entry, words)
    if entry.get("read_off"):
        note = words.plain("read_off")
    bearing = entry.get("statement_is") if entry.get("statement_is") in _BEARINGS else ""
    numbers = []
    for name, word in (("margin", "margin"), ("alpha", "alpha"), ("p_value", "p"), ("adjusted_p_value", "p_adjusted"),
                       ("power", "power_for"), ("n_needed", "needed_for")):
        value = entry.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            text = f"{value:.0%}" if name == "power" else f"{value:,.0f}" if name == "n_needed" else compact(value)
            margin = entry.get("margin")
            size = compact(100 * (margin if isinstance(margin, int | float) and margin else 0.05))
            numbers.append((words.plain(word, size=size), of_hypothesis(entry, name, text)))
    figure = figure_of(findings, entry)
    statement = words.say(_text(entry.get("statement")) or _text(entry.get("id")))
    of_two = entry.get("first") and entry.get("second")
    if of_two and not bearing and figure and figure.function == "difference_in_differences":
        note = words.plain("list_mark").join(filter(None, [note, words.plain("of_each")]))
    tone = entry.get("tone") if entry.get("tone") in _SYMBOLS else verdict
    return {"side": side_of(entry, figure, words), "tone": tone, "statement": statement, "verdict": verdict,
            "bearing": bearing, "bears": words.plain(f"bearing.{bearing}") if bearing else "",
            "mark": _BEARINGS.get(bearing, ""),
            "symbol": _SYMBOLS[verdict], "word": words.plain(f"verdict.{verdict}"), "numbers": numbers,
            "kind": words.plain(f"kind.{kind}") if kind in ("superiority", "non_inferiority", "equivalence") else kind,
            "note": note, "figure": figure}


def _reason(entry: dict[str, Any], words: Words) -> str:
    """In words, without the p-value that stands among the numbers already."""
    reason, adjusted = _text(entry.get("note") or entry.get("reason")), entry.get("adjusted_p_value")
    if not isinstance(adjusted, int | float):
        return words.say(reason)
    if _CORRECTED.fullmatch(reason):
        return ""
    said = words.say(reason)
    end = _ENDS_IN_P.search(said)
    return said[:end.start()] if end and end[1] == f"{adjusted:.2g}" else said


def _fields(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The simple entries of an object, by their dotted names."""
    found: list[tuple[str, str]] = []

    def visit(name: str, value: Any, depth: int) -> None:
        if isinstance(value, dict) and depth < 4:
            for key, inner in value.items():
                if key not in _LEFT_TO_THE_FILE:
                    visit(f"{name}.{key}" if name else str(key), inner, depth + 1)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value) and depth < 4:
            for place, inner in enumerate(value):
                visit(f"{name}.{place}", inner, depth + 1)
        elif value not in (None, "", [], {}) and len(found) < _MOST_FIELDS:
            written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append((name, written[:400]))

    visit("", values, 0)
    return found
