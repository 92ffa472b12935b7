"""GPU kernels around the grouped GEMMs of `ops.experts`: each is one pass over memory.

Shapes: T tokens, K choices, N = T·K rows sorted by expert, D hidden, I expert width, F = 2I.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit
def _repeat_tokens_kernel(x, inverse, out, dims, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dims
    values = tl.load(x + token * dims + columns, mask=inside, other=0.0)
    for choice in tl.static_range(CHOICES):
        row = tl.load(inverse + token * CHOICES + choice)
        tl.store(out + row * dims + columns, values, mask=inside)


@triton_op("moonbase::repeat_tokens", mutates_args={})
def repeat_tokens(x_TD: Tensor, inverse_N: Tensor) -> Tensor:
    """rows[inverse[t·K + k]] = x_t: every token is read once and written K times, which a gather by row would also read
    K times. `inverse_N` is a permutation, so every row is written."""
    x_TD = x_TD.contiguous()
    (num_tokens, dims), num_rows = x_TD.shape, inverse_N.shape[0]
    out = x_TD.new_empty(num_rows, dims)
    block = min(1024, triton.next_power_of_2(dims))
    wrap_triton(_repeat_tokens_kernel)[(num_tokens, triton.cdiv(dims, block))](
        x_TD, inverse_N, out, dims, CHOICES=num_rows // num_tokens, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _sum_choices_kernel(rows, inverse, out, dims, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dims
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(inverse + token * CHOICES + choice)
        total += tl.load(rows + row * dims + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * dims + columns, total.to(out.dtype.element_ty), mask=inside)


@triton_op("moonbase::sum_choices", mutates_args={})
def sum_choices(rows_ND: Tensor, inverse_N: Tensor, num_choices: int) -> Tensor:
    """out_t = Σ_k rows[inverse[t·K + k]], summed in fp32: a gather, so no atomics and no dependence on timing."""
    rows_ND = rows_ND.contiguous()
    num_rows, dims = rows_ND.shape
    out = rows_ND.new_empty(num_rows // num_choices, dims)
    block = min(1024, triton.next_power_of_2(dims))
    wrap_triton(_sum_choices_kernel)[(num_rows // num_choices, triton.cdiv(dims, block))](
        rows_ND, inverse_N, out, dims, CHOICES=num_choices, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _swiglu_kernel(gate_up, weight, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (gate * tl.sigmoid(gate) * up * factor).to(out.dtype.element_ty), mask=inside)


@triton_op("moonbase::swiglu", mutates_args={})
def swiglu(gate_up_NF: Tensor, weight_N1: Tensor) -> Tensor:
    """See `ops.experts.swiglu`."""
    num_rows, double = gate_up_NF.shape
    out = gate_up_NF.new_empty(num_rows, double // 2)
    block = triton.next_power_of_2(min(1024, double // 2))
    wrap_triton(_swiglu_kernel)[(num_rows, triton.cdiv(double // 2, block))](
        gate_up_NF, weight_N1, out, double // 2, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _swiglu_backward_kernel(grad, gate_up, weight, grad_gate_up, grad_weight, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight + row)
    columns = tl.arange(0, BLOCK)
    weight_gradient = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        here = start + columns
        inside = here < width
        gate = tl.load(gate_up + row * 2 * width + here, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + here, mask=inside, other=0.0).to(tl.float32)
        incoming = tl.load(grad + row * width + here, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        weight_gradient += incoming * silu * up
        weighted = incoming * factor
        grad_gate = weighted * up * (sigmoid + silu * (1 - sigmoid))
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + row * 2 * width + here, grad_gate.to(kind), mask=inside)
        tl.store(grad_gate_up + row * 2 * width + width + here, (weighted * silu).to(kind), mask=inside)
    tl.store(grad_weight + row, tl.sum(weight_gradient, 0))


@triton_op("moonbase::swiglu_backward", mutates_args={})
def swiglu_backward(grad_NI: Tensor, gate_up_NF: Tensor, weight_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `ops.experts.swiglu_backward`. The activation is kept: to write it again would cost a sixth of
    this kernel's time."""
    num_rows, width = grad_NI.shape
    grad_gate_up = torch.empty_like(gate_up_NF)
    grad_weight = torch.empty(num_rows, dtype=torch.float32, device=grad_NI.device)
    wrap_triton(_swiglu_backward_kernel)[(num_rows,)](
        grad_NI, gate_up_NF, weight_N1, grad_gate_up, grad_weight, width,
        BLOCK=triton.next_power_of_2(min(1024, width)), num_warps=4)
    return grad_gate_up, grad_weight
