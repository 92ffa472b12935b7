"""Every cell of a report against the figure it names.

A report writes a number as `<data class="figure" data-id="ID" value="NUMBER">TEXT</data>`, in just this form; a count
beside it has the class `part` and the field in `data-part`, a number of a hypothesis the class `hypothesis`. A Chinese
page says the same number in Chinese. A CSV has the columns id, value and text. Pages are read by one pattern in one
pass: no page can make that slow, and nothing in it is interpreted.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moonbase.evals.proof.canonical import clean
from moonbase.report.words import visible

_CELL = re.compile(r'<data class="(figure|part|hypothesis)" data-id="([^"<>]*)"(?: data-part="([^"<>]*)")?'
                   r' value="([^"<>]*)">([^<>]*)</data>')
_ANY = re.compile(r"<data\b", re.IGNORECASE)
_ACTIVE = re.compile(r"<(script|iframe|frame|object|embed|applet|base|form|link|portal|animate|set)\b"
                     r"|<meta[^<>]{0,1000}(refresh)|<[a-z][^<>]{0,9999}=[\s\"']{0,20}(javascript):", re.IGNORECASE)
_HANDLER = re.compile(r"<[a-z][^<>]{0,9999}[\s/\"](on[a-z]{3,30})\s{0,20}=", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"<>]*\"|'[^'<>]*'")
"""What a page would need to run, load, send or lead elsewhere; handlers are looked for outside of quoted words."""
LONGEST_FIELD = 2**20
_MOST = 20


class Known:
    """Figures as computed from the records, and hypotheses as the bundle states them, by the ids that pages show."""

    def __init__(self, figures: Mapping[str, Mapping[str, Any]], hypotheses: Iterable[Any] = ()) -> None:
        self.figures = {visible(name): figure for name, figure in figures.items()}
        self.hypotheses = {visible(str(entry.get("id"))): entry for entry in hypotheses if isinstance(entry, dict)}


def check_page(page: bytes, known: Known, language: str = "en") -> tuple[int, list[str]]:
    """How many cells an HTML report in `language` has, and what is wrong with them."""
    try:
        text = page.decode("utf-8")
    except UnicodeDecodeError as error:
        return 0, [f"not UTF-8 (byte {error.start})"]
    problems, cells = [], 0
    for opening in _ANY.finditer(text):
        cell = _CELL.match(text, opening.start())
        if cell is None:
            problems.append(f"a <data> element is not in the agreed form: "
                            f"{clean(text[opening.start():opening.start() + 60])}")
        else:
            cells += 1
            problems += _wrong_cell(*(html.unescape(part or "") for part in cell.groups()), known, language)
        if len(problems) > _MOST:
            break
    if shown := _ACTIVE.search(text) or _HANDLER.search(_QUOTED.sub('""', text)):
        what = next(filter(None, shown.groups())).lower()
        problems.append(f"holds a <{what}>, which could change what a reader sees")
    return cells, problems


def _wrong_cell(kind: str, name: str, part: str, value: str, text: str, known: Known, language: str = "en",
                ) -> Iterator[str]:
    entry = (known.hypotheses if kind == "hypothesis" else known.figures).get(name)
    if entry is None:
        yield f"{'hypothesis' if kind == 'hypothesis' else 'figure'} {clean(name)!r} does not follow from the records"
        return
    field = "value" if kind == "figure" else part
    right = entry.get(field)
    if field not in entry or not (right is None or type(right) in (int, float)):
        yield f"{kind} {clean(name)} has no number called {clean(part, 40)!r}"
    elif not same_number(value, right):
        yield f"figure {clean(name)} has {field} {clean(value, 40)!r}, the records give {right}"
    elif kind == "figure" and text != (said := visible(_text(entry, language))):
        yield f"figure {clean(name)} reads {clean(text, 60)!r}, the records give {clean(said, 60)!r}"
    elif kind == "part" and text != f"{right:,}":
        yield f"figure {clean(name)}: {field} reads {clean(text, 60)!r}, the records give {right:,}"


def _text(figure: Mapping[str, Any], language: str) -> str:
    from moonbase.evals.printing import text_of

    return str(figure["text"]) if language == "en" else text_of(figure, language)


def same_number(written: str, value: float | None) -> bool:
    """Whether a cell's text is the figure's value; no value is written as nothing."""
    if value is None or not written:
        return value is None and not written
    if len(written) > 40:
        return False
    try:
        return abs(float(written) - value) <= 1e-9 * max(1.0, abs(value))
    except ValueError:
        return False


def check_csv(data: bytes, known: Known) -> tuple[int, list[str]]:
    """How many rows a CSV has, and what is wrong with them; it must have every figure once.

    Further columns must be fields of figures, or `condition.NAME`, and are compared too.
    """
    try:
        text = data.decode("utf-8-sig")
        rows = list(_rows(text))
    except UnicodeDecodeError as error:
        return 0, [f"not UTF-8 (byte {error.start})"]
    except csv.Error as error:
        return 0, [f"not readable as CSV: {clean(error)}"]
    header = rows[0] if rows else []
    if not {"id", "value", "text"} <= set(header) or len(set(header)) < len(header):
        return 0, ["its columns must include id, value and text, each once"]
    fields = {name for figure in known.figures.values() for name in figure}
    if odd := [name for name in header if name not in {*fields, "id", "value", "text"}
               and not name.startswith("condition.")]:
        return 0, [f"has a column {clean(odd[0], 60)!r}, which is no field of figures"]
    problems, seen = [], set()
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            problems.append(f"row {number} has {len(row)} cells, not {len(header)}")
            continue
        cells = {name: _unguarded(cell) for name, cell in zip(header, row, strict=True)}
        if cells["id"] in seen:
            problems.append(f"figure {clean(cells['id'])} is there twice")
        seen.add(cells["id"])
        problems += _wrong_cell("figure", cells["id"], "", cells["value"], cells["text"], known)
        problems += _wrong_extras(cells, known.figures.get(cells["id"], {}))
    problems += [f"figure {clean(name)} is missing" for name in known.figures if name not in seen]
    return len(rows) - 1, problems


def _rows(text: str) -> Iterator[list[str]]:
    csv.field_size_limit(LONGEST_FIELD)
    yield from csv.reader(io.StringIO(text, newline=""), strict=True)


def _unguarded(cell: str) -> str:
    """Without the ' that keeps a spreadsheet from taking a text for a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:].lstrip()[:1] in ("=", "+", "-", "@") else cell


def _wrong_extras(cells: Mapping[str, str], figure: Mapping[str, Any]) -> Iterator[str]:
    facets = _facets(figure)
    for name, written in cells.items():
        if name in ("id", "value", "text") or not figure:
            continue
        value = facets.get(name.removeprefix("condition.")) if name.startswith("condition.") else figure.get(name)
        if isinstance(value, bool | dict | list):
            continue
        same = same_number(written, value) if isinstance(value, int | float) or (value is None and not written) \
            else written == visible(value or "").replace("\n", " ").replace("\t", " ")
        if not same:
            yield f"figure {clean(cells['id'])} has {name} {clean(written, 40)!r}, the records give {value!r}"


def _facets(figure: Mapping[str, Any]) -> dict[str, str]:
    """The conditions under which a figure holds, its model aside, by the names of the columns without `condition.`"""
    facets = {**(figure.get("spec") or {}).get("select", {}), **(figure.get("condition") or {})}
    return {visible(name.removeprefix("condition.")): value for name, value in facets.items() if name != "model"}
