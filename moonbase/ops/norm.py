"""Root-mean-square norm (Zhang & Sennrich 2019) as DeepSeek-V3 computes it: fp32 inside, cast, then the gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in fp32, rounded to x's dtype, times `gain` [D]; over the last dimension."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * gain.to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Fast twin. On a GPU the reference itself is used: the compiler fuses it with its neighbours."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _RMSNorm.apply(x, gain, eps)
    return rms_norm_reference(x, gain, eps)


class _RMSNorm(torch.autograd.Function):
    """Forward and backward in the fewest passes over memory that PyTorch's own operations allow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x, gain, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normalised = x * scale
        ctx.save_for_backward(normalised, gain, scale)
        return normalised * gain

    @staticmethod
    def backward(ctx: Any, grad):
        normalised, gain, scale = ctx.saved_tensors
        product = grad * normalised
        grad_gain = product.reshape(-1, product.shape[-1]).sum(0)
        shared = (product @ gain).div_(-normalised.shape[-1]).unsqueeze(-1)
        grad_x = (grad * gain).addcmul_(normalised, shared).mul_(scale)
        return grad_x, grad_gain, None
