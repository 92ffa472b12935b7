"""Fake quantisation on a GPU: one pass over the weights, the same values as the reference in `int4.py`.

Rounding and division are spelled out, because a GPU's quick ones would put a weight on the border of two numbers on the
other side. Inside the kernel: GROUPS groups of SIZE weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moonbase.layout import Int4Rule
from moonbase.ops.int4 import INT4_RULES, INT4_SCALE_FLOOR

_GROUPS = 64
_WHOLE = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a small number, it leaves no room for a fraction."""
_FLOOR = tl.constexpr(INT4_SCALE_FLOOR)
_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _round(x):
    """Half to even, for |x| < 2²²."""
    return (x + _WHOLE) - _WHOLE


@triton.jit
def _to_bf16(x):
    """The nearest bf16 number, ties to even, as fp32. The interpreter would cut off instead."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _numbers(weights, scales):
    numbers = _round(tl.div_rn(weights, tl.broadcast_to(scales[:, None], weights.shape)))
    return tl.minimum(tl.maximum(numbers, -8.0), 7.0)


@triton.jit
def _fake_quantize(
    out, weight, num_groups, DIVISORS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    where = group[:, None] * SIZE + tl.arange(0, SIZE)[None]
    inside = (group < num_groups)[:, None]
    weights = tl.load(weight + where, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(weights), 1)
    # NaN where a weight is no number, which a maximum would hide; otherwise the first scale comes whatever its error.
    best = tl.sum(weights * 0.0, 1)
    least = tl.full(largest.shape, float("inf"), tl.float32)
    for choice in tl.static_range(len(DIVISORS)):
        divisor = tl.full(largest.shape, DIVISORS[choice], tl.float32)
        scale = _to_bf16(tl.maximum(tl.div_rn(largest, divisor), _FLOOR))
        difference = _numbers(weights, scale) * scale[:, None] - weights
        error = tl.sum(difference * difference, 1)
        best = tl.where((best == best) & ((error < least) | (choice == 0)), scale, best)
        least = tl.minimum(error, least)
    grid = tl.zeros_like(largest)
    for steps in tl.static_range(1, 9):
        scale = tl.div_rn(largest, tl.full(largest.shape, steps, tl.float32))
        # Where all is zero nothing is explained; dividing by one instead keeps NaN away.
        safe = tl.where(scale > 0, scale, 1.0)[:, None]
        numbers = _round(tl.div_rn(weights, tl.broadcast_to(safe, weights.shape)))
        unexplained = tl.max(tl.abs(numbers * scale[:, None] - weights), 1)
        stored = (_to_bf16(scale) == scale) & (scale >= _SMALLEST) & (tl.max(numbers, 1) <= 7)
        grid = tl.where(stored & (unexplained == 0), scale, grid)
    scale = tl.where(grid > 0, grid, best)
    tl.store(out + where, (_numbers(weights, scale) * scale[:, None]).to(out.dtype.element_ty), mask=inside)


def fake_quantize_cuda_(out: Tensor, weight: Tensor, rule: Int4Rule, group: int) -> Tensor:
    """See `int4.fake_quantize_`."""
    assert out.is_contiguous() and weight.is_contiguous()
    num_groups = weight.numel() // group
    _fake_quantize[(triton.cdiv(num_groups, _GROUPS),)](
        out, weight, num_groups, INT4_RULES[rule], group, _GROUPS)
    return out
