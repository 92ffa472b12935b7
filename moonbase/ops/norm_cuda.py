"""GPU kernels of the root-mean-square norm for training: one pass over memory forward, one backward.

The compiler fuses the norm with its neighbours too, but sums the gradient of the gain in a second pass, for which it
reads everything again. Here both sums come from one reading.

Shapes: N rows, D dims.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_NARROWEST = 1024
"""Narrower rows (the latents of attention) are left to the compiler, which reads and writes them inside wider ones."""
_PROGRAMS = 528
"""Of the backward pass, each with its own part of the gain's gradient: four for every processor of a Hopper GPU."""
_AT_ONCE, _IN_A_THREAD = 2048, 16
"""Elements that a program works on at once where rows are no longer, and how many of them are one thread's."""


def takes(x: Tensor, gain: Tensor) -> bool:
    """Whether a training pass is to take these kernels for this norm."""
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and gain.dtype == x.dtype
            and x.shape[-1] >= _NARROWEST and torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """As `ops.norm.rms_norm`, for what `takes`."""
    return _Norm.apply(x, gain, eps)


def rms_norm_beside(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.norm.rms_norm_beside`, for what `takes`."""
    return _NormBeside.apply(x, gain, eps)


def rms_norm_of_sum(x: Tensor, added: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `ops.norm.rms_norm_of_sum`, for what `takes`."""
    return _NormOfSum.apply(x, added, gain, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gain, eps):
        out, scale = norm(x.reshape(-1, x.shape[-1]), gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad):
        x, gain, scale = ctx.saved_tensors
        rows = (-1, x.shape[-1])
        grad_x, grad_gain = norm_backward(grad.reshape(rows), x.reshape(rows), gain, scale, None)
        return grad_x.view(x.shape), grad_gain.sum(0).to(gain.dtype), None


class _NormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gain, eps):
        out, scale = norm(x.reshape(-1, x.shape[-1]), gain, eps)
        ctx.save_for_backward(x, gain, scale)
        return x.view(x.shape), out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_x, grad):
        x, gain, scale = ctx.saved_tensors
        rows = (-1, x.shape[-1])
        grad_x, grad_gain = norm_backward(
            grad.reshape(rows), x.reshape(rows), gain, scale, grad_x.reshape(rows))
        return grad_x.view(x.shape), grad_gain.sum(0).to(gain.dtype), None


class _NormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, added, gain, eps):
        rows = (-1, x.shape[-1])
        total, out, scale = norm_of_sum(x.reshape(rows), added.reshape(rows), gain, eps)
        ctx.save_for_backward(total, gain, scale)
        return total.view(x.shape), out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_total, grad):
        total, gain, scale = ctx.saved_tensors
        rows = (-1, total.shape[-1])
        grad_x, grad_gain = norm_backward(grad.reshape(rows), total, gain, scale, grad_total.reshape(rows))
        grad_x = grad_x.view(grad.shape)
        return grad_x, grad_x, grad_gain.sum(0).to(gain.dtype), None


@triton.jit
def _norm_kernel(
    x, added, gain, total, out, scale, rows, dims, eps, ADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < dims)[None, :]
    places = row.to(tl.int64)[:, None] * dims + column[None, :]
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=inside)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 1) / dims + eps)
    tl.store(scale + row, factor, mask=row < rows)
    normalised = (value * factor[:, None]).to(out.dtype.element_ty).to(tl.float32)
    weight = tl.load(gain + column, mask=column < dims, other=0.0).to(tl.float32)
    tl.store(out + places, (normalised * weight[None, :]).to(out.dtype.element_ty), mask=inside)


def _blocks(dims: int) -> tuple[int, int, int]:
    """Rows at once, dims rounded up, warps."""
    block = triton.next_power_of_2(dims)
    return max(1, _AT_ONCE // block), block, max(1, min(16, max(block, _AT_ONCE) // (32 * _IN_A_THREAD)))


@triton_op("moonbase::norm", mutates_args={})
def norm(x_ND: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of every row [N, D] and what it was multiplied by, fp32 [N]."""
    x_ND, gain = x_ND.contiguous(), gain.contiguous()
    rows, dims = x_ND.shape
    out, scale = torch.empty_like(x_ND), x_ND.new_empty(rows, dtype=torch.float32)
    at_once, block, warps = _blocks(dims)
    wrap_triton(_norm_kernel)[(triton.cdiv(rows, at_once),)](
        x_ND, x_ND, gain, out, out, scale, rows, dims, eps, ADDED=False, ROWS=at_once, BLOCK=block,
        num_warps=warps)
    return out, scale


@triton_op("moonbase::norm_of_sum", mutates_args={})
def norm_of_sum(x_ND: Tensor, added_ND: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + added [N, D], its norm and what every row was multiplied by, fp32 [N]."""
    x_ND, added_ND, gain = x_ND.contiguous(), added_ND.contiguous(), gain.contiguous()
    rows, dims = x_ND.shape
    total, out = torch.empty_like(x_ND), torch.empty_like(x_ND)
    scale = x_ND.new_empty(rows, dtype=torch.float32)
    at_once, block, warps = _blocks(dims)
    wrap_triton(_norm_kernel)[(triton.cdiv(rows, at_once),)](
        x_ND, added_ND, gain, total, out, scale, rows, dims, eps, ADDED=True, ROWS=at_once, BLOCK=block,
        num_warps=warps)
    return total, out, scale


@triton.jit
def _norm_backward_kernel(
    grad, x, gain, scale, passing, grad_x, grad_gain, rows, dims,
    PASSING: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    weight = tl.load(gain + column, mask=column < dims, other=0.0).to(tl.float32)
    of_gain = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < dims)[None, :]
        places = row.to(tl.int64)[:, None] * dims + column[None, :]
        incoming = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        if PASSING:
            around = tl.load(passing + places, mask=inside, other=0.0).to(tl.float32)
        normalised = value * factor[:, None]
        of_gain += incoming * normalised
        incoming *= weight[None, :]
        along = tl.sum(incoming * normalised, 1) / dims
        result = (incoming - normalised * along[:, None]) * factor[:, None]
        if PASSING:
            result += around
        tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_gain + tl.program_id(0) * dims + column, tl.sum(of_gain, 0), mask=column < dims)


@triton_op("moonbase::norm_backward", mutates_args={})
def norm_backward(
    grad_ND: Tensor, x_ND: Tensor, gain: Tensor, scale_N: Tensor, passing_ND: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of a norm's input [N, D] and, as fp32 parts [·, D] to be summed, of its gain.

    passing_ND: gradient that reaches the input past the norm, added here.
    """
    grad_ND, x_ND, gain = grad_ND.contiguous(), x_ND.contiguous(), gain.contiguous()
    rows, dims = x_ND.shape
    at_once, block, warps = _blocks(dims)
    programs = min(_PROGRAMS, triton.cdiv(rows, at_once))
    grad_x, grad_gain = torch.empty_like(x_ND), x_ND.new_empty(programs, dims, dtype=torch.float32)
    passing = grad_ND if passing_ND is None else passing_ND.contiguous()
    wrap_triton(_norm_backward_kernel)[(programs,)](
        grad_ND, x_ND, gain, scale_N, passing, grad_x, grad_gain, rows, dims, PASSING=passing_ND is not None,
        ROWS=at_once, BLOCK=block, num_warps=warps)
    return grad_x, grad_gain
