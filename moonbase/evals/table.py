"""The records of an evaluation as columns: numbers and small integers, no texts, read line by line.

Words are numbered in alphabetical order, so that nothing computed from a table depends on the order of its rows.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.records import LABELS, SCHEMA

WORDS = ("suite", "task", "item", "model", "group", "label", "input_digest")
"""Fields of a record that are kept as they are; besides: cluster, status, call.*, condition.*, vote.*, folder."""
CALL_WORDS = ("provider", "precision", "fingerprint", "weights_digest", "api_signal")
NUMBERS = ("sample", "input_tokens", "output_tokens", "reasoning_tokens", "seconds", "cost")
STATUSES = ("scored", "unscored", "abstained", "error")
IDENTITY = ("suite", "task", "item", "model")


@dataclass
class _Words:
    """A column under construction: codes in order of appearance; -1 where a record has no such word."""

    codes: array = field(default_factory=lambda: array("i"))
    known: dict[str, int] = field(default_factory=dict)

    def put(self, row: int, word: str | None) -> None:
        missing = row - len(self.codes)
        if missing:
            self.codes.extend([-1] * missing)
        self.codes.append(-1 if word is None else self.known.setdefault(word, len(self.known)))


@dataclass
class _Numbers:
    values: array = field(default_factory=lambda: array("d"))

    def put(self, row: int, value: float | None) -> None:
        missing = row - len(self.values)
        if missing:
            self.values.extend([math.nan] * missing)
        self.values.append(math.nan if value is None else value)


class Builder:
    """Takes records as JSON values, one at a time."""

    def __init__(self) -> None:
        self.size = 0
        self.words: dict[str, _Words] = {}
        self.numbers: dict[str, _Numbers] = {}

    def _word(self, name: str, value: Any) -> None:
        column = self.words.get(name)
        if column is None:
            column = self.words[name] = _Words()
        if value is not None and not isinstance(value, str):
            raise ValueError(f"`{name}` is not text")
        column.put(self.size, value)

    def _number(self, name: str, value: Any) -> None:
        column = self.numbers.get(name)
        if column is None:
            column = self.numbers[name] = _Numbers()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"`{name}` is not a number")
        column.put(self.size, value)

    def add(self, record: Mapping[str, Any]) -> None:
        """Raises ValueError that says what is wrong with the record."""
        if record.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {record.get('schema')!r}, not {SCHEMA!r}")
        for name in (*IDENTITY, "input_digest"):
            if not isinstance(record.get(name), str):
                raise ValueError(f"`{name}` is missing")
        status, label = record.get("status", "scored"), record.get("label")
        if status not in STATUSES:
            raise ValueError(f"`status` is {status!r}, not one of {', '.join(STATUSES)}")
        if label is not None and label not in LABELS:
            raise ValueError(f"`label` is {label!r}, not one of {', '.join(LABELS)}")
        for name in WORDS:
            self._word(name, record.get(name))
        self._word("cluster", record.get("cluster") or record["item"])
        self._word("status", status)
        call = record.get("call") or {}
        for name in CALL_WORDS:
            self._word(name, call.get(name))
        for prefix, name in (("condition.", "condition"), ("vote.", "votes")):
            for key, value in (record.get(name) or {}).items():
                self._word(prefix + key, value)
        for name in NUMBERS:
            self._number(name, record.get(name, None if name == "cost" else 0))
        for name, value in (record.get("scores") or {}).items():
            self._number("score:" + name, value)
        self._number("output_kept", float(record.get("output") is not None))
        self.size += 1

    def table(self) -> Table:
        words, codes, numbers = {}, {}, {}
        for name, column in self.words.items():
            column.put(self.size, None)
            order = sorted(column.known)
            places = np.full(len(order) + 1, -1, np.int32)
            for place, word in enumerate(order):
                places[column.known[word]] = place
            words[name] = order
            # The last place stands for -1.
            codes[name] = places[np.frombuffer(column.codes, np.int32)[:-1]]
        for name, column in self.numbers.items():
            column.put(self.size, None)
            numbers[name] = np.frombuffer(column.values, np.float64)[:-1].copy()
        return Table(self.size, words, codes, numbers)


@dataclass(frozen=True)
class Measured:
    """One value per selected row; NaN where there is none, and how many for which reason."""

    rows: np.ndarray
    values: np.ndarray
    unscored: int
    abstained: int
    errors: int


@dataclass(frozen=True, eq=False)
class Table:
    """`codes[name]` (size,) int32 into the sorted `words[name]`, -1 for none; `numbers[name]` (size,) float64."""

    size: int
    words: dict[str, list[str]]
    codes: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]

    @staticmethod
    def read(path: Path | str) -> Table:
        """From records.jsonl, sealed or not. Raises UserError naming the line that is no record, or a repeated one."""
        path, builder = Path(path), Builder()
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        value = json.loads(line)
                        builder.add(value.get("record", value))
                    except (ValueError, AttributeError, RecursionError) as error:
                        raise UserError(f"{path}, line {number}: not a record ({str(error).splitlines()[0]})") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        table = builder.table()
        table.refuse_repeats(str(path))
        return table

    @staticmethod
    def of(records: Iterable[Any]) -> Table:
        """From `Record`s or their JSON values."""
        builder = Builder()
        for record in records:
            builder.add(record if isinstance(record, Mapping) else record.canonical())
        return builder.table()

    @staticmethod
    def joined(tables: Sequence[Table], folders: Sequence[str]) -> Table:
        """One below the other, with a column `folder`."""
        size = sum(table.size for table in tables)
        words: dict[str, list[str]] = {"folder": sorted(set(folders))}
        codes = {"folder": np.repeat([words["folder"].index(name) for name in folders],
                                     [table.size for table in tables]).astype(np.int32)}
        for name in dict.fromkeys(name for table in tables for name in table.codes):
            order = sorted({word for table in tables for word in table.words.get(name, ())})
            places = {word: place for place, word in enumerate(order)}
            parts = []
            for table in tables:
                if name not in table.codes:
                    parts.append(np.full(table.size, -1, np.int32))
                    continue
                target = np.array([*(places[word] for word in table.words[name]), -1], np.int32)
                parts.append(target[table.codes[name]])
            words[name], codes[name] = order, np.concatenate(parts)
        numbers = {name: np.concatenate([table.numbers.get(name, np.full(table.size, math.nan)) for table in tables])
                   for name in dict.fromkeys(name for table in tables for name in table.numbers)}
        return Table(size, words, codes, numbers)

    def constant(self, name: str, word: str) -> Table:
        """With a column of words that says the same in every row, in place of one that may be there."""
        return Table(self.size, self.words | {name: [word]}, self.codes | {name: np.zeros(self.size, np.int32)},
                     self.numbers)

    def renamed(self, name: str, new: Mapping[str, str]) -> Table:
        """With other words in a column; several may become one."""
        words = [new.get(word, word) for word in self.words[name]]
        order = sorted(set(words))
        places = np.array([*(order.index(word) for word in words), -1], np.int32)
        return Table(self.size, self.words | {name: order}, self.codes | {name: places[self.codes[name]]}, self.numbers)

    @property
    def conditions(self) -> list[str]:
        """Names of the columns `condition.NAME`."""
        return sorted(name for name in self.codes if name.startswith("condition."))

    def combined(self, names: Sequence[str], rows: np.ndarray | None = None, numbers: Sequence[str] = ()) -> np.ndarray:
        """One integer per row; two rows have the same exactly when they agree in all these columns."""
        count = self.size if rows is None else len(rows)
        key = np.zeros(count, np.int64)
        columns = [self.codes[name] for name in names if name in self.codes] + [self.numbers[name] for name in numbers]
        for column in columns:
            part = column if rows is None else column[rows]
            distinct, place = np.unique(part, return_inverse=True)
            key = np.unique(key * len(distinct) + place.reshape(-1), return_inverse=True)[1].reshape(-1)
        return key

    def refuse_repeats(self, where: str) -> None:
        """Raises UserError where a sample occurs twice: it would count double."""
        if not self.size:
            return
        keys = self.combined([*IDENTITY, *self.conditions], numbers=["sample"])
        first = np.unique(keys, return_index=True)[1]
        if len(first) < self.size:
            row = int(np.setdiff1d(np.arange(self.size), first)[0])
            raise UserError(f"{where}: {self.describe(row)} is recorded twice; run the evaluation into an empty folder")

    def word(self, name: str, row: int) -> str | None:
        code = int(self.codes[name][row])
        return None if code < 0 else self.words[name][code]

    def describe(self, row: int) -> str:
        """A row by what identifies it; ids only, never a text."""
        parts = [f"{name} {self.word(name, row)!r}" for name in ("task", "item")]
        parts += [f"{name.removeprefix('condition.')} {self.word(name, row)!r}" for name in self.conditions
                  if self.word(name, row) is not None]
        return f"{', '.join(parts)}, sample {int(self.numbers['sample'][row])} of {self.word('model', row)!r}"

    def present(self, name: str, rows: np.ndarray | None = None) -> list[str]:
        """The words that occur in a column, sorted; none where there is no such column."""
        if name not in self.codes:
            return []
        found = np.unique(self.codes[name] if rows is None else self.codes[name][rows])
        return [self.words[name][code] for code in found if code >= 0]

    def rows(self, select: Mapping[str, str]) -> np.ndarray:
        """Row numbers in which every named column has the value, or one of several (`us|eu`); "" is none.

        Raises UserError for a column that no table has; a condition that no record names selects nothing.
        """
        mask = np.ones(self.size, bool)
        for name, wanted in select.items():
            if name == "sample":
                mask &= np.isin(self.numbers["sample"], [float(part) for part in wanted.split("|")])
                continue
            if name not in self.codes:
                known = {*WORDS, *CALL_WORDS, "cluster", "status", "folder", *self.codes}
                if not (name in known or name.startswith(("condition.", "vote."))):
                    raise UserError(f"select: no column {name!r} in the records{did_you_mean(name, known)}")
                mask &= wanted == ""
                continue
            mask &= np.isin(self.codes[name], self._codes(name, wanted))
        return np.flatnonzero(mask)

    def _codes(self, name: str, wanted: str) -> list[int]:
        places = {word: place for place, word in enumerate(self.words[name])}
        return [places.get(word, -2) if word else -1 for word in [wanted, *wanted.split("|")]]

    def measure(self, select: Mapping[str, str], value: str) -> Measured:
        """`value`: `score:NAME`, `label:A|B` (1 where the label is one of them), `vote:JUDGE=A|B`, or a number's name.

        A row has no value because the call failed (error), the judge abstained, or nothing could be scored.
        """
        rows = self.rows(select)
        kind, _, name = value.partition(":")
        if kind in ("label", "vote"):
            column, _, wanted = ("label", "", name) if kind == "label" else name.rpartition("=")
            column = column if kind == "label" else f"vote.{column}"
            codes = self.codes[column][rows] if column in self.codes else np.full(len(rows), -1)
            hits = np.isin(codes, self._codes(column, wanted)) if column in self.codes else np.zeros(len(rows), bool)
            values = np.where(codes >= 0, hits.astype(float), math.nan)
        elif kind == "score" and value not in self.numbers:
            values = np.full(len(rows), math.nan)
        elif value in self.numbers:
            values = self.numbers[value][rows].copy()
        else:
            raise UserError(f"value {value!r}: write score:NAME, label:A|B, vote:JUDGE=A|B or one of "
                            f"{', '.join(NUMBERS)}")
        values[~np.isfinite(values)] = math.nan
        status = self.codes["status"][rows] if self.size else np.zeros(0, np.int32)
        names = self.words.get("status", [])
        is_error = status == names.index("error") if "error" in names else np.zeros(len(rows), bool)
        values[is_error] = math.nan
        missing = np.isnan(values) & ~is_error
        abstained = missing & (status == names.index("abstained")) if "abstained" in names else missing & False
        return Measured(rows, values, int(missing.sum() - abstained.sum()), int(abstained.sum()), int(is_error.sum()))
