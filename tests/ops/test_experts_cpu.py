"""The CPU kernel of routed experts against the reference; and a token's bits, which depend on nothing beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.experts import experts, experts_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")


def inputs(tokens: int, choices: int, count: int, dims: int, width: int, routing: str = "random", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, count, generator=generator).argsort(1)[:, :choices].contiguous()
    if routing == "one expert":
        indices.fill_(count - 1)
    elif routing == "some empty":
        indices = indices // 2 * 2
    x, weights = torch.randn(tokens, dims, generator=generator), torch.rand(tokens, choices, generator=generator)
    gate_up = torch.randn(count, 2 * width, dims, generator=generator) / dims**0.5
    down = torch.randn(count, dims, width, generator=generator) / width**0.5
    return [x.requires_grad_(), indices, weights.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()]


@given(
    tokens=st.integers(1, 260), choices=st.integers(1, 4), count=st.integers(4, 9), dims=st.sampled_from([16, 48, 64]),
    width=st.sampled_from([16, 32, 80]), routing=st.sampled_from(["random", "one expert", "some empty"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_reference(tokens, choices, count, dims, width, routing, seed) -> None:
    tensors = inputs(tokens, choices, count, dims, width, routing, seed)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    direction = torch.randn(tokens, dims, generator=torch.Generator().manual_seed(seed))
    results = []
    for form in (experts, experts_reference):
        out = form(*tensors)
        results.append([out, *torch.autograd.grad((out * direction).sum(), wanted)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_more_rows_than_a_task() -> None:
    tensors = inputs(1300, 1, 4, 16, 16, "one expert")
    out, plain = experts(*tensors), experts_reference(*tensors)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    for one, other in zip(torch.autograd.grad(out.square().sum(), tensors[3:]),
                          torch.autograd.grad(plain.square().sum(), tensors[3:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_a_token_has_the_same_bits_alone_and_in_company() -> None:
    x, indices, weights, gate_up, down = inputs(200, 3, 6, 48, 32)
    together = experts(x, indices, weights, gate_up, down)
    for part in (slice(0, 1), slice(17, 18), slice(3, 40), slice(100, 200)):
        assert torch.equal(experts(x[part], indices[part], weights[part], gate_up, down), together[part])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    tensors = inputs(300, 4, 8, 32, 16)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = experts(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), [t for t in tensors if t.requires_grad])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_with_and_without_gradient_the_same_bits() -> None:
    tensors = inputs(50, 2, 5, 32, 16)
    with torch.no_grad():
        plain = experts(*tensors)
    assert torch.equal(experts(*tensors), plain)


def test_a_gate_that_is_saturated_or_not_finite() -> None:
    x, indices, weights, gate_up, down = inputs(8, 1, 4, 16, 16)
    x.data[0], x.data[1], x.data[2] = 1e4, -1e4, torch.nan
    out, plain = (form(x, indices, weights, gate_up, down) for form in (experts, experts_reference))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-3, equal_nan=True)
    assert out[2].isnan().all() and out[3:].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_that_is_no_expert(wrong: int) -> None:
    tensors = inputs(8, 2, 4, 16, 16)
    tensors[1][3, 1] = wrong
    with pytest.raises(IndexError, match="there are 4 experts"):
        experts(*tensors)
