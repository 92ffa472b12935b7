"""Cross-entropy of a language-model head without ever holding the whole logits.

Tokens go through the head in chunks; each chunk's logits are turned into their own gradient in place and multiplied out
at once. Peak extra memory is one chunk of logits instead of tokens × vocabulary.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moonbase.ops import cross_entropy_cpu
from moonbase.ops.accumulate import accumulate_

IGNORE = -100


def cross_entropy_reference(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of -log p(target) over the tokens whose target is not -100, nats, fp32."""
    return F.cross_entropy((hidden_ND @ head_VD.T).float(), targets_N, ignore_index=IGNORE, reduction="sum")


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk_size: int | None = None) -> Tensor:
    """Fast twin of `cross_entropy_reference`. `chunk_size` tokens at a time; None aims at 256 MB of fp32 logits, and at
    512 MB of bf16 ones on a GPU: every chunk reads and writes the head's gradient once more."""
    if chunk_size is None:
        chunk_size = max(256, ((256 if head_VD.is_cuda else 64) << 20) // head_VD.shape[0])
    if cross_entropy_cpu.takes(hidden_ND, head_VD):
        chunk_size = 0  # the kernel's own
    if not torch.is_grad_enabled():
        # An autograd.Function is asked for gradients by what requires them, grad mode or not.
        hidden_ND, head_VD = hidden_ND.detach(), head_VD.detach()
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND, head_VD, targets_N, chunk_size):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        ctx.head_dtype = head_VD.dtype
        if chunk_size == 0:
            loss, *gradients = cross_entropy_cpu.loss_and_gradients(
                hidden_ND, head_VD, targets_N, need_hidden, need_head)
            ctx.save_for_backward(*gradients)
            return loss
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if need_head else None
        for start in range(0, hidden_ND.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            chunk_loss, grad_logits = _chunk(hidden_ND[rows], head_VD, targets_N[rows], need_hidden or need_head)
            loss += chunk_loss
            if need_hidden:
                torch.mm(grad_logits, head_VD, out=grad_hidden[rows])
            if need_head:
                _add_product(grad_head, grad_logits.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss):
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_loss).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None


def _add_product(total_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    if a_VN.dtype == total_VD.dtype:
        total_VD.addmm_(a_VN, b_ND)
    else:
        accumulate_(total_VD, a_VN @ b_ND)


def _chunk(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of one chunk and the gradient of its logits (softmax - one-hot, zero rows where ignored)."""
    logits = hidden_ND @ head_VD.T
    if logits.device.type == "cuda":
        from moonbase.ops.cross_entropy_cuda import loss_and_gradient_

        return loss_and_gradient_(logits, targets_N), logits
    logits = logits.float()
    kept = targets_N != IGNORE
    target = torch.where(kept, targets_N, 0)[:, None]
    target_logit = logits.gather(1, target)[:, 0]
    # One pass for the maximum, one for exp and sum; the exponentials become the gradient in place.
    largest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(1)
    loss = ((total.log() + largest[:, 0] - target_logit) * kept).sum()
    if not need_grad:
        return loss, None
    exponentials.mul_((kept / total)[:, None])
    exponentials.scatter_add_(1, target, -kept[:, None].to(exponentials.dtype))
    return loss, exponentials.to(hidden_ND.dtype)
