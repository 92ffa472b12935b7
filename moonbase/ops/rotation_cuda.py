"""GPU kernels that bring queries and keys of multi-head latent attention into the form that attention kernels read.

`model.rope.rotated_heads` is the definition. Each kernel is one pass over memory: queries are rotated where they lie,
keys are put together from the expanded latent and the one rotated part that all heads share, and the gradients of keys
and values come back as one tensor, which is what the products behind them read.

Rotated dims come out half-split (first members of all pairs, then second ones), as in `model.rope.rotate`.

Shapes: N tokens of whole sequences of T, H heads, K query and key dims per head, of which the last R are rotated,
V value dims per head, X = K - R + V expanded dims per head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_ROWS = 32
"""Heads of tokens that a program turns or copies."""


def takes(query: Tensor, expanded: Tensor, key_rope: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> bool:
    """Whether the kernels work on these: bf16 on a GPU, one table of rotations for all rows of the batch, a power of
    two of rotated dims and an even number of the others."""
    dims = key_rope.shape[-1]
    return (query.is_cuda and query.dtype == expanded.dtype == key_rope.dtype == torch.bfloat16 and cos_TR.ndim == 2
            and not (cos_TR.requires_grad or sin_TR.requires_grad) and dims >= 16 and dims & (dims - 1) == 0
            and query.shape[-1] % 2 == 0)


def rotated_heads(
    query_BTHK: Tensor, expanded_BTHX: Tensor, key_rope_BTR: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model.rope.rotated_heads`. The values are a view of `expanded_BTHX`."""
    query = _Queries.apply(query_BTHK, cos_TR, sin_TR)
    return query, *_KeysAndValues.apply(expanded_BTHX, key_rope_BTR, cos_TR, sin_TR, query_BTHK.shape[-1])


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_last(query, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, grad):
        return rotate_last(grad, *ctx.saved_tensors, True), None, None


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expanded, key_rope, cos, sin, key_dims):
        ctx.save_for_backward(cos, sin)
        nope = key_dims - key_rope.shape[-1]
        return join_keys(expanded, key_rope, cos, sin, key_dims), expanded[..., nope:]

    @staticmethod
    def backward(ctx: Any, grad_key, grad_value):
        return *part_keys(grad_key, grad_value, *ctx.saved_tensors), None, None, None


@triton.jit
def _pairs(words):
    """Both bf16 members of pairs that were read as one word each, fp32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _words(first, second):
    """The way back, rounded to bf16."""
    low = first.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = second.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _rotate_last_kernel(
    x, cosine, sine, rows, time, dims, HEADS: tl.constexpr, ROTATED: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    HALF: tl.constexpr = ROTATED // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    half = tl.arange(0, HALF)
    angle = ((row // HEADS) % time)[:, None] * HALF + half[None, :]
    cos = tl.load(cosine + angle, mask=inside, other=0.0)
    sin = tl.load(sine + angle, mask=inside, other=0.0)
    start = x + (row.to(tl.int64) * dims + dims - ROTATED)[:, None]
    words = start.to(tl.pointer_type(tl.int32), bitcast=True) + half[None, :]
    # Places are written by other threads than read them, hence the barriers.
    if INVERSE:
        low = tl.load(start + half[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.load(start + HALF + half[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(words, _words(low * cos + high * sin, high * cos - low * sin), mask=inside)
    else:
        first, second = _pairs(tl.load(words, mask=inside, other=0))
        tl.debug_barrier()
        tl.store(start + half[None, :], (first * cos - second * sin).to(tl.bfloat16), mask=inside)
        tl.store(start + HALF + half[None, :], (first * sin + second * cos).to(tl.bfloat16), mask=inside)


@triton_op("moonbase::rotate_last", mutates_args={})
def rotate_last(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> Tensor:
    """x with its last dims rotated, pairs side by side before and half-split after; `inverse`: the way back, which is
    the gradient's. Compiled code writes in place where nobody else reads x."""
    batch, time, heads, dims = x_BTHK.shape
    out = x_BTHK.clone(memory_format=torch.contiguous_format)
    rows = batch * time * heads
    wrap_triton(_rotate_last_kernel)[(triton.cdiv(rows, _ROWS),)](
        out, cos_TR.contiguous(), sin_TR.contiguous(), rows, time, dims, HEADS=heads, ROTATED=2 * cos_TR.shape[-1],
        INVERSE=inverse, ROWS=_ROWS, num_warps=4)
    return out


