"""Finds the table in an answer: Markdown anywhere, CSV in a fence or alone, or a JSON list of objects.

The text comes from a model and may be anything, so everything is bounded: characters, rows, columns, attempts.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from moonbase.agents.worlds.cells import plain_text

Row = dict[str, str]

MOST_ROWS = 4096
MOST_COLUMNS = 64
_JSON_ATTEMPTS = 8
_TABLES = 64
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*([\w+-]*)[ \t]*$", re.MULTILINE)
_RULE_LETTERS = frozenset(" \t|:+=-")
_JSON_LIST = re.compile(r"\[\s*\{")


def plain_header(name: str, unit: bool = False) -> str:
    """A column's name as far as it counts: small letters and digits; `unit`: what stands in parentheses as well."""
    text = plain_text(name)
    if not unit:
        text = re.sub(r" ?[(\[][^()\[\]]*[)\]]$", "", text)
    return "".join(letter for letter in text if letter.isalnum()) or text


def parse_table(text: str, columns: Sequence[str] | None = None) -> list[Row] | None:
    """The rows of the table in a text, by column name; None where there is none.

    Of several tables the one with the most of `columns` counts, and of equal ones the last. A first row that is no
    header (it has as many cells as `columns`, and none of them is one of these names) is a row under `columns`.
    """
    best: tuple[int, list[Row]] | None = None
    wanted = {plain_header(name) for name in columns or ()}
    for grid in _grids(text):
        header, *body = grid
        named = len(wanted & {plain_header(name) for name in header})
        if columns and not named and len(header) == len(columns):
            header, body, named = list(columns), grid, 0
        rows = _as_rows(header, body)
        if best is None or named >= best[0]:
            best = (named, rows)
    return best[1] if best else None


def _as_rows(header: list[str], body: list[list[str]]) -> list[Row]:
    names: list[str] = []
    for place, name in enumerate(header[:MOST_COLUMNS]):
        # A second column of one name is another column, and not one that was asked for.
        names.append(name if name not in names else f"{name} [{place + 1}]")
    return [dict(zip(names, [*cells, *[""] * len(names)], strict=False)) for cells in body[:MOST_ROWS] if any(cells)]


def _grids(text: str) -> Iterator[list[list[str]]]:
    """Every table of a text as rows of cells, the header first."""
    found = 0
    for grid in _candidates(text):
        if grid:
            yield grid
            found += 1
            if found == _TABLES:
                return


def _candidates(text: str) -> Iterator[list[list[str]]]:
    """What may be a table, the surest last."""
    fenced = _fenced(text)
    if "|" not in text:
        for language, block in fenced:
            if language in ("csv", "tsv", "", "text", "txt"):
                yield _csv_grid(block)
        if not fenced and not text.lstrip().startswith(("[", "{")):
            yield _csv_grid(text)
    else:
        for language, block in fenced:
            if language in ("csv", "tsv"):
                yield _csv_grid(block)
    yield from _markdown_grids(text)
    yield from _json_grids(text)


def _fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block; one that is not closed goes on to the end."""
    marks = list(_FENCE.finditer(text))[: 2 * _TABLES]
    blocks = []
    for place in range(0, len(marks), 2):
        end = marks[place + 1].start() if place + 1 < len(marks) else len(text)
        blocks.append((marks[place][1].lower(), text[marks[place].end() : end].strip("\n")))
    return blocks


def _json_grids(text: str) -> Iterator[list[list[str]]]:
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    place = 0
    for _ in range(_JSON_ATTEMPTS):
        start = _JSON_LIST.search(text, place)
        if start is None:
            return
        try:
            value, place = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            place = start.end()
            continue
        rows = [row for row in value[:MOST_ROWS] if isinstance(row, dict)]
        header = list(dict.fromkeys(name for row in rows for name in list(row)[:MOST_COLUMNS]))[:MOST_COLUMNS]
        yield [header, *([_json_cell(row.get(name)) for name in header] for row in rows)]


def _json_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return ""


def _markdown_grids(text: str) -> Iterator[list[list[str]]]:
    """Runs of lines with pipes; the line under the header may be missing."""
    grid: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if "|" in line:
            if len(grid) <= MOST_ROWS and not _is_rule(line):
                grid.append(split_markdown(line))
        elif not (grid and _is_rule(line)):
            # One column or one line with a pipe in it is a sentence rather than a table.
            if len(grid) > 1 or (grid and len(grid[0]) > 2):
                yield grid
            grid = []


def _is_rule(line: str) -> bool:
    """|---|:---:|, the line between header and rows."""
    return "-" in line and _RULE_LETTERS.issuperset(line)


def split_markdown(line: str) -> list[str]:
    """The cells of a row; an escaped pipe belongs to its cell."""
    cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line.strip())]
    if cells and not cells[0]:
        cells = cells[1:]
    if cells and not cells[-1] and line.rstrip().endswith("|"):
        cells = cells[:-1]
    return cells[:MOST_COLUMNS]


def _csv_grid(text: str) -> list[list[str]]:
    """Empty unless there are at least two columns in every line of the head, and a line below it."""
    text = text.strip("\n")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    if not first.count(delimiter):
        return []
    grid: list[list[str]] = []
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True):
            if len(grid) > MOST_ROWS:
                break
            if cells:
                grid.append([cell.strip() for cell in cells[:MOST_COLUMNS]])
    except csv.Error:
        pass  # A cell beyond csv's limit of 131,072 characters: the rows before it stand, and grading shows the rest.
    # Prose has commas too, but not the same number in every line.
    odd = sum(len(cells) != len(grid[0]) for cells in grid)
    return grid if len(grid) > 1 and odd * 4 <= len(grid) else []
