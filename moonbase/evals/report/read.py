"""What a report is made of: results.json, and suite.json and manifest.json where they exist."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moonbase.errors import UserError

SCHEMA = "moonbase.results/1"
KINDS = ("evaluation", "comparison", "fine_tuning")


@dataclass(frozen=True)
class Shown:
    """One figure of results.json. `facets` are the conditions under which it holds, the model and its name aside."""

    id: str
    text: str
    metric: str = ""
    model: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    level: int = 0
    n: int = 0
    clusters: int = 0
    unscored: int = 0
    abstained: int = 0
    errors: int = 0
    method: str = ""
    note: str | None = None
    facets: dict[str, str] = field(default_factory=dict)
    function: str = ""
    source: str = ""
    """What is measured: `score:accuracy`, `label:refusal`, ..."""
    versus: dict[str, str] = field(default_factory=dict)
    """The other side of a difference; empty: the figure is not one."""
    params: dict[str, Any] = field(default_factory=dict)
    unit: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    p_value: float | None = None

    @property
    def member(self) -> str:
        """The member of the panel whose votes alone it counts; empty: it is of the panel's labels, or of no labels."""
        return str(self.params.get("member", ""))

    @property
    def left_out(self) -> int:
        return self.unscored + self.abstained + self.errors

    def without(self, *names: str) -> tuple[tuple[str, str], ...]:
        """Its conditions except some, as a key to group by."""
        return tuple(sorted((name, value) for name, value in self.facets.items() if name not in names))


@dataclass(frozen=True)
class Findings:
    """Everything the report knows."""

    figures: tuple[Shown, ...]
    hypotheses: tuple[dict[str, Any], ...]
    suite: dict[str, Any]
    """The suite; what else suite.json holds (models, seed) is in `plan`."""
    plan: dict[str, Any]
    manifest: dict[str, Any]
    kind: str = "evaluation"
    """Or `comparison`, `fine_tuning`: what is found by laying evaluations side by side."""
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """In the order in which the figures name them."""
        return list(dict.fromkeys(figure.model for figure in self.figures if figure.model))

    def figure(self, name: Any) -> Shown | None:
        return self._by_id.get(name) if isinstance(name, str) else None

    @cached_property
    def _by_id(self) -> dict[str, Shown]:
        return {figure.id: figure for figure in self.figures}


def read_findings(folder: str | Path) -> Findings:
    """Raises UserError where results.json is absent or not what it should be; the other two files may be missing."""
    folder = Path(folder)
    path = folder / "results.json"
    results = _object(path, required=True)
    if results.get("schema") != SCHEMA:
        raise UserError(f"{path}: `schema` is {results.get('schema')!r}, this version reads {SCHEMA!r}")
    entries = results.get("figures")
    if not isinstance(entries, list):
        raise UserError(f"{path}: `figures` must be a list")
    figures = tuple(_figure(path, number, entry) for number, entry in enumerate(entries))
    twice = {figure.id for figure in figures}
    if len(twice) < len(figures):
        raise UserError(f"{path}: two figures have the same `id`")
    hypotheses = results.get("hypotheses")
    hypotheses = [entry for entry in hypotheses if isinstance(entry, dict)] if isinstance(hypotheses, list) else []
    plan = _object(folder / "suite.json")
    suite = plan.pop("suite") if isinstance(plan.get("suite"), dict) else {}
    kind, notes = results.get("kind", KINDS[0]), results.get("notes")
    if kind not in KINDS:
        raise UserError(f"{path}: `kind` is {kind!r}, not one of {', '.join(KINDS)}")
    notes = tuple(note for note in notes if isinstance(note, str)) if isinstance(notes, list) else ()
    return Findings(figures, tuple(hypotheses), suite, plan, _object(folder / "manifest.json"), kind, notes)


def _object(path: Path, required: bool = False) -> dict[str, Any]:
    """A JSON object. NaN and Infinity, which are not JSON, are read as null: such a figure says so in its text."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        if required:
            raise UserError(f"{path}: no results to report; run `moonbase eval` into this folder first") from None
        return {}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is wanted")
    return value


def _figure(path: Path, number: int, entry: Any) -> Shown:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not isinstance(entry.get("text"), str):
        raise UserError(f"{path}: figure {number} needs an `id` and a `text`")
    spec = entry.get("spec") if isinstance(entry.get("spec"), dict) else {}
    select = _strings(spec.get("select"))
    facets = {name: value for name, value in (select | _strings(entry.get("condition"))).items() if name != "model"}
    counts = {name: int(_number(entry.get(name)) or 0)
              for name in ("level", "n", "clusters", "unscored", "abstained", "errors")}
    return Shown(
        id=entry["id"], text=entry["text"], metric=_text(entry.get("metric")),
        model=_text(entry.get("model")) or select.get("model", ""), value=_number(entry.get("value")),
        low=_number(entry.get("low")), high=_number(entry.get("high")), **counts, method=_text(entry.get("method")),
        note=_text(entry.get("note")) or None, facets=facets, function=_text(spec.get("function")),
        source=_text(spec.get("value")), versus=_strings(spec.get("versus")),
        params=spec.get("params") if isinstance(spec.get("params"), dict) else {}, unit=_text(entry.get("unit")),
        details=entry.get("details") if isinstance(entry.get("details"), dict) else {},
        p_value=_number(entry.get("p_value")))


def _strings(value: Any) -> dict[str, str]:
    """Names and values as text; `condition.language` is called `language`."""
    if not isinstance(value, dict):
        return {}
    return {str(name).removeprefix("condition."): _text(item) for name, item in value.items() if item is not None}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
