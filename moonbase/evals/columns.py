"""Columns of a table in as few bytes as their contents take: words as numbers, numbers as the narrowest integers.

A column begins with one byte a row and widens when a value does not fit, so that memory is that of the values: a score
of 0 or 1 takes one byte, a price eight. Nothing is rounded: what is no integer is kept as the float that it was. Many
different words (the names of items) are kept as the bytes that they are, one after another: of a digest, 33.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

_WIDER = {"b": "h", "h": "i", "i": "q"}
_LOWEST = {code: -(1 << (8 * array(code).itemsize - 1)) for code in "bhiq"}
_HIGHEST = {code: (1 << (8 * array(code).itemsize - 1)) - 1 for code in "bhiq"}
_EXACT = 1 << 53
"""Integers up to here are floats without loss."""
_SMALL = {float(number): number for number in range(-127, 128)}
"""What fits into the narrowest column, whether it comes as 1 or as 1.0."""
FEW = 2048
"""Words that are kept as Python's strings, three hundred bytes each with their place in a dictionary."""
_DIGESTS = {"hmac-sha256": b"\xfe", "sha256": b"\xff"}
"""Kind of a digest to the byte that it begins with when packed: one that no UTF-8 has."""
PIECE = 1 << 16
"""Rows that are widened at a time."""
_KINDS = {mark[0]: kind for kind, mark in _DIGESTS.items()}


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
        lowest, place = int(part.min()), part.astype(np.int64)
        place -= lowest
        return place, int(part.max()) - lowest + 1

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    @staticmethod
    def of(values: np.ndarray) -> Numbers:
        column = NumberColumn()
        for start in range(0, len(values), PIECE):
            for row, value in enumerate(np.asarray(values[start:start + PIECE], float).tolist(), start):
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


