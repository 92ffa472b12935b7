"""How INT4 weights lie on a GPU: the words and scales of `int4_packed`, in another order.

Chunks of 64 rows x 128 inputs, the scales behind the words: a kernel gets a chunk by one bulk copy, and every lane its
part of it by one read.

Shapes: E experts, B blocks of 64 rows, J chunks along the inputs, Y bytes of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.layout import INT4_GROUP

CHUNK_ROWS, CHUNK_INPUTS = 64, 128
CHUNK_BYTES = CHUNK_ROWS * CHUNK_INPUTS // 2 + CHUNK_ROWS * CHUNK_INPUTS // INT4_GROUP * 2
AT_ONCE = 16
"""Experts that are brought into this order together."""


def divides(hidden: int, width: int) -> bool:
    """Whether experts of this size are whole chunks, gate and up as well as down."""
    return hidden % CHUNK_INPUTS == 0 and width % CHUNK_INPUTS == 0


def pack_chunks(words: Tensor, scales: Tensor, gated: bool) -> Tensor:
    """Words int32 [E, rows, inputs / 8] and scales bf16 [E, rows, inputs / 32] of a checkpoint -> uint8 [E, B, J, Y].

    `gated`: the first half of the rows is gate's, the second up's; eight of each share a tile.
    """
    experts, rows, depth = words.shape
    blocks, chunks = rows // CHUNK_ROWS, depth * 8 // CHUNK_INPUTS
    if experts > AT_ONCE:
        # A layer of K2 has 9.5 GB: what lies between the two orders is made of a few experts at a time.
        packed = torch.empty(experts, blocks, chunks, CHUNK_BYTES, dtype=torch.uint8, device=words.device)
        for part in (slice(first, first + AT_ONCE) for first in range(0, experts, AT_ONCE)):
            packed[part] = pack_chunks(words[part], scales[part], gated)
        return packed
    if gated:
        words, scales = (_interleave(each) for each in (words, scales))
    # [expert, block, tile, half, row of eight, chunk, group, quarter]
    words = words.reshape(experts, blocks, 4, 2, 8, chunks, 4, 4).permute(0, 1, 5, 2, 3, 4, 7, 6)
    scales = scales.reshape(experts, blocks, 4, 2, 8, chunks, 4).permute(0, 1, 5, 2, 4, 3, 6)
    return torch.cat([each.contiguous().view(torch.uint8).reshape(experts, blocks, chunks, -1)
                      for each in (words, scales)], dim=-1)


def unpack_chunks(chunks_EBJY: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """What `pack_chunks` was given."""
    experts, blocks, chunks, _ = chunks_EBJY.shape
    words, scales = chunks_EBJY.split([CHUNK_ROWS * CHUNK_INPUTS // 2, CHUNK_ROWS * CHUNK_INPUTS // INT4_GROUP * 2], -1)
    words = words.contiguous().view(torch.int32).view(experts, blocks, chunks, 4, 2, 8, 4, 4)
    scales = scales.contiguous().view(torch.bfloat16).view(experts, blocks, chunks, 4, 8, 2, 4)
    words = words.permute(0, 1, 3, 4, 5, 2, 7, 6).reshape(experts, blocks * CHUNK_ROWS, -1)
    scales = scales.permute(0, 1, 3, 5, 4, 2, 6).reshape(experts, blocks * CHUNK_ROWS, -1)
    return tuple(_separate(each) if gated else each for each in (words, scales))


def _interleave(rows: Tensor) -> Tensor:
    """[E, gate's then up's rows, ...] -> eight of gate's, the same eight of up's, the next eight of gate's, ..."""
    return rows.unflatten(1, (2, -1, 8)).transpose(1, 2).flatten(1, 3)


def _separate(rows: Tensor) -> Tensor:
    """The way back."""
    return rows.unflatten(1, (-1, 2, 8)).transpose(1, 2).flatten(1, 3)
