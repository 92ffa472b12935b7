"""Muon's last step on a GPU, weight decay included: one pass over the weights instead of two."""

from __future__ import annotations

import torch
from torch import Tensor


def decay_and_subtract_(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    """weight ← keep · weight − rate · update; of one shape, any dtypes."""
    if weight.is_cuda and weight.dtype == torch.float32 and weight.is_contiguous() and update.is_contiguous():
        from moonbase.optim import decayed_cuda

        decayed_cuda.decay_and_subtract_(weight, update, keep, rate)
    else:
        weight.mul_(keep).sub_(update, alpha=rate)
