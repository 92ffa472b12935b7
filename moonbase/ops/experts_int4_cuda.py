"""Routed experts with INT4 weights for inference, in Triton: any number of tokens, and any GPU without a CUDA compiler.

Reads chunks (`int4_chunks`). A block of weights becomes bf16 in registers, eight times sixteen
inputs: the numbers in place p of every word make one product with the inputs that stand there. A tensor core may sum
the inputs in any order, so nothing is moved between lanes.

Weights are q·s rounded to the tokens' dtype, once: what a multiplied-out checkpoint holds. As in
`experts_decoding_cuda`, weights are the left operand and a row's bits do not depend on the other rows.

Shapes as there and in `int4_chunks`. Inside a kernel: ROWS choices of one expert x 64 outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moonbase.ops import experts_int4_hopper, experts_int4_prompt_hopper
from moonbase.ops.experts_decoding_cuda import MOST_ROWS, group_by_expert, rows_at_once
from moonbase.ops.int4_chunks import CHUNK_BYTES, CHUNK_INPUTS, CHUNK_ROWS

_WORDS = tl.constexpr(CHUNK_BYTES // 4)
_SCALES = tl.constexpr(CHUNK_BYTES // 2)
"""A chunk, in words and in scales."""
_FIRST_SCALE = tl.constexpr(CHUNK_ROWS * CHUNK_INPUTS // 4)
_INPUTS = tl.constexpr(CHUNK_INPUTS)


@triton.jit
def _multiply(total, words, scales, tile, half, row, x, tokens, x_stride, rows_inside, chunk):
    """total [64, ROWS] + 64 rows of weights, whose places in a chunk are given, times 128 inputs of the tokens.

    words, scales: where the chunk of each row begins.
    """
    word = tl.arange(0, 16)
    group, quarter = word // 4, word % 4
    packed = tl.load(words + (tile * 256 + half * 128 + row * 16)[:, None] + (quarter * 4 + group)[None])
    scale = tl.load(scales + (tile * 64 + row * 8 + half * 4 + _FIRST_SCALE)[:, None] + group[None]).to(tl.float32)
    for place in tl.static_range(8):
        weights = (((packed >> (4 * place)) & 15) - 8).to(tl.float32) * scale
        inputs = group * 32 + quarter * 8 + place + chunk * _INPUTS
        values = tl.load(x + tokens[:, None] * x_stride + inputs[None], mask=rows_inside[:, None], other=0.0)
        total = tl.dot(weights.to(values.dtype), tl.trans(values), total, input_precision="ieee")
    return total


@triton.jit
def _gate_up(
    x, order, offsets, counts, words, scales, activation, x_stride,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):
    """activation = silu(gate x) · up x, rows in grouped order. Grid: row tiles, blocks of 64 outputs, experts."""
    expert = tl.program_id(2).to(tl.int64)
    offset, count = tl.load(offsets + expert), tl.load(counts + expert)
    output = tl.arange(0, 64)
    columns = tl.program_id(1) * 64 + output
    # 32 outputs have their rows in one chunk: eight of gate and the same eight of up in each of its tiles.
    block = (expert * (2 * WIDTH // 64) + tl.program_id(1) * 2 + output // 32) * (DEPTH // _INPUTS)
    tile, row = output % 32 // 8, output % 8
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        lanes = first + tl.arange(0, ROWS)
        rows_inside = lanes < count
        rows = (offset + lanes).to(tl.int64)
        tokens = tl.load(order + rows, mask=rows_inside, other=0).to(tl.int64) // CHOICES
        gate = tl.zeros([64, ROWS], tl.float32)
        up = tl.zeros([64, ROWS], tl.float32)
        for chunk in range(0, DEPTH // _INPUTS):
            words_here = words + ((block + chunk) * _WORDS)[:, None]
            scales_here = scales + ((block + chunk) * _SCALES)[:, None]
            gate = _multiply(gate, words_here, scales_here, tile, 0, row, x, tokens, x_stride, rows_inside, chunk)
            up = _multiply(up, words_here, scales_here, tile, 1, row, x, tokens, x_stride, rows_inside, chunk)
        value = gate * tl.sigmoid(gate) * up
        tl.store(activation + rows[None] * WIDTH + columns[:, None], value.to(activation.dtype.element_ty),
                 mask=rows_inside[None])


@triton.jit
def _down(
    activation, order, offsets, counts, routing_weights, words, scales, out,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):
    """out[choice] = weight[choice] · down activation: from grouped order back to token order. Grid as in `_gate_up`."""
    expert = tl.program_id(2).to(tl.int64)
    offset, count = tl.load(offsets + expert), tl.load(counts + expert)
    output = tl.arange(0, 64)
    columns = tl.program_id(1) * 64 + output
    block = (expert * (WIDTH // 64) + tl.program_id(1)) * (DEPTH // _INPUTS)
    tile, half, row = output // 16, output // 8 % 2, output % 8
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        lanes = first + tl.arange(0, ROWS)
        rows_inside = lanes < count
        rows = (offset + lanes).to(tl.int64)
        choices = tl.load(order + rows, mask=rows_inside, other=0).to(tl.int64)
        total = tl.zeros([64, ROWS], tl.float32)
        for chunk in range(0, DEPTH // _INPUTS):
            total = _multiply(total, words + (block + chunk) * _WORDS, scales + (block + chunk) * _SCALES, tile, half,
                              row, activation, rows, DEPTH, rows_inside, chunk)
        total *= tl.load(routing_weights + choices, mask=rows_inside, other=0.0)[None]
        tl.store(out + choices[None] * WIDTH + columns[:, None], total, mask=rows_inside[None])


def experts_int4_cuda(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor
) -> Tensor:
    """See `experts_int4_hopper`; `x_ND` bf16 or fp32, any number of tokens and experts."""
    (num_tokens, hidden), num_choices, num_experts = x_ND.shape, indices_NK.shape[1], gate_up_EBJY.shape[0]
    width = down_EBJY.shape[2] * CHUNK_INPUTS
    assert gate_up_EBJY.shape == (num_experts, 2 * width // CHUNK_ROWS, hidden // CHUNK_INPUTS, CHUNK_BYTES)
    assert down_EBJY.shape == (num_experts, hidden // CHUNK_ROWS, width // CHUNK_INPUTS, CHUNK_BYTES)
    assert weights_NK.dtype == torch.float32 and x_ND.stride(1) == 1
    assert all(each.is_contiguous() for each in (weights_NK, gate_up_EBJY, down_EBJY))
    grouped = group_by_expert(indices_NK, num_experts)
    rows, row_programs = rows_at_once(num_tokens, num_choices, num_experts)
    # More rows at once leave no registers for weights.
    schedule = {"ROWS": min(rows, MOST_ROWS), "num_warps": 4}
    row_programs *= triton.cdiv(rows, MOST_ROWS)

    def stack(chunks_EBJY: Tensor) -> tuple[Tensor, Tensor]:
        return chunks_EBJY.view(torch.int32), chunks_EBJY.view(torch.bfloat16)

    activation = x_ND.new_empty(num_tokens * num_choices, width)
    _gate_up[(row_programs, width // 64, num_experts)](
        x_ND, *grouped, *stack(gate_up_EBJY), activation, x_ND.stride(0), CHOICES=num_choices, WIDTH=width,
        DEPTH=hidden, **schedule)
    out_NKD = torch.empty(num_tokens, num_choices, hidden, dtype=torch.float32, device=x_ND.device)
    _down[(row_programs, hidden // 64, num_experts)](
        activation, *grouped, weights_NK, *stack(down_EBJY), out_NKD, WIDTH=hidden, DEPTH=width, **schedule)
    return out_NKD


def experts_int4_for_few(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor
) -> Tensor:
    """The same for rows that decode: by the kernel in CUDA C++ where the machine has it, as many rows at once as it
    takes. Its sums are rounded otherwise than Triton's, so a row's kernel must not depend on how many others there are.
    """
    per_call = experts_int4_hopper.MOST_CHOICES // indices_NK.shape[1]
    if not (x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and experts_int4_hopper.available()
            and experts_int4_hopper.fits(indices_NK.shape[1], gate_up_EBJY.shape[0], x_ND.shape[1],
                                         down_EBJY.shape[2] * CHUNK_INPUTS)):
        return experts_int4_cuda(x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY)
    parts = [experts_int4_hopper.experts_int4_hopper(*call, gate_up_EBJY, down_EBJY) for call in zip(
        *(each.split(per_call) for each in (x_ND, indices_NK, weights_NK)), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def experts_int4_for_prompts(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EBJY: Tensor, down_EBJY: Tensor
) -> Tensor:
    """The same for rows of prompts, however few: rows of choices [N, K, D] or, by the kernel in CUDA C++ where the
    machine has it, their sums [N, 1, D]; both fp32."""
    if not (x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and experts_int4_prompt_hopper.available()
            and experts_int4_prompt_hopper.fits(gate_up_EBJY.shape[0], x_ND.shape[1],
                                                down_EBJY.shape[2] * CHUNK_INPUTS)):
        return experts_int4_cuda(x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY)
    return experts_int4_prompt_hopper.experts_int4_prompt_hopper(
        x_ND, indices_NK, weights_NK, gate_up_EBJY, down_EBJY).unsqueeze(1)
