"""Routed experts with INT4 weights for prompts on a Hopper GPU: the call of `experts_int4_prompt_hopper.cu`.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert; B, J, Y as in `int4_chunks`; R rows
of choices grouped by expert.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from moonbase.ops.cuda_library import library
from moonbase.ops.int4_chunks import CHUNK_BYTES, CHUNK_INPUTS, CHUNK_ROWS, divides

MOST_EXPERTS = 512
"""What the kernel's lists have room for."""
TILE_ROWS = 256
"""Rows of weights that a block multiplies at once."""
GROUP, SPREAD, GATE_UP, DOWN, SUM = 1, 2, 4, 8, 16
"""Parts of the work, to be timed by themselves."""


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in
          ("x", "indices", "weights", "gate_up", "down", "inputs", "activation", "choice_rows", "out", "tiles",
           "num_tiles", "row_of_choice", "choice_of_row", "weight_of_row")],
        *[(name, ctypes.c_int64) for name in ("x_row", "rows")],
        *[(name, ctypes.c_int32) for name in ("tokens", "choices", "experts", "hidden", "width", "wide_indices")],
    ]


def fits(num_experts: int, hidden: int, width: int) -> bool:
    """Whether the kernel takes a layer of these sizes."""
    return num_experts <= MOST_EXPERTS and divides(hidden, width) and hidden % TILE_ROWS == 0


def available() -> bool:
    """Whether the kernel can be used on this machine's GPU; the first call compiles it."""
    return (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
            and library("experts_int4_prompt_hopper") is not None)


def experts_int4_prompt_hopper(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor,
    parts: int = GROUP | SPREAD | GATE_UP | DOWN | SUM,
) -> Tensor:
    """Σ_k w_nk · E_{i_nk}(x_n), fp32 [N, D].

    `x_ND` bf16; `indices_NK` int32 or int64 in 0..E-1; `weights_NK` fp32; weights from `pack_chunks`. Weights count as
    q·s rounded to bf16; activations, and a choice's output times its weight, are rounded to bf16. Sizes: `fits`. Five
    launches, nothing is read back. Takes 4·D bytes and 2·I bytes a choice for the length of the call, and 4·D a token.
    """
    (tokens, hidden), choices, experts = x_ND.shape, indices_NK.shape[1], gate_up_EBJY.shape[0]
    width = down_EBJY.shape[2] * CHUNK_INPUTS
    assert gate_up_EBJY.shape == (experts, 2 * width // CHUNK_ROWS, hidden // CHUNK_INPUTS, CHUNK_BYTES)
    assert down_EBJY.shape == (experts, hidden // CHUNK_ROWS, width // CHUNK_INPUTS, CHUNK_BYTES)
    assert x_ND.dtype == torch.bfloat16 and weights_NK.dtype == torch.float32
    assert x_ND.stride(1) == 1 and x_ND.stride(0) % 8 == 0 and x_ND.data_ptr() % 16 == 0  # 16 bytes at a time
    assert all(each.is_contiguous() for each in (indices_NK, weights_NK, gate_up_EBJY, down_EBJY))
    assert fits(experts, hidden, width)
    out_ND = torch.empty(tokens, hidden, dtype=torch.float32, device=x_ND.device)
    if tokens == 0:
        return out_ND
    kernels, blocks, stream = _where(x_ND.device)
    num_choices = tokens * choices
    # Every expert that somebody chose begins at a multiple of eight.
    rows = (num_choices + 7 * min(experts, num_choices) + 7) // 8 * 8
    inputs = x_ND.new_empty(rows, hidden)  # and then the rows of choices, when nobody reads them any more
    activation = x_ND.new_empty(rows, width)
    most_tiles = num_choices // kernels.moonbase_experts_int4_prompt_tokens() + min(experts, num_choices)
    lists = torch.empty(5 * most_tiles + 1 + num_choices + 2 * rows, dtype=torch.int32, device=x_ND.device)
    tiles, num_tiles, row_of_choice, choice_of_row, weight_of_row = lists.split(
        [5 * most_tiles, 1, num_choices, rows, rows])
    arguments = _Arguments(
        *[each.data_ptr() for each in
          (x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY, inputs, activation, inputs, out_ND, tiles, num_tiles,
           row_of_choice, choice_of_row, weight_of_row)],
        x_ND.stride(0), rows, tokens, choices, experts, hidden, width, indices_NK.dtype == torch.int64)
    error = kernels.moonbase_experts_int4_prompt(ctypes.byref(arguments), blocks, parts, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"experts_int4_prompt_hopper: CUDA error {error}, x {tuple(x_ND.shape)}, {experts} experts")
    return out_ND


def _where(device: torch.device) -> tuple[ctypes.CDLL, int, int]:
    """The kernels, how many blocks run at once, and the stream."""
    kernels = library("experts_int4_prompt_hopper")
    assert kernels is not None
    return kernels, _processors(device), torch.cuda.current_stream(device).cuda_stream


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
