"""Fused attention against its reference, and the contract of the largest logit that QK-Clip relies on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops.attention import Documents, attention, attention_reference, largest_logit, wide_product


def inputs(batch: int, time: int, heads: int, key_dims: int, value_dims: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, time, heads, dims, generator=generator).to(dtype).requires_grad_()
            for dims in (key_dims, key_dims, value_dims)]


def documents_of(kind: str, batch: int, time: int, seed: int = 0) -> Documents | None:
    generator = torch.Generator().manual_seed(seed)
    chance = {"none": 0.0, "some": 0.15, "every token": 1.0}[kind]
    ids = (torch.rand(batch, time, generator=generator) < chance).cumsum(1).to(torch.int32)
    return Documents.from_ids(ids)


shapes = dict(
    batch=st.integers(1, 3), time=st.integers(1, 70), heads=st.integers(1, 4), key_dims=st.integers(1, 40),
    value_dims=st.integers(1, 40), kind=st.sampled_from(["none", "some", "every token"]), seed=st.integers(0, 999),
)


@given(**shapes)
@settings(max_examples=60, deadline=None)
def test_output_and_gradients_equal_the_reference(batch, time, heads, key_dims, value_dims, kind, seed) -> None:
    tensors = inputs(batch, time, heads, key_dims, value_dims, seed)
    documents = documents_of(kind, batch, time, seed)
    results = []
    for form in (attention, attention_reference):
        output, _ = form(*tensors, 0.3, documents)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
        results.append((output, torch.autograd.grad((output * direction).sum(), tensors)))
    (fast, fast_grads), (plain, plain_grads) = results
    assert fast.shape == (batch, time, heads, value_dims)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    for one, other in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@given(**shapes, size=st.sampled_from([0.05, 1.0, 6.0]), place=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_largest_logit_contract(batch, time, heads, key_dims, value_dims, kind, seed, size, place) -> None:
    query, key, value = inputs(batch, time, heads, key_dims, value_dims, seed)
    query, documents = query * size, documents_of(kind, batch, time, seed)
    _, exact = attention_reference(query, key, value, 0.7, documents)
    _, bound = attention(query, key, value, 0.7, documents)
    rounding = 1e-4 + 1e-5 * exact.abs()
    assert bound.dtype == torch.float32 and bound.shape == (heads,)
    assert (bound >= exact - rounding).all() and (bound <= exact + math.log(time) + rounding).all()
    _, all_exact = attention(query, key, value, 0.7, documents, -math.inf)
    torch.testing.assert_close(all_exact, exact, rtol=1e-4, atol=1e-4)
    # A threshold anywhere among the bounds: above it exact, at or below it the bound itself.
    threshold = (bound.min() + place * (bound.max() - bound.min())).item()
    _, mixed = attention(query, key, value, 0.7, documents, threshold)
    above = bound > threshold
    torch.testing.assert_close(mixed[above], exact[above], rtol=1e-4, atol=1e-4)
    assert torch.equal(mixed[~above], bound[~above])


def test_no_head_above_the_threshold_escapes() -> None:
    """The point of the bound: max > τ implies bound > τ, so a head that needs a clip is always looked at."""
    query, key, value = inputs(2, 50, 6, 16, 16)
    with torch.no_grad():
        _, exact = attention_reference(query, key, value, 1.0)
        for threshold in exact.tolist():
            _, found = attention(query, key, value, 1.0, None, threshold - 1e-3)
            assert torch.equal(found > threshold - 1e-3, (exact > threshold - 1e-3) | (found > threshold - 1e-3))
            torch.testing.assert_close(found[exact > threshold - 1e-3], exact[exact > threshold - 1e-3])


def test_the_report_carries_no_gradient() -> None:
    tensors = inputs(1, 8, 2, 4, 4)
    for documents in (None, documents_of("some", 1, 8, 1)):
        for threshold in (None, -math.inf):
            output, largest = attention(*tensors, 0.5, documents, threshold)
            assert output.requires_grad and not largest.requires_grad


@pytest.mark.parametrize("kind", ["none", "some"])
def test_huge_logits_stay_finite(kind: str) -> None:
    query, key, value = inputs(2, 33, 2, 8, 8)
    documents = documents_of(kind, 2, 33)
    output, bound = attention(query * 1e4, key, value, 1.0, documents)
    output.sum().backward()
    assert output.isfinite().all() and bound.isfinite().all() and bound.max() > 1e4
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (query, key, value))


@pytest.mark.parametrize("kind", ["none", "some"])
def test_bfloat16_follows_fp32(kind: str) -> None:
    tensors = inputs(2, 40, 2, 24, 16, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    documents = documents_of(kind, 2, 40)
    output, bound = attention(*tensors, 0.2, documents)
    expected, exact = attention_reference(*wide, 0.2, documents)
    assert output.dtype == torch.bfloat16 and bound.dtype == torch.float32
    assert (bound >= exact - 1e-3).all(), "a bound rounded to bf16 would be none"
    torch.testing.assert_close(output.float(), expected, rtol=2e-2, atol=2e-2)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((output.float() * direction).sum(), tensors)
    for one, other in zip(found, torch.autograd.grad((expected * direction).sum(), wide), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["none", "some"])
def test_backward_equals_numeric_slopes(kind: str) -> None:
    tensors = inputs(2, 7, 2, 3, 2, dtype=torch.float64)
    documents = documents_of(kind, 2, 7, 3)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, 0.7, documents)[0], tensors)


@torch.no_grad()
@given(time=st.integers(1, 40), block=st.integers(1, 50), packed=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_largest_logit_in_blocks(time, block, packed, seed) -> None:
    query, key, value = inputs(2, time, 1, 5, 5, seed)
    documents = documents_of("some" if packed else "none", 2, time, seed)
    _, exact = attention_reference(query, key, value, 0.7, documents)
    ids = None if documents is None else documents.ids_BT
    torch.testing.assert_close(largest_logit(query[:, :, 0], key[:, :, 0], 0.7, ids, block), exact[0])


def test_the_same_input_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        tensors = inputs(2, 65, 3, 24, 16, seed=5)
        output, largest = attention(*tensors, 0.2, documents_of("some", 2, 65), 0.5)
        output.square().sum().backward()
        results.append([output, largest, *(tensor.grad for tensor in tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_fp32_on_another_device_takes_the_reference() -> None:
    """Only shapes can be looked at without such a device."""
    query, value = torch.empty(2, 5, 3, 8, device="meta"), torch.empty(2, 5, 3, 6, device="meta")
    output, largest = attention(query, query, value, 0.3, None, 1.0)
    assert output.shape == (2, 5, 3, 6) and largest.shape == (3,)


def test_wide_product_is_not_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, *shape, generator=generator).bfloat16() for shape in [(3, 40), (40, 5)])
    found = wide_product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
