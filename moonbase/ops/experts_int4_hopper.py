"""Routed experts with INT4 weights for a few tokens on a Hopper GPU: the call of `experts_int4_hopper.cu`.

Shapes: N tokens, K choices per token, E experts, D hidden, I width of an expert; B, J, Y as in `int4_chunks`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moonbase.ops.cuda_library import Arguments, HopperKernels, fields
from moonbase.ops.int4_chunks import CHUNK_BYTES, CHUNK_INPUTS, CHUNK_ROWS, divides

MOST_CHOICES, MOST_EXPERTS = 2048, 512
"""What the kernel's lists have room for; see the constants of the same names there."""


_KERNELS = HopperKernels("experts_int4_hopper")
available = _KERNELS.available


class _Arguments(Arguments):
    _fields_ = fields(
        pointers=("x", "indices", "weights", "gate_up", "down", "activation", "out", "progress"), int64=("x_row",),
        int32=("tokens", "choices", "experts", "hidden", "width", "wide_indices"))


def fits(num_choices: int, num_experts: int, hidden: int, width: int) -> bool:
    """Whether the kernel takes a layer of these sizes; `num_choices`: of all tokens together."""
    return num_choices <= MOST_CHOICES and num_experts <= MOST_EXPERTS and divides(hidden, width)


def experts_int4_hopper(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor,
) -> Tensor:
    """w_nk · E_{i_nk}(x_n) of every choice, fp32 [N, K, D], like `experts_decoding_cuda.experts_for_inference`.

    `x_ND` bf16; `indices_NK` int32 or int64 in 0..E-1; `weights_NK` fp32; weights from `pack_chunks`. Weights count as
    q·s, unrounded; the activations between the two products are rounded to bf16. Sizes: `fits`. One launch, nothing is
    read back.
    """
    tokens, choices, experts, hidden, width = sizes_of_call(x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY)
    assert fits(tokens * choices, experts, hidden, width)
    activation = x_ND.new_empty(tokens * choices, width)
    out_NKD = torch.empty(tokens, choices, hidden, dtype=torch.float32, device=x_ND.device)
    progress = _progress(x_ND.device, experts)
    arguments = _Arguments(
        (x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY, activation, out_NKD, progress),
        x_ND.stride(0), tokens, choices, experts, hidden, width, indices_NK.dtype == torch.int64)
    gpu = _KERNELS.on(x_ND.device)
    gpu.launch("moonbase_experts_int4", arguments, gpu.processors, about=f"x {tuple(x_ND.shape)}, {experts} experts")
    return out_NKD


def sizes_of_call(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor
) -> tuple[int, int, int, int, int]:
    """N, K, E, D and I of tensors that a kernel can take; the one for prompts asks for the same."""
    (tokens, hidden), choices, experts = x_ND.shape, indices_NK.shape[1], gate_up_EBJY.shape[0]
    width = down_EBJY.shape[2] * CHUNK_INPUTS
    assert gate_up_EBJY.shape == (experts, 2 * width // CHUNK_ROWS, hidden // CHUNK_INPUTS, CHUNK_BYTES)
    assert down_EBJY.shape == (experts, hidden // CHUNK_ROWS, width // CHUNK_INPUTS, CHUNK_BYTES)
    assert x_ND.dtype == torch.bfloat16 and weights_NK.dtype == torch.float32
    assert x_ND.stride(1) == 1 and x_ND.stride(0) % 8 == 0 and x_ND.data_ptr() % 16 == 0  # 16 bytes at a time
    assert all(each.is_contiguous() for each in (indices_NK, weights_NK, gate_up_EBJY, down_EBJY))
    return tokens, choices, experts, hidden, width


@functools.cache
def _progress(device: torch.device, experts: int) -> Tensor:
    """The kernel's counters, zero between launches. One kernel of a device at a time."""
    return torch.zeros(experts + 1, dtype=torch.int32, device=device)
