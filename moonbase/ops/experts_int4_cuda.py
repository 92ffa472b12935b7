"""Routed experts with INT4 weights for inference on a Hopper GPU: how the weights lie, and the call of the kernel.

The words and scales are those of the checkpoint (`layout.py`), in another order: chunks of 64 rows x 128 inputs, their
scales behind the words, so that a kernel gets a chunk by one bulk copy and every lane its part of it by one read. The
kernel itself: `experts_int4.cu`.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert, F = 2I rows of gate and up, B 64 rows,
J chunks along the inputs, Y bytes of a chunk.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from moonbase.layout import INT4_GROUP
from moonbase.ops.cuda_library import library

CHUNK_ROWS, CHUNK_INPUTS = 64, 128
CHUNK_BYTES = CHUNK_ROWS * CHUNK_INPUTS // 2 + CHUNK_ROWS * CHUNK_INPUTS // INT4_GROUP * 2
MOST_CHOICES, MOST_EXPERTS = 2048, 512
"""What the kernel's lists have room for; see the constants of the same names there."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in
          ("x", "indices", "weights", "gate_up", "down", "activation", "out", "progress")],
        ("x_row", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("tokens", "choices", "experts", "hidden", "width", "wide_indices")],
    ]


def fits(num_choices: int, num_experts: int, hidden: int, width: int) -> bool:
    """Whether the kernel takes a layer of these sizes; `num_choices`: of all tokens together."""
    return (num_choices <= MOST_CHOICES and num_experts <= MOST_EXPERTS and hidden % CHUNK_INPUTS == 0
            and width % CHUNK_INPUTS == 0)


def pack_chunks(words: Tensor, scales: Tensor, gated: bool) -> Tensor:
    """Words int32 [E, rows, inputs / 8] and scales bf16 [E, rows, inputs / 32] of a checkpoint -> uint8 [E, B, J, Y].

    `gated`: the first half of the rows is gate's, the second up's; eight of each share a tile.
    """
    experts, rows, depth = words.shape
    blocks, chunks = rows // CHUNK_ROWS, depth * 8 // CHUNK_INPUTS
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


def experts_int4(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor,
    token_tiles: int | None = None,
) -> Tensor:
    """w_nk · E_{i_nk}(x_n) of every choice, fp32 [N, K, D], like `experts_decoding_cuda.experts_for_inference`.

    `x_ND` bf16; `indices_NK` int32 or int64 in 0..E-1; `weights_NK` fp32; weights from `pack_chunks`. Weights count as
    q·s, unrounded; the activations between the two products are rounded to bf16. Sizes: `fits`. One launch, nothing is
    read back. `token_tiles`: an expert's tokens at once, in eights, 1 or 2; who has more reads its weights again.
    """
    (tokens, hidden), choices, experts = x_ND.shape, indices_NK.shape[1], gate_up_EBJY.shape[0]
    width = down_EBJY.shape[2] * CHUNK_INPUTS
    assert gate_up_EBJY.shape == (experts, 2 * width // CHUNK_ROWS, hidden // CHUNK_INPUTS, CHUNK_BYTES)
    assert down_EBJY.shape == (experts, hidden // CHUNK_ROWS, width // CHUNK_INPUTS, CHUNK_BYTES)
    assert x_ND.dtype == torch.bfloat16 and weights_NK.dtype == torch.float32
    assert x_ND.stride(1) == 1 and x_ND.stride(0) % 8 == 0 and x_ND.data_ptr() % 16 == 0  # 16 bytes at a time
    assert all(each.is_contiguous() for each in (indices_NK, weights_NK, gate_up_EBJY, down_EBJY))
    assert fits(tokens * choices, experts, hidden, width)
    activation = x_ND.new_empty(tokens * choices, width)
    out_NKD = torch.empty(tokens, choices, hidden, dtype=torch.float32, device=x_ND.device)
    progress = _progress(x_ND.device, experts)
    arguments = _Arguments(
        *[each.data_ptr() for each in
          (x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY, activation, out_NKD, progress)],
        x_ND.stride(0), tokens, choices, experts, hidden, width, indices_NK.dtype == torch.int64)
    kernels, blocks, stream = _where(x_ND.device)
    token_tiles = token_tiles or (1 if tokens <= 8 or tokens * choices <= 2 * experts else 2)
    error = kernels.moonbase_experts_int4(ctypes.byref(arguments), token_tiles, blocks, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"experts_int4: CUDA error {error} at x {tuple(x_ND.shape)}, {experts} experts of {width}")
    return out_NKD


def _where(device: torch.device) -> tuple[ctypes.CDLL, int, int]:
    """The kernels, how many blocks run at once, and the stream."""
    kernels = library("experts_int4")
    assert kernels is not None
    return kernels, _processors(device), torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _progress(device: torch.device, experts: int) -> Tensor:
    """The kernel's counters, zero between launches. One kernel of a device at a time."""
    return torch.zeros(experts + 1, dtype=torch.int32, device=device)
