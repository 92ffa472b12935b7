"""Matrix products of consecutive groups of rows, each group with its own weight: the GEMM of a mixture of experts.

Shapes: N rows sorted by expert, E experts, K inner and M outer dims. `ends_E` int32: where each expert's rows end.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm_reference(x_NK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """Row n of expert e becomes x_n · W_e. Returns [N, M]."""
    rows = pairwise([0, *ends_E.tolist()])
    return torch.cat([x_NK[start:end] @ weight for (start, end), weight in zip(rows, weight_EKM, strict=True)])


def grouped_outer_reference(x_NK: Tensor, y_NM: Tensor, ends_E: Tensor) -> Tensor:
    """Per expert the sum of outer products of its rows, Xₑᵀ Yₑ: the weight gradient. Returns [E, K, M]."""
    return torch.stack([x_NK[start:end].T @ y_NM[start:end] for start, end in pairwise([0, *ends_E.tolist()])])


def _on_tensor_cores(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype == torch.bfloat16


def grouped_mm(x_NK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """Fast twin of `grouped_mm_reference`: one kernel on a GPU (bf16), GEMMs into one output on a CPU."""
    if _on_tensor_cores(x_NK):
        return F.grouped_mm(x_NK, weight_EKM, offs=ends_E)
    out = x_NK.new_empty(x_NK.shape[0], weight_EKM.shape[2])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_NK[start:end], weight_EKM[expert], out=out[start:end])
        start = end
    return out


def grouped_outer(x_NK: Tensor, y_NM: Tensor, ends_E: Tensor) -> Tensor:
    """Fast twin of `grouped_outer_reference`. Experts without rows get zeros."""
    if _on_tensor_cores(x_NK):
        return F.grouped_mm(x_NK.T, y_NM, offs=ends_E)
    out = x_NK.new_empty(ends_E.shape[0], x_NK.shape[1], y_NM.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_NK[start:end].T, y_NM[start:end], out=out[expert])
        else:
            out[expert].zero_()
        start = end
    return out
