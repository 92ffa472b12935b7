"""The GPU form of `ops.accumulate`: 10 bytes an element, read and written 16 at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["factor"])
def _accumulate_kernel(total, addend, factor, count, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    # Four at a time of either dtype, so that a thread reads what it adds; eight bf16 numbers would change hands.
    added = tl.load(addend + tl.max_contiguous(elements, 4), mask=inside, other=0.0).to(tl.float32)
    tl.store(total + elements, tl.load(total + elements, mask=inside, other=0.0) + added * factor, mask=inside)


def accumulate_cuda_(total: Tensor, addend: Tensor, factor: float = 1.0) -> None:
    """total fp32 += factor · addend; both contiguous, of one shape."""
    count = total.numel()
    if count:
        _accumulate_kernel[(triton.cdiv(count, _BLOCK),)](total, addend, factor, count, BLOCK=_BLOCK, num_warps=8)
