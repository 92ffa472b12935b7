"""Routed experts for inference: Triton kernels that stream each chosen expert's weights from memory once.

The grouped GEMMs of `ops.experts` are made for thousands of rows. While decoding an expert sees a handful, the time is
that of reading its weights, and the steps around the GEMMs (sort, gather, SwiGLU, gather) would cost more than they do.
Here three kernels do it all: group the choices by expert, gate and up, down; whoever adds the result to the residual
sums the choices. No sizes are read back from the device, so the whole can be recorded in a CUDA graph; there are no
atomics, so it is deterministic.

Weights are the left operand of every product, tokens the right one, in blocks of 64 outputs or more, as in
`ops.linear_cuda` and for the same reason: a row's bits do not depend on what else is in the batch, for one token of a
reply as for the thousands of a prompt.

Shapes: N tokens, K choices per token, D hidden, E experts, I expert width, F = 2I (gate rows, then up rows).
Inside a kernel: ROWS choices of one expert x COLUMNS outputs, summed over DEPTH inputs in steps of STEP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
"""Choices of a small batch that one program takes at a time, at most: two blocks of weights and one of rows fit three
times over."""
MANY_CHOICES = 4096
"""From so many choices on they are sorted instead of counted by every expert, and tiles are larger."""


@triton.jit
def _group(indices, order, offsets, counts, num_rows, BLOCK: tl.constexpr):
    """One program per expert: where its choices begin in the grouped order, how many they are, and which."""
    expert = tl.program_id(0)
    choice = tl.arange(0, BLOCK)
    inside = choice < num_rows
    chosen = tl.load(indices + choice, mask=inside, other=0)
    mine = (inside & (chosen == expert)).to(tl.int32)
    offset = tl.sum((inside & (chosen < expert)).to(tl.int32), 0)
    tl.store(order + offset + tl.cumsum(mine, 0) - 1, choice, mask=mine != 0)
    tl.store(offsets + expert, offset)
    tl.store(counts + expert, tl.sum(mine, 0))


@triton.jit
def _load_block(matrix, rows, stride, rows_inside, start, DEPTH: tl.constexpr, STEP: tl.constexpr):
    """[rows, STEP] from column `start` on; what lies outside is zero. Constant masks fold away."""
    inputs = start + tl.arange(0, STEP)
    inside = rows_inside[:, None] & ((inputs < DEPTH) | (DEPTH % STEP == 0))[None]
    return tl.load(matrix + rows[:, None] * stride + inputs[None], mask=inside, other=0.0)


@triton.jit
def _gate_up(
    x, order, offsets, counts, gate_up, activation, x_stride,
    CHOICES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """activation = silu(gate x) · up x, rows in grouped order. Grid: row tiles, blocks of columns, experts."""
    expert = tl.program_id(2).to(tl.int64)
    offset, count = tl.load(offsets + expert), tl.load(counts + expert)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns_inside = (columns < WIDTH) | (WIDTH % COLUMNS == 0)
    gate_weights = gate_up + expert * (2 * WIDTH * DEPTH)
    up_weights = gate_weights + WIDTH * DEPTH
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        lanes = first + tl.arange(0, ROWS)
        rows_inside = lanes < count
        rows = (offset + lanes).to(tl.int64)
        tokens = tl.load(order + rows, mask=rows_inside, other=0).to(tl.int64) // CHOICES
        gate = tl.zeros([COLUMNS, ROWS], tl.float32)
        up = tl.zeros([COLUMNS, ROWS], tl.float32)
        for start in range(0, DEPTH, STEP):
            inputs = tl.trans(_load_block(x, tokens, x_stride, rows_inside, start, DEPTH, STEP))
            block = _load_block(gate_weights, columns, DEPTH, columns_inside, start, DEPTH, STEP)
            gate = tl.dot(block, inputs, gate, input_precision="ieee")
            block = _load_block(up_weights, columns, DEPTH, columns_inside, start, DEPTH, STEP)
            up = tl.dot(block, inputs, up, input_precision="ieee")
        value = gate * tl.sigmoid(gate) * up
        tl.store(activation + rows[None] * WIDTH + columns[:, None], value.to(activation.dtype.element_ty),
                 mask=rows_inside[None] & columns_inside[:, None])


@triton.jit
def _down(
    activation, order, offsets, counts, routing_weights, down, out,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """out[choice] = weight[choice] · down activation: from grouped order back to token order. Grid as in `_gate_up`."""
    expert = tl.program_id(2).to(tl.int64)
    offset, count = tl.load(offsets + expert), tl.load(counts + expert)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns_inside = (columns < WIDTH) | (WIDTH % COLUMNS == 0)
    weights = down + expert * (WIDTH * DEPTH)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        lanes = first + tl.arange(0, ROWS)
        rows_inside = lanes < count
        rows = (offset + lanes).to(tl.int64)
        choices = tl.load(order + rows, mask=rows_inside, other=0).to(tl.int64)
        total = tl.zeros([COLUMNS, ROWS], tl.float32)
        for start in range(0, DEPTH, STEP):
            inputs = tl.trans(_load_block(activation, rows, DEPTH, rows_inside, start, DEPTH, STEP))
            block = _load_block(weights, columns, DEPTH, columns_inside, start, DEPTH, STEP)
            total = tl.dot(block, inputs, total, input_precision="ieee")
        total *= tl.load(routing_weights + choices, mask=rows_inside, other=0.0)[None]
        tl.store(out + choices[None] * WIDTH + columns[:, None], total,
                 mask=rows_inside[None] & columns_inside[:, None])


def group_by_expert(indices_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order of the N·K flat choices by expert, and where each expert's begin and how many they are: int32 [N·K],
    [E], [E].

    `indices_NK`: int32 or int64, each in 0..E-1. Of few choices every expert looks at all, in one kernel.
    """
    assert indices_NK.is_contiguous()
    num_rows = indices_NK.numel()
    if num_rows >= MANY_CHOICES:
        chosen, order = indices_NK.flatten().sort(stable=True)
        experts = torch.arange(num_experts + 1, device=chosen.device, dtype=chosen.dtype)
        offsets = torch.searchsorted(chosen, experts, out_int32=True)
        return order.int(), offsets[:-1], offsets.diff()
    order = torch.empty(num_rows, dtype=torch.int32, device=indices_NK.device)
    offsets, counts = torch.empty(2, num_experts, dtype=torch.int32, device=indices_NK.device)
    block = max(512, triton.next_power_of_2(num_rows))  # one kernel for all small batches, no slower than many
    _group[(num_experts,)](indices_NK, order, offsets, counts, num_rows, BLOCK=block, num_warps=4)
    return order, offsets, counts


