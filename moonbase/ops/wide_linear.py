"""A dense layer whose result stays in the fp32 that it is summed in: y = x Wᵀ for a router's scores.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moonbase.ops.linear import linear


def wide_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """Fast twin of `linear(x.float(), weight_OI.float())`; x [..., I]. Returns fp32 [..., O].

    Training in bf16 on a GPU multiplies on tensor cores: products of bf16 numbers are exact in fp32, so only the order
    of their sum differs. The gradient of y is rounded to bf16 before it is multiplied, as that of every other layer is.
    Without gradients nothing is rounded and the product is the plain one.
    """
    if x.is_cuda and x.dtype == weight_OI.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return _WideLinear.apply(x.flatten(0, -2), weight_OI).unflatten(0, x.shape[:-1])
    return linear(x.float(), weight_OI.float())


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI, weight_OI):
        ctx.save_for_backward(x_NI, weight_OI)
        if x_NI.is_cuda:
            return torch.mm(x_NI, weight_OI.T, out_dtype=torch.float32)
        return x_NI.float() @ weight_OI.float().T

    @staticmethod
    def backward(ctx: Any, grad_NO):
        x_NI, weight_OI = ctx.saved_tensors
        grad_NO = grad_NO.to(x_NI.dtype)
        return grad_NO @ weight_OI, grad_NO.T @ x_NI
