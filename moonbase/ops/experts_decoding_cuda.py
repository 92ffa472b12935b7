"""Routed experts for few rows: Triton kernels that stream each chosen expert's weights from memory once.

The grouped GEMMs of `ops.experts` are made for thousands of rows. While decoding an expert sees a handful, the time is
that of reading its weights, and the steps around the GEMMs (sort, gather, SwiGLU, gather) would cost more than they do.
Here four kernels do it all: group the choices by expert, gate and up, down, sum over choices. No sizes are read back
from the device, so the whole can be recorded in a CUDA graph; there are no atomics, so it is deterministic.

Weights are the left operand of every product, tokens the right one. Blocks of weights and the depth of one step follow
the shape of the weights alone, so the tensor core instructions and their order of summation are the same for any number
of tokens: a row's bits do not depend on what else is in the batch.

Shapes: N tokens, K choices per token, D hidden, E experts, I expert width, F = 2I (gate rows, then up rows).
Inside a kernel: ROWS choices of one expert x COLUMNS outputs, summed over DEPTH inputs in steps of STEP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 64
"""Choices that one program takes at a time, at most: two blocks of weights and one of rows fit three times over."""


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


@triton.jit
def _sum_choices_and_add(
    rows, residual, extra, out, residual_stride, extra_stride, dims, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dims
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        total += tl.load(rows + (token * CHOICES + choice) * dims + columns, mask=inside, other=0.0)
    if extra is not None:
        total += tl.load(extra + token * extra_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * dims + columns, total.to(out.dtype.element_ty), mask=inside)


def group_by_expert(indices_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order of the N·K flat choices by expert, and where each expert's begin and how many they are: int32 [N·K],
    [E], [E].

    `indices_NK`: int32 or int64, each in 0..E-1. Every expert looks at all choices at once, which suits a few thousand.
    """
    assert indices_NK.is_contiguous()
    num_rows = indices_NK.numel()
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
    rows = max(16, min(MOST_ROWS, triton.next_power_of_2(min(2 * mean, num_tokens))))
    return rows, min(triton.cdiv(num_tokens, rows), 2 * triton.cdiv(mean, rows))


def weight_block(width: int, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and depth of the block of weights [width, depth] that a program multiplies with at a time.

    32 rows: the eight experts of a single token make 128 programs at a width of 512, about one for each processor of
    an H200. 64, where the matrix is tall enough, bring Hopper's warp group instruction. The two sum in another order,
    so this must never be a function of the number of tokens.
    """
    longest_step = 32 if dtype == torch.float32 else 128  # fp32 multiplies without tensor cores, in registers
    return {"WIDTH": width, "DEPTH": depth, "COLUMNS": 64 if width >= 2048 else 32,
            "STEP": max(16, min(longest_step, triton.next_power_of_2(depth)))}


def experts_few_rows(
    x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor
) -> Tensor:
    """w_nk · E_{i_nk}(x_n) of every choice, fp32 [N, K, D]; `sum_choices_and_add` makes the layer's output of it.

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
    schedule = dict(ROWS=rows, num_warps=4, num_stages=4 if rows == 16 else 3)

    # Programs that share a block of weights are neighbours: the second finds it in the cache. Hence the grid's order.
    activation = x_ND.new_empty(num_tokens * num_choices, width)
    block = weight_block(width, hidden, x_ND.dtype)
    _gate_up[(row_programs, triton.cdiv(width, block["COLUMNS"]), num_experts)](
        x_ND, *grouped, gate_up_EFD, activation, x_ND.stride(0), CHOICES=num_choices, **block, **schedule)

    out_NKD = torch.empty(num_tokens, num_choices, hidden, dtype=torch.float32, device=x_ND.device)
    block = weight_block(hidden, width, x_ND.dtype)
    _down[(row_programs, triton.cdiv(hidden, block["COLUMNS"]), num_experts)](
        activation, *grouped, weights_NK, down_EDI, out_NKD, **block, **schedule)
    return out_NKD


def sum_choices_and_add(
    rows_NKD: Tensor, residual_ND: Tensor | None, extra_ND: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Σ_k rows[n, k] + extra[n] + residual[n], in fp32 and in this order, rounded once to `dtype`: [N, D].

    `rows_NKD` fp32 as `experts_few_rows` returns them; `extra_ND`: the shared expert's output, or None.
    """
    num_tokens, num_choices, dims = rows_NKD.shape
    assert rows_NKD.dtype == torch.float32 and rows_NKD.is_contiguous()
    assert all(added is None or added.stride(1) == 1 for added in (residual_ND, extra_ND))
    out_ND = torch.empty(num_tokens, dims, dtype=dtype, device=rows_NKD.device)
    block = min(1024, triton.next_power_of_2(dims))
    strides = [0 if added is None else added.stride(0) for added in (residual_ND, extra_ND)]
    _sum_choices_and_add[(num_tokens, triton.cdiv(dims, block))](
        rows_NKD, residual_ND, extra_ND, out_ND, *strides, dims, CHOICES=num_choices, BLOCK=block, num_warps=4)
    return out_ND
