"""The GPU form of one cross-entropy chunk: two reads and one write of the logits, which become their own gradient.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _loss_and_gradient_kernel(logits, targets, losses, stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for offset in range(0, vocab_size, BLOCK):
        inside = offset + columns < vocab_size
        x = tl.load(start + offset + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
    kept = target >= 0
    target_logit = tl.load(start + tl.where(kept, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(kept, tl.log(total) + largest - target_logit, 0.0))
    # Every thread must have read the target's logit before the second pass overwrites it.
    tl.debug_barrier()
    factor = tl.where(kept, 1.0 / total, 0.0)
    for offset in range(0, vocab_size, BLOCK):
        inside = offset + columns < vocab_size
        x = tl.load(start + offset + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - largest) * factor - tl.where((offset + columns == target) & kept, 1.0, 0.0)
        tl.store(start + offset + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def loss_and_gradient_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Overwrite `logits_NV` with softmax - one-hot (zero rows where the target is negative); return Σ loss, fp32."""
    assert logits_NV.stride(1) == 1
    num_tokens, vocab_size = logits_NV.shape
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits_NV.device)
    _loss_and_gradient_kernel[(num_tokens,)](logits_NV, targets_N, losses, logits_NV.stride(0), vocab_size,
                                             BLOCK=min(8192, triton.next_power_of_2(vocab_size)), num_warps=16)
    return losses.sum()
