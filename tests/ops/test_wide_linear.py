"""A dense layer that keeps its fp32 sums, against autograd on fp32 copies."""

from __future__ import annotations

import pytest
import torch

from moonbase.ops.wide_linear import _WideLinear, wide_linear

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def inputs(device: str, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator, device=device) for shape in ((2, rows, 32), (8, 32),
                                                                                            (2, rows, 8)))
    return x.bfloat16(), weight.bfloat16(), grad


def compare(device: str, form) -> None:
    """Values of exact products; gradients of a gradient in bf16, rounded once more at the end."""
    x, weight, grad = inputs(device)
    wide = [tensor.float().requires_grad_() for tensor in (x, weight)]
    expected = torch.nn.functional.linear(*wide)
    expected_grads = torch.autograd.grad(expected, wide, grad.bfloat16().float())
    narrow = [tensor.requires_grad_() for tensor in (x, weight)]
    found = form(*narrow)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, narrow, grad), expected_grads, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=1e-2, atol=1e-4)


def test_gradients() -> None:
    compare("cpu", lambda x, weight: _WideLinear.apply(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_the_plain_layer(dtype: torch.dtype) -> None:
    x, weight, grad = inputs("cpu")
    results = []
    for form in (wide_linear, lambda x, weight: torch.nn.functional.linear(x.float(), weight.float())):
        narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
        found = form(*narrow)
        results.append([found, *torch.autograd.grad(found, narrow, grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_tensor_cores(compiled: bool) -> None:
    torch.compiler.reset()
    compare("cuda", torch.compile(wide_linear, dynamic=False, fullgraph=True) if compiled else wide_linear)


@pytest.mark.gpu
@on_a_gpu
@torch.no_grad()
def test_without_gradients_it_is_the_plain_layer() -> None:
    x, weight, _ = inputs("cuda")
    assert torch.equal(wide_linear(x, weight), torch.nn.functional.linear(x.float(), weight.float()))
