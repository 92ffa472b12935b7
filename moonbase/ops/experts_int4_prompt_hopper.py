"""Routed experts with INT4 weights for prompts on a Hopper GPU: the call of `experts_int4_prompt_hopper.cu`.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert; B, J, Y as in `int4_chunks`; R rows
of choices grouped by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.ops.cuda_library import Arguments, HopperKernels, fields
from moonbase.ops.experts_int4_hopper import sizes_of_call
from moonbase.ops.int4_chunks import divides

MOST_EXPERTS = 512
"""What the kernel's lists have room for."""
TILE_ROWS = 256
"""Rows of weights that a block multiplies at once."""
GROUP, SPREAD, GATE_UP, DOWN, SUM = 1, 2, 4, 8, 16
"""Parts of the work, to be timed by themselves."""


_KERNELS = HopperKernels("experts_int4_prompt_hopper")
available = _KERNELS.available


class _Arguments(Arguments):
    _fields_ = fields(
        pointers=("x", "indices", "weights", "gate_up", "down", "inputs", "activation", "choice_rows", "out", "tiles",
                  "num_tiles", "row_of_choice", "choice_of_row", "weight_of_row"),
        int64=("x_row", "rows"), int32=("tokens", "choices", "experts", "hidden", "width", "wide_indices"))


def fits(num_experts: int, hidden: int, width: int) -> bool:
    """Whether the kernel takes a layer of these sizes."""
    return num_experts <= MOST_EXPERTS and divides(hidden, width) and hidden % TILE_ROWS == 0


def experts_int4_prompt_hopper(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor,
    parts: int = GROUP | SPREAD | GATE_UP | DOWN | SUM,
) -> Tensor:
    """Σ_k w_nk · E_{i_nk}(x_n), fp32 [N, D].

    `x_ND` bf16; `indices_NK` int32 or int64 in 0..E-1; `weights_NK` fp32; weights from `pack_chunks`. Weights count as
    q·s rounded to bf16; activations, and a choice's output times its weight, are rounded to bf16. Sizes: `fits`. Five
    launches, nothing is read back. Takes 4·D bytes and 2·I bytes a choice for the length of the call, and 4·D a token.
    """
    tokens, choices, experts, hidden, width = sizes_of_call(x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY)
    assert fits(experts, hidden, width)
    out_ND = torch.empty(tokens, hidden, dtype=torch.float32, device=x_ND.device)
    if tokens == 0:
        return out_ND
    gpu, num_choices = _KERNELS.on(x_ND.device), tokens * choices
    # Every expert that somebody chose begins at a multiple of eight.
    rows = (num_choices + 7 * min(experts, num_choices) + 7) // 8 * 8
    inputs = x_ND.new_empty(rows, hidden)  # and then the rows of choices, when nobody reads them any more
    activation = x_ND.new_empty(rows, width)
    most_tiles = num_choices // gpu.kernels.moonbase_experts_int4_prompt_tokens() + min(experts, num_choices)
    lists = torch.empty(5 * most_tiles + 1 + num_choices + 2 * rows, dtype=torch.int32, device=x_ND.device)
    tiles, num_tiles, row_of_choice, choice_of_row, weight_of_row = lists.split(
        [5 * most_tiles, 1, num_choices, rows, rows])
    arguments = _Arguments(
        (x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY, inputs, activation, inputs, out_ND, tiles, num_tiles,
         row_of_choice, choice_of_row, weight_of_row),
        x_ND.stride(0), rows, tokens, choices, experts, hidden, width, indices_NK.dtype == torch.int64)
    gpu.launch("moonbase_experts_int4_prompt", arguments, gpu.processors, parts,
               about=f"x {tuple(x_ND.shape)}, {experts} experts")
    return out_ND
