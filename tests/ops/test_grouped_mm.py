"""Grouped matrix products against one product per group."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops.grouped_mm import grouped_mm, grouped_mm_reference, grouped_outer, grouped_outer_reference

counts = st.lists(st.integers(0, 9), min_size=1, max_size=7)


@given(
    counts=counts, inner=st.integers(1, 20), outer=st.integers(1, 20), transposed=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_fast_equals_reference(counts, inner, outer, transposed, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), inner, generator=generator)
    y = torch.randn(sum(counts), outer, generator=generator)
    weight = torch.randn(len(counts), outer, inner, generator=generator).transpose(1, 2)
    if not transposed:
        weight = weight.contiguous()
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    product = grouped_mm(x, weight, ends)
    torch.testing.assert_close(product, grouped_mm_reference(x, weight, ends), rtol=1e-4, atol=1e-5)
    assert torch.equal(product, grouped_mm(x, weight, ends))
    sums = grouped_outer(x, y, ends)
    torch.testing.assert_close(sums, grouped_outer_reference(x, y, ends), rtol=1e-4, atol=1e-5)
    # Independent of both: a matrix of zeros and ones that says which row belongs to whom.
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    owner = torch.nn.functional.one_hot(groups, len(counts)).float()
    torch.testing.assert_close(product, torch.einsum("nk,ekm,ne->nm", x, weight, owner), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums, torch.einsum("nk,nm,ne->ekm", x, y, owner), rtol=1e-4, atol=1e-4)
