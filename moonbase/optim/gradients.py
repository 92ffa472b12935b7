"""The global gradient norm and clipping by it, right for sharded gradients and without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from moonbase.optim.sharding import RowShard, local_part, row_shard


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients as a 0-d fp32 tensor, the same on every process.

    Sharded gradients are summed over the processes that hold them, so with these it is a collective call. Not finite if
    any gradient is not. Parameters without gradient count as zero.
    """
    parts: dict[RowShard | None, list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        if parameter.grad is not None:
            parts.setdefault(row_shard(parameter.grad), []).append(local_part(parameter.grad))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for shard, gradients in parts.items():
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
        square = norms.square().sum()
        if shard is not None:
            dist.all_reduce(square, group=shard.group)
        total = total + square
    return total.sqrt()


def may_clip(max_norm: float, norm: float) -> bool:
    """Whether `clip_gradients_` would change anything: a factor of exactly 1 leaves all bits as they are, but reads and
    writes every gradient. A norm that is no number counts."""
    return not norm < max_norm * (1 - 1e-5) - 1e-6


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients in place by min(1, max_norm / norm), `norm` being that of `grad_norm`.

    A norm that is not finite makes the gradients NaN or zero; the caller is expected to look at it and skip the step.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
