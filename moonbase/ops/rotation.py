"""Rotary positions on a CPU: one pass over memory instead of eight (`model.rope.rotate` is the definition).

Shapes: B batch, T positions, H heads, R rope dims per head.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moonbase.ops import native


class _Task(ctypes.Structure):
    """struct rotation of cpu_kernels_norm.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cosine", "sine", "out")),
        *((name, ctypes.c_int64) for name in
          ("tokens", "heads", "dims", "x_token", "x_head", "num_rotations", "num_threads", "backward")),
    ]


def takes(x_BTHR: Tensor, cos_TR: Tensor) -> bool:
    """Whether the kernel works on these; [T, H, R] will do too. Rotations have no gradient."""
    return (x_BTHR.ndim in (3, 4) and native.takes(x_BTHR) and cos_TR.device.type == "cpu" and not cos_TR.requires_grad
            and cos_TR.dtype == torch.float32)


def rotate(x_BTHR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """As `model.rope.rotate`, for what `takes`."""
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    if torch.is_grad_enabled() and x_BTHR.requires_grad:
        return _Rotation.apply(x_BTHR, cos_TR, sin_TR)
    return _run(x_BTHR, cos_TR, sin_TR, backward=False)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHR, cos_TR, sin_TR):
        ctx.save_for_backward(cos_TR, sin_TR)
        return _run(x_BTHR, cos_TR, sin_TR, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        return _run(grad, *ctx.saved_tensors, backward=True), None, None


def _run(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    shape, x = x.shape, x if x.ndim == 4 else x.unsqueeze(0)
    batch, time, heads, dims = x.shape
    if x.stride(3) != 1 or (batch > 1 and x.stride(0) != time * x.stride(1)):
        x = x.contiguous()
    assert cos.shape[-2:] == (time, dims // 2) and cos.numel() in (time * dims // 2, batch * time * dims // 2)
    out = x.new_empty(shape)
    native.call("moonbase_rotate", _Task(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), batch * time, heads, dims, x.stride(1),
        x.stride(2), cos.numel() // (dims // 2), torch.get_num_threads(), backward))
    return out
