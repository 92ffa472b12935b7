"""A dense SwiGLU feed-forward part: y = W_down( silu(W_gate x) ⊙ W_up x ).

Training small ones on a CPU goes through the kernel of cpu_kernels_feed_forward.c, one call each way.

Shapes: N rows, D hidden, I width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.ops import native
from moonbase.ops.linear import FEWEST_ROWS, LARGEST_WEIGHT, linear


def feed_forward_reference(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """x [..., D], any floating dtype."""
    return F.linear(F.silu(F.linear(x, gate_ID)) * F.linear(x, up_ID), down_DI)


def feed_forward(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> Tensor:
    """Fast twin of `feed_forward_reference`."""
    tensors = (x, gate_ID, up_ID, down_DI)
    if (torch.is_grad_enabled() and native.takes(*tensors) and down_DI.numel() <= LARGEST_WEIGHT
            and x.numel() >= FEWEST_ROWS * x.shape[-1] and all(tensor.requires_grad for tensor in tensors)):
        return _NativeFeedForward.apply(*tensors)
    if x.is_cuda and torch.is_grad_enabled():
        # One product for both: it reads x once and, above all, gives one gradient of it.
        gate, up = linear(x, torch.cat([gate_ID, up_ID])).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, down_DI)
    return linear(F.silu(linear(x, gate_ID)) * linear(x, up_ID), down_DI)


class _Task(ctypes.Structure):
    """struct feed_forward."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "x", "gate", "up", "down", "pre_activation", "y", "grad_y", "grad_x", "grad_gate", "grad_up", "grad_down")),
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "width", "blocks_a_task", "num_threads")),
        *((name, ctypes.c_void_p) for name in ("panels", "partial")),
    ]


class _NativeFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gate_ID, up_ID, down_DI):
        x, gate_ID, up_ID, down_DI = (tensor.contiguous() for tensor in (x, gate_ID, up_ID, down_DI))
        y, task = torch.empty_like(x), _task(x, gate_ID, up_ID, down_DI)
        pre_activation = x.new_empty(task.rows, 2 * task.width)
        task.pre_activation, task.y = pre_activation.data_ptr(), y.data_ptr()
        native.call("moonbase_feed_forward", task)
        ctx.save_for_backward(x, gate_ID, up_ID, down_DI, pre_activation)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        *inputs, pre_activation = ctx.saved_tensors
        grad, task = grad.contiguous(), _task(*inputs)
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        task.pre_activation, task.grad_y = pre_activation.data_ptr(), grad.data_ptr()
        task.grad_x, task.grad_gate, task.grad_up, task.grad_down = (t.data_ptr() for t in gradients)
        native.call("moonbase_feed_forward_backward", task)
        return tuple(gradients)


def _task(x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor) -> _Task:
    width, hidden = gate_ID.shape
    assert x.shape[-1] == hidden and up_ID.shape == (width, hidden) and down_DI.shape == (hidden, width)
    # Each task has sums of its own for the weights' gradients: fewer, where these are large.
    blocks = 6 if gate_ID.numel() > 1 << 14 else 3
    return _Task(x=x.data_ptr(), gate=gate_ID.data_ptr(), up=up_ID.data_ptr(), down=down_DI.data_ptr(),
                 rows=x.numel() // hidden, hidden=hidden, width=width, blocks_a_task=blocks,
                 num_threads=torch.get_num_threads())
