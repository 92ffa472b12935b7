"""A dense layer without bias, y = x Wᵀ. Training small layers on a CPU goes through the kernel of cpu_kernels_linear.c.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.ops import native

LARGEST_WEIGHT = 1 << 17
"""Elements: the kernel keeps a sum of this size for every few hundred rows. Larger layers go to PyTorch's product."""
FEWEST_ROWS = 64


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`torch.nn.functional.linear`, which is its own reference; x [..., I]."""
    if (torch.is_grad_enabled() and native.takes(x, weight_OI) and weight_OI.shape[0] % native.GRAIN == 0
            and weight_OI.numel() <= LARGEST_WEIGHT and x.numel() >= FEWEST_ROWS * x.shape[-1]
            and (x.requires_grad or weight_OI.requires_grad)):
        return _NativeLinear.apply(x, weight_OI)
    return F.linear(x, weight_OI)


class _Task(ctypes.Structure):
    """struct linear."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "grad", "grad_x", "grad_weight")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "x_row", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("panels", "partial")),
    ]


class _NativeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight_OI):
        x_NI, weight_OI = native.rows(x), weight_OI.contiguous()
        y = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
        task = _task(x_NI, weight_OI)
        task.y = y.data_ptr()
        native.call("moonbase_linear", task)
        ctx.save_for_backward(x_NI, weight_OI)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        x_NI, weight_OI = ctx.saved_tensors
        grad, task = grad.contiguous(), _task(x_NI, weight_OI)
        grad_x = grad_weight = None
        task.grad = grad.data_ptr()
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(*grad.shape[:-1], x_NI.shape[1])
            task.grad_x = grad_x.data_ptr()
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_OI)
            task.grad_weight = grad_weight.data_ptr()
        native.call("moonbase_linear_backward", task)
        return grad_x, grad_weight


def _task(x_NI: Tensor, weight_OI: Tensor) -> _Task:
    assert x_NI.shape[1] == weight_OI.shape[1], f"{tuple(x_NI.shape)} · {tuple(weight_OI.shape)}ᵀ"
    return _Task(x=x_NI.data_ptr(), weight=weight_OI.data_ptr(), rows=x_NI.shape[0], inputs=x_NI.shape[1],
                 outputs=weight_OI.shape[0], x_row=x_NI.stride(0), num_threads=torch.get_num_threads())
