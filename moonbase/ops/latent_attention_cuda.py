"""Triton kernels for attention over paged latents. Loaded only on a machine with a GPU.

One program reads one stretch of one token's context for up to 16 (or more) heads at once, so the latents travel from
memory once for all heads; a second kernel joins the stretches. Stretches have a fixed length, so a token's result does
not depend on what else is in the batch.

Shapes as in `ops.latent_attention`; G stretches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCH = 1024
"""Slots that one program reads. Fixed, so that the order of summation does not depend on the batch."""


@triton.jit
def _read_stretch(
    query, store, tables, sequence_of, position_of, out, top,
    scale_log2, num_heads, table_width, num_stretches,
    query_token, query_head, store_block, store_slot,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, Z: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr,
):
    token, head_block, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequence_of + token)
    position = tl.load(position_of + token)
    first = stretch * LENGTH
    heads = head_block * HEADS + tl.arange(0, HEADS)
    latent, rope = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    of_head = heads[:, None] < num_heads
    out_row = ((token * num_stretches + stretch) * num_heads + heads).to(tl.int64)
    if (sequence < 0) | (first > position):
        tl.store(top + out_row, -float("inf"), mask=heads < num_heads)
        return
    base = query + token.to(tl.int64) * query_token + heads[:, None] * query_head
    query_latent = tl.load(base + latent[None], mask=of_head & (latent < C)[None], other=0.0)
    query_rope = tl.load(base + C + rope[None], mask=of_head & (rope < R)[None], other=0.0)
    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    read = tl.zeros([HEADS, C_PAD], tl.float32)
    last = tl.minimum(first + LENGTH, position + 1)
    for start in range(first, last, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        known = slots < last
        block = tl.load(tables + sequence * table_width + slots // Z, mask=known, other=0).to(tl.int64)
        rows = store + block * store_block + (slots % Z) * store_slot
        latents = tl.load(rows[:, None] + latent[None], mask=known[:, None] & (latent < C)[None], other=0.0)
        keys = tl.load(rows[:, None] + C + rope[None], mask=known[:, None] & (rope < R)[None], other=0.0)
        logits = tl.dot(query_latent, tl.trans(latents))
        logits = tl.dot(query_rope, tl.trans(keys), logits) * scale_log2
        logits = tl.where(known[None], logits, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        read = tl.dot(weights.to(latents.dtype), latents, read * shrink[:, None])
        largest = new_largest
    tl.store(top + out_row, largest + tl.log2(total), mask=heads < num_heads)
    tl.store(out + out_row[:, None] * C + latent[None], read / total[:, None],
             mask=of_head & (latent < C)[None])


@triton.jit
def _join_stretches(parts, tops, out, num_heads, num_stretches, C: tl.constexpr, C_PAD: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    latent = tl.arange(0, C_PAD)
    largest = -float("inf")
    total = 0.0
    read = tl.zeros([C_PAD], tl.float32)
    for stretch in range(num_stretches):
        row = ((token * num_stretches + stretch) * num_heads + head).to(tl.int64)
        top = tl.load(tops + row)
        if top > -float("inf"):
            new_largest = tl.maximum(largest, top)
            weight, shrink = tl.exp2(top - new_largest), tl.exp2(largest - new_largest)
            part = tl.load(parts + row * C + latent, mask=latent < C, other=0.0)
            read = read * shrink + part * weight
            total = total * shrink + weight
            largest = new_largest
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + (token.to(tl.int64) * num_heads + head) * C + latent, read / total, mask=latent < C)


def latent_attention_cuda(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int,
) -> Tensor:
    """See `ops.latent_attention.latent_attention`. The number of stretches follows the width of `tables_BM` alone, so
    nothing waits for the device and the call can be recorded in a CUDA graph."""
    num_tokens, num_heads, width = query_NHX.shape
    block = store_PZX.shape[1]
    num_stretches = max(1, triton.cdiv(tables_BM.shape[1] * block, STRETCH))
    heads = max(16, min(64, triton.next_power_of_2(num_heads)))
    parts = torch.empty(num_tokens, num_stretches, num_heads, rank, dtype=torch.float32, device=query_NHX.device)
    tops = torch.empty(num_tokens, num_stretches, num_heads, dtype=torch.float32, device=query_NHX.device)
    padded, rope_padded = triton.next_power_of_2(rank), max(16, triton.next_power_of_2(width - rank))
    assert query_NHX.stride(2) == store_PZX.stride(2) == tables_BM.stride(1) == 1
    _read_stretch[(num_tokens, triton.cdiv(num_heads, heads), num_stretches)](
        query_NHX, store_PZX, tables_BM, sequence_N, position_N, parts, tops,
        scale * 1.4426950408889634, num_heads, tables_BM.stride(0), num_stretches,
        query_NHX.stride(0), query_NHX.stride(1), store_PZX.stride(0), store_PZX.stride(1),
        C=rank, R=width - rank, C_PAD=max(16, padded), R_PAD=rope_padded, Z=block, HEADS=heads, SLOTS=32,
        LENGTH=STRETCH, num_warps=8 if heads > 16 else 4, num_stages=2)
    out_NHC = query_NHX.new_empty(num_tokens, num_heads, rank)
    _join_stretches[(num_tokens, num_heads)](parts, tops, out_NHC, num_heads, num_stretches, C=rank,
                                             C_PAD=max(16, padded), num_warps=4)
    return out_NHC
