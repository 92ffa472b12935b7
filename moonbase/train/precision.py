"""bf16 compute with fp32 masters, from outside the model.

In bf16 (the default on a GPU) the model's parameters are copies of fp32 masters. Every gradient is added to its
master's fp32 gradient as soon as it exists and then freed, so that many micro-batches add up without rounding and at
most a few bf16 gradients are alive at once. In fp32 (the default on a CPU), and under FSDP2 (which keeps its own fp32
shards), the parameters are their own masters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masters:
    """The tensors that the optimizer updates: `named` maps parameter names to masters with `.grad`."""

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        self.named: dict[str, Tensor] = {}
        self._copies: list[Tensor] = []
        self.separate = compute_dtype != torch.float32
        for name, parameter in model.named_parameters():
            if not self.separate:
                self.named[name] = parameter
                continue
            self.named[name] = parameter.detach().clone().float()
            parameter.data = parameter.data.to(compute_dtype)
            self._copies.append(parameter)
            parameter.register_post_accumulate_grad_hook(_adder(self.named[name]))

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the compute parameters, after every optimizer step or load."""
        if self.separate:
            torch._foreach_copy_(self._copies, list(self.named.values()))

    def zero_gradients(self) -> None:
        """Forget the gradients; their memory is kept for the next step where masters are separate."""
        gradients = [master.grad for master in self.named.values() if master.grad is not None]
        if self.separate and gradients:
            torch._foreach_zero_(gradients)
        else:
            for master in self.named.values():
                master.grad = None


def _adder(master: Tensor):
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            # Added to zeros like every later one: a resumed run then has the same signs of zero.
            master.grad = torch.zeros_like(master)
        master.grad += parameter.grad
        parameter.grad = None

    return add
