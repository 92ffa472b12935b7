"""Muon's momentum: one pass over memory each way where a kernel can, and never more than two.

`_foreach_mul_` and `_foreach_add_` would read and write the momentum twice, and memory traffic, not launches, is what
these steps cost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def momentum_(gradient: Tensor, momentum: Tensor, out: Tensor, mu: float, nesterov: bool) -> None:
    """M ← μ M + G, and out = μ M + G of the new M (Nesterov) or M itself; of one shape, any dtypes."""
    if out.is_cuda and all(tensor.is_contiguous() for tensor in (gradient, momentum, out)):
        from moonbase.ops import muon_cuda

        muon_cuda.momentum_(gradient, momentum, out, mu, nesterov)
        return
    torch.add(gradient, momentum, alpha=mu, out=momentum)
    if nesterov:
        torch.add(gradient, momentum, alpha=mu, out=out)
    else:
        out.copy_(momentum)
