"""Adding one tensor to another of a wider dtype, in one pass over memory: how gradients of micro-batches add up."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 1 << 20
"""Elements from which the GPU kernel pays: what is smaller is bound by launches, and PyTorch's are the cheaper ones."""


@torch.no_grad()
def accumulate_(total: Tensor, addend: Tensor, factor: float = 1.0) -> None:
    """total += factor · addend, added and kept in `total`'s dtype; of one shape, any dtypes.

    On a GPU PyTorch's addition of two dtypes reads element by element: 2.5 TB/s where the kernel's wide reads reach the
    memory's rate. Without a factor the bits are the same.
    """
    if (total.is_cuda and total.dtype == torch.float32 and addend.dtype == torch.bfloat16 and total.numel() >= FEWEST
            and total.shape == addend.shape and total.is_contiguous() and addend.is_contiguous()):
        from moonbase.ops.accumulate_cuda import accumulate_cuda_

        accumulate_cuda_(total, addend, factor)
    else:
        total.add_(addend, alpha=factor)
