"""A shuffled order that needs no memory: a keyed bijection of 0..n-1, evaluated only where it is asked.

A Feistel network permutes the next power of four; values that fall outside are permuted again until they are inside
("cycle walking", Black & Rogaway 2002). The order depends on n and the seed alone, never on a library's random stream,
so a resumed run and another machine see the same.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """One 64-bit number well stirred (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def combine(*numbers: int) -> int:
    """A seed from several numbers; their order counts."""
    result = 0
    for number in numbers:
        result = mix(result ^ mix(number & _MASK))
    return result


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A pseudo-random order of `size` things, fixed by `seed`."""

    def __init__(self, size: int, seed: int) -> None:
        assert size >= 0
        self.size = size
        self._half_bits = np.uint64(max(1, ((max(size, 2) - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._keys = [np.uint64(combine(seed, round)) for round in range(_ROUNDS)]

    def take(self, start: int, count: int) -> np.ndarray:
        """What stands at positions start .. start+count-1 (cut at `size`), int64."""
        values = np.arange(start, min(start + count, self.size), dtype=np.uint64)
        if len(values):
            values = self._network(values)
            while (outside := values >= self.size).any():
                values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix_array(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
