"""Triton kernels for attention over paged latents. Loaded only on a machine with a GPU.

One program reads one stretch of one token's context for up to 16 (or more) heads at once, so the latents travel from
memory once for all heads; a second kernel joins the stretches. How long a stretch is follows from the token's own
position alone, so its result does not depend on what else is in the batch.

Shapes as in `ops.latent_attention`; G stretches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRETCHES = 64
"""Programs that share one context at most. Twice as many read one long context hardly faster on an H200, and many
of them slower: what they leave to be joined grows with their number (docs/log.md)."""
SHORTEST = 256
"""Slots that one program reads at least; a multiple of those it reads at once."""
SLOTS, STAGES = 64, 2
"""Slots read at once where a GPU has the room, else half of them; and how many such reads are under way."""
PARTS_LIMIT = 1 << 28
"""fp32 numbers of unjoined results at a time (1 GiB)."""


def _slots(heads: int, width: int, device: torch.device) -> int:
    """Slots that a program reads at once: they stand in shared memory beside the queries of its heads."""
    if device.type != "cuda":
        return SLOTS
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return SLOTS if (STAGES * SLOTS + heads) * width * 2 <= room else SLOTS // 2


@triton.jit
def _stretch_length(position, MOST: tl.constexpr, SHORTEST: tl.constexpr):
    """Slots per program for a context of position + 1 tokens: a multiple of SHORTEST, in MOST pieces or fewer."""
    return tl.cdiv(position + 1, MOST * SHORTEST) * SHORTEST


@triton.jit
def _read_stretch(
    query, store, tables, sequence_of, position_of, out, top,
    scale_log2, num_heads, table_width, num_stretches,
    query_token, query_head, store_block, store_slot,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, Z: tl.constexpr,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, SHORTEST: tl.constexpr,
):
    token, head_block, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequence_of + token)
    position = tl.load(position_of + token)
    length = _stretch_length(position, MOST, SHORTEST)
    first = stretch * length
    heads = head_block * HEADS + tl.arange(0, HEADS)
    latent, rope = tl.arange(0, C_PAD), tl.arange(0, R_PAD)
    of_head = heads[:, None] < num_heads
    out_row = ((token * num_stretches + stretch) * num_heads + heads).to(tl.int64)
    if (sequence < 0) | (first > position):
        return
    base = query + token.to(tl.int64) * query_token + heads[:, None] * query_head
    query_latent = tl.load(base + latent[None], mask=of_head & (latent < C)[None], other=0.0)
    query_rope = tl.load(base + C + rope[None], mask=of_head & (rope < R)[None], other=0.0)
    largest = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    read = tl.zeros([HEADS, C_PAD], tl.float32)
    last = tl.minimum(first + length, position + 1)
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
def _join_stretches(
    parts, tops, out, sequence_of, position_of, num_heads, num_stretches,
    C: tl.constexpr, C_PAD: tl.constexpr, MOST: tl.constexpr, SHORTEST: tl.constexpr, AT_ONCE: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(sequence_of + token)
    position = tl.load(position_of + token)
    used = tl.where(sequence < 0, 0, tl.cdiv(position + 1, _stretch_length(position, MOST, SHORTEST)))
    latent, all_stretches = tl.arange(0, C_PAD), tl.arange(0, MOST)
    row = token.to(tl.int64) * num_stretches * num_heads + head
    all_tops = tl.load(tops + row + all_stretches * num_heads, mask=all_stretches < used, other=-float("inf"))
    largest = tl.where(used > 0, tl.max(all_tops, 0), 0.0)
    total = tl.where(used > 0, tl.sum(tl.exp2(all_tops - largest), 0), 1.0)
    read = tl.zeros([C_PAD], tl.float32)
    for start in range(0, used, AT_ONCE):
        stretch = start + tl.arange(0, AT_ONCE)
        there = stretch < used
        place = row + stretch * num_heads
        weight = tl.exp2(tl.load(tops + place, mask=there, other=-float("inf")) - largest)
        part = tl.load(parts + place[:, None] * C + latent[None], mask=there[:, None] & (latent < C)[None], other=0.0)
        read += tl.sum(part * weight[:, None], 0)
    tl.store(out + (token.to(tl.int64) * num_heads + head) * C + latent, read / total, mask=latent < C)


def latent_attention_cuda(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int,
) -> Tensor:
    """See `ops.latent_attention.latent_attention`. The number of stretches follows the width of `tables_BM` alone, so
    nothing waits for the device and the call can be recorded in a CUDA graph."""
    num_tokens, num_heads, width = query_NHX.shape
    block = store_PZX.shape[1]
    num_stretches = min(STRETCHES, triton.cdiv(tables_BM.shape[1] * block, SHORTEST))
    if num_tokens > 1 and num_tokens * num_stretches * num_heads * rank > PARTS_LIMIT:
        halves = [(query_NHX[part], sequence_N[part], position_N[part])
                  for part in (slice(num_tokens // 2), slice(num_tokens // 2, None))]
        return torch.cat([latent_attention_cuda(query, store_PZX, tables_BM, sequence, position, scale, rank)
                          for query, sequence, position in halves])
    heads = max(16, min(64, triton.next_power_of_2(num_heads)))
    parts = torch.empty(num_tokens, num_stretches, num_heads, rank, dtype=torch.float32, device=query_NHX.device)
    tops = torch.empty(num_tokens, num_stretches, num_heads, dtype=torch.float32, device=query_NHX.device)
    padded, rope_padded = triton.next_power_of_2(rank), max(16, triton.next_power_of_2(width - rank))
    assert query_NHX.stride(2) == store_PZX.stride(2) == tables_BM.stride(1) == 1
    _read_stretch[(num_tokens, triton.cdiv(num_heads, heads), num_stretches)](
        query_NHX, store_PZX, tables_BM, sequence_N, position_N, parts, tops,
        scale * 1.4426950408889634, num_heads, tables_BM.stride(0), num_stretches,
        query_NHX.stride(0), query_NHX.stride(1), store_PZX.stride(0), store_PZX.stride(1),
        C=rank, R=width - rank, C_PAD=max(16, padded), R_PAD=rope_padded, Z=block, HEADS=heads,
        SLOTS=_slots(heads, width, query_NHX.device), MOST=STRETCHES, SHORTEST=SHORTEST,
        num_warps=8 if heads > 16 else 4, num_stages=STAGES)
    out_NHC = query_NHX.new_empty(num_tokens, num_heads, rank)
    _join_stretches[(num_tokens, num_heads)](
        parts, tops, out_NHC, sequence_N, position_N, num_heads, num_stretches, C=rank, C_PAD=max(16, padded),
        MOST=STRETCHES, SHORTEST=SHORTEST, AT_ONCE=min(8, STRETCHES), num_warps=4)
    return out_NHC
