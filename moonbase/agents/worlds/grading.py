"""Tables in answers, compared with gold tables: item-F1 and row-F1 as WideSearch defines them (Wong et al. 2025, §3.4).

    item precision = right cells / (rows of the answer × columns)     item recall = right cells / (gold rows × columns)
    row precision  = rows all right / rows of the answer              row recall  = rows all right / gold rows

Cells are compared where the keys of two rows agree. Each row is matched once: a row that is there twice counts twice in
the precision and once, with the fewest of its cells right, as a hit, so that guessing more than once never pays. (Where
the gold rows themselves have a key twice, the rows of that key are matched as well as can be.)
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from moonbase.agents.worlds.cells import values_agree
from moonbase.agents.worlds.metrics import METRICS, cells_agree, value_of
from moonbase.agents.worlds.tables_in_text import Row, parse_table, plain_header
from moonbase.agents.worlds.world import Column, Task

__all__ = ["Score", "parse_table", "score", "score_rows", "score_text"]

TEXT_LIMIT = 1_000_000
"""Characters of an answer that are read."""
NEAR_NAME = 0.8
"""How alike names of columns must be to be taken for one another, as difflib measures it."""

Cells = tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True)
class Score:
    """All from 0 to 1. `exact`: every row right, none missing, none too many."""

    item_precision: float = 0.0
    item_recall: float = 0.0
    item_f1: float = 0.0
    row_precision: float = 0.0
    row_recall: float = 0.0
    row_f1: float = 0.0
    exact: bool = False
    notes: tuple[str, ...] = ()
    """What cost points, in words."""


def score(task: Task, text: str) -> Score:
    """Grade an answer: a table where the task's answer is rows, else its text."""
    if isinstance(task.answer, str):
        return score_text(task.columns[0] if task.columns else Column("answer"), task.answer, text)
    rows = parse_table(text[:TEXT_LIMIT], task.column_names)
    if rows is None:
        return Score(notes=("the answer holds no table",))
    return score_rows(task.columns, task.keys, task.answer, rows)


def score_text(column: Column, gold: str, text: str) -> Score:
    """Grade one value: what follows the last "Answer:" of a line, or else the last line that is not empty."""
    lines = [line.strip().strip("*_ ") for line in text[-TEXT_LIMIT:].splitlines() if line.strip()]
    marked = [place for place, line in enumerate(lines) if line.lower().startswith(("answer:", "answer**:"))]
    said = lines[-1] if lines else ""
    if marked:
        said = lines[marked[-1]].partition(":")[2].strip("*_ ") or " ".join(lines[marked[-1] + 1 :][:1])
    right = cells_agree(column, gold, said.strip("*_ "))
    one = float(right)
    return Score(one, one, one, one, one, one, right, () if right else (f"{said.strip()[:80]!r} is not the answer",))


