"""Pages of what is found by laying evaluations side by side: `compare` and `diff-ft` with `--out`.

A folder with results.json, results.csv and the report in each language, made of the evaluation report's own parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.files import make_folder, write_text

if TYPE_CHECKING:
    from moonbase.evals.comparison import Comparison
    from moonbase.evals.figures import Figure
    from moonbase.evals.fine_tuning import FineTuning
    from moonbase.evals.suite import Suite


def write_comparison(found: Comparison, folders: Sequence[Path], out: Path) -> Path:
    """Forest plots of differences and rates, verdicts, what may not be concluded; returns the English page."""
    verdicts = [one.figure for one in found.verdicts]
    # What is noted of a row stands beside its number.
    notes = [note for note in found.notes if not note.startswith(tuple(f"{row.id}: " for row in found.rows))]
    return _write(out, "comparison", [*found.rows, *verdicts, *found.figures],
                  [one.model_dump(mode="json") for one in found.verdicts], found.models, notes, folders)


def write_fine_tuning(found: FineTuning, folders: Sequence[Path], out: Path) -> Path:
    """Dose curve with its slope, changes from the base, an answer to each question; returns the English page."""
    figures = [figure for curve in found.curves for figure in (*curve.points, curve.figure)]
    answers = []
    for change in found.changes:
        fields = change.model_dump(mode="json")
        # Kept capability and unchanged over-refusal are good news.
        good = (change.answer == "yes") != (change.subject == "over_refusal")
        tone = change.answer if change.answer == "undecided" else "yes" if good else "no"
        answers.append({name: fields[name] for name in ("kind", "margin", "alpha", "adjusted_p_value", "reason")} | {
            "tone": tone,
            "id": change.figure.id, "statement": change.question, "verdict": change.answer, "second": change.dose,
            "figure": fields["figure"]})
    figures += [change.figure for change in found.changes] + found.missed
    return _write(out, "fine_tuning", figures, answers, [found.model], found.notes, folders)


def _write(out: Path, kind: str, figures: Iterable[Figure], hypotheses: list[dict[str, Any]], models: Sequence[str],
           notes: Sequence[str], folders: Sequence[Path]) -> Path:
    from moonbase.evals.comparison import suite_if_known
    from moonbase.evals.evaluation import RESULTS_SCHEMA
    from moonbase.evals.report import write_reports

    make_folder(out)
    suite: Suite | None = next((one for folder in folders if (one := suite_if_known(folder)) is not None), None)
    shown = {figure.id: figure.model_dump(mode="json") for figure in figures}
    results = {"schema": RESULTS_SCHEMA, "kind": kind, "suite": suite.name if suite else "",
               "figures": list(shown.values()), "hypotheses": hypotheses, "notes": list(notes)}
    # The suite's own hypotheses are among the verdicts where they are decided here.
    plan = {"suite": (suite.canonical() if suite else {"name": ""}) | {"hypotheses": []}, "models": list(models),
            "compared": [Path(folder).name for folder in folders]}
    for name, content in (("suite.json", plan), ("results.json", results)):
        write_text(out / name, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    return write_reports(out)[0]
