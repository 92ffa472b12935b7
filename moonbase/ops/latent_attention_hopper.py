"""Attention over paged latents on a Hopper GPU, for decoding: the calls of `latent_attention_hopper.cu`.

Shapes as in `ops.latent_attention`; G stretches, B blocks of 64 heads.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moonbase.ops.cuda_library import Arguments, HopperKernels, fields

RANK, ROPE = 512, 64
"""The widths that the kernel is made for: DeepSeek-V3's and Kimi K2's."""
HEADS = 64
"""Heads that share one reading of the rows."""
PARTS_LIMIT = 1 << 29
"""fp16 numbers of unjoined results at a time (1 GiB)."""
_HEAD_PARTS = HEADS * RANK
_SUMMING = 256  # threads of a block that sum
_LOG2_E = 1.4426950408889634


_KERNELS = HopperKernels("latent_attention_hopper")
available = _KERNELS.available


class _Arguments(Arguments):
    _fields_ = fields(
        pointers=("query", "store", "tables", "sequence", "position", "parts", "marks", "scales", "arrived", "out"),
        int64=("query_token", "query_head", "store_page", "store_slot"), float32=("scale_log2",),
        int32=("tokens", "heads", "page_slots", "table_width", "stretches", "pages", "few"))


def fits(query_NHX: Tensor, store_PZX: Tensor, rank: int) -> bool:
    """Whether the kernel takes these: bf16, 512 + 64 numbers a row, rows that begin at multiples of 16 bytes, pages of
    8 slots or a multiple."""
    width = RANK + ROPE
    return (rank == RANK and query_NHX.shape[2] == store_PZX.shape[2] == width
            and store_PZX.shape[1] % 8 == 0 and query_NHX.dtype == store_PZX.dtype == torch.bfloat16
            and all(each.stride(2) == 1 and each.stride(0) % 8 == each.stride(1) % 8 == each.data_ptr() % 16 == 0
                    for each in (query_NHX, store_PZX)))


def latent_attention_hopper(
    query_NHX: Tensor, store_PZX: Tensor, tables_BM: Tensor, sequence_N: Tensor, position_N: Tensor, scale: float,
    rank: int, few: int = 4,
) -> Tensor:
    """See `ops.latent_attention.latent_attention`; sizes: `fits`; tables, sequences and positions int32, `scale` > 0.

    few: into how many stretches a context is cut, as long as they have 256 to 4,096 slots. A token's bits depend on it:
    so many that a usual batch has one for every processor and block of heads are fastest, for a sequence alone more.

    Weights are rounded to bf16 before they multiply the rows, and sums of a part of a long context to 11 bits; all else
    is fp32. Room is taken for the longest context that fits `tables_BM`, so nothing waits for the device and the call
    can be recorded in a CUDA graph, if it was made once before.
    """
    tokens, heads, _ = query_NHX.shape
    assert fits(query_NHX, store_PZX, rank) and scale > 0
    assert all(each.dtype == torch.int32 for each in (tables_BM, sequence_N, position_N))
    assert tables_BM.stride(1) == 1 and sequence_N.is_contiguous() and position_N.is_contiguous()
    gpu = _KERNELS.on(query_NHX.device)
    head_blocks, page_slots = -(-heads // HEADS), store_PZX.shape[1]
    # The kernel divides slots by these through a product of 32 bits.
    assert page_slots > 1 and tables_BM.shape[1] * page_slots**2 < 2**32
    stretches = gpu.kernels.moonbase_latent_stretches(tables_BM.shape[1] * page_slots, few)
    blocks = max(gpu.processors // head_blocks, 1) * head_blocks
    areas = min(tokens, 2 * blocks // head_blocks)  # a block has its own, and one for a token that others go on with
    if tokens > 1 and areas * stretches * head_blocks * _HEAD_PARTS > PARTS_LIMIT:
        halves = (slice(tokens // 2), slice(tokens // 2, None))
        return torch.cat([latent_attention_hopper(query_NHX[half], store_PZX, tables_BM, sequence_N[half],
                                                  position_N[half], scale, rank, few) for half in halves])
    out_NHC = query_NHX.new_empty(tokens, heads, rank)
    if tokens == 0:
        return out_NHC
    places = areas, stretches, head_blocks
    parts = torch.empty(*places, _HEAD_PARTS, dtype=torch.float16, device=query_NHX.device)
    marks = torch.empty(*places, _SUMMING, 4, dtype=torch.float32, device=query_NHX.device)
    scales = torch.empty(*places, _SUMMING, 2, dtype=torch.float32, device=query_NHX.device)
    arguments = _Arguments(
        (query_NHX, store_PZX, tables_BM, sequence_N, position_N, parts, marks, scales,
         _arrived(query_NHX.device, blocks), out_NHC),
        *query_NHX.stride()[:2], *store_PZX.stride()[:2], scale * _LOG2_E,
        tokens, heads, page_slots, tables_BM.stride(0), stretches, store_PZX.shape[0], few)
    gpu.launch("moonbase_latent_attention", arguments, blocks, about=f"query {tuple(query_NHX.shape)}")
    return out_NHC


@functools.cache
def _arrived(device: torch.device, blocks: int) -> Tensor:
    """The kernel's counters, zero between launches. One kernel of a device at a time."""
    return torch.zeros(blocks, dtype=torch.int32, device=device)


def try_products(query_HX: Tensor, rows_SX: Tensor, weights_HS: Tensor) -> tuple[Tensor, Tensor]:
    """One tile of both products by itself, to see which of them is wrong: query · rowsᵀ and weights · rows[:, :512],
    fp32, of 64 heads and 64 rows."""
    assert query_HX.shape == rows_SX.shape == (HEADS, RANK + ROPE) and weights_HS.shape == (HEADS, HEADS)
    assert all(each.is_contiguous() and each.dtype == torch.bfloat16 for each in (query_HX, rows_SX, weights_HS))
    scores = torch.full((HEADS, HEADS), torch.nan, device=query_HX.device)
    values = torch.full((HEADS, RANK), torch.nan, device=query_HX.device)
    _KERNELS.on(query_HX.device).launch("moonbase_latent_products", query_HX, rows_SX, weights_HS, scores, values,
                                        about="in its products")
    return scores, values
