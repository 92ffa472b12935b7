"""Causal attention inside documents that also reports how large the logits of every head became.

QK-Clip (Kimi K2 §2.1) needs the largest logit of each head. No fused attention kernel returns it, but all of them
return the log-sum-exp of every row, and  max_j s_ij <= log Σ_j exp(s_ij). So a head whose log-sum-exp never exceeds τ
cannot need a clip, whatever its exact maximum is; only the others get an exact maximum, by one extra QKᵀ over those
heads alone. The bound is tight: it exceeds the maximum by at most log T.

Shapes: B batch, T time, H heads, K query/key dims per head, V value dims per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.ops import native
from moonbase.ops.documents import Documents

__all__ = ["Documents", "attention", "attention_reference", "exact_above", "largest_logit", "wide_product"]


def attention_reference(
    query_BTHK: Tensor, key_BTHK: Tensor, value_BTHV: Tensor, scale: float, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in fp32. Returns the output [B, T, H, V] and the exact largest logit of each head [H]."""
    logits = torch.einsum("bthk,bshk->bhts", query_BTHK.float(), key_BTHK.float()) * scale
    time = logits.shape[-1]
    hidden = torch.ones(time, time, dtype=torch.bool, device=logits.device).triu(1)
    if documents is not None:
        hidden = hidden | (documents.ids_BT[:, None, :, None] != documents.ids_BT[:, None, None, :])
    logits = logits.masked_fill(hidden, -math.inf)
    output = torch.einsum("bhts,bshv->bthv", logits.softmax(-1), value_BTHV.float())
    return output.to(value_BTHV.dtype), logits.detach().amax((0, 2, 3))


def attention(
    query_BTHK: Tensor,
    key_BTHK: Tensor,
    value_BTHV: Tensor,
    scale: float,
    documents: Documents | None = None,
    clip_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused attention. Returns the output [B, T, H, V] and per head [H], fp32, without gradient:

    the largest log-sum-exp where that is at most `clip_threshold` (an upper bound of the largest logit), else the exact
    largest logit. `clip_threshold=None` returns the bound for every head; -inf the exact maximum for every head.
    """
    if query_BTHK.device.type == "cuda" and query_BTHK.dtype in (torch.bfloat16, torch.float16):
        from moonbase.ops.attention_cuda import attention_with_logsumexp

        output, logsumexp = attention_with_logsumexp(query_BTHK, key_BTHK, value_BTHV, scale, documents)
    elif query_BTHK.device.type != "cpu":
        # fp32 on a GPU is for comparisons of small shapes: the reference holds all T² logits.
        return attention_reference(query_BTHK, key_BTHK, value_BTHV, scale, documents)
    else:
        output, logsumexp = _attention_cpu(query_BTHK, key_BTHK, value_BTHV, scale, documents)
    bound = logsumexp.detach().float().amax((0, 2))
    if clip_threshold is None:
        return output, bound
    ids = None if documents is None else documents.ids_BT
    return output, exact_above(query_BTHK.detach(), key_BTHK.detach(), bound, scale, clip_threshold, ids)


def _attention_cpu(
    query_BTHK: Tensor, key_BTHK: Tensor, value_BTHV: Tensor, scale: float, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [B, H, T]: our own kernel, or PyTorch's flash kernel, which wants V = K, hence padding."""
    if native.takes(query_BTHK, key_BTHK, value_BTHV):
        from moonbase.ops.attention_cpu import NativeAttention

        batch, time = query_BTHK.shape[:2]
        segments = documents.segments if documents is not None else [(row, 0, time) for row in range(batch)]
        return NativeAttention.apply(query_BTHK, key_BTHK, value_BTHV, scale, torch.tensor(segments))
    query, key, value = (x.transpose(1, 2) for x in (query_BTHK, key_BTHK, value_BTHV))
    value_dims, key_dims = value.shape[-1], key.shape[-1]
    width = max(value_dims, key_dims)
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    if documents is None:
        output, logsumexp = _flash(query, key, value, 0.0, True, scale=scale)
    else:
        output, logsumexp = _PackedAttention.apply(query, key, value, scale, documents.segments)
    return output[..., :value_dims].transpose(1, 2), logsumexp


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _PackedAttention(torch.autograd.Function):
    """Document after document: no work on pairs that may not see one another, and no mask of T² entries."""

    @staticmethod
    def forward(ctx: Any, query, key, value, scale, segments):
        # [B, T, H, ·] storage, so that what follows reads heads of a token side by side.
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for row, start, stop in segments:
            part = (slice(row, row + 1), slice(None), slice(start, stop))
            output[part], logsumexp[part] = _flash(query[part], key[part], value[part], 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.scale, ctx.segments = scale, segments
        ctx.mark_non_differentiable(logsumexp)
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, grad, _):
        query, key, value, output, logsumexp = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        for row, start, stop in ctx.segments:
            part = (slice(row, row + 1), slice(None), slice(start, stop))
            found = _flash_backward(grad[part], query[part], key[part], value[part], output[part], logsumexp[part], 0.0,
                                    True, scale=ctx.scale)
            for gradient, piece in zip(gradients, found, strict=True):
                gradient[part] = piece
        return *gradients, None, None


@torch.library.custom_op("moonbase::exact_above", mutates_args=())
def exact_above(
    query_BTHK: Tensor, key_BTHK: Tensor, bound_H: Tensor, scale: float, threshold: float, ids_BT: Tensor | None
) -> Tensor:
    """Replace `bound_H` by the exact largest logit for the heads whose bound exceeds `threshold`.

    On a GPU the other heads' programs end at once on the device, so nothing waits for the host.
    """
    if query_BTHK.device.type == "cuda":
        from moonbase.ops.attention_cuda import exact_above_cuda

        return exact_above_cuda(query_BTHK, key_BTHK, bound_H, scale, threshold, ids_BT)
    result = bound_H.clone()
    for head in torch.nonzero(bound_H > threshold).flatten().tolist():
        result[head] = largest_logit(query_BTHK[:, :, head], key_BTHK[:, :, head], scale, ids_BT)
    return result


@exact_above.register_fake
def _exact_above_shape(query_BTHK, key_BTHK, bound_H, scale, threshold, ids_BT):
    return torch.empty_like(bound_H)


def largest_logit(query_BTK: Tensor, key_BTK: Tensor, scale: float, ids_BT: Tensor | None, block: int = 512) -> Tensor:
    """The exact largest causal logit of one head, in blocks of query rows so that long contexts fit."""
    time = query_BTK.shape[1]
    largest = query_BTK.new_full((), -math.inf, dtype=torch.float32)
    for start in range(0, time, block):
        stop = min(start + block, time)
        logits = torch.bmm(query_BTK[:, start:stop].float(), key_BTK[:, :stop].float().transpose(1, 2)) * scale
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=logits.device).triu(start + 1)
        if ids_BT is not None:
            hidden = hidden | (ids_BT[:, start:stop, None] != ids_BT[:, None, :stop])
        largest = torch.maximum(largest, logits.masked_fill_(hidden, -math.inf).amax())
    return largest


def wide_product(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    """a · b [B, M, N] in the fp32 that it is summed in, for inputs of any floating dtype.

    Rounded to bf16, a logit of 50 would be off by up to an eighth. Without gradient on a GPU.
    """
    if a_BMK.device.type == "cuda" and a_BMK.dtype != torch.float32:
        return torch.bmm(a_BMK, b_BKN, out_dtype=torch.float32)
    return torch.bmm(a_BMK.float(), b_BKN.float())
