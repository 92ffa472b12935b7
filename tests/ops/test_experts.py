"""A layer of routed experts against one expert after the other, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops.experts import experts, experts_reference, sort_by_expert, swiglu, swiglu_backward


def inputs(tokens: int, choices: int, count: int, dims: int, width: int, routing: str = "random", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    if routing == "one expert":
        indices = torch.full((tokens, choices), count - 1)
    elif routing == "some empty":
        indices = torch.rand(tokens, max(1, count // 2), generator=generator).argsort(1)[:, :choices] * 2 % count
    else:
        indices = torch.rand(tokens, count, generator=generator).argsort(1)[:, :choices]
    choices = indices.shape[1]
    x = torch.randn(tokens, dims, generator=generator)
    weights = torch.rand(tokens, choices, generator=generator)
    gate_up = torch.randn(count, 2 * width, dims, generator=generator) / dims**0.5
    down = torch.randn(count, dims, width, generator=generator) / width**0.5
    tensors = (x, indices, weights, gate_up, down)
    return [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]


@given(
    tokens=st.integers(1, 40), choices=st.integers(1, 4), count=st.integers(1, 9), dims=st.integers(1, 20),
    width=st.integers(1, 20), routing=st.sampled_from(["random", "one expert", "some empty"]), seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_fast_equals_reference(tokens, choices, count, dims, width, routing, seed) -> None:
    tensors = inputs(tokens, min(choices, count), count, dims, width, routing, seed)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    direction = torch.randn(tokens, dims, generator=torch.Generator().manual_seed(seed))
    results = []
    for form in (experts, experts_reference):
        out = form(*tensors)
        results.append((out, torch.autograd.grad((out * direction).sum(), wanted)))
    (fast, fast_grads), (plain, plain_grads) = results
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    for one, other in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_gradient_zero() -> None:
    tensors = inputs(6, 2, 5, 8, 4, "one expert")
    experts(*tensors).sum().backward()
    gate_up, down = tensors[3:]
    assert not gate_up.grad[:4].any() and not down.grad[:4].any()
    assert gate_up.grad[4].any() and down.grad[4].any()


@torch.no_grad()
def test_each_token_alone_gives_the_same() -> None:
    """Brute force by token instead of by expert."""
    x, indices, weights, gate_up, down = inputs(7, 3, 6, 8, 4)
    for token in range(7):
        expected = torch.zeros(8)
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            expected += weight * (down[expert] @ (gate / (1 + (-gate).exp()) * up))
        torch.testing.assert_close(experts(x, indices, weights, gate_up, down)[token], expected, rtol=1e-4, atol=1e-5)


@given(tokens=st.integers(1, 30), choices=st.integers(1, 4), count=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_sorting_by_expert(tokens, choices, count, seed) -> None:
    indices = torch.randint(0, count, (tokens, choices), generator=torch.Generator().manual_seed(seed))
    order, inverse, ends = sort_by_expert(indices, count)
    pairs = sorted(range(tokens * choices), key=lambda place: (indices.flatten()[place].item(), place))
    assert order.tolist() == pairs
    assert torch.equal(order[inverse], torch.arange(tokens * choices))
    assert ends.dtype == torch.int32
    assert ends.tolist() == [sum(int(chosen) <= expert for chosen in indices.flatten()) for expert in range(count)]


@given(rows=st.integers(0, 9), width=st.integers(1, 12), size=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_swiglu_backward_equals_autograd(rows, width, size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_up = (torch.randn(rows, 2 * width, generator=generator) * size).requires_grad_()
    weight = torch.rand(rows, 1, generator=generator).requires_grad_()
    grad = torch.randn(rows, width, generator=generator)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up * weight
    torch.testing.assert_close(swiglu(gate_up, weight), expected)
    grad_gate_up, grad_weight = torch.autograd.grad(expected, (gate_up, weight), grad)
    found_gate_up, found_weight, activation = swiglu_backward(grad, gate_up.detach(), weight.detach())
    torch.testing.assert_close(found_gate_up, grad_gate_up, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_weight, grad_weight[:, 0], rtol=1e-4, atol=1e-4 * size**2)
    torch.testing.assert_close(activation, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_fp32(dtype: torch.dtype) -> None:
    x, indices, weights, gate_up, down = inputs(20, 2, 4, 16, 8)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, gate_up, down)]
    wide = [tensor.detach().float().requires_grad_() for tensor in low]
    direction = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for form, (x, gate_up, down) in ((experts, low), (experts_reference, wide)):
        out = form(x, indices, weights, gate_up, down)
        gradients = torch.autograd.grad((out.float() * direction).sum(), (x, weights, gate_up, down))
        results.append([out, *gradients])
    assert [tensor.dtype for tensor in results[0]] == [dtype, dtype, torch.float32, dtype, dtype]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=6e-2)


def test_the_same_input_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        tensors = inputs(50, 4, 8, 32, 16, seed=3)
        out = experts(*tensors)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors if tensor.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("routing", ["random", "one expert", "some empty"])
def test_kernels_around_grouped_products(routing: str, compiled: bool) -> None:
    """On a GPU choices are counted instead of sorted, and inputs and activations are kept instead of made again."""
    low = [tensor.detach().cuda() for tensor in inputs(300, 4, 8, 64, 32, routing)]
    low = [tensor.bfloat16() if place in (0, 3, 4) else tensor for place, tensor in enumerate(low)]
    direction = torch.randn(300, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    torch.compiler.reset()
    fast = torch.compile(experts, dynamic=False, fullgraph=True) if compiled else experts
    results = []
    for form, dtype in ((fast, torch.bfloat16), (experts_reference, torch.float32)):
        tensors = [tensor.to(dtype) if place in (0, 3, 4) else tensor for place, tensor in enumerate(low)]
        wanted = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
        out = form(*tensors)
        results.append([out, *torch.autograd.grad((out.float() * direction).sum(), wanted)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=1e-2 * other.abs().max().item())
