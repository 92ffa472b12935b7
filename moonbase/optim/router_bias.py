"""The router's selection bias: experts are kept evenly used without a loss term (DeepSeek-V3 §2.1.2, Moonlight).

After each step the bias of an expert rises if it received fewer tokens than the mean and falls if it received more:

    deepseek   b_i ← b_i + γ · sign(mean(c) − c_i)
    moonlight  b_i ← b_i + u · (sign(e_i) − mean_j sign(e_j)),  e_i = mean(c) − c_i: the biases' mean stays where it is

c_i counts the tokens of expert i in the whole step: all micro-batches and processes, each token once (not again when
the forward pass is recomputed, and not in evaluation).

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_load(loads: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Stack the layers' token counts [E] to [L, E] and sum them over the processes of `group` (all by default).

    A collective call where torch.distributed is initialised.
    """
    stacked = torch.stack(list(loads))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(stacked, op=dist.ReduceOp.SUM, group=group)
    return stacked


@torch.no_grad()
def update_router_bias_(bias: Tensor | Sequence[Tensor], load: Tensor, rate: float,
                        rule: Literal["deepseek", "moonlight"] = "moonlight") -> None:
    """Move the selection biases one step, in place.

    bias: fp32 [E] with load [E], or L of them (a sequence, or [L, E]) with load [L, E]. load: tokens per expert in
    this step, integers or floats that hold integers. A layer whose load is zero everywhere does not change. Raises
    ValueError for an unknown rule. Nothing waits for the device.
    """
    if rule not in ("deepseek", "moonlight"):
        raise ValueError(f"bias_rule={rule!r}: 'deepseek' or 'moonlight' expected")
    # E · (mean − load): the same sign, and exact, where a rounded mean would see ties as differences.
    load = load.to(torch.int64)
    error = load.sum(dim=-1, keepdim=True) - load.shape[-1] * load
    change = error.sign().float()
    if rule == "moonlight":
        change = change - change.mean(dim=-1, keepdim=True)
    change = change * rate
    if isinstance(bias, Tensor):
        bias.add_(change)
    elif len(bias):
        torch._foreach_add_(list(bias), list(change.unbind()))
