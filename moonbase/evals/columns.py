"""Columns of a table in as few bytes as their contents take: words as numbers, numbers as the narrowest integers.

A column begins with one byte a row and widens when a value does not fit, so that memory is that of the values: a score
of 0 or 1 takes one byte, a price eight. Nothing is rounded: what is no integer is kept as the float that it was.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

_WIDER = {"b": "h", "h": "i", "i": "q"}
_LOWEST = {code: -(1 << (8 * array(code).itemsize - 1)) for code in "bhiq"}
_HIGHEST = {code: (1 << (8 * array(code).itemsize - 1)) - 1 for code in "bhiq"}
_EXACT = 1 << 53
"""Integers up to here are floats without loss."""
_SMALL = {float(number): number for number in range(-127, 128)}
"""What fits into the narrowest column, whether it comes as 1 or as 1.0."""


class Numbers:
    """A finished column of numbers: floats when looked at, NaN where there is none; narrower while it is kept."""

    def __init__(self, kept: np.ndarray) -> None:
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, rows: Any) -> Any:
        """Float64 of these rows; of one row a float."""
        part = self._kept[rows]
        if self._kept.dtype.kind == "f":
            return part.astype(np.float64) if isinstance(part, np.ndarray) else float(part)
        lowest = np.iinfo(self._kept.dtype).min
        if isinstance(part, np.ndarray):
            found = part.astype(np.float64)
            found[part == lowest] = math.nan
            return found
        return math.nan if part == lowest else float(part)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self[:]
        return found if dtype is None else found.astype(dtype)

    def places(self, rows: np.ndarray | None = None) -> tuple[np.ndarray, int]:
        """(an integer from 0 for every value, in the order of values; how many there may be). NaN are all alike."""
        part = self._kept if rows is None else self._kept[rows]
        if not len(part):
            return np.zeros(0, np.int64), 1
        if part.dtype.itemsize == 8:
            distinct, place = np.unique(part, return_inverse=True)
            return place.reshape(-1), len(distinct)
        lowest = int(part.min())
        return part.astype(np.int64) - lowest, int(part.max()) - lowest + 1

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    @staticmethod
    def of(values: np.ndarray) -> Numbers:
        column = NumberColumn()
        for row, value in enumerate(np.asarray(values, float).tolist()):
            column.put(row, value)
        return column.done(len(values))


class NumberColumn:
    """Numbers, row by row. The lowest integer of a width stands for none."""

    def __init__(self) -> None:
        self.values = array("b")
        self.none: float = _LOWEST["b"]

    def put(self, row: int, value: float | None) -> None:
        """Raises OverflowError for an integer that no float holds."""
        if len(self.values) != row:
            self._fill(row)
        if value is None or value != value:
            self.values.append(self.none)
        elif self.values.typecode == "d":
            self.values.append(value)
        elif (small := _SMALL.get(value)) is not None:
            self.values.append(small)
        else:
            self._put_other(float(value))

    def _put_other(self, value: float) -> None:
        whole = int(value) if abs(value) <= _EXACT else None
        if whole is None or whole != value:
            self._widen("d")
            self.values.append(value)
            return
        while not _LOWEST[self.values.typecode] < whole <= _HIGHEST[self.values.typecode]:
            self._widen(_WIDER[self.values.typecode])
        self.values.append(whole)

    def _fill(self, row: int) -> None:
        self.values.extend([self.none] * (row - len(self.values)))

    def _widen(self, code: str) -> None:
        before, lowest = self.values, self.none
        self.none = math.nan if code == "d" else _LOWEST[code]
        self.values = array(code, (self.none if value == lowest else value for value in before))

    def done(self, size: int) -> Numbers:
        self._fill(size)
        return Numbers(np.frombuffer(self.values, self.values.typecode) if size else np.zeros(0))


class WordColumn:
    """Words, row by row, as numbers in order of appearance; -1 where a record has none."""

    def __init__(self) -> None:
        self.codes = array("b")
        self.known: dict[Any, int] = {}

    def put(self, row: int, word: Any) -> None:
        if len(self.codes) != row:
            self.codes.extend([-1] * (row - len(self.codes)))
        code = -1 if word is None else self.known.setdefault(word, len(self.known))
        if code > _HIGHEST[self.codes.typecode]:
            self.codes = array(_WIDER[self.codes.typecode], self.codes)
        self.codes.append(code)

    def done(self, size: int) -> tuple[list[Any], np.ndarray]:
        """(words in alphabetical order, the rows' places in it), so that nothing depends on the order of rows."""
        self.codes.extend([-1] * (size - len(self.codes)))
        order = sorted(self.known)
        # The last place stands for -1.
        places = np.full(len(order) + 1, -1, self.codes.typecode)
        for place, word in enumerate(order):
            places[self.known[word]] = place
        self.known = {}
        codes = np.frombuffer(self.codes, self.codes.typecode) if size else np.zeros(0, np.int8)
        return order, places[codes]


def narrow(codes: np.ndarray, words: Sequence[Any]) -> np.ndarray:
    """Codes in the fewest bytes that hold every place in `words`, and -1."""
    return codes.astype(np.min_scalar_type(-max(len(words), 1)))
