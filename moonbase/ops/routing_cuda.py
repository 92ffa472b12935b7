"""GPU kernels that choose experts and put the choices in order, instead of general sorting: both fit in registers.

Shapes: T tokens, K choices per token, N = T·K choices, E experts. Inside a kernel: ROWS choices x COLUMNS experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_ROWS = 64
"""Choices that a program of the sort takes: each is compared with all others, and with all experts."""
_TILE, _PER_WARP = 16384, 4096
"""Elements of [choices, experts] that it may hold, and that one of its warps does: few warps, since they would wait for
each other."""
_STEP = 2048
"""Partial counts that a program adds up at a time."""


@triton.jit
def _top_k_kernel(values, indices, num_rows, count, CHOICES: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    start = row.to(tl.int64)
    inside = (row < num_rows)[:, None] & (column < count)[None]
    x = tl.load(values + start[:, None] * count + column[None], mask=inside, other=0.0)
    # Bits that compare as integers like the numbers they stand for, not-a-number above all; then the place, so that no
    # two are equal.
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)
    place = (COLUMNS - 1 - column).to(tl.int64)
    smallest = -0x8000000000000000
    ranked = tl.where(inside, (bits.to(tl.int64) << 32) | place[None], smallest)
    choice = tl.arange(0, PADDED)
    chosen = tl.zeros([ROWS, PADDED], tl.int64)
    for number in tl.static_range(CHOICES):
        best = tl.max(ranked, 1)
        chosen = tl.where((choice == number)[None], (COLUMNS - 1 - (best & (COLUMNS - 1)))[:, None], chosen)
        ranked = tl.where(ranked == best[:, None], smallest, ranked)
    tl.store(indices + start[:, None] * CHOICES + choice[None], chosen,
             mask=(row < num_rows)[:, None] & (choice < CHOICES)[None])


@triton_op("moonbase::top_k", mutates_args={})
def top_k(values: Tensor, choices: int) -> Tensor:
    """See `ops.top_k`; fp32, at most 1024 values a row. Of equal values the first are taken."""
    values = values.contiguous()
    count = values.shape[-1]
    num_rows = values.numel() // count
    indices = values.new_empty([*values.shape[:-1], choices], dtype=torch.int64)
    columns = triton.next_power_of_2(count)
    rows = max(1, 2048 // columns)
    wrap_triton(_top_k_kernel)[(triton.cdiv(num_rows, rows),)](
        values, indices, num_rows, count, CHOICES=choices, PADDED=triton.next_power_of_2(choices), ROWS=rows,
        COLUMNS=columns, num_warps=4)
    return indices


@triton.jit
def _count_kernel(indices, counts, num_choices, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts[e, p]: how often this program's choices are expert e."""
    choice = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen = tl.load(indices + choice, mask=choice < num_choices, other=-1)
    expert = tl.arange(0, COLUMNS)
    count = tl.sum((chosen[:, None] == expert[None]).to(tl.int32), 0)
    tl.store(counts + expert * tl.num_programs(0) + tl.program_id(0), count, mask=expert < num_experts)


@triton.jit
def _running_sum_kernel(counts, totals, num_parts, STEP: tl.constexpr):
    """One program per expert: its counts become their sum over all parts before, `totals` that over all parts."""
    start = counts + tl.program_id(0) * num_parts
    total = 0
    for first in range(0, num_parts, STEP):
        part = first + tl.arange(0, STEP)
        count = tl.load(start + part, mask=part < num_parts, other=0)
        tl.store(start + part, total + tl.cumsum(count, 0) - count, mask=part < num_parts)
        total += tl.sum(count, 0)
    tl.store(totals + tl.program_id(0), total)


@triton.jit
def _place_kernel(indices, counts, totals, order, inverse, ends, num_choices, num_experts, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr):
    """A choice goes behind those of lower experts, of its expert in earlier parts, and of its expert before it here."""
    place, expert = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    choice = tl.program_id(0) * ROWS + place
    inside = choice < num_choices
    chosen = tl.load(indices + choice, mask=inside, other=0).to(tl.int32)
    total = tl.load(totals + expert, mask=expert < num_experts, other=0)
    if tl.program_id(0) == 0:
        tl.store(ends + expert, tl.cumsum(total, 0), mask=expert < num_experts)
    lower = tl.sum(tl.where(expert[None] < chosen[:, None], total[None], 0), 1)
    earlier = tl.load(counts + chosen * tl.num_programs(0) + tl.program_id(0), mask=inside, other=0)
    same = (chosen[:, None] == chosen[None]) & (place[None] < place[:, None])
    position = lower + earlier + tl.sum(same.to(tl.int32), 1)
    tl.store(inverse + choice, position.to(tl.int64), mask=inside)
    tl.store(order + position, choice.to(tl.int64), mask=inside)


@triton_op("moonbase::sort_by_expert", mutates_args={})
def sort_by_expert(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.experts.sort_by_expert`: counted in parts, so stable and without atomics."""
    indices = indices_TK.contiguous().flatten()
    num_choices, columns = indices.shape[0], triton.next_power_of_2(num_experts)
    rows = max(16, min(_ROWS, _TILE // columns))
    parts = triton.cdiv(num_choices, rows)
    sizes = {"ROWS": rows, "COLUMNS": columns, "num_warps": max(1, min(8, rows * columns // _PER_WARP))}
    counts = torch.empty(num_experts, parts, dtype=torch.int32, device=indices.device)
    totals, ends = (torch.empty(num_experts, dtype=torch.int32, device=indices.device) for _ in range(2))
    order, inverse = (torch.empty(num_choices, dtype=torch.int64, device=indices.device) for _ in range(2))
    wrap_triton(_count_kernel)[(parts,)](indices, counts, num_choices, num_experts, **sizes)
    wrap_triton(_running_sum_kernel)[(num_experts,)](counts, totals, parts, STEP=_STEP, num_warps=4)
    wrap_triton(_place_kernel)[(parts,)](
        indices, counts, totals, order, inverse, ends, num_choices, num_experts, **sizes)
    return order, inverse, ends
