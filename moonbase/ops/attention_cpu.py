"""CPU side of `ops.attention`: the kernels of cpu_kernels_attention.c.

Shapes: B batch, T time, H heads, K query/key dims, V value dims, S documents.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moonbase.ops import native


class _View(ctypes.Structure):
    """struct view: a tensor [B, T, H, dims] whose dims lie side by side."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "time", "head"))]


class _Task(ctypes.Structure):
    """struct attention."""

    _fields_ = [
        *((name, _View) for name in ("query", "key", "value", "output")),
        ("logsumexp", ctypes.c_void_p), ("segments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in
          ("num_segments", "heads", "time", "key_dims", "value_dims", "num_threads")),
        ("scale", ctypes.c_float),
        *((name, _View) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
    ]


def _view(x_BTHD: Tensor) -> _View:
    assert x_BTHD.stride(3) == 1 and x_BTHD.dtype == torch.float32
    return _View(x_BTHD.data_ptr(), *x_BTHD.stride()[:3])


class NativeAttention(torch.autograd.Function):
    """Output [B, T, H, V] and log-sum-exp [B, H, T] (without gradient) of causal attention within documents.

    segments_S3: int64 (row, start, stop), which together cover every token once.
    """

    @staticmethod
    def forward(ctx: Any, query_BTHK, key_BTHK, value_BTHV, scale, segments_S3):
        query, key, value = map(_rows_together, (query_BTHK, key_BTHK, value_BTHV))
        batch, time, heads, _ = query.shape
        output = query.new_empty(batch, time, heads, value.shape[-1])
        logsumexp = query.new_empty(batch, heads, time)
        native.call("moonbase_attention", _task(query, key, value, output, logsumexp, scale, segments_S3))
        ctx.save_for_backward(query, key, value, output, logsumexp, segments_S3)
        ctx.scale = scale
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad, _):
        query, key, value, output, logsumexp, segments = ctx.saved_tensors
        grad = _rows_together(grad)
        task = _task(query, key, value, output, logsumexp, ctx.scale, segments)
        gradients = [x.new_empty(x.shape) for x in (query, key, value)]
        task.grad_output, task.grad_query, task.grad_key, task.grad_value = map(_view, (grad, *gradients))
        native.call("moonbase_attention_backward", task)
        return *gradients, None, None


def _rows_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _task(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, scale: float,
          segments: Tensor) -> _Task:
    assert segments.dtype == torch.int64 and segments.is_contiguous() and logsumexp.is_contiguous()
    return _Task(
        *map(_view, (query, key, value, output)), logsumexp.data_ptr(), segments.data_ptr(), len(segments),
        query.shape[2], query.shape[1], query.shape[3], value.shape[3], torch.get_num_threads(), scale)
