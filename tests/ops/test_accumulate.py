"""Adding gradients up: the same bits as PyTorch's addition, whatever the dtypes and strides."""

from __future__ import annotations

import pytest
import torch

from moonbase.ops.accumulate import FEWEST, accumulate_

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])])


@each_device
@pytest.mark.parametrize("rows", [3, FEWEST // 8, FEWEST // 8 + 1])
@pytest.mark.parametrize(("total_dtype", "dtype"), [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_equals_addition(rows: int, total_dtype: torch.dtype, dtype: torch.dtype, transposed: bool,
                         device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    total, addend = (torch.randn(rows, 8, generator=generator, device=device) for _ in range(2))
    total, addend = total.to(total_dtype), addend.to(dtype)
    if transposed:
        addend = addend.T.contiguous().T
    expected = (total.double() + addend.double()).to(total_dtype)  # exact before it is rounded once
    accumulate_(total, addend)
    assert total.dtype == total_dtype and torch.equal(total, expected)


@each_device
def test_factor(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    total, addend = (torch.randn(FEWEST, generator=generator, device=device) for _ in range(2))
    addend = addend.bfloat16()
    expected = total.double() - 0.3 * addend.double()
    accumulate_(total, addend, -0.3)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
