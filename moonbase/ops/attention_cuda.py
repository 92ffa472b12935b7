"""GPU side of `ops.attention`: cuDNN's fused kernels and an exact per-head maximum that costs nothing where not needed.

cuDNN is the one stock kernel with different query/key (192) and value (128) dims on Hopper. Its variable-length form is
60 times slower and its gradients there are wrong (docs/log.md), so batches of several documents per row go through the
flash kernel with values as wide as the keys, as does everything on GPUs where cuDNN does not know the head size. Both
return the log-sum-exp.

Shapes: B batch, T time, H heads, K query/key dims, V value dims per head, N = B·T tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonbase.ops.documents import Documents


def attention_with_logsumexp(
    query_BTHK: Tensor, key_BTHK: Tensor, value_BTHV: Tensor, scale: float, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Causal attention; output [B, T, H, V] and log-sum-exp [B, H, T] fp32 (without gradient)."""
    batch, time, _, dims = query_BTHK.shape
    if documents is None and cudnn_takes(max(dims, value_BTHV.shape[-1]), query_BTHK.device.index):
        query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTHK, value_BTHV))
        output, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, scale=scale)
        return output.transpose(1, 2), logsumexp.detach().flatten(2)
    if documents is None:
        boundaries = torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=query_BTHK.device)
        extent = None
    else:
        assert documents.boundaries is not None, "Documents.from_ids(ids, device) prepares documents for a GPU"
        boundaries, extent = documents.boundaries, documents.extent
    output, logsumexp = packed_attention(query_BTHK.flatten(0, 1), key_BTHK.flatten(0, 1), value_BTHV.flatten(0, 1),
                                         boundaries, extent, time, scale)
    return output.unflatten(0, (batch, time)), logsumexp.detach().unsqueeze(0)


FAR, CHUNK = 4096, 2048
"""Tokens from position FAR on are worth calls of their own: one for every CHUNK positions of a context."""

_capability = functools.cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result  # compiled graphs hold the branch taken; nothing is asked when they run
def cudnn_takes(dims: int, device_index: int) -> bool:
    """Whether cuDNN's attention has kernels, gradients included, for heads of this size on this GPU: above 128 dims
    only on the data centre GPUs of two generations, Hopper and Blackwell."""
    return dims <= 128 or _capability(device_index) in ((9, 0), (10, 0))


