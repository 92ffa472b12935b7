"""Attention over paged latents: what decoding with multi-head latent attention does (DeepSeek-V3.2 appendix).

Every cached token is one row of X = C + R numbers, its latent and its rotated key, shared by all heads. The absorbed
query scores whole rows; what is read back is their first C numbers. Rows lie in blocks that any sequence may own, so a
table per sequence says where its k-th block is.

A token's result does not depend, bit for bit, on which other tokens are computed beside it (fp32 on a CPU with the
native kernels): rows are summed in the order of their positions, one query after the other.

Shapes: N new tokens of any number of sequences, H heads, C kv latent, R rope dims, X = C + R, P blocks in the pool,
Z tokens per block, B sequences, M blocks that the longest of them owns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.ops.latent_attention_cpu import latent_attention_cpu, takes


def latent_attention_reference(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int,
) -> Tensor:
    """Token n, at `position_N[n]` of sequence `sequence_N[n]`, attends to slots 0 … position of that sequence.

    Returns [N, H, C] in the query's dtype, with C = `rank`; logits and softmax in fp32. A token of sequence -1 is
    padding and gets zeros.
    """
    block = store_PZX.shape[1]
    read_NHC = query_NHX.new_zeros(*query_NHX.shape[:2], rank)
    for number, (sequence, position) in enumerate(zip(sequence_N.tolist(), position_N.tolist(), strict=True)):
        if sequence < 0:
            continue
        slots = position + 1
        table = tables_BM[sequence, : -(-slots // block)].long()
        rows_SX = store_PZX[table].flatten(0, 1)[:slots]
        logits_HS = (query_NHX[number].float() @ rows_SX.float().T) * scale
        read_NHC[number] = (logits_HS.softmax(-1) @ rows_SX[:, :rank].float()).to(read_NHC.dtype)
    return read_NHC


def latent_attention(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int, few: int = 4,
) -> Tensor:
    """Fast twin of `latent_attention_reference`. Tokens of one sequence must stand side by side. `few`: see
    `latent_attention_hopper`; a GPU's kernel of that name goes by it."""
    if query_NHX.is_cuda:
        # By the sizes of the model alone: a token's bits must not depend on what is computed beside it.
        from moonbase.ops import latent_attention_hopper as hopper

        if hopper.fits(query_NHX, store_PZX, rank) and hopper.available():
            return hopper.latent_attention_hopper(
                query_NHX, store_PZX, tables_BM, sequence_N, position_N, scale, rank, few)
        from moonbase.ops.latent_attention_cuda import latent_attention_cuda

        return latent_attention_cuda(query_NHX, store_PZX, tables_BM, sequence_N, position_N, scale, rank)
    if takes(query_NHX, store_PZX, rank):
        return latent_attention_cpu(query_NHX, store_PZX, tables_BM, sequence_N, position_N, scale, rank)
    return _by_sequence(query_NHX, store_PZX, tables_BM, sequence_N, position_N, scale, rank)


def _by_sequence(query_NHX, store_PZX, tables_BM, sequence_N, position_N, scale, rank):
    """Two matrix products per sequence, over all its new tokens and heads at once."""
    block, heads = store_PZX.shape[1], query_NHX.shape[1]
    read_NHC = query_NHX.new_zeros(query_NHX.shape[0], heads, rank)
    sequences, counts = torch.unique_consecutive(sequence_N, return_counts=True)
    start = 0
    for sequence, count in zip(sequences.tolist(), counts.tolist(), strict=True):
        part = slice(start, start + count)
        start += count
        if sequence < 0:
            continue
        slots = int(position_N[part].max()) + 1
        table = tables_BM[sequence, : -(-slots // block)].long()
        rows_SX = store_PZX.index_select(0, table).flatten(0, 1)[:slots].float()
        logits_THS = (query_NHX[part].flatten(0, 1).float() @ rows_SX.T).view(count, heads, slots) * scale
        if count > 1:
            later = torch.arange(slots, device=rows_SX.device) > position_N[part, None]
            logits_THS = logits_THS.masked_fill_(later[:, None], -torch.inf)
        read = logits_THS.softmax(-1).flatten(0, 1) @ rows_SX[:, :rank]
        read_NHC[part] = read.view(count, heads, rank).to(read_NHC.dtype)
    return read_NHC