class Words(Sequence[str]):
    """Different words in the order of their packed bytes: of code points; digests behind all other words."""

    def __init__(self, packed: bytearray, ends: Sequence[int], places: np.ndarray | None = None) -> None:
        """`ends`: where each word ends; `places`: of the words that are meant, where it is not all of them."""
        self._packed, self._ends, self._places = packed, ends, places

    def __len__(self) -> int:
        return len(self._ends) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return unpacked(self._bytes(range(len(self))[place]))

    def __iter__(self) -> Iterator[str]:
        return (unpacked(self._bytes(place)) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def part(self, places: np.ndarray) -> Words:
        """Some of the words, in the order of `places`, which must ascend."""
        return Words(self._packed, self._ends, places if self._places is None else self._places[places])

    def _bytes(self, place: int) -> bytes:
        if self._places is not None:
            place = int(self._places[place])
        return bytes(self._packed[self._ends[place - 1] if place else 0:self._ends[place]])

    def place(self, word: str) -> int | None:
        """Where the word is."""
        for wanted in {packed(word, digests=True), packed(word, digests=False)}:
            place = bisect_left(range(len(self)), wanted, key=self._bytes)
            if place < len(self) and self._bytes(place) == wanted:
                return place
        return None


def place_of(words: Sequence[str], word: str) -> int | None:
    """The place of a word among sorted ones."""
    if isinstance(words, Words):
        return words.place(word)
    place = bisect_left(words, word)
    return place if place < len(words) and words[place] == word else None


def packed(word: str, digests: bool) -> bytes:
    """A word as UTF-8; where `digests`, one of them as a byte for its kind and its 32 bytes."""
    kind, _, digits = word.partition(":") if digests else ("", "", "")
    if len(digits) == 64 and kind in _DIGESTS:
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            raw = b""
        if raw.hex() == digits:
            return _DIGESTS[kind] + raw
    return word.encode("utf-8", "surrogatepass")


def unpacked(data: bytes) -> str:
    if data and data[0] in _KINDS:
        return f"{_KINDS[data[0]]}:{data[1:].hex()}"
    return data.decode("utf-8", "surrogatepass")


class _Kept:
    """Packed words that are numbered in the order in which they came, and found by their hashes."""

    def __init__(self) -> None:
        self.packed, self.count = bytearray(), 0
        self.width: int | None = None
        """Bytes of each word, as long as all have as many; else `ends` holds where each ends."""
        self.ends: array[int] | None = None
        self.runs = [0]
        """Every `take` adds a run of words, sorted among themselves: how many words there were after each."""
        self._hashes, self._codes = np.zeros(0, np.int64), np.zeros(0, np.int32)

    def copy(self) -> _Kept:
        found = _Kept()
        # Arrays are never changed in their place.
        found.__dict__ |= self.__dict__ | {"packed": self.packed[:], "runs": self.runs[:], "ends": self.ends and
                                           self.ends[:]}
        return found

    def _end(self, code: int) -> int:
        return (code + 1) * (self.width or 0) if self.ends is None else self.ends[code] if code >= 0 else 0

    def bytes_of(self, code: int) -> bytes:
        return bytes(self.packed[self._end(code - 1):self._end(code)])

    def take(self, words: Sequence[bytes]) -> np.ndarray:
        """The code of each of these different words, new ones where they were not there."""
        hashes = np.fromiter(map(hash, words), np.int64, len(words))
        first = np.searchsorted(self._hashes, hashes)
        codes = np.full(len(words), -1, np.int64)
        # Words with one hash stand side by side; which of them it is their bytes say.
        there = first < len(self._hashes)
        there[there] = self._hashes[first[there]] == hashes[there]
        for number in np.flatnonzero(there):
            place = int(first[number])
            while place < len(self._hashes) and self._hashes[place] == hashes[number]:
                if self.bytes_of(int(self._codes[place])) == words[number]:
                    codes[number] = self._codes[place]
                    break
                place += 1
        new = np.array(sorted(np.flatnonzero(codes < 0).tolist(), key=words.__getitem__), np.int64)
        codes[new] = np.arange(self.count, self.count + len(new))
        for number in new:
            self._append(words[number])
        self.runs.append(self.count)
        new = new[np.argsort(hashes[new])]
        if self.count > _HIGHEST["i"]:
            self._codes = self._codes.astype(np.int64)
        self._codes = np.insert(self._codes, first[new], codes[new])
        self._hashes = np.insert(self._hashes, first[new], hashes[new])
        return codes

    def _append(self, word: bytes) -> None:
        if self.ends is None and len(word) != self.width:
            if self.width is None:
                self.width = len(word)
            else:
                self.ends = array("I", range(self.width, len(self.packed) + 1, self.width or 1))
        self.packed += word
        self.count += 1
        if self.ends is not None:
            if len(self.packed) >> 32 and self.ends.typecode == "I":
                self.ends = array("Q", self.ends)
            self.ends.append(len(self.packed))

    def sorted(self) -> tuple[Words, np.ndarray]:
        """(the words in their order, the place in it of every code; the last, for code -1, is -1). Ends the use."""
        del self._hashes, self._codes
        kind = np.int32 if self.count <= _HIGHEST["i"] else np.int64
        places = np.full(self.count + 1, -1, kind)
        if self.ends is None and self.width:
            # Of one width: as numpy's words, which end in zeros, they compare as the bytes that they are.
            words = np.frombuffer(self.packed, f"S{self.width}")
            places[np.argsort(words, kind="stable")] = np.arange(self.count, dtype=kind)
            words.sort()
            return Words(self.packed, range(self.width, len(self.packed) + 1, self.width)), places
        runs = (((self.bytes_of(code), code) for code in range(start, stop))
                for start, stop in zip(self.runs, self.runs[1:], strict=False))
        text, ends = bytearray(len(self.packed)), array(self.ends.typecode if self.ends else "I", b"")
        at = 0
        for place, (word, code) in enumerate(heapq.merge(*runs)):
            text[at:at + len(word)] = word
            at += len(word)
            ends.append(at)
            places[code] = place
        return Words(text, ends), places


class WordColumn:
    """Words, row by row, as numbers in order of appearance; -1 where a record has none."""

    def __init__(self, digests: bool = False) -> None:
        """`digests`: most of its words are such."""
        self.codes = array("b")
        self.known: dict[Any, int] = {}
        """Words that came lately, and what stands for them in the rows from `_since` on."""
        self._kept, self._since, self._digests = _Kept(), 0, digests

    def put(self, row: int, word: Any) -> None:
        if len(self.codes) != row:
            self.codes.extend([-1] * (row - len(self.codes)))
        code = -1 if word is None else self.known.setdefault(word, self._kept.count + len(self.known))
        if code > _HIGHEST[self.codes.typecode]:
            self.codes = array(_WIDER[self.codes.typecode], self.codes)
        self.codes.append(code)
        if len(self.known) > FEW and len(self.known) > self._kept.count >> 5:
            self._keep()

    def _keep(self) -> None:
        """What came lately joins what is kept; a word that was there has its code again."""
        start = self._kept.count
        codes = np.append(self._kept.take([packed(word, self._digests) for word in self.known]), -1)
        rows = np.frombuffer(self.codes, self.codes.typecode)[self._since:]
        rows[:] = codes[np.where(rows < 0, -1, rows - start)]
        self._since, self.known = len(self.codes), {}

    def copy(self) -> WordColumn:
        found = WordColumn(self._digests)
        found.codes, found.known, found._kept, found._since = (
            self.codes[:], dict(self.known), self._kept.copy(), self._since)
        return found

    def done(self, size: int) -> tuple[Sequence[Any], np.ndarray]:
        """(words in alphabetical order, the rows' places in it), so that nothing depends on the order of rows."""
        self.codes.extend([-1] * (size - len(self.codes)))
        if not size:
            return [], np.zeros(0, np.int8)
        codes = np.frombuffer(self.codes, self.codes.typecode)
        if self._kept.count:
            del codes
            self._keep()
            words, places = self._kept.sorted()
            codes = np.frombuffer(self.codes, self.codes.typecode)
        else:
            words = sorted(self.known)
            # The last place stands for -1.
            places = np.full(len(words) + 1, -1, self.codes.typecode)
            for place, word in enumerate(words):
                places[self.known[word]] = place
        self.known = {}
        for start in range(0, size, PIECE):
            codes[start:start + PIECE] = places[codes[start:start + PIECE]]
        return words, codes


def narrow(codes: np.ndarray, words: Sequence[Any]) -> np.ndarray:
    """Codes in the fewest bytes that hold every place in `words`, and -1."""
    return codes.astype(np.min_scalar_type(-max(len(words), 1)))
