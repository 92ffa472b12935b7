"""The GPU form of `optim.decayed`: 10 bytes a weight, read and written 16 at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["keep", "rate"])
def _kernel(weight, update, keep, rate, count, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < count
    # Four at a time of either dtype, so that a thread reads what it takes off.
    places = tl.max_contiguous(elements, 4)
    step = tl.load(update + places, mask=inside, other=0.0).to(tl.float32) * rate
    tl.store(weight + places, tl.load(weight + places, mask=inside, other=0.0) * keep - step, mask=inside)


def decay_and_subtract_(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    """See `optim.decayed`; fp32 weights, both contiguous."""
    count = weight.numel()
    assert update.numel() == count
    if count:
        _kernel[(triton.cdiv(count, _BLOCK),)](weight, update, keep, rate, count, BLOCK=_BLOCK, num_warps=8)
