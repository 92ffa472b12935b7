"""Routed experts whose weights stay in INT4, as stored (`ops.int4_packed`): the same layer as `ops.experts`.

Only what the tokens of a call chose is multiplied out, for the length of the call; the rest stays at 0.5625 bytes a
weight. In fp32 the numbers are those of the multiplied-out layer, and so are the results, bit for bit.

Shapes: T tokens, K choices per token, D hidden, E experts, I expert width, F = 2I (gate rows, then up rows), W int32
words of eight numbers, G groups of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.ops.experts import experts, experts_reference, sum_choices
from moonbase.ops.int4_packed import dequantize_int4

FLOAT_BYTES = 1 << 30
"""Experts are multiplied out together up to this size, then in several runs (on a CPU)."""


def experts_int4_reference(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_packed_EFW: Tensor, gate_up_scale_EFG: Tensor,
    down_packed_EDW: Tensor, down_scale_EDG: Tensor,
) -> Tensor:
    """Everything multiplied out, then `experts_reference`."""
    gate_up_EFD = dequantize_int4(gate_up_packed_EFW, gate_up_scale_EFG, dtype=x_TD.dtype)
    down_EDI = dequantize_int4(down_packed_EDW, down_scale_EDG, dtype=x_TD.dtype)
    return experts_reference(x_TD, indices_TK, weights_TK, gate_up_EFD, down_EDI)


def experts_int4(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_packed_EFW: Tensor, gate_up_scale_EFG: Tensor,
    down_packed_EDW: Tensor, down_scale_EDG: Tensor,
) -> Tensor:
    """Twin of `experts_int4_reference` for any device: `x_TD` in any float dtype, `weights_TK` fp32, packed int32,
    scales bf16. A gradient for x and the weights of the choices; the experts themselves have none."""
    stacks = (gate_up_packed_EFW, gate_up_scale_EFG, down_packed_EDW, down_scale_EDG)
    chosen_C, indices_TK = _chosen(indices_TK, gate_up_packed_EFW.shape[0])
    weights_each = 8 * (gate_up_packed_EFW[0].numel() + down_packed_EDW[0].numel())
    at_once = max(1, FLOAT_BYTES // (weights_each * x_TD.element_size()))
    if x_TD.is_cuda or chosen_C.shape[0] <= at_once:
        return experts(x_TD, indices_TK, weights_TK, *_floats(stacks, chosen_C, x_TD.dtype))
    num_choices = indices_TK.shape[1]
    rows_ND = x_TD.new_empty(indices_TK.numel(), x_TD.shape[1])
    for number, part in enumerate(chosen_C.split(at_once)):
        first = number * at_once
        tokens, choices = torch.where((indices_TK >= first) & (indices_TK < first + at_once))
        # Every (token, choice) pair is a token with one choice: its row, already weighted.
        rows_ND[tokens * num_choices + choices] = experts(
            x_TD[tokens], indices_TK[tokens, choices, None] - first, weights_TK[tokens, choices, None],
            *_floats(stacks, part, x_TD.dtype))
    return sum_choices(rows_ND, torch.arange(rows_ND.shape[0], device=x_TD.device), num_choices)


def _chosen(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Which experts to multiply out [C], and each choice's place among them [T, K]."""
    if not indices_TK.is_cuda:
        return torch.unique(indices_TK, return_inverse=True)
    # The host must not wait for a GPU, so the number of different experts stays unknown there.
    if indices_TK.numel() < num_experts:
        return indices_TK.flatten(), torch.arange(indices_TK.numel(), device=indices_TK.device).view_as(indices_TK)
    return torch.arange(num_experts, device=indices_TK.device), indices_TK


def _floats(stacks: tuple[Tensor, Tensor, Tensor, Tensor], chosen_C: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gate and up [C, F, D] and down [C, D, I] of some experts."""
    return [dequantize_int4(packed[chosen_C], scale[chosen_C], dtype=dtype)
            for packed, scale in (stacks[:2], stacks[2:])]
