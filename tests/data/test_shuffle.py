"""The shuffled order is an order: everything once, fixed by the seed, and it looks random."""

from __future__ import annotations

import numpy as np
import pytest

from moonbase.data.shuffle import Permutation, combine


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_everything_once(size: int) -> None:
    for seed in range(5):
        assert sorted(Permutation(size, seed).take(0, size + 3).tolist()) == list(range(size))


def test_any_part_is_part_of_the_whole() -> None:
    order = Permutation(1000, 7)
    whole = order.take(0, 1000)
    parts = np.concatenate([order.take(start, 37) for start in range(0, 1000, 37)])
    assert (whole == parts).all()


def test_seed_decides() -> None:
    orders = {tuple(Permutation(10, seed).take(0, 10).tolist()) for seed in range(50)}
    assert len(orders) > 45
    assert combine(1, 2) != combine(2, 1)


def test_looks_random() -> None:
    """Positions and values do not correlate, and the first place is taken by everyone equally often."""
    values = Permutation(10_000, 3).take(0, 10_000)
    assert abs(np.corrcoef(np.arange(10_000), values)[0, 1]) < 0.05
    counts = np.bincount([int(Permutation(5, seed).take(0, 1)[0]) for seed in range(5000)], minlength=5)
    assert (abs(counts - 1000) < 150).all()


def test_huge_sizes_cost_no_memory() -> None:
    values = Permutation(10**12, 0).take(10**11, 1000)
    assert len(np.unique(values)) == 1000 and values.min() >= 0 and values.max() < 10**12
