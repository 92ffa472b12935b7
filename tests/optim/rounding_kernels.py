"""The GPU forms of `optim.rounding` and `optim.decayed` against readable ones: in Triton's interpreter, and on the GPU
where there is one."""

from __future__ import annotations

import os

import pytest
import torch

from moonbase.optim import decayed_cuda, rounding, rounding_cuda
from moonbase.optim.rounding import AdamStep, Key

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KINDS = ("nearest", "stochastic", "compensated")
KEYS = (Key.of(1, 2, "model.layers.3", "update"), Key(0xFFFFFFFF, 0x80000000))


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found: torch.Tensor, expected: torch.Tensor, moved: float = 1e-3) -> None:
    """Equal but for the last bit here and there: a GPU multiplies and adds in one rounding."""
    found = found.cpu()
    apart = found.view(torch.int16).int() - expected.view(torch.int16).int()
    assert apart.abs().max() <= 1 and (apart != 0).float().mean() <= moved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", KEYS, ids=["usual", "large"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "update"])
def test_write(kind: str, key: Key, rows: bool) -> None:
    weight, update = normal(37, 90, seed=0).bfloat16(), normal(37, 90, seed=1).bfloat16()
    weight[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    residual = (normal(37, 90, seed=2) * 1e-3).bfloat16() if kind == "compensated" else None
    factors = torch.where(normal(37, seed=3) > 0, 1.0, 0.997) if rows else None
    there = [None if x is None else x.clone().to(DEVICE) for x in (weight, update, residual, factors)]
    flat = [None if x is None else x.view(-1) for x in there[:3]]
    options = {"keep": 1 - 3e-5, "rate": 7e-4}
    rounding_cuda.write_(flat[0], None if rows else flat[1], flat[2], kind, key, 1000, factors=there[3], columns=90,
                         **options)
    rounding.write_(weight, None if rows else update, kind, key, first=1000, factors=factors, residual=residual,
                    **options)
    assert torch.equal(there[0].isnan().cpu(), weight.isnan())
    same(there[0].nan_to_num(), weight.nan_to_num())
    if residual is not None:  # what is left after a rounding that went the other way is another number altogether
        held = [a.double().cpu() + b.double().cpu() for a, b in ((there[0], there[2]), (weight, residual))]
        torch.testing.assert_close(held[0][1:], held[1][1:], rtol=2**-16, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5000])
def test_adamw(kind: str, count: int) -> None:
    weight, gradient, mean = (normal(count, seed=seed).bfloat16() for seed in range(3))
    square = normal(count, seed=3).square().bfloat16()
    residual = (normal(count, seed=4) * 1e-3).bfloat16() if kind == "compensated" else None
    here = [weight, gradient, mean, square, residual]
    there = [None if x is None else x.clone().to(DEVICE) for x in here]
    corrections = torch.tensor([0.3, 0.2])
    step = AdamStep(3e-4, (0.9, 0.95), 1e-8, 0.1, corrections)
    rounding.adamw_(*here[:4], step, kind, KEYS[0], residual)
    rounding_cuda.adamw_(*there, AdamStep(3e-4, (0.9, 0.95), 1e-8, 0.1, corrections.to(DEVICE)), kind, KEYS[0])
    for found, expected in zip((there[0], *there[2:4]), (weight, mean, square), strict=True):
        same(found, expected)


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decay_and_subtract(count: int, dtype: torch.dtype) -> None:
    weight, update = normal(count, seed=0), normal(count, seed=1).to(dtype)
    expected = weight.double() * (1 - 3e-3) - update.double() * 7e-3
    there = weight.to(DEVICE)
    decayed_cuda.decay_and_subtract_(there, update.to(DEVICE), keep=1 - 3e-3, rate=7e-3)
    torch.testing.assert_close(there.cpu().double(), expected, rtol=1e-6, atol=1e-7)
