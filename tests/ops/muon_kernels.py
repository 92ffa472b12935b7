"""The kernels of `muon_cuda` and `symmetric_cuda` against plain PyTorch. `test_cuda_kernels` runs this file as it does
`kernels.py`: in Triton's interpreter on any machine that has triton, and on the GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.ops import muon_cuda, symmetric_cuda

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter cuts fp32 off where bf16 should be rounded.
SHORT = torch.bfloat16 if DEVICE == "cuda" else torch.float16
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "Nesterov"])
@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32, SHORT), (torch.float32, SHORT, SHORT), (SHORT, SHORT, SHORT),
    (torch.float32, torch.float32, torch.float32)], ids=["fp32 masters", "short momentum", "all short", "all fp32"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 64), (2, 33, 77)])
def test_momentum(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], nesterov: bool) -> None:
    gradient, momentum = (normal(*shape, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes[:2]))
    kept = 0.95 * momentum.double() + gradient.double()
    found, out = momentum.to(DEVICE, copy=True), torch.empty(shape, dtype=dtypes[2], device=DEVICE)
    muon_cuda.momentum_(gradient.to(DEVICE), found, out, 0.95, nesterov)
    torch.testing.assert_close(found.double().cpu(), kept, rtol=ROUNDED[dtypes[1]], atol=1e-6)
    # The direction follows from the momentum as it was rounded.
    direction = 0.95 * found.double().cpu() + gradient.double() if nesterov else found.double().cpu()
    torch.testing.assert_close(out.double().cpu(), direction, rtol=ROUNDED[dtypes[2]], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, SHORT])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 80), (2, 33, 77), (0, 4, 4)])
def test_divide(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrices = normal(*shape, dtype=dtype, seed=0)
    divisors = normal(shape[0], 1, 1, dtype=torch.float32, seed=1).abs() + 0.1
    found = matrices.to(DEVICE, copy=True)
    muon_cuda.divide(found, divisors.to(DEVICE), found)
    torch.testing.assert_close(
        found.double().cpu(), matrices.double() / divisors.double(), rtol=ROUNDED[dtype], atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 128, 256), (1, 384, 128), (2, 256, 128)], ids=str)
def test_products(shape: tuple[int, int, int]) -> None:
    """What one step of Newton-Schulz takes, of wide and tall matrices; every place of the result is written."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x = (normal(*shape, dtype=torch.float32, seed=0) / 16).to(DEVICE, dtype)
    left, right = (x, x.mT) if shape[1] <= shape[2] else (x.mT, x)
    near = dict.fromkeys(("rtol", "atol"), ROUNDED[dtype] + 1e-5)
    square = symmetric_cuda.product(left, right, symmetric=True)
    torch.testing.assert_close(square.double(), left.double() @ right.double(), **near)
    bend = symmetric_cuda.product(square, square, square, 2.0, -4.5, torch.full_like(square, torch.nan), symmetric=True)
    torch.testing.assert_close(bend.double(), 2 * square.double() @ square.double() - 4.5 * square.double(), **near)
    assert torch.equal(square, square.mT) and torch.equal(bend, bend.mT)
    left, right = (bend, x) if shape[1] <= shape[2] else (x, bend)
    found = symmetric_cuda.product(left, right, x, 1.0, 3.5, torch.full_like(x, torch.nan))
    torch.testing.assert_close(found.double(), left.double() @ right.double() + 3.5 * x.double(), **near)
