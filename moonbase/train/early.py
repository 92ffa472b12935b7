"""Weights that are updated within the backward pass, so that their gradients are never alive together.

What is given up for it, and what stands in its place:
- Micro-batches cannot be added up; one large micro-batch costs less memory than all gradients would (a 16B model's are
  30 GiB in bf16, as much as the activations of 100,000 tokens with recomputation).
- The gradient norm is known only when the pass is over. These gradients are clipped by the last step's norm or their
  own parameter's, whichever is larger; all others by this step's. Muon and AdamW divide by the gradient's size, so a
  clip only says how much a step weighs in the momentum.
- A step cannot be thrown away any more. A loss that is not finite is seen before the pass and updates nothing; a
  gradient that is not finite counts as zero.

The tenth of the weights that are left (attention, dense and shared feed-forward parts, routers, gains) wait for the
end of the step: small matrices are orthogonalised in batches, and QK-Clip finds its weights as in any other step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moonbase.optim import MuonClip, grad_norm
from moonbase.optim.groups import is_looked_up
from moonbase.train.precision import Masters


class EarlyUpdates:
    """Acts on gradients as they appear. `last_norm` is of the last step that had a finite one."""

    def __init__(self, masters: Masters, optimizer: MuonClip, grad_clip: float | None) -> None:
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.last_norm = 0.0
        self._squares: list[Tensor] = []
        masters.on_gradient(early_names(masters.named), self._update)

    def begin(self, step: int, lr: float, measure_update: bool) -> None:
        """Before the pass of step number `step`."""
        self._squares = []
        self.optimizer.set_learning_rate(lr)
        self.optimizer.begin_step(step, measure_update=measure_update)

    @torch.no_grad()
    def _update(self, master: Tensor) -> None:
        norm = grad_norm([master])
        self._squares.append(norm.square())
        scale = torch.ones_like(norm)
        if self.grad_clip is not None:
            scale = (self.grad_clip / (norm.clamp_min(self.last_norm) + 1e-6)).clamp_max(1.0)
        scale = torch.where(norm.isfinite(), scale, 0.0)
        master.grad.nan_to_num_(0.0, 0.0, 0.0).mul_(scale)
        self.optimizer.update_early(master)

    def norm_with(self, rest: Tensor) -> Tensor:
        """The step's norm over all gradients, `rest` being that of the ones still alive; NaN where no pass was made."""
        if not self._squares:
            return torch.full_like(rest, math.nan)
        return torch.stack([*self._squares, rest.square()]).sum().sqrt()

    def end(self, norm: float) -> None:
        """After the step; norm: as `norm_with` said."""
        if math.isfinite(norm):
            self.last_norm = norm


def early_names(named: Mapping[str, Tensor]) -> list[str]:
    """Stacks of experts, embedding and head: the large ones, 90 % of a 16B model."""
    return [name for name, parameter in named.items() if parameter.ndim == 3 or is_looked_up(name)]
