"""The places of the K largest values of every row, in any order. On a CPU by the kernel of cpu_kernels_top_k.c, on a
GPU by that of routing_cuda.

Shapes: N rows, E values, K choices.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moonbase.ops import native

LARGEST_ROW = 1024
"""The kernels go through a row once for every choice; beyond, sorting is faster."""


def top_k(values: Tensor, choices: int) -> Tensor:
    """`values.topk(choices, sorted=False).indices` over the last dimension, int64; no gradient. Which of equal values
    is taken is not said."""
    count = values.shape[-1]
    if count > LARGEST_ROW or not 0 < choices <= min(count, 32):
        return values.topk(choices, dim=-1, sorted=False).indices
    if values.is_cuda and values.dtype == torch.float32:
        from moonbase.ops import routing_cuda

        return routing_cuda.top_k(values, choices)
    if not native.takes(values):
        return values.topk(choices, dim=-1, sorted=False).indices
    values = values.contiguous()
    indices = torch.empty(*values.shape[:-1], choices, dtype=torch.int64)
    native.call("moonbase_top_k", _Task(
        values.data_ptr(), indices.data_ptr(), values.numel() // count, count, choices, torch.get_num_threads()))
    return indices


class _Task(ctypes.Structure):
    """struct top_k."""

    _fields_ = [("values", ctypes.c_void_p), ("indices", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("rows", "count", "choices", "num_threads"))]
