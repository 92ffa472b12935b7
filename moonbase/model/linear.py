"""The two parameter holders that everything else is built of. `Transformer` fills the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moonbase.ops.linear import linear
from moonbase.ops.norm import rms_norm, rms_norm_beside, rms_norm_of_sum


class Linear(nn.Module):
    """y = W x without bias; `weight` [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with gain `weight` [dims]."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x itself and its norm, see `ops.norm.rms_norm_beside`."""
        return rms_norm_beside(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added and the norm of that, see `ops.norm.rms_norm_of_sum`."""
        return rms_norm_of_sum(x, added, self.weight, self.eps)