@triton.jit
def _join_keys_kernel(
    expanded, rope, cosine, sine, key, rows, time, rope_stride, expanded_dims, nope_dims,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROTATED: tl.constexpr, ROWS: tl.constexpr,
):
    HALF: tl.constexpr = ROTATED // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    token = row // HEADS
    row = row.to(tl.int64)
    nope, half = tl.arange(0, NOPE), tl.arange(0, HALF)
    own = inside & (nope < nope_dims)[None, :]
    plain = tl.load(expanded + (row * expanded_dims)[:, None] + nope[None, :], mask=own, other=0.0)
    words = (rope + (token.to(tl.int64) * rope_stride)[:, None]).to(tl.pointer_type(tl.int32), bitcast=True)
    first, second = _pairs(tl.load(words + half[None, :], mask=inside, other=0))
    angle = (token % time)[:, None] * HALF + half[None, :]
    cos = tl.load(cosine + angle, mask=inside, other=0.0)
    sin = tl.load(sine + angle, mask=inside, other=0.0)
    out = key + (row * (nope_dims + ROTATED))[:, None]
    tl.store(out + nope[None, :], plain, mask=own)
    tl.store(out + nope_dims + half[None, :], (first * cos - second * sin).to(tl.bfloat16), mask=inside)
    tl.store(out + nope_dims + HALF + half[None, :], (first * sin + second * cos).to(tl.bfloat16), mask=inside)


@triton_op("moonbase::join_keys", mutates_args={})
def join_keys(expanded_BTHX: Tensor, rope_BTR: Tensor, cos_TR: Tensor, sin_TR: Tensor, key_dims: int) -> Tensor:
    """Keys [B, T, H, K]: every head's own dims of `expanded_BTHX`, then the shared part, rotated."""
    expanded_BTHX = expanded_BTHX.contiguous()
    batch, time, heads, dims = expanded_BTHX.shape
    rotated = rope_BTR.shape[-1]
    stride = rope_BTR.stride(1)
    if rope_BTR.stride() != (time * stride, stride, 1) or stride % 2 or rope_BTR.storage_offset() % 2:
        rope_BTR = rope_BTR.contiguous()
    key = expanded_BTHX.new_empty(batch, time, heads, key_dims)
    rows, nope = batch * time * heads, key_dims - rotated
    wrap_triton(_join_keys_kernel)[(triton.cdiv(rows, _ROWS),)](
        expanded_BTHX, rope_BTR, cos_TR.contiguous(), sin_TR.contiguous(), key, rows, time, rope_BTR.stride(1), dims,
        nope, HEADS=heads, NOPE=triton.next_power_of_2(nope), ROTATED=rotated, ROWS=_ROWS, num_warps=4)
    return key


@triton.jit
def _part_keys_kernel(
    grad_key, grad_value, cosine, sine, grad_expanded, grad_rope, heads, time, nope_dims, value_dims,
    value_head, value_token,
    NOPE: tl.constexpr, VALUE: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr,
):
    HALF: tl.constexpr = ROTATED // 2
    token = tl.program_id(0).to(tl.int64)
    nope, value, half = tl.arange(0, NOPE), tl.arange(0, VALUE), tl.arange(0, HALF)
    low, high = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None]
        here = token * heads + head
        key = grad_key + (here * (nope_dims + ROTATED))[:, None]
        out = grad_expanded + (here * (nope_dims + value_dims))[:, None]
        own, of_value = inside & (nope < nope_dims)[None, :], inside & (value < value_dims)[None, :]
        plain = tl.load(key + nope[None, :], mask=own, other=0.0)
        found = tl.load(grad_value + token * value_token + (head * value_head)[:, None] + value[None, :],
                        mask=of_value, other=0.0)
        low += tl.sum(tl.load(key + nope_dims + half[None, :], mask=inside, other=0.0).to(tl.float32), 0)
        high += tl.sum(tl.load(key + nope_dims + HALF + half[None, :], mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(out + nope[None, :], plain, mask=own)
        tl.store(out + nope_dims + value[None, :], found, mask=of_value)
    angle = (tl.program_id(0) % time) * HALF + half
    cos, sin = tl.load(cosine + angle), tl.load(sine + angle)
    words = (grad_rope + token * ROTATED).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(words + half, _words(low * cos + high * sin, high * cos - low * sin))


@triton_op("moonbase::part_keys", mutates_args={})
def part_keys(
    grad_key_BTHK: Tensor, grad_value_BTHV: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the expanded latent [B, T, H, X] and of the shared part [B, T, R] (summed over heads in fp32) from
    those of keys and values: the way back of `join_keys`."""
    grad_key_BTHK = grad_key_BTHK.contiguous()
    batch, time, heads, key_dims = grad_key_BTHK.shape
    value_dims, rotated = grad_value_BTHV.shape[-1], 2 * cos_TR.shape[-1]
    strides = grad_value_BTHV.stride()
    if strides[0] != time * strides[1] or strides[3] != 1:
        grad_value_BTHV = grad_value_BTHV.contiguous()
    nope = key_dims - rotated
    grad_expanded = grad_key_BTHK.new_empty(batch, time, heads, nope + value_dims)
    grad_rope = grad_key_BTHK.new_empty(batch, time, rotated)
    wrap_triton(_part_keys_kernel)[(batch * time,)](
        grad_key_BTHK, grad_value_BTHV, cos_TR.contiguous(), sin_TR.contiguous(), grad_expanded, grad_rope, heads, time,
        nope, value_dims, grad_value_BTHV.stride(2), grad_value_BTHV.stride(1), NOPE=triton.next_power_of_2(nope),
        VALUE=triton.next_power_of_2(value_dims), ROTATED=rotated, HEADS=min(16, triton.next_power_of_2(heads)),
        num_warps=4)
    return grad_expanded, grad_rope
