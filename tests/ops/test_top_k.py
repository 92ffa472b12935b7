"""The largest values of a row against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops.top_k import top_k


@given(lead=st.lists(st.integers(1, 9), min_size=0, max_size=2), count=st.sampled_from([1, 5, 16, 48, 64, 272, 2048]),
       choices=st.integers(1, 40), levels=st.sampled_from([2, 5, 10**6]), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_equals_a_sort(lead: list[int], count: int, choices: int, levels: int, seed: int) -> None:
    choices = min(choices, count)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-levels, levels, (*lead, count), generator=generator).float() / 7
    values[..., :: 5] *= -math.inf  # hidden groups of a router; 0 * inf is not a number
    found = top_k(values, choices)
    assert found.dtype == torch.int64 and found.shape == (*lead, choices)
    assert (found.sort(-1).values.diff(dim=-1) > 0).all(), "a place is taken once"
    expected = values.sort(-1, descending=True).values[..., :choices]
    chosen = values.gather(-1, found).sort(-1, descending=True).values
    torch.testing.assert_close(chosen, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("extreme", [math.nan, -math.nan, math.inf, -math.inf])
def test_rows_of_one_value(extreme: float) -> None:
    values = torch.full((3, 32), extreme)
    assert top_k(values, 32).sort(-1).values.tolist() == [list(range(32))] * 3
    values[:, 20] = 0.0
    assert (top_k(values, 1) == 20).all().item() == (extreme == -math.inf)
