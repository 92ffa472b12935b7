"""Matrix products for inference in which a row's bits depend on the row and the weight alone. Loaded only on a GPU.

cuBLAS picks a kernel by the number of rows, and kernels differ in their order of summation: a token's hidden state, and
now and then the next token, would depend on who else is in the batch. Here the weight is the left operand and tokens
are the right one, blocks of 64 outputs or more bring the same tensor core instruction for any number of tokens (on
Hopper the warp group's), and every output is one chain of sums over the inputs from first to last. So tiles may follow
the number of rows, and the bits do not.

Shapes: N tokens, D inputs, O outputs. Inside a kernel: ROWS tokens x COLUMNS outputs, summed in steps of STEP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NEIGHBOURS = 8
"""Blocks of tokens that go through the outputs together, so that both operands are found in the cache."""
ENOUGH_PROGRAMS = 96
"""Programs that keep a large GPU's processors busy."""


@triton.jit
def _place(num_rows, num_columns, NEIGHBOURS: tl.constexpr):
    """Block of tokens and block of outputs of this program."""
    program = tl.program_id(0)
    together = NEIGHBOURS * num_columns
    first = program // together * NEIGHBOURS
    size = tl.minimum(num_rows - first, NEIGHBOURS)
    return first + program % size, program % together // size


@triton.jit
def _block(matrix, rows, stride, start, depth, STEP: tl.constexpr, EVEN: tl.constexpr):
    """[rows, STEP] from column `start` on, zero beyond the last; EVEN: steps end with the columns."""
    inputs = (start + tl.arange(0, STEP))[None]
    if EVEN:
        return tl.load(matrix + rows[:, None] * stride + inputs)
    else:
        return tl.load(matrix + rows[:, None] * stride + inputs, mask=inputs < depth, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x, weight, out, num_tokens, x_row, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, NEIGHBOURS: tl.constexpr, EVEN: tl.constexpr,
):
    row_block, column_block = _place(tl.cdiv(num_tokens, ROWS), tl.cdiv(width, COLUMNS), NEIGHBOURS)
    tokens, columns = row_block * ROWS + tl.arange(0, ROWS), column_block * COLUMNS + tl.arange(0, COLUMNS)
    # What stands behind the last row or output repeats it: nothing to mask when reading.
    token = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    column = tl.minimum(columns, width - 1).to(tl.int64)
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, depth, STEP):
        inputs = tl.trans(_block(x, token, x_row, start, depth, STEP, EVEN))
        total = tl.dot(_block(weight, column, depth, start, depth, STEP, EVEN), inputs, total, input_precision="ieee")
    tl.store(out + token[None] * width + columns[:, None], total.to(out.dtype.element_ty),
             mask=(tokens < num_tokens)[None] & (columns < width)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _gated_linear_kernel(
    x, gate_weight, up_weight, out, num_tokens, x_row, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, NEIGHBOURS: tl.constexpr, EVEN: tl.constexpr,
):
    row_block, column_block = _place(tl.cdiv(num_tokens, ROWS), tl.cdiv(width, COLUMNS), NEIGHBOURS)
    tokens, columns = row_block * ROWS + tl.arange(0, ROWS), column_block * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    column = tl.minimum(columns, width - 1).to(tl.int64)
    gate = tl.zeros([COLUMNS, ROWS], tl.float32)
    up = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, depth, STEP):
        inputs = tl.trans(_block(x, token, x_row, start, depth, STEP, EVEN))
        block = _block(gate_weight, column, depth, start, depth, STEP, EVEN)
        gate = tl.dot(block, inputs, gate, input_precision="ieee")
        block = _block(up_weight, column, depth, start, depth, STEP, EVEN)
        up = tl.dot(block, inputs, up, input_precision="ieee")
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + token[None] * width + columns[:, None], value.to(out.dtype.element_ty),
             mask=(tokens < num_tokens)[None] & (columns < width)[:, None])


def _schedule(num_tokens: int, width: int, depth: int, dtype: torch.dtype, products: int) -> dict[str, int]:
    """Tiles for so many tokens and outputs, of kernels with so many products of one input: as large as leaves all
    processors something to do."""
    rows, columns, longest_step, stages = (16, 64, 128, 4) if num_tokens <= 16 else (64, 64, 64, 6)
    for large_rows, large_columns in ((256, 128), (128, 128), (128, 64)) if num_tokens > 64 else ():
        large_columns = max(64, large_columns // products)
        programs = triton.cdiv(num_tokens, large_rows) * triton.cdiv(width, large_columns)
        wasted = -width % large_columns
        if num_tokens >= large_rows and programs >= ENOUGH_PROGRAMS and wasted <= width // 8:
            rows, columns, stages = large_rows, large_columns, 3 if large_rows == 256 else 4
            break
    if dtype == torch.float32:  # multiplied without tensor cores, in registers
        rows, columns, longest_step, stages = 16, 64, 16, 2
    step = max(16, min(longest_step, triton.next_power_of_2(depth)))
    return {"ROWS": rows, "COLUMNS": columns, "STEP": step, "NEIGHBOURS": NEIGHBOURS, "EVEN": depth % step == 0,
            "num_warps": 8 if rows >= 128 else 4, "num_stages": stages}


def linear(x_ND: Tensor, weight_OD: Tensor) -> Tensor:
    """x · Wᵀ, summed in fp32 and rounded once: [N, O]. Both of one dtype; `x_ND` may be columns of something wider."""
    (num_tokens, depth), width = x_ND.shape, weight_OD.shape[0]
    assert weight_OD.shape[1] == depth and weight_OD.dtype == x_ND.dtype
    assert x_ND.stride(1) == 1 and weight_OD.is_contiguous()
    out_NO = x_ND.new_empty(num_tokens, width)
    schedule = _schedule(num_tokens, width, depth, x_ND.dtype, 1)
    programs = triton.cdiv(num_tokens, schedule["ROWS"]) * triton.cdiv(width, schedule["COLUMNS"])
    _linear_kernel[(programs,)](x_ND, weight_OD, out_NO, num_tokens, x_ND.stride(0), width, depth, **schedule)
    return out_NO


def gated_linear(x_ND: Tensor, gate_OD: Tensor, up_OD: Tensor) -> Tensor:
    """silu(x · W_gateᵀ) · (x · W_upᵀ) in fp32, rounded once: [N, O]."""
    (num_tokens, depth), width = x_ND.shape, gate_OD.shape[0]
    assert gate_OD.shape == up_OD.shape == (width, depth) and gate_OD.dtype == up_OD.dtype == x_ND.dtype
    assert x_ND.stride(1) == 1 and gate_OD.is_contiguous() and up_OD.is_contiguous()
    out_NO = x_ND.new_empty(num_tokens, width)
    schedule = _schedule(num_tokens, width, depth, x_ND.dtype, 2)
    programs = triton.cdiv(num_tokens, schedule["ROWS"]) * triton.cdiv(width, schedule["COLUMNS"])
    _gated_linear_kernel[(programs,)](
        x_ND, gate_OD, up_OD, out_NO, num_tokens, x_ND.stride(0), width, depth, **schedule)
    return out_NO