def score_rows(
    columns: Sequence[Column], keys: Sequence[str], gold: Sequence[Row], rows: Sequence[Row]
) -> Score:
    """Grade rows by column name.

    Columns are found by their names without case, spaces and a unit in parentheses, in tables of WideSearch also by the
    nearest name (its tables and its prompts differ in spelling); those that were not asked for do not
    count. Raises ValueError where a key is no column or there are no gold rows.
    """
    names = [column.name for column in columns]
    if not keys or not set(keys) <= set(names):
        raise ValueError(f"keys {list(keys)} must be among the columns {names}")
    if not gold:
        raise ValueError("no gold rows")
    answer, notes = _rename(rows, names, nearest=any(column.type in METRICS for column in columns))
    if not answer:
        return Score(notes=(*notes, "the table has no rows"))
    gold_by_key, answer_by_key = _by_key(gold, columns, keys), _by_key(answer, columns, keys)
    right_cells = right_rows = 0
    for key, gold_rows in gold_by_key.items():
        matched = _match(columns, gold_rows, answer_by_key.get(key, []))
        right_cells += sum(matched)
        right_rows += sum(right == len(columns) for right in matched)
    missing = sum(max(0, len(ours) - len(answer_by_key.get(key, []))) for key, ours in gold_by_key.items())
    extra = len(answer) + missing - len(gold)
    notes += [f"{missing} rows missing"] * (missing > 0) + [f"{extra} rows too many"] * (extra > 0)
    item_precision = right_cells / (len(answer) * len(columns))
    item_recall = right_cells / (len(gold) * len(columns))
    row_precision, row_recall = right_rows / len(answer), right_rows / len(gold)
    return Score(item_precision, item_recall, _f1(item_precision, item_recall), row_precision, row_recall,
                 _f1(row_precision, row_recall), right_rows == len(gold) == len(answer), tuple(notes))


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _rename(rows: Sequence[Row], names: list[str], nearest: bool) -> tuple[list[Row], list[str]]:
    """The rows with the asked columns by their names, and notes on columns that differ."""
    there = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, str] = {}
    for reading in (str, lambda name: plain_header(name, unit=True), plain_header):
        for name in names:
            fitting = [one for one in there if reading(one) == reading(name) and one not in found.values()]
            if name not in found and fitting:
                found[name] = fitting[0]
    for name in names if nearest else ():
        free = {plain_header(one): one for one in there if one not in found.values()}
        near = difflib.get_close_matches(plain_header(name), list(free), 1, NEAR_NAME)
        if name not in found and near:
            found[name] = free[near[0]]
    notes = [f"column {name} is missing" for name in names if name not in found]
    notes += [f"column {name[:80]} was not asked for" for name in there if name not in found.values()]
    return [{name: row.get(found.get(name, ""), "") for name in names} for row in rows], notes


def _by_key(rows: Sequence[Row], columns: Sequence[Column], keys: Sequence[str]) -> dict[Hashable, list[Cells]]:
    """What the cells of each row say, by what its keys say; a row without a key is under the empty one."""
    found: dict[Hashable, list[Cells]] = {}
    for row in rows:
        cells = tuple(value_of(column, row.get(column.name, "")) for column in columns)
        key = tuple(cell for column, cell in zip(columns, cells, strict=True) if column.name in keys)
        found.setdefault(key, []).append(cells)
    return found


def _match(columns: Sequence[Column], gold: list[Cells], answer: list[Cells]) -> list[int]:
    """Right cells of each pair of rows with one key, each row used once."""
    right = [[sum(map(values_agree, columns, ours, theirs)) for ours in gold] for theirs in answer]
    if len(gold) == 1:
        return [min(counts[0] for counts in right)] if right else []
    if not right:
        return []
    if len(right) > len(gold):
        right = [list(counts) for counts in zip(*right, strict=True)]
    # As many right cells as can be, and of such assignments the one with the most rows all right.
    full = len(columns)
    worth = [[count * (len(gold) + 1) + (count == full) for count in counts] for counts in right]
    return [right[row][place] for row, place in enumerate(_assign(worth))]


def _assign(worth: list[list[int]]) -> list[int]:
    """For each row the column of its own that makes the sum of worth largest; rows ≤ columns.

    The Hungarian method with potentials (Jonker and Volgenant 1987), O(rows² · columns).
    """
    num_rows, num_columns = len(worth), len(worth[0])
    row_potential, column_potential = [0] * (num_rows + 1), [0] * (num_columns + 1)
    row_of, previous = [0] * (num_columns + 1), [0] * (num_columns + 1)
    for row in range(1, num_rows + 1):
        row_of[0], column = row, 0
        slack: list[float] = [float("inf")] * (num_columns + 1)
        visited = [False] * (num_columns + 1)
        while row_of[column]:
            visited[column] = True
            current, least, following = row_of[column], float("inf"), 0
            for other in range(1, num_columns + 1):
                if visited[other]:
                    continue
                cost = -worth[current - 1][other - 1] - row_potential[current] - column_potential[other]
                if cost < slack[other]:
                    slack[other], previous[other] = cost, column
                if slack[other] < least:
                    least, following = slack[other], other
            for other in range(num_columns + 1):
                if visited[other]:
                    row_potential[row_of[other]] += least
                    column_potential[other] -= least
                else:
                    slack[other] -= least
            column = following
        while column:
            row_of[column], column = row_of[previous[column]], previous[column]
    assigned = {row_of[column] - 1: column - 1 for column in range(1, num_columns + 1) if row_of[column]}
    return [assigned[row] for row in range(num_rows)]
