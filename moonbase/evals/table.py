"""The records of an evaluation as columns: numbers and small integers, no texts, read line by line.

Words are numbered in alphabetical order, so that nothing computed from a table depends on the order of its rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moonbase.errors import UserError, did_you_mean
from moonbase.evals.columns import NumberColumn, Numbers, WordColumn, Words, narrow, place_of
from moonbase.evals.records import LABELS, SCHEMA

WORDS = ("suite", "task", "item", "model", "group", "label", "input_digest")
"""Fields of a record that are kept as they are; besides: cluster, status, call.*, condition.*, vote.*, folder."""
CALL_WORDS = ("provider", "precision", "fingerprint", "weights_digest", "api_signal")
NUMBERS = ("sample", "input_tokens", "output_tokens", "reasoning_tokens", "seconds", "cost")
DIGEST = "input_digest"
STATUSES = ("scored", "unscored", "abstained", "error")
IDENTITY = ("suite", "task", "item", "model")
SILENT = "silent."
"""Beside `vote.MEMBER`, where it gave no label: whether it could not tell, or gave nothing that could be read."""
ABSTAINED, FAILED = "abstained", "failed"


class Builder:
    """Takes records as JSON values, one at a time."""

    def __init__(self) -> None:
        self.size = 0
        self.words: dict[str, WordColumn] = {}
        self.numbers: dict[str, NumberColumn] = {}

    def _word(self, name: str, value: Any) -> None:
        column = self.words.get(name)
        if column is None:
            column = self.words[name] = WordColumn(digests=name == DIGEST)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"`{name}` is not text")
        column.put(self.size, value)

    def _number(self, name: str, value: Any) -> None:
        column = self.numbers.get(name)
        if column is None:
            column = self.numbers[name] = NumberColumn()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"`{name}` is not a number")
        try:
            column.put(self.size, value)
        except OverflowError:
            raise ValueError(f"`{name}` is no number that a computer holds") from None

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
        cluster = record.get("cluster") or record["item"]
        if cluster != record["item"] and "cluster" not in self.words:
            # As long as every item is its own cluster, one column is enough for both.
            self.words["cluster"] = self.words["item"].copy() if self.size else WordColumn()
        for name in WORDS:
            self._word(name, record.get(name))
        if "cluster" in self.words:
            self._word("cluster", cluster)
        self._word("status", status)
        call = record.get("call") or {}
        for name in CALL_WORDS:
            self._word(name, call.get(name))
        for prefix, name in (("condition.", "condition"), ("vote.", "votes")):
            for key, value in (record.get(name) or {}).items():
                self._word(prefix + key, value)
        for member, vote in (record.get("votes") or {}).items():
            if vote is None:
                failed = (record.get("details") or {}).get(f"{member}: failed") is True
                self._word(SILENT + member, FAILED if failed else ABSTAINED)
        for name in NUMBERS:
            self._number(name, record.get(name, None if name == "cost" else 0))
        for name, value in (record.get("scores") or {}).items():
            self._number("score:" + name, value)
        self._number("output_kept", float(record.get("output") is not None))
        self.size += 1

    def table(self) -> Table:
        words: dict[str, Sequence[str]] = {}
        codes, numbers = {}, {}
        for name in list(self.words):
            # One at a time: what a column was built from goes before the next is finished.
            words[name], codes[name] = self.words.pop(name).done(self.size)
        if self.size and "cluster" not in words:
            words["cluster"], codes["cluster"] = words["item"], codes["item"]
        for name in list(self.numbers):
            numbers[name] = self.numbers.pop(name).done(self.size)
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
    """`codes[name]` (size,) into the sorted `words[name]`, -1 for none; `numbers[name]` (size,), floats when read.

    Codes are integers of as few bytes as they need: whoever computes with them widens them first, and changes none in
    its place. Words are a list, or where they are many a sequence that makes them when looked at.
    """

    size: int
    words: dict[str, Sequence[str]]
    codes: dict[str, np.ndarray]
    numbers: dict[str, Numbers]

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
        words: dict[str, Sequence[str]] = {"folder": sorted(set(folders))}
        codes = {"folder": narrow(np.repeat([words["folder"].index(name) for name in folders],
                                            [table.size for table in tables]), words["folder"])}
        for name in dict.fromkeys(name for table in tables for name in table.codes):
            column, ends = WordColumn(digests=name == DIGEST), [0]
            for table in tables:
                for place, word in enumerate(table.words.get(name, ()), ends[-1]):
                    column.put(place, word)
                ends.append(ends[-1] + len(table.words.get(name, ())))
            order, places = column.done(ends[-1])
            parts = [np.append(places[start:stop], -1).astype(places.dtype)[table.codes[name]] if name in table.codes
                     else np.full(table.size, -1, np.int8)
                     for table, start, stop in zip(tables, ends, ends[1:], strict=False)]
            words[name], codes[name] = order, narrow(np.concatenate(parts), order)
        numbers = {name: Numbers.of(np.concatenate([
            table.numbers[name][:] if name in table.numbers else np.full(table.size, math.nan) for table in tables]))
            for name in dict.fromkeys(name for table in tables for name in table.numbers)}
        return Table(size, words, codes, numbers)

    def constant(self, name: str, word: str) -> Table:
        """With a column of words that says the same in every row, in place of one that may be there."""
        return Table(self.size, self.words | {name: [word]}, self.codes | {name: np.zeros(self.size, np.int8)},
                     self.numbers)

    def renamed(self, name: str, new: Mapping[str, str]) -> Table:
        """With other words in a column; several may become one."""
        words = [new.get(word, word) for word in self.words[name]]
        order = sorted(set(words))
        places = np.array([*(order.index(word) for word in words), -1])
        codes = narrow(places[self.codes[name]], order)
        return Table(self.size, self.words | {name: order}, self.codes | {name: codes}, self.numbers)

    @property
    def conditions(self) -> list[str]:
        """Names of the columns `condition.NAME`."""
        return sorted(name for name in self.codes if name.startswith("condition."))

    def combined(self, names: Sequence[str], rows: np.ndarray | None = None, numbers: Sequence[str] = ()) -> np.ndarray:
        """One integer per row, from 0 without a gap; two rows have the same exactly when they agree in all these
        columns, and they are ordered as the columns are."""
        return np.unique(self._mixed(names, rows, numbers), return_inverse=True)[1].reshape(-1)

    def _mixed(self, names: Sequence[str], rows: np.ndarray | None, numbers: Sequence[str]) -> np.ndarray:
        """The same with gaps: the columns as digits of one number, in little memory."""
        key, span = np.zeros(self.size if rows is None else len(rows), np.int64), 1
        for name in [*(name for name in names if name in self.codes), *numbers]:
            if name in self.codes:
                codes, size = self.codes[name], len(self.words[name]) + 1
                place = (codes if rows is None else codes[rows]).astype(np.int64)
                place += 1
            else:
                place, size = self.numbers[name].places(rows)
            if span * size >= 1 << 62:
                distinct, key = np.unique(key, return_inverse=True)
                key, span = key.reshape(-1), len(distinct)
            key *= size
            key += place
            span *= size
        return key

    def refuse_repeats(self, where: str) -> None:
        """Raises UserError where a sample occurs twice: it would count double."""
        if not self.size:
            return
        keys = self._mixed(named := [*IDENTITY, *self.conditions], None, ["sample"])
        keys.sort()
        if (keys[1:] == keys[:-1]).any():
            first = np.unique(self._mixed(named, None, ["sample"]), return_index=True)[1]
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

    def present(self, name: str, rows: np.ndarray | None = None) -> Sequence[str]:
        """The words that occur in a column, sorted; none where there is no such column."""
        if name not in self.codes:
            return []
        there, words = np.zeros(len(self.words[name]) + 1, bool), self.words[name]
        # The last place stands for -1.
        there[self.codes[name] if rows is None else self.codes[name][rows]] = True
        found = np.flatnonzero(there[:-1])
        return words.part(found) if isinstance(words, Words) else [words[code] for code in found]

    def rows(self, select: Mapping[str, str]) -> np.ndarray:
        """Row numbers in which every named column has the value, or one of several (`us|eu`); "" is none.

        Raises UserError for a column that no table has; a condition that no record names selects nothing.
        """
        mask = np.ones(self.size, bool)
        for name, wanted in select.items():
            if name == "sample":
                mask &= np.isin(self.numbers["sample"][:], [float(part) for part in wanted.split("|")])
                continue
            if name not in self.codes:
                known = {*WORDS, *CALL_WORDS, "cluster", "status", "folder", *self.codes}
                if not (name in known or name.startswith(("condition.", "vote.", SILENT))):
                    raise UserError(f"select: no column {name!r} in the records{did_you_mean(name, known)}")
                mask &= wanted == ""
                continue
            mask &= self.says(name, wanted)
        return np.flatnonzero(mask)

    def says(self, name: str, wanted: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Whether a column has the word, or one of several (`us|eu`; "" is none), in each row."""
        words = self.words[name]
        known = np.zeros(len(words) + 1, bool)
        for word in {wanted, *wanted.split("|")}:
            # The last place stands for -1.
            place = place_of(words, word) if word else len(words)
            if place is not None:
                known[place] = True
        return known[self.codes[name] if rows is None else self.codes[name][rows]]

    def measure(self, select: Mapping[str, str], value: str) -> Measured:
        """`value`: `score:NAME`, `label:A|B` (1 where the label is one of them), `vote:JUDGE=A|B`, or a number's name.

        A row has no value because the call failed (error), the judge abstained, or nothing could be scored.
        """
        rows = self.rows(select)
        kind, _, name = value.partition(":")
        silent = None
        if kind in ("label", "vote"):
            member, _, wanted = name.rpartition("=") if kind == "vote" else ("", "", name)
            column = f"vote.{member}" if member else "label"
            values = np.full(len(rows), math.nan)
            if column in self.codes:
                values = np.where(self.codes[column][rows] >= 0, self.says(column, wanted, rows), math.nan)
            if member:
                silent = self.silent(member, rows)
        elif kind == "score" and value not in self.numbers:
            values = np.full(len(rows), math.nan)
        elif value in self.numbers:
            values = self.numbers[value][rows]
        else:
            raise UserError(f"value {value!r}: write score:NAME, label:A|B, vote:JUDGE=A|B or one of "
                            f"{', '.join(NUMBERS)}")
        values[~np.isfinite(values)] = math.nan
        is_error = self.says("status", "error", rows) if self.size else np.zeros(len(rows), bool)
        values[is_error] = math.nan
        missing = np.isnan(values) & ~is_error
        if silent is None:
            silent = self.says("status", "abstained", rows) if self.size else missing
        abstained = int((missing & silent).sum())
        return Measured(rows, values, int(missing.sum()) - abstained, abstained, int(is_error.sum()))

    def silent(self, member: str, rows: np.ndarray) -> np.ndarray:
        """Whether a member of the panel was asked and answered that it could not tell."""
        column = f"{SILENT}{member}"
        return self.says(column, ABSTAINED, rows) if column in self.codes else np.zeros(len(rows), bool)

    def members(self, rows: np.ndarray, spoke: bool = False) -> list[str]:
        """Names of the panel that was asked about these rows; `spoke`: those that gave a label at least once."""
        asked: set[str] = set()
        for prefix in ("vote.",) if spoke else ("vote.", SILENT):
            asked |= {name.removeprefix(prefix) for name, codes in self.codes.items()
                      if name.startswith(prefix) and (codes[rows] >= 0).any()}
        return sorted(asked)
