"""The Triton kernels of the norm against autograd. `test_cuda_kernels` starts this file (see there)."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.ops import norm_cuda
from moonbase.ops.norm import rms_norm_reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).bfloat16().double()


@pytest.mark.parametrize(("shape", "programs"), [((1, 1, 24), 1), ((2, 37, 64), 3), ((3, 1100), 2)])
@pytest.mark.parametrize("kind", ["alone", "beside", "summed"])
def test_norm_and_gradients(shape: tuple[int, ...], programs: int, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(norm_cuda, "_PROGRAMS", programs)
    x, added, gain = normal(*shape), normal(*shape, seed=1), (1 + normal(shape[-1], seed=2) / 4).bfloat16().double()
    weights = [normal(*shape, seed=3), normal(*shape, seed=4)]
    total, exact_gain = (x + added if kind == "summed" else x.clone()).requires_grad_(), gain.clone().requires_grad_()
    expected = rms_norm_reference(total, exact_gain, 1e-6)
    ((expected * weights[0]).sum() + (0 if kind == "alone" else (total * weights[1]).sum())).backward()
    x, added, gain = (y.detach().bfloat16().to(DEVICE).requires_grad_() for y in (x, added, gain))
    if kind == "alone":
        passed, found = None, norm_cuda.rms_norm(x, gain, 1e-6)
        found.backward(weights[0].bfloat16().to(DEVICE))
    else:
        passed, found = (norm_cuda.rms_norm_beside(x, gain, 1e-6) if kind == "beside"
                         else norm_cuda.rms_norm_of_sum(x, added, gain, 1e-6))
        torch.autograd.backward((passed, found), [w.bfloat16().to(DEVICE) for w in reversed(weights)])
        close(passed, total)
    if kind == "summed":
        assert torch.equal(x.grad, added.grad)
    for one, other in ((found, expected), (x.grad, total.grad), (gain.grad, exact_gain.grad)):
        close(one, other)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within three roundings to bf16; Triton's interpreter rounds towards zero."""
    size = expected.detach().abs().amax()
    torch.testing.assert_close(found.detach().double().cpu(), expected.detach(), rtol=2e-2, atol=float(size) * 2e-3)
