"""Routed experts held in INT4 as a checkpoint stores them: stands in for `model.moe.Experts` where nobody trains.

The network does not know of it; whoever loads a checkpoint for an engine puts it in place (`hold_in_int4`). Its tensors
are buffers, so neither an optimizer nor a change of the parameters' dtype finds them, and `state_dict` gives back the
words and scales that were read, also where they lie in another order for a kernel (`arrange`).

Shapes: N tokens, K choices per token, D hidden, E experts, I expert width, F = 2I.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.model.moe import MixtureOfExperts
from moonbase.ops.experts_int4 import experts_int4
from moonbase.ops.int4_packed import INT4_GROUP

Pack = Callable[[Tensor, Tensor, bool], Tensor]
Unpack = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
_STACKS = {"gate_up_proj": True, "down_proj": False}
"""Whether the first half of a stack's rows are gate's and the second half up's."""
_PARTS = ("_packed", "_scale")


class QuantizedExperts(nn.Module):
    """The routed experts' weights, stacked as in `Experts`; each stack is int32 words and bf16 scales."""

    gate_up_proj_packed: Tensor
    """int32 [E, F, D / 8]: gate rows above up rows."""
    gate_up_proj_scale: Tensor
    """bf16 [E, F, D / 32]."""
    down_proj_packed: Tensor
    """int32 [E, D, I / 8]."""
    down_proj_scale: Tensor
    """bf16 [E, D, I / 32]."""
    gate_up_proj_arranged: Tensor
    """In place of the first two, after `arrange`."""
    down_proj_arranged: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._order: tuple[Pack, Unpack] | None = None
        count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            self.register_buffer(name + "_packed", torch.empty(count, rows, columns // 8, dtype=torch.int32))
            self.register_buffer(
                name + "_scale", torch.empty(count, rows, columns // INT4_GROUP, dtype=torch.bfloat16))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return experts_int4(x_ND, indices_NK, weights_NK, *self.stored("gate_up_proj"), *self.stored("down_proj"))

    @property
    def is_arranged(self) -> bool:
        return self._order is not None

    def stored(self, stack: str) -> tuple[Tensor, Tensor]:
        """Words and scales of `gate_up_proj` or `down_proj` as a checkpoint has them."""
        if self._order is None:
            words, scales = (self._buffers[stack + part] for part in _PARTS)
            return words, scales
        return self._order[1](self._buffers[stack + "_arranged"], _STACKS[stack])

    def arrange(self, pack: Pack, unpack: Unpack) -> None:
        """Let both stacks lie in the order that a kernel wants: `pack(words, scales, gated)`, of which
        `unpack(arranged, gated)` makes the two again. One stack at a time is in memory twice."""
        if self._order == (pack, unpack):
            return
        self.restore()
        for name, gated in _STACKS.items():
            self.register_buffer(name + "_arranged", pack(*self.stored(name), gated), persistent=False)
            for part in _PARTS:
                del self._buffers[name + part]
        self._order = pack, unpack

    def hold_arranged(self, stacks: Mapping[str, Tensor], pack: Pack, unpack: Unpack) -> None:
        """What `arrange` leaves, of stacks that lie in that order already, by name."""
        for name in _STACKS:
            for part in _PARTS:
                self._buffers.pop(name + part, None)
            self.register_buffer(name + "_arranged", stacks[name], persistent=False)
        self._order = pack, unpack

    def restore(self) -> None:
        """Undo `arrange`: whoever writes into the words, not by `load_state_dict`, does it before."""
        if self._order is None:
            return
        for name in _STACKS:
            for part, tensor in zip(_PARTS, self.stored(name), strict=True):
                self.register_buffer(name + part, tensor)
            del self._buffers[name + "_arranged"]
            self._non_persistent_buffers_set.discard(name + "_arranged")
        self._order = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._order is not None:
            for name in _STACKS:
                destination |= {prefix + name + part: tensor
                                for part, tensor in zip(_PARTS, self.stored(name), strict=True)}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        order = self._order
        self.restore()
        super()._load_from_state_dict(*arguments)
        if order is not None:
            self.arrange(*order)


def hold_in_int4(model: nn.Module) -> None:
    """Put `QuantizedExperts`, still without numbers, in the place of every stack of routed experts.

    Widths are multiples of 32.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            with torch.device(module.gate.weight.device):
                module.experts = QuantizedExperts(module.config)
