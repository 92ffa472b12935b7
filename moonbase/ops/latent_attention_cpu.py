"""CPU side of `ops.latent_attention`: the kernel of cpu_kernels_decoding.c.

Shapes: N tokens, H heads, C kv latent, R rope dims, X = C + R, P pages of Z tokens, B sequences, M pages each.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moonbase.ops import native


class _Task(ctypes.Structure):
    """struct latent_attention."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "store", "tables", "sequence", "position", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "dims", "rank", "page", "pages", "num_threads")),
        ("scale", ctypes.c_float), ("groups", ctypes.c_void_p),
    ]


def takes(query_NHX: Tensor, store_PZX: Tensor, rank: int) -> bool:
    """Whether the kernel works on these: fp32 on the CPU, X and C multiples of 16."""
    return native.takes(query_NHX, store_PZX) and rank % native.GRAIN == 0


def latent_attention_cpu(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int,
) -> Tensor:
    """As `ops.latent_attention.latent_attention`, for what `takes`. Tokens of one sequence need not stand side by side,
    but go faster where they do. A token's bits depend on its own query and sequence only."""
    assert store_PZX.is_contiguous() and tables_BM.is_contiguous()
    assert all(x.dtype == torch.int32 for x in (tables_BM, sequence_N, position_N))
    query_NHX, sequence_N, position_N = (x.contiguous() for x in (query_NHX, sequence_N, position_N))
    tokens, heads, dims = query_NHX.shape
    out_NHC = query_NHX.new_empty(tokens, heads, rank)
    native.call("moonbase_latent_attention", _Task(
        *(x.data_ptr() for x in (query_NHX, store_PZX, tables_BM, sequence_N, position_N, out_NHC)),
        tokens, heads, dims, rank, store_PZX.shape[1], tables_BM.shape[1], torch.get_num_threads(), scale))
    return out_NHC
