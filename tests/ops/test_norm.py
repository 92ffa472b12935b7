"""RMSNorm against its reference, autograd, transformers and numeric slopes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.norm import _RMSNorm, rms_norm, rms_norm_reference


def inputs(shape: tuple[int, ...], seed: int = 0, size: float = 1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * size).to(dtype).requires_grad_()
    return x, (1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype).requires_grad_()


@given(
    lead=st.lists(st.integers(1, 5), min_size=0, max_size=3), dims=st.integers(1, 40),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]), size=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_fast_equals_reference(lead, dims, eps, size, seed) -> None:
    x, gain = inputs((*lead, dims), seed, size)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    fast, plain = rms_norm(x, gain, eps), rms_norm_reference(x, gain, eps)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((fast * direction).sum(), (x, gain))
    expected = torch.autograd.grad((plain * direction).sum(), (x, gain))
    # In x the gradient has the size 1/|x|; cancellation leaves a rounding error of that size.
    torch.testing.assert_close(found[0] * size, expected[0] * size, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_backward_equals_numeric_slopes() -> None:
    x, gain = inputs((3, 4, 7), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, gain: _RMSNorm.apply(x, gain, 1e-5), (x, gain))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype: torch.dtype) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    x, gain = inputs((5, 24), dtype=dtype)
    theirs = DeepseekV3RMSNorm(24, eps=1e-5).to(dtype)
    theirs.weight.copy_(gain)
    found = rms_norm(x, gain, 1e-5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, theirs(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


@torch.no_grad()
def test_zeros_stay_zeros_and_huge_values_finite() -> None:
    gain = torch.ones(8)
    assert not rms_norm(torch.zeros(2, 8), gain, 1e-6).any()
    torch.testing.assert_close(rms_norm(torch.full((2, 8), 1e18), gain, 1e-6), torch.ones(2, 8))


def test_the_same_input_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        x, gain = inputs((4, 33, 64), seed=2)
        out = rms_norm(x, gain, 1e-6)
        out.square().sum().backward()
        results.append([out, x.grad, gain.grad])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")
@given(rows=st.integers(1, 300), dims=st.sampled_from([16, 48, 128]), sliced=st.booleans(),
       size=st.sampled_from([1e-4, 1.0, 1e4]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_kernel_equals_the_reference(rows, dims, sliced, size, seed) -> None:
    """Also where x is a slice of wider rows, as the latent is; and with any number of threads."""
    whole, _ = inputs((2, rows, dims + 16), seed, size)
    _, gain = inputs((dims,), seed)
    x = whole.detach()[..., :dims]
    x = (x if sliced else x.contiguous()).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    results = []
    for form, threads in ((rms_norm_reference, 1), (rms_norm, 1), (rms_norm, 3)):
        torch.set_num_threads(threads)
        out = form(x, gain, 1e-6)
        results.append([out, *torch.autograd.grad((out * direction).sum(), (x, gain))])
    plain, one, three = results
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    torch.testing.assert_close(one[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[1] * size, plain[1] * size, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(one[2], plain[2], rtol=1e-4, atol=2e-4)
