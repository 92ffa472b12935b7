"""CPU side of `ops.experts`: the kernels of cpu_kernels_experts.c.

Shapes: T tokens, K choices per token, N = T·K rows, D hidden, E experts, I expert width, F = 2I.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moonbase.ops import native

_POINTERS = ("x", "indices", "weights", "gate_up", "down", "order", "ends", "pre_activation", "y")
_NUMBERS = ("tokens", "choices", "num_experts", "hidden", "width", "num_threads")
_GRADIENTS = ("grad_y", "grad_x", "grad_weights", "grad_gate_up", "grad_down")


class _Task(ctypes.Structure):
    """struct experts."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in (*_GRADIENTS, "rows", "inverse", "work")),
    ]


def experts_cpu(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor,
                down_EDI: Tensor) -> Tensor:
    """As `ops.experts.experts`, for what `native.takes`. Raises IndexError for an index that is no expert's."""
    tensors = (x_TD.contiguous(), weights_TK.contiguous(), gate_up_EFD.contiguous(), down_EDI.contiguous())
    indices_TK = indices_TK.contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _NativeExperts.apply(*tensors, indices_TK)
    return _forward(*tensors, indices_TK, keep=False)[0]


def _task(x_TD: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor) -> _Task:
    task = _Task(
        x=x_TD.data_ptr(), weights=weights_TK.data_ptr(), gate_up=gate_up_EFD.data_ptr(), down=down_EDI.data_ptr(),
        tokens=x_TD.shape[0], choices=weights_TK.shape[1], num_experts=down_EDI.shape[0], hidden=down_EDI.shape[1],
        width=down_EDI.shape[2], num_threads=torch.get_num_threads())
    assert x_TD.shape[1] == task.hidden and gate_up_EFD.shape == (task.num_experts, 2 * task.width, task.hidden)
    return task


def _forward(x_TD: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor, indices_TK: Tensor,
             keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Output, order of the rows, ends of the experts, and where `keep` the pre-activations."""
    assert indices_TK.dtype == torch.int64 and indices_TK.shape == weights_TK.shape
    task, rows = _task(x_TD, weights_TK, gate_up_EFD, down_EDI), indices_TK.numel()
    y_TD = torch.empty_like(x_TD)
    order_N = torch.empty(rows, dtype=torch.int32)
    ends_E = torch.empty(gate_up_EFD.shape[0], dtype=torch.int32)
    pre_activation_NF = x_TD.new_empty(rows, gate_up_EFD.shape[1]) if keep else None
    task.indices, task.y, task.order, task.ends = (t.data_ptr() for t in (indices_TK, y_TD, order_N, ends_E))
    if pre_activation_NF is not None:
        task.pre_activation = pre_activation_NF.data_ptr()
    if native.call("moonbase_experts", task):
        raise IndexError(f"expert indices from {int(indices_TK.min())} to {int(indices_TK.max())}, "
                         f"but there are {gate_up_EFD.shape[0]} experts")
    return y_TD, order_N, ends_E, pre_activation_NF


class _NativeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weights_TK, gate_up_EFD, down_EDI, indices_TK):
        y_TD, *saved = _forward(x_TD, weights_TK, gate_up_EFD, down_EDI, indices_TK, keep=True)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_EFD, down_EDI, *saved)
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD):
        *inputs, order_N, ends_E, pre_activation_NF = ctx.saved_tensors
        grad_TD, task = grad_TD.contiguous(), _task(*inputs)
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        task.order, task.ends, task.pre_activation, task.grad_y = (
            t.data_ptr() for t in (order_N, ends_E, pre_activation_NF, grad_TD))
        task.grad_x, task.grad_weights, task.grad_gate_up, task.grad_down = (t.data_ptr() for t in gradients)
        native.call("moonbase_experts_backward", task)
        return *gradients, None