@torch.library.custom_op("moonbase::packed_attention", mutates_args=())
def packed_attention(
    query_NHK: Tensor, key_NHK: Tensor, value_NHV: Tensor, boundaries: Tensor, extent: Tensor | None, longest: int,
    scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents laid end to end. Returns output [N, H, V] and log-sum-exp [H, N] fp32.

    boundaries: int32, where documents start, and their common end as often as there is room for; extent: int32 [2] on
    the CPU, how many documents there are and the longest of them, so that no program is started for nothing: with a
    tensor, compiled graphs need not know.
    """
    boundaries, longest = _as_they_are(boundaries, extent, longest)
    width = query_NHK.shape[-1]
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query_NHK, key_NHK, wide_values(value_NHV, width), boundaries, boundaries, longest, longest, 0.0, True, False,
        scale=scale)
    return output[..., width - value_NHV.shape[-1] :].contiguous(), logsumexp


def _as_they_are(boundaries: Tensor, extent: Tensor | None, longest: int) -> tuple[Tensor, int]:
    if extent is None:
        return boundaries, longest
    count, longest = extent.tolist()
    return boundaries[: count + 1], longest


def wide_values(value_NHV: Tensor, width: int) -> Tensor:
    """`width` dims a head, of which the values are the last; for the flash kernel, which knows one head size for all.

    Where the values are ends of wider rows, as MLA's are, what stands before them is taken along and nothing copied:
    it meets nobody's output and gradients of zero.
    """
    missing = width - value_NHV.shape[-1]
    tokens, heads, _ = value_NHV.shape
    if value_NHV.stride(2) == 1 and value_NHV.stride(1) >= width and value_NHV.storage_offset() >= missing:
        return value_NHV.as_strided(
            (tokens, heads, width), value_NHV.stride(), value_NHV.storage_offset() - missing)
    return _padded(value_NHV, width)


def _padded(x_NHV: Tensor, width: int) -> Tensor:
    """Zeros before the values."""
    return torch.nn.functional.pad(x_NHV, (width - x_NHV.shape[-1], 0)) if x_NHV.shape[-1] < width else x_NHV


def attention_to_context(
    query_NHK: Tensor, key_SHK: Tensor, value_SHV: Tensor, counts: Sequence[int], stops: Sequence[int], scale: float
) -> Tensor:
    """The last `counts[i]` of `stops[i]` tokens of document i attend to what stands before them and themselves.

    Queries [N = Σ counts] and keys [S = Σ stops] of all documents lie end to end. Returns [N, H, V]; no gradient.
    Which kernel reads a token, and in which pieces, follows from its position alone: a token's bits depend neither on
    the other documents nor on where its own was cut into chunks.
    """
    widest = max(query_NHK.shape[-1], value_SHV.shape[-1])
    far_from = FAR if widest % 8 == 0 and cudnn_takes(widest, query_NHK.device.index) else max(stops)
    if max(stops) <= far_from:
        return _attention_end_to_end(query_NHK, key_SHK, value_SHV, counts, stops, scale)
    out_NHV = value_SHV.new_empty(*query_NHK.shape[:2], value_SHV.shape[-1])
    near: list[tuple[slice, slice]] = []
    for count, stop, last_row, last_key in zip(
            counts, stops, itertools.accumulate(counts), itertools.accumulate(stops), strict=True):
        row, key = last_row - stop, last_key - stop  # where its position 0 is, or would be
        if stop - count < far_from:
            near.append((slice(row + stop - count, row + min(stop, far_from)), slice(key, key + min(stop, far_from))))
        for start in range(far_from + (max(stop - count, far_from) - far_from) // CHUNK * CHUNK, stop, CHUNK):
            first, end = max(start, stop - count), min(start + CHUNK, stop)
            out_NHV[row + first : row + end] = _attention_to_one_context(
                query_NHK[row + first : row + end], key_SHK[key : key + end], value_SHV[key : key + end], start, scale)
    if near:
        rows, keys = zip(*near, strict=True)
        parts = (torch.cat([x[each] for each in places]) for x, places in (
            (query_NHK, rows), (key_SHK, keys), (value_SHV, keys)))
        lengths = ([each.stop - each.start for each in places] for places in (rows, keys))
        read = _attention_end_to_end(*parts, *lengths, scale)
        for each, part in zip(rows, read.split([each.stop - each.start for each in rows]), strict=True):
            out_NHV[each] = part
    return out_NHV


def _attention_end_to_end(
    query_NHK: Tensor, key_SHK: Tensor, value_SHV: Tensor, counts: Sequence[int], stops: Sequence[int], scale: float
) -> Tensor:
    """`attention_to_context` by the flash kernel, which reads every context in the same pieces from its beginning."""
    width = -(-max(query_NHK.shape[-1], value_SHV.shape[-1]) // 8) * 8  # heads of other sizes it does not take
    ends = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (counts, stops)]
    query_ends, key_ends = (end.to(query_NHK.device, non_blocking=True) for end in ends)
    # With more keys than queries, the flash kernel's diagonal ends in the lower right corner.
    output, *_ = torch.ops.aten._flash_attention_forward(
        *(_widen(x, width) for x in (query_NHK, key_SHK, value_SHV)), query_ends, key_ends, max(counts), max(stops),
        0.0, True, False, scale=scale)
    return output[..., : value_SHV.shape[-1]]


def _attention_to_one_context(
    query_NHK: Tensor, key_SHK: Tensor, value_SHV: Tensor, start: int, scale: float
) -> Tensor:
    """The last tokens of one context, all behind its `start` tokens, by cuDNN.

    Its diagonal begins in the upper left corner: what stands before `start` is read apart, and both parts are joined by
    their log-sum-exps. Queries between `start` and the first one asked for are made up.
    """
    made_up = key_SHK.shape[0] - query_NHK.shape[0] - start
    query, key, value = (x.unsqueeze(0).transpose(1, 2) for x in (query_NHK, key_SHK, value_SHV))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    whole = torch.nn.functional.pad(query, (0, 0, made_up, 0))
    own, own_total, *_ = attend(whole, key[:, :, start:], value[:, :, start:], None, True, 0.0, True, scale=scale)
    earlier, earlier_total, *_ = attend(
        query, key[:, :, :start], value[:, :, :start], None, True, 0.0, False, scale=scale)
    share = torch.sigmoid(own_total.flatten(2)[:, :, made_up:] - earlier_total.flatten(2))
    joined = torch.lerp(earlier.float(), own[:, :, made_up:].float(), share.unsqueeze(-1))
    return joined.to(own.dtype).squeeze(0).transpose(0, 1)


def _widen(x_NHV: Tensor, width: int) -> Tensor:
    """Zeros up to `width`: the flash kernel knows one head size for all."""
    return x_NHV if x_NHV.shape[-1] == width else torch.nn.functional.pad(x_NHV, (0, width - x_NHV.shape[-1]))


@packed_attention.register_fake
def _packed_attention_shape(query_NHK, key_NHK, value_NHV, boundaries, extent, longest, scale):
    tokens, heads, _ = query_NHK.shape
    return value_NHV.new_empty(value_NHV.shape), query_NHK.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("moonbase::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_NHV: Tensor, query_NHK: Tensor, key_NHK: Tensor, value_NHV: Tensor, output_NHV: Tensor, logsumexp_HN: Tensor,
    boundaries: Tensor, extent: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_attention` for query, key and value; the last are the ends of wider rows."""
    boundaries, longest = _as_they_are(boundaries, extent, longest)
    width = query_NHK.shape[-1]
    random_state = torch.zeros(2, dtype=torch.uint64, device=query_NHK.device)
    grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
        _padded(grad_NHV, width), query_NHK, key_NHK, wide_values(value_NHV, width), _padded(output_NHV, width),
        logsumexp_HN, boundaries, boundaries, longest, longest, 0.0, True, random_state, random_state, scale=scale)
    return grad_query, grad_key, grad_value[..., width - value_NHV.shape[-1] :]


