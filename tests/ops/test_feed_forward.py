"""The dense layer and the SwiGLU part against PyTorch's own operations in fp64, with autograd's gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.feed_forward import feed_forward, feed_forward_reference
from moonbase.ops.linear import linear

WIDTHS = st.sampled_from([1, 7, 16, 48, 80])
ROWS = st.sampled_from([1, 63, 64, 97, 300, 700])


def tensors(*shapes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def compare(fast, plain, inputs: list[torch.Tensor]) -> None:
    """Result and gradients of `fast` in fp32, of `plain` in fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = fast(*inputs), plain(*wide)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((found * direction).sum(), inputs)
    expected = torch.autograd.grad((expected * direction.double()).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@given(rows=ROWS, inputs=WIDTHS, outputs=WIDTHS, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_linear(rows: int, inputs: int, outputs: int, seed: int) -> None:
    compare(linear, F.linear, tensors((rows, inputs), (outputs, inputs), seed=seed))


@given(rows=ROWS, hidden=WIDTHS, width=WIDTHS, seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_feed_forward(rows: int, hidden: int, width: int, seed: int) -> None:
    shapes = [(rows, hidden), (width, hidden), (width, hidden), (hidden, width)]
    compare(feed_forward, feed_forward_reference, tensors(*shapes, seed=seed))


def test_a_batch_whose_rows_lie_apart_and_large_weights() -> None:
    whole, weight = tensors((2, 100, 96), (32, 48), seed=1)
    compare(lambda x, w: linear(x[..., 48:], w), lambda x, w: F.linear(x[..., 48:], w), [whole, weight])
    compare(linear, F.linear, tensors((128, 256), (1024, 256), seed=2))
    compare(feed_forward, feed_forward_reference, tensors((200, 128), (384, 128), (384, 128), (128, 384), seed=3))


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = tensors((100, 32), (64, 32), seed=4)
    for inputs in ([x.detach(), weight], [x, weight.detach()]):
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = torch.autograd.grad(linear(*inputs).square().sum(), wanted)
        expected = torch.autograd.grad(F.linear(*inputs).square().sum(), wanted)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_bits_depend_neither_on_threads_nor_on_other_rows() -> None:
    x, *weights = tensors((700, 32), (48, 32), (48, 32), (32, 48), seed=5)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            y = feed_forward(x, *weights)
            dense = linear(x, weights[0])
            results.append([y, dense, *torch.autograd.grad(y.square().sum() + dense.square().sum(), [x, *weights])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(linear(x[200:300], weights[0]), results[0][1][200:300])
    assert torch.equal(feed_forward(x[200:300], *weights), results[0][0][200:300])
