"""The CPU attention kernel against the reference: shapes around its blocks, any strides, any documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.attention import Documents, attention, attention_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")


def inputs(batch: int, time: int, heads: int, key_dims: int, value_dims: int, seed: int = 0) -> list[torch.Tensor]:
    """As the model makes them: the value is a slice of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, time, heads, key_dims, generator=generator) for _ in range(2))
    value = torch.randn(batch, time, heads, 16 + value_dims, generator=generator)[..., 16:]
    return [x.requires_grad_() for x in (query, key, value)]


def documents_of(chance: float, batch: int, time: int, seed: int = 0) -> Documents | None:
    generator = torch.Generator().manual_seed(seed)
    return Documents.from_ids((torch.rand(batch, time, generator=generator) < chance).cumsum(1).to(torch.int32))


def both(tensors: list[torch.Tensor], documents: Documents | None, scale: float = 0.3):
    results = []
    for form in (attention, attention_reference):
        output, _ = form(*tensors, scale, documents)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        results.append([output, *torch.autograd.grad((output * direction).sum(), tensors)])
    return results


@given(
    batch=st.integers(1, 2), time=st.integers(1, 130), heads=st.integers(1, 3),
    key_dims=st.sampled_from([16, 32, 48, 192]), value_dims=st.sampled_from([16, 32, 48, 128]),
    chance=st.sampled_from([0.0, 0.02, 0.3, 1.0]), seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_reference(batch, time, heads, key_dims, value_dims, chance, seed) -> None:
    tensors = inputs(batch, time, heads, key_dims, value_dims, seed)
    for one, other in zip(*both(tensors, documents_of(chance, batch, time, seed), key_dims**-0.5), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("time", [511, 513, 1100])
@pytest.mark.parametrize("chance", [0.0, 0.002])
def test_more_keys_than_a_block(time: int, chance: float) -> None:
    tensors = inputs(1, time, 2, 16, 32)
    for one, other in zip(*both(tensors, documents_of(chance, 1, time)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_no_number_crosses_a_border() -> None:
    """What the mask hides is not even multiplied by zero: infinities and NaN stay where they are."""
    tensors = inputs(1, 90, 2, 16, 16)
    ids = (torch.arange(90) >= 37).int()[None]
    clean, _ = attention(*tensors, 0.3, Documents.from_ids(ids))
    for tensor in tensors:
        tensor.data[:, 37:] = torch.nan
    dirty, _ = attention(*tensors, 0.3, Documents.from_ids(ids))
    assert torch.equal(clean[:, :37], dirty[:, :37]) and dirty[:, 37:].isnan().all()


@torch.no_grad()
def test_the_bound_of_a_row_that_is_not_finite() -> None:
    query, key, value = inputs(1, 20, 2, 16, 16)
    query[0, 11, 1] = torch.nan
    _, bound = attention(query, key, value, 0.3)
    assert bound[0].isfinite() and not bound[1].isfinite()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    tensors, documents = inputs(2, 150, 3, 32, 32), documents_of(0.02, 2, 150)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        output, largest = attention(*tensors, 0.3, documents)
        results.append([output, largest, *torch.autograd.grad(output.square().sum(), tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