@packed_attention_backward.register_fake
def _packed_attention_backward_shape(
    grad_NHV, query_NHK, key_NHK, value_NHV, output_NHV, logsumexp_HN, boundaries, extent, longest, scale
):
    width = query_NHK.shape[-1]
    wide = value_NHV.new_empty(*value_NHV.shape[:2], width)
    return (query_NHK.new_empty(query_NHK.shape), key_NHK.new_empty(key_NHK.shape),
            wide[..., width - value_NHV.shape[-1] :])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, boundaries, extent, ctx.longest, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries, extent)


def _differentiate(ctx: Any, grad: Tensor, grad_logsumexp: Tensor | None) -> tuple:
    query, key, value, output, logsumexp, boundaries, extent = ctx.saved_tensors
    gradients = packed_attention_backward(
        grad, query, key, value, output, logsumexp, boundaries, extent, ctx.longest, ctx.scale)
    return *gradients, None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)


@triton.jit
def _exact_above_kernel(
    query, key, bound, result, ids, scale, threshold, time, heads,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    HAS_IDS: tl.constexpr, DIMS: tl.constexpr, DIMS_LOW: tl.constexpr, DIMS_HIGH: tl.constexpr, BLOCK: tl.constexpr,
):
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    if tl.load(bound + head) > threshold:
        # The head size (192) is no power of two: it is read as a low and a high part, 16 dims each at least.
        low, high = tl.arange(0, DIMS_LOW), DIMS_LOW + tl.arange(0, DIMS_HIGH)
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        q_base = query + batch.to(tl.int64) * stride_qb + head * stride_qh + rows[:, None].to(tl.int64) * stride_qt
        q_low = tl.load(q_base + low[None, :], mask=(rows < time)[:, None] & (low < DIMS)[None, :], other=0.0)
        q_high = tl.load(q_base + high[None, :], mask=(rows < time)[:, None] & (high < DIMS)[None, :], other=0.0)
        if HAS_IDS:
            row_ids = tl.load(ids + batch.to(tl.int64) * time + rows, mask=rows < time, other=-1)
        largest = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            k_base = key + batch.to(tl.int64) * stride_kb + head * stride_kh + columns[None, :].to(tl.int64) * stride_kt
            k_low = tl.load(k_base + low[:, None], mask=(columns < time)[None, :] & (low < DIMS)[:, None], other=0.0)
            k_high = tl.load(k_base + high[:, None], mask=(columns < time)[None, :] & (high < DIMS)[:, None], other=0.0)
            logits = tl.dot(q_low, k_low) + tl.dot(q_high, k_high)
            visible = (columns[None, :] <= rows[:, None]) & (rows < time)[:, None]
            if HAS_IDS:
                column_ids = tl.load(ids + batch.to(tl.int64) * time + columns, mask=columns < time, other=-2)
                visible = visible & (column_ids[None, :] == row_ids[:, None])
            largest = tl.maximum(largest, tl.max(tl.where(visible, logits * scale, -float("inf")), 1))
        tl.atomic_max(result + head, tl.max(largest, 0))


def exact_above_cuda(
    query_BTHK: Tensor, key_BTHK: Tensor, bound_H: Tensor, scale: float, threshold: float, ids_BT: Tensor | None
) -> Tensor:
    """See `ops.attention.exact_above`. Programs of heads within the threshold end at once."""
    batch, time, heads, dims = query_BTHK.shape
    block, low = 64, max(16, triton.next_power_of_2(dims) // 2)
    above = bound_H > threshold
    result = torch.where(above, -float("inf"), bound_H)
    ids = ids_BT.contiguous() if ids_BT is not None else bound_H
    _exact_above_kernel[(triton.cdiv(time, block), batch * heads)](
        query_BTHK, key_BTHK, bound_H, result, ids, scale, threshold, time, heads,
        *query_BTHK.stride()[:3], *key_BTHK.stride()[:3], HAS_IDS=ids_BT is not None, DIMS=dims, DIMS_LOW=low,
        DIMS_HIGH=max(16, triton.next_power_of_2(max(1, dims - low))), BLOCK=block)
    return result
