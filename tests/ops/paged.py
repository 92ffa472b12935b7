"""Random caches in blocks that lie about in any order."""

from __future__ import annotations

import torch
from torch import Tensor


def paged(
    heads: int, rank: int, rope: int, lengths: list[int], new_tokens: list[int], seed: int = 0, block: int = 16,
    padding: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query [N, H, X], store [P, Z, X], tables [B, M], sequence [N], position [N] of sequences that have `lengths`
    tokens of which the last `new_tokens` ask; `padding` rows at the end belong to nobody."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block) for length in lengths]
    order = 1 + torch.randperm(sum(blocks), generator=generator)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    first = 0
    for row, count in enumerate(blocks):
        tables[row, :count] = order[first : first + count]
        first += count
    sequence = [row for row, count in enumerate(new_tokens) for _ in range(count)] + [-1] * padding
    position = [place for length, count in zip(lengths, new_tokens, strict=True)
                for place in range(length - count, length)] + [0] * padding
    store = torch.randn(sum(blocks) + 1, block, rank + rope, generator=generator)
    query = torch.randn(len(sequence), heads, rank + rope, generator=generator)
    return (query, store, tables, torch.tensor(sequence, dtype=torch.int32),
            torch.tensor(position, dtype=torch.int32))
