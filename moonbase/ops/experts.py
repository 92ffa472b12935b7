"""A layer of routed experts: y_t = Σ_k w_tk · E_{i_tk}(x_t),  E(x) = W_down( silu(W_gate x) ⊙ W_up x ).

The fast form sorts the (token, choice) pairs by expert once, runs two grouped GEMMs and sums the choices of a token by
gathering, never by scattered addition, so that the result does not depend on thread timing. On a CPU only the input and
the pre-activations are kept for the backward pass; the gathered inputs and the activations are made again there. On a
GPU they are kept as well: who lacks the memory recomputes whole blocks (`train.speed`). On a Hopper GPU the products
are kernels of our own (`experts_hopper`), with SwiGLU at the end of the first.

Shapes: T tokens, K choices per token, N = T·K rows, D hidden, E experts, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.ops import experts_hopper, native
from moonbase.ops.grouped_mm import grouped_mm, grouped_outer


def experts_reference(
    x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor
) -> Tensor:
    """One expert after the other, each on the tokens that chose it. `gate_up_EFD`: gate rows, then up rows (F = 2I)."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gate_up_EFD.shape[0]):
        tokens, choices = torch.where(indices_TK == expert)
        gate, up = (x_TD[tokens] @ gate_up_EFD[expert].T).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ down_EDI[expert].T
        y_TD = y_TD.index_add(0, tokens, out * weights_TK[tokens, choices, None].to(out.dtype))
    return y_TD


def experts(x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor) -> Tensor:
    """Fast twin of `experts_reference`; `weights_TK` fp32, the rest in one dtype. No gradient for the indices."""
    if native.takes(x_TD, gate_up_EFD, down_EDI) and weights_TK.dtype == torch.float32:
        from moonbase.ops.experts_cpu import experts_cpu

        return experts_cpu(x_TD, indices_TK, weights_TK, gate_up_EFD, down_EDI)
    order, inverse, ends = sort_by_expert(indices_TK, gate_up_EFD.shape[0])
    return _Experts.apply(x_TD, weights_TK, gate_up_EFD, down_EDI, order, inverse, ends)


def sort_by_expert(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order of the N = T·K choices by expert, its inverse, and where each expert's rows end (int32 [E])."""
    if indices_TK.is_cuda:
        from moonbase.ops import routing_cuda

        return routing_cuda.sort_by_expert(indices_TK, num_experts)
    flat = indices_TK.flatten()
    sorted_experts, order = flat.sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    boundaries = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(sorted_experts, boundaries, right=True).to(torch.int32)
    return order, inverse, ends


def swiglu(gate_up_NF: Tensor, weight_N1: Tensor) -> Tensor:
    """silu(gate) · up · weight in fp32, rounded once. Returns [N, I]."""
    if gate_up_NF.is_cuda:
        from moonbase.ops import experts_cuda

        return experts_cuda.swiglu(gate_up_NF, weight_N1)
    gate, up = gate_up_NF.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weight_N1).to(gate_up_NF.dtype)


def swiglu_backward(grad_NI: Tensor, gate_up_NF: Tensor, weight_N1: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `swiglu` for gate_up [N, F] and weight [N], and the activation [N, I] itself, made again; None on a
    GPU, where it was kept."""
    if gate_up_NF.is_cuda:
        from moonbase.ops import experts_cuda

        return *experts_cuda.swiglu_backward(grad_NI, gate_up_NF, weight_N1), None
    gate, up = gate_up_NF.float().chunk(2, dim=-1)
    silu = F.silu(gate)
    activation = silu * up
    grad_weight = torch.linalg.vecdot(grad_NI.float(), activation)
    weighted = grad_NI * weight_N1
    grad_gate_up = torch.empty(gate_up_NF.shape, dtype=torch.float32)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(weighted, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(weighted * up, gate, grad_input=grad_gate)
    return grad_gate_up.to(gate_up_NF.dtype), grad_weight, activation.mul_(weight_N1).to(gate_up_NF.dtype)


def _on_hopper(rows_ND: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor) -> bool:
    return rows_ND.is_cuda and experts_hopper.fits(rows_ND, gate_up_EFD, down_EDI) and experts_hopper.available()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weights_TK, gate_up_EFD, down_EDI, order, inverse, ends):
        num_choices = weights_TK.shape[1]
        weight_N1 = weights_TK.flatten()[order, None]
        rows_ND = repeat_tokens(x_TD, order, inverse)
        on_hopper = _on_hopper(rows_ND, gate_up_EFD, down_EDI)
        if on_hopper:
            gate_up_NF, activation_NI = experts_hopper.gate_up_product(rows_ND, gate_up_EFD, weight_N1[:, 0], ends)
        else:
            gate_up_NF = grouped_mm(rows_ND, gate_up_EFD.transpose(1, 2), ends)
            activation_NI = swiglu(gate_up_NF, weight_N1)
        kept = (rows_ND, activation_NI) if x_TD.is_cuda else (x_TD, None)
        del rows_ND
        out_ND = (experts_hopper.product(activation_NI, down_EDI, ends) if on_hopper
                  else grouped_mm(activation_NI, down_EDI.transpose(1, 2), ends))
        ctx.save_for_backward(*kept, weight_N1, gate_up_NF, gate_up_EFD, down_EDI, order, inverse, ends)
        return sum_choices(out_ND, inverse, num_choices)

    @staticmethod
    def backward(ctx: Any, grad_TD):
        inputs, kept_NI, weight_N1, gate_up_NF, gate_up_EFD, down_EDI, order, inverse, ends = ctx.saved_tensors
        num_choices = order.shape[0] // grad_TD.shape[0]
        grad_ND = repeat_tokens(grad_TD, order, inverse)
        mm, outer = grouped_mm, grouped_outer
        if _on_hopper(grad_ND, gate_up_EFD, down_EDI):
            mm, outer = experts_hopper.gradient, experts_hopper.weight_gradient
        grad_gate_up_NF, grad_weight_N, activation_NI = swiglu_backward(
            mm(grad_ND, down_EDI, ends), gate_up_NF, weight_N1)
        grad_down = outer(grad_ND, activation_NI if kept_NI is None else kept_NI, ends)
        rows_ND = repeat_tokens(inputs, order, inverse) if kept_NI is None else inputs
        grad_gate_up = outer(grad_gate_up_NF, rows_ND, ends)
        grad_x = sum_choices(mm(grad_gate_up_NF, gate_up_EFD, ends), inverse, num_choices)
        grad_weights = grad_weight_N[inverse].view(-1, num_choices)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None, None


def repeat_tokens(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Every token once for each of its choices, sorted by expert: [N, D]."""
    if x_TD.is_cuda:
        from moonbase.ops import experts_cuda

        return experts_cuda.repeat_tokens(x_TD, inverse_N)
    return x_TD.index_select(0, order_N // (order_N.shape[0] // x_TD.shape[0]))


def sum_choices(rows_ND: Tensor, inverse_N: Tensor, num_choices: int) -> Tensor:
    """out_t = Σ_k rows[inverse[t·K + k]]: sorted rows back in token order, each token's choices added up in fp32."""
    if rows_ND.is_cuda:
        from moonbase.ops import experts_cuda

        return experts_cuda.sum_choices(rows_ND, inverse_N, num_choices)
    if rows_ND.dtype == torch.float32:
        # Gather and sum in one pass: 6x faster than indexing and summing, and the same bits.
        return F.embedding_bag(inverse_N.view(-1, num_choices), rows_ND, mode="sum")
    return rows_ND.index_select(0, inverse_N).view(-1, num_choices, rows_ND.shape[-1]).sum(1)