def rows_at_once(num_tokens: int, num_choices: int, num_experts: int) -> tuple[int, int]:
    """(choices that a program takes at a time, programs that share the choices of one expert).

    Room for twice the mean: an expert with more is met by a loop, so that a bound for the worst case need not be
    launched. Neither number changes a result.
    """
    mean = triton.cdiv(num_tokens * num_choices, num_experts)
    many = num_tokens * num_choices >= MANY_CHOICES
    most = MOST_ROWS if not many else 2 * MOST_ROWS if mean < 512 else 4 * MOST_ROWS
    rows = max(16, min(most, triton.next_power_of_2(min(2 * mean, num_tokens))))
    return rows, min(triton.cdiv(num_tokens, rows), 2 * triton.cdiv(mean, rows))


def _schedule(width: int, depth: int, rows: int, products: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of a kernel that multiplies so many rows at a time with so many weights [width, depth] at once."""
    many = rows > MOST_ROWS
    longest_step = 32 if dtype == torch.float32 else 64 if many else 128  # fp32: in registers
    return {"WIDTH": width, "DEPTH": depth, "ROWS": rows, "COLUMNS": 128 if many and products == 1 else 64,
            "STEP": max(16, min(longest_step, triton.next_power_of_2(depth))),
            "num_warps": 8 if many else 4, "num_stages": 3 if rows in (MOST_ROWS, 4 * MOST_ROWS) else 4}


def experts_for_inference(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor
) -> Tensor:
    """w_nk · E_{i_nk}(x_n) of every choice, fp32 [N, K, D]; their sums over K are the layer's output.

    `x_ND`, `gate_up_EFD`, `down_EDI` in one dtype, bf16 or fp32; `weights_NK` fp32; `indices_NK` int32 or int64 in
    0..E-1, where a token may name an expert twice. The activations between the two products are rounded to that dtype,
    as in `ops.experts.experts_reference`; the rows of choices stay fp32, so that their sum is rounded once.
    A row's bits depend on its token and on the weights, not on N.
    """
    (num_tokens, hidden), num_choices = x_ND.shape, indices_NK.shape[1]
    num_experts, width = gate_up_EFD.shape[0], down_EDI.shape[2]
    assert gate_up_EFD.shape == (num_experts, 2 * width, hidden) and down_EDI.shape == (num_experts, hidden, width)
    assert x_ND.dtype == gate_up_EFD.dtype == down_EDI.dtype and weights_NK.dtype == torch.float32
    assert x_ND.stride(1) == 1 and all(each.is_contiguous() for each in (weights_NK, gate_up_EFD, down_EDI))
    grouped = group_by_expert(indices_NK, num_experts)
    rows, row_programs = rows_at_once(num_tokens, num_choices, num_experts)
    if x_ND.dtype == torch.float32:
        rows = min(rows, MOST_ROWS)

    # Programs that share a block of weights are neighbours: the second finds it in the cache. Hence the grid's order.
    activation = x_ND.new_empty(num_tokens * num_choices, width)
    schedule = _schedule(width, hidden, rows, 2, x_ND.dtype)
    _gate_up[(row_programs, triton.cdiv(width, schedule["COLUMNS"]), num_experts)](
        x_ND, *grouped, gate_up_EFD, activation, x_ND.stride(0), CHOICES=num_choices, **schedule)

    out_NKD = torch.empty(num_tokens, num_choices, hidden, dtype=torch.float32, device=x_ND.device)
    schedule = _schedule(hidden, width, rows, 1, x_ND.dtype)
    _down[(row_programs, triton.cdiv(hidden, schedule["COLUMNS"]), num_experts)](
        activation, *grouped, weights_NK, down_EDI, out_NKD, **schedule)
    return out_NKD
