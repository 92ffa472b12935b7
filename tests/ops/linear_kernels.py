"""The kernels of `linear_cuda` against plain PyTorch. `test_cuda_kernels` runs this file as it does `kernels.py`: in
Triton's interpreter on any machine that has triton, and on the GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from moonbase.ops.linear_cuda import gated_linear, linear

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="NumPy's product of other shapes adds in another order")
# The interpreter cuts fp32 off where bf16 should be rounded, and multiplies bf16 matrices as if they were integers.
SHORT = torch.bfloat16 if DEVICE == "cuda" else torch.float16
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, SHORT], ids=["fp32", "16 bits"])


def case(tokens: int, depth: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x as columns of something wider that must not be read, and two weights; products are of order one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, depth, generator=generator).to(dtype)
    wider = torch.cat([x, torch.full_like(x, torch.nan)], 1).to(DEVICE)
    weights = (torch.randn(2, width, depth, generator=generator) / depth**0.5).to(dtype).to(DEVICE)
    return wider[:, :depth], *weights


@each_dtype
@pytest.mark.parametrize(("tokens", "depth", "width"), [
    (1, 20, 5), (17, 150, 70), (70, 16, 130), (530, 40, 150), (3, 256, 64)])
def test_products(tokens: int, depth: int, width: int, dtype: torch.dtype) -> None:
    x, gate, up = case(tokens, depth, width, dtype)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=2e-3)
    products = [x.double() @ weight.double().T for weight in (gate, up)]
    found = linear(x, gate)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), products[0], **tolerance)
    torch.testing.assert_close(gated_linear(x, gate, up).double(), F.silu(products[0]) * products[1], **tolerance)


@on_a_gpu
@each_dtype
@pytest.mark.parametrize(("depth", "width"), [(1024, 320), (320, 4096), (512, 3072), (7168, 576), (24, 40)])
def test_a_row_does_not_depend_on_its_company(depth: int, width: int, dtype: torch.dtype) -> None:
    x, gate, up = case(2000, depth, width, dtype)
    together, gated_together = linear(x, gate), gated_linear(x, gate, up)
    for first, last in ((0, 1), (1999, 2000), (5, 21), (7, 71), (100, 611), (100, 612), (3, 1500)):
        assert linear(x[first:last], gate).equal(together[first:last]), (first, last)
        assert gated_linear(x[first:last], gate, up).equal(gated_together[first:last]), (first, last)
