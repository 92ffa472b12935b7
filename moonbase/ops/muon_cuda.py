"""GPU kernels around Muon's products, each one pass over memory; PyTorch reads such mixed dtypes element by element.

Shapes: N matrices [rows, columns].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["mu"])
def _momentum_kernel(gradient, momentum, out, mu, count, NESTEROV: tl.constexpr, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    # Four at a time of every dtype, so that no number changes hands between threads.
    places = tl.max_contiguous(elements, 4)
    new = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
    kept = (tl.load(momentum + places, mask=inside, other=0.0).to(tl.float32) * mu + new).to(momentum.dtype.element_ty)
    tl.store(momentum + places, kept, mask=inside)
    direction = kept.to(tl.float32)
    if NESTEROV:
        direction = direction * mu + new
    tl.store(out + places, direction.to(out.dtype.element_ty), mask=inside)


def momentum_(gradient: Tensor, momentum: Tensor, out: Tensor, mu: float, nesterov: bool) -> None:
    """M ← μ M + G; out = μ M + G with the new M, or M itself. Contiguous, of one size, any floating dtypes."""
    count = gradient.numel()
    assert momentum.numel() == out.numel() == count
    assert gradient.is_contiguous() and momentum.is_contiguous() and out.is_contiguous()
    if count:
        _momentum_kernel[(triton.cdiv(count, _BLOCK),)](
            gradient, momentum, out, mu, count, NESTEROV=nesterov, BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _divide_kernel(matrices, divisors, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    elements = tl.program_id(0).to(tl.int64) * size + place
    inside = place < size
    values = tl.load(matrices + elements, mask=inside, other=0.0).to(tl.float32) / tl.load(divisors + tl.program_id(0))
    tl.store(out + elements, values.to(out.dtype.element_ty), mask=inside)


def divide(matrices: Tensor, divisors: Tensor, out: Tensor) -> None:
    """Matrix n divided by the fp32 number n of `divisors` [N, 1, 1], rounded once; `out` may be `matrices`."""
    assert matrices.is_contiguous() and out.is_contiguous() and divisors.numel() == len(matrices)
    if matrices.numel():
        size = matrices[0].numel()
        _divide_kernel[(len(matrices), triton.cdiv(size, _BLOCK))](
            matrices, divisors, out, size, BLOCK=_BLOCK, num_warps=8)
