"""Root-mean-square norm (Zhang & Sennrich 2019) as DeepSeek-V3 computes it: fp32 inside, cast, then the gain."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moonbase.ops import native


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in fp32, rounded to x's dtype, times `gain` [D]; over the last dimension."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * gain.to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Fast twin. On a GPU training has kernels for wide rows; all else takes the reference, which the compiler fuses
    with its neighbours."""
    if native.takes(x, gain):
        if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
            return _NativeRMSNorm.apply(x, gain, eps)
        return _native_forward(native.rows(x), gain.contiguous(), eps)[0].view(x.shape)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _RMSNorm.apply(x, gain, eps)
    if x.is_cuda:
        from moonbase.ops import norm_cuda

        if norm_cuda.takes(x, gain):
            return norm_cuda.rms_norm(x, gain, eps)
    return rms_norm_reference(x, gain, eps)


def rms_norm_beside(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x itself, for who adds to it later, and its norm. On a GPU the gradients of both meet in one pass over memory."""
    if x.is_cuda:
        from moonbase.ops import norm_cuda

        if norm_cuda.takes(x, gain):
            return norm_cuda.rms_norm_beside(x, gain, eps)
    return x, rms_norm(x, gain, eps)


def rms_norm_of_sum(x: Tensor, added: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added and its norm: what stands between a block's two halves. On a GPU one pass over memory each way."""
    if x.is_cuda:
        from moonbase.ops import norm_cuda

        if norm_cuda.takes(x, gain):
            return norm_cuda.rms_norm_of_sum(x, added, gain, eps)
    total = x + added
    return total, rms_norm(total, gain, eps)


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


class _Task(ctypes.Structure):
    """struct rms_norm of cpu_kernels_norm.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gain", "grad", "out", "scale", "grad_x", "grad_gain")),
        *((name, ctypes.c_int64) for name in ("rows", "dims", "x_row", "num_threads")),
        ("eps", ctypes.c_float), ("partial", ctypes.c_void_p),
    ]


def _native_forward(x_ND: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result [N, D] and what every row was multiplied by [N]."""
    out, scale = x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0])
    task = _task(x_ND, gain, scale, eps)
    task.out = out.data_ptr()
    native.call("moonbase_rms_norm", task)
    return out, scale


class _NativeRMSNorm(torch.autograd.Function):
    """One pass over memory forward, one backward."""

    @staticmethod
    def forward(ctx: Any, x, gain, eps):
        x_ND, gain = native.rows(x), gain.contiguous()
        out, scale = _native_forward(x_ND, gain, eps)
        ctx.save_for_backward(x_ND, gain, scale)
        ctx.eps = eps
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        x_ND, gain, scale = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_gain = torch.empty_like(grad), torch.empty_like(gain)
        task = _task(x_ND, gain, scale, ctx.eps)
        task.grad, task.grad_x, task.grad_gain = grad.data_ptr(), grad_x.data_ptr(), grad_gain.data_ptr()
        native.call("moonbase_rms_norm_backward", task)
        return grad_x, grad_gain, None


def _task(x_ND: Tensor, gain: Tensor, scale: Tensor, eps: float) -> _Task:
    assert gain.shape == x_ND.shape[1:]
    return _Task(x=x_ND.data_ptr(), gain=gain.data_ptr(), scale=scale.data_ptr(), rows=x_ND.shape[0],
                 dims=x_ND.shape[1], x_row=x_ND.stride(0), num_threads=torch.get_num_threads(), eps=eps)
