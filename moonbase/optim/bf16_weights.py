"""What `MuonClip` knows of bf16 parameters that have no fp32 masters: which they are, and what their writing needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moonbase.errors import UserError
from moonbase.optim import rounding
from moonbase.optim.sharding import row_shard


class Bf16Weights:
    """Writes bf16 parameters as `kind` says; None, and parameters of other dtypes, are none of its business.

    `number` is the step that random numbers are keyed by, beside `seed` and the parameter's name.
    """

    def __init__(self, kind: rounding.Kind | None, seed: int) -> None:
        self.kind, self.seed, self.number = kind, seed, 0
        self._names: dict[Tensor, str] = {}

    def add(self, parameters: Iterable[Tensor], names: Iterable[str]) -> None:
        """Raises UserError for sharded parameters: their halves would have to agree on what they drew."""
        for parameter, name in zip(parameters, names, strict=True):
            self._names[parameter] = name
            if self.takes(parameter) and row_shard(parameter) is not None:
                raise UserError(f"{name}: sharded weights need fp32 masters (masters=fp32)")

    def takes(self, parameter: Tensor) -> bool:
        return self.kind is not None and parameter.dtype == torch.bfloat16

    def key(self, parameter: Tensor, purpose: str) -> rounding.Key | None:
        """Of this step's random numbers for one parameter; None for one that is not written here."""
        if not self.takes(parameter):
            return None
        return rounding.Key.of(self.seed, self.number, self._names[parameter], purpose)

    def residual(self, parameter: Tensor, state: dict[str, Any]) -> Tensor | None:
        """The second bf16 number of every weight, made when first asked for; None unless `kind` is compensated."""
        if self.kind != "compensated" or not self.takes(parameter):
            return None
        if "residual" not in state:
            state["residual"] = torch.zeros_like(parameter)
        return state["residual"]

    def adamw_(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], key: rounding.Key) -> None:
        """One step of AdamW; nothing waits for the device."""
        state["step"] += 1
        corrections = torch.stack([1 - beta ** state["step"] for beta in group["adam_betas"]])
        step = rounding.AdamStep(group["lr"], group["adam_betas"], group["adam_eps"], group["weight_decay"],
                                 corrections)
        rounding.adamw_(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], step, self.kind, key,
                        self.residual(parameter, state))

    def scale_rows_(self, parameter: Tensor, factors: Tensor, state: dict[str, Any]) -> None:
        """Multiply row i by factors[i]. A clip that takes 0.1 % off would, to the nearest, leave every weight alone."""
        key = self.key(parameter, "rows")
        assert key is not None
        rounding.write_(parameter, None, self.kind, key, factors=factors, residual=self.residual(parameter, state))
