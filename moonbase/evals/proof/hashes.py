"""What must be remembered of every item, in little more than its bytes: sorted arrays, and a few in Python's own sets.

A Python set takes a hundred bytes for each value of sixteen, a dictionary two hundred for two numbers of eight.
"""

from __future__ import annotations

import numpy as np

FEW = 2048
"""Values that wait in Python's objects before they are sorted into the arrays, or a thirty-second of all."""


class Distinct:
    """Different values of one number of bytes."""

    def __init__(self, width: int) -> None:
        self._sorted, self._new, self._width = np.zeros(0, f"S{width}"), set[bytes](), width

    def add(self, value: bytes) -> None:
        self._new.add(value)
        if len(self._new) > max(FEW, len(self._sorted) >> 5):
            self._merge()

    def _merge(self) -> None:
        # Values of one width: numpy's words, which end in zeros, compare as the bytes that they are.
        new = np.frombuffer(b"".join(sorted(self._new)), f"S{self._width}")
        self._new = set()
        places = np.searchsorted(self._sorted, new)
        known = places < len(self._sorted)
        known[known] = self._sorted[places[known]] == new[known]
        self._sorted = np.insert(self._sorted, places[~known], new[~known])

    def __len__(self) -> int:
        self._merge()
        return len(self._sorted)

    def tobytes(self) -> bytes:
        """All of them in order, one after another."""
        self._merge()
        return self._sorted.tobytes()


class Firsts:
    """What was said of each key when it came first; keys and values are 64-bit hashes, signed."""

    def __init__(self) -> None:
        self._keys, self._values = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._new: dict[int, int] = {}

    def agrees(self, key: int, value: int) -> bool:
        """Whether the value is the first one of its key; the first one is."""
        known = self._new.get(key)
        if known is None:
            place = int(self._keys.searchsorted(key))
            if place < len(self._keys) and self._keys[place] == key:
                return bool(self._values[place] == value)
            self._new[key] = known = value
            if len(self._new) > max(FEW, len(self._keys) >> 5):
                self._merge()
        return known == value

    def _merge(self) -> None:
        keys = np.fromiter(self._new.keys(), np.int64, len(self._new))
        values = np.fromiter(self._new.values(), np.int64, len(self._new))
        order = np.argsort(keys)
        keys, values, self._new = keys[order], values[order], {}
        places = np.searchsorted(self._keys, keys)
        self._keys, self._values = np.insert(self._keys, places, keys), np.insert(self._values, places, values)
