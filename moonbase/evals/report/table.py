"""results.csv: every figure of results.json on one line, for spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from moonbase.evals.report.language import value_of
from moonbase.evals.report.read import Findings, read_findings
from moonbase.files import write_text
from moonbase.report.words import visible

COLUMNS = ("id", "metric", "model", "value", "low", "high", "level", "n", "clusters", "unscored", "abstained",
           "errors", "method", "unit", "text", "note")


def write_table(folder: str | Path) -> Path:
    """Write results.csv beside results.json, whole or not at all."""
    path = Path(folder) / "results.csv"
    write_text(path, render_table(read_findings(folder)))
    return path


def render_table(findings: Findings) -> str:
    """Comma-separated, UTF-8, one header line; conditions have a column each, called `condition.NAME`."""
    conditions = sorted({name for figure in findings.figures for name in figure.facets})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(_safe(f"condition.{name}") for name in conditions)])
    for figure in findings.figures:
        cells = [getattr(figure, name) for name in COLUMNS]
        row = [_safe(cell or "") if isinstance(cell, str | None) else value_of(cell) for cell in cells]
        writer.writerow([*row, *(_safe(figure.facets.get(name, "")) for name in conditions)])
    return out.getvalue()


def _safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula: `'` goes before a first sign that would begin one."""
    text = visible(text).replace("\n", " ").replace("\t", " ")
    begins = text.lstrip()[:2]
    formula = begins[:1] in ("=", "@") or (begins[:1] in ("+", "-") and not begins[1:].isdigit())
    return f"'{text}" if formula else text
