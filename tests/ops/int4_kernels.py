"""Fake quantisation on a GPU gives the reference's values. Run by `test_cuda_kernels`, as `kernels.py` is."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.ops.int4 import INT4_RULES, fake_quantize_
from moonbase.ops.int4_cuda import fake_quantize_cuda_

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("rule", INT4_RULES)
@pytest.mark.parametrize("shape", [(3, 32), (2, 37, 96)])
def test_the_values_of_the_reference(rule: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.view(-1, 32)[0] = 0
    weight.view(-1, 32)[1] *= 1e-7
    expected = fake_quantize_(torch.empty_like(weight), weight, rule)
    found = fake_quantize_cuda_(torch.empty_like(weight, device=DEVICE), weight.to(DEVICE), rule, 32)
    assert torch.equal(found.cpu(), expected)
    weight.view(-1, 32)[2, 5] = torch.nan
    weight.view(-1, 32)[2, 6] = torch.inf
    odd = fake_quantize_cuda_(torch.empty_like(found), weight.to(DEVICE), rule, 32).view(-1, 32).cpu()
    assert odd[2].isnan().any() and torch.equal(odd[:2], expected.view(-1, 32)[:2])
    again = fake_quantize_cuda_(torch.empty_like(found), found, rule, 32)
    assert torch.equal(again, found), "twice is once"


@pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter cuts fp32 off where bf16 should be rounded")
def test_into_bf16() -> None:
    weight = torch.randn(64, 2048, device=DEVICE)
    expected = fake_quantize_(torch.empty(64, 2048), weight.cpu())
    out = torch.empty(64, 2048, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(fake_quantize_(out, weight).cpu(), expected.bfloat16())
