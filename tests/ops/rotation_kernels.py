"""The Triton kernels around attention against the plain forms. `test_cuda_kernels` starts this file (see there)."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.model.rope import rotate, rotated_heads
from moonbase.ops import attention_cuda, rotation_cuda

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plainly(query, expanded, key_rope, cos, sin) -> tuple[torch.Tensor, ...]:
    """Pair by pair and head by head."""
    rotated, nope = key_rope.shape[-1], query.shape[-1] - key_rope.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:  # [B, T, R]
        firsts = [x[..., 2 * k] * cos[:, k] - x[..., 2 * k + 1] * sin[:, k] for k in range(rotated // 2)]
        seconds = [x[..., 2 * k] * sin[:, k] + x[..., 2 * k + 1] * cos[:, k] for k in range(rotated // 2)]
        return torch.stack(firsts + seconds, -1)

    heads = range(query.shape[2])
    queries = [torch.cat([query[:, :, h, :nope], turn(query[:, :, h, nope:])], -1) for h in heads]
    keys = [torch.cat([expanded[:, :, h, :nope], turn(key_rope)], -1) for h in heads]
    return torch.stack(queries, 2), torch.stack(keys, 2), expanded[..., nope:]


@pytest.mark.parametrize(("batch", "time", "heads", "nope", "rotated", "value"), [
    (1, 1, 1, 16, 16, 16), (2, 5, 3, 24, 16, 8), (2, 3, 16, 128, 64, 128), (1, 2, 33, 16, 32, 40),
])
def test_rotated_heads_and_gradients(batch, time, heads, nope, rotated, value) -> None:
    angles = normal(time, rotated // 2, seed=9)
    cos, sin = angles.cos().float(), angles.sin().float()
    query, expanded = normal(batch, time, heads, nope + rotated), normal(batch, time, heads, nope + value, seed=1)
    latent = normal(batch, time, 5 + rotated, seed=2)  # the shared part is the end of wider rows
    exact = [x.bfloat16().double().requires_grad_() for x in (query, expanded, latent)]
    expected = plainly(exact[0], exact[1], exact[2][..., 5:], cos.double(), sin.double())
    given = [x.detach().bfloat16().to(DEVICE).requires_grad_() for x in exact]
    found = rotation_cuda.rotated_heads(
        given[0], given[1], given[2][..., 5:], cos.to(DEVICE), sin.to(DEVICE))
    weights = [normal(*x.shape, seed=3 + number).bfloat16() for number, x in enumerate(expected)]
    sum((x * w.double()).sum() for x, w in zip(expected, weights, strict=True)).backward()
    torch.autograd.backward(found, [w.to(DEVICE) for w in weights])
    for one, other in zip((*found, *(x.grad for x in given)), (*expected, *(x.grad for x in exact)), strict=True):
        torch.testing.assert_close(one.detach().double().cpu(), other.detach(), rtol=8e-3, atol=8e-3)
    # What only moves is the same to the bit, and the query that was given is left as it was.
    assert torch.equal(found[1][..., :nope].cpu(), given[1][..., :nope].cpu()) and torch.equal(
        given[0].detach().double().cpu(), exact[0].detach())


def test_definition_and_kernels_agree() -> None:
    cos, sin = normal(4, 8, seed=1).cos().float(), normal(4, 8, seed=1).sin().float()
    query, expanded, rope = normal(2, 4, 2, 24).bfloat16(), normal(2, 4, 2, 16).bfloat16(), normal(2, 4, 16).bfloat16()
    defined = rotated_heads(query, expanded, rope, cos, sin)  # on the CPU
    there = [x.to(DEVICE) for x in (query, expanded, rope, cos, sin)]
    for one, other in zip(rotation_cuda.rotated_heads(*there), defined, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=8e-3, atol=8e-3)
    turned = rotate(rope.unsqueeze(2), cos, sin)
    back = rotation_cuda.rotate_last(turned.to(DEVICE), *there[3:], True)
    torch.testing.assert_close(back.cpu(), rope.unsqueeze(2), rtol=2e-2, atol=2e-2)


def test_values_are_widened_without_a_copy_where_they_are_the_ends_of_wider_rows() -> None:
    rows = normal(5, 3, 40)
    value = rows[..., 24:]
    wide = attention_cuda.wide_values(value, 24)
    assert torch.equal(wide, rows[..., 16:]) and wide.data_ptr() == rows[..., 16:].data_ptr()
    for other in (value.contiguous(), rows[..., 4:20], rows[..., :16]):
        found = attention_cuda.wide_values(other, 24)
        assert torch.equal(found[..., 8:], other) and not found[..., :8].any()
