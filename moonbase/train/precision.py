"""What the network computes with and what the optimizer updates, from outside the model.

In bf16 (the default on a GPU) the model's parameters are copies of fp32 masters. Every gradient is added to its
master's fp32 gradient as soon as it exists and then freed, so that many micro-batches add up without rounding and at
most a few bf16 gradients are alive at once. In fp32 (the default on a CPU), and under FSDP2 (which keeps its own fp32
shards), the parameters are their own masters.

Masters may also be bf16 (`masters` other than fp32): then the optimizer writes them so that small steps are not lost
(`optim.rounding`), matrices that are computed with in bf16 are their own masters, and nothing else is kept of them.
Gains, a hundred thousand numbers near 1, stay fp32: their steps are the smallest beside their size. Gradients of
micro-batches add up in bf16 then, to the nearest: each addition is wrong by 0.2 % of the sum at most, in no direction,
which is less than micro-batches differ by.

Quantisation-aware training is one more kind of copy: from the chosen step on, the routed experts' parameters are what
INT4 makes of their masters (`ops.int4`), made once per optimizer step. The gradient of the copy is the master's:
straight-through. Validation and samples see the copies, checkpoints hold the masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moonbase.ops.accumulate import accumulate_
from moonbase.ops.int4 import fake_quantize_
from moonbase.recipe import QuantizationAware


class Masters:
    """The tensors that the optimizer updates: `named` maps parameter names to masters with `.grad`."""

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, qat: QuantizationAware | None = None,
                 in_bf16: bool = False) -> None:
        self.named: dict[str, Tensor] = {}
        self.qat = qat
        self._copies: dict[str, nn.Parameter] = {}
        """Parameters that are not their own masters."""
        self.quantized = False
        """Whether the experts' parameters are INT4 now."""
        for name, parameter in model.named_parameters():
            master_dtype = torch.bfloat16 if in_bf16 and parameter.ndim > 1 else torch.float32
            if compute_dtype == master_dtype and not (qat and is_routed_expert(name)):
                if parameter.dtype != master_dtype:
                    parameter.data = parameter.data.to(master_dtype)
                self.named[name] = parameter
                continue
            self.named[name] = parameter.detach().to(master_dtype, copy=True)
            # Of what the master holds, which may be less than was drawn.
            parameter.data = (self.named[name].to(compute_dtype) if compute_dtype != master_dtype
                              else parameter.data.to(compute_dtype))
            self._copies[name] = parameter
            if not isinstance(parameter, DTensor):
                parameter.register_post_accumulate_grad_hook(_adder(self.named[name]))

    @torch.no_grad()
    def publish(self, step: int) -> None:
        """Copy the masters into the parameters as step number `step` (the first is 0) had them: after every optimizer
        step or load. What is validated then is what was trained."""
        self.quantized = self.qat is not None and step >= self.qat.start_step
        quantized = {name for name in self._copies if self.quantized and is_routed_expert(name)}
        plain = [name for name in self._copies if name not in quantized]
        if plain:
            torch._foreach_copy_([_local(self._copies[name]) for name in plain],
                                 [_local(self.named[name]) for name in plain])
        for name in quantized:
            fake_quantize_(_local(self._copies[name]), _local(self.named[name]), self.qat.rule)

    def prepare(self, step: int) -> None:
        """Before step number `step`: here quantisation begins."""
        if self.qat is not None and not self.quantized and step >= self.qat.start_step:
            self.publish(step)

    def collect(self) -> None:
        """After the last backward pass: hand over the gradients that FSDP2 has summed, which no hook sees."""
        for name, parameter in self._copies.items():
            if parameter.grad is not None:
                self.named[name].grad, parameter.grad = parameter.grad, None

    def on_gradient(self, names: Iterable[str], act: Callable[[Tensor], None]) -> None:
        """Call `act(master)` in the backward pass whenever the master of one of these parameters has its gradient."""
        for name in names:
            parameter = self._copies.get(name, self.named[name])
            parameter.register_post_accumulate_grad_hook(lambda _, master=self.named[name]: act(master))

    def zero_gradients(self) -> None:
        """Forget the gradients; their memory is kept for the next step where masters are separate."""
        kept = {name for name in self._copies if not isinstance(self.named[name], DTensor)}
        gradients = [self.named[name].grad for name in kept if self.named[name].grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)
        for name, master in self.named.items():
            if name not in kept:
                master.grad = None


def is_routed_expert(name: str) -> bool:
    """Whether a parameter holds routed experts, stacked: what the published INT4 checkpoints quantise."""
    return ".mlp.experts." in name


def _local(tensor: Tensor) -> Tensor:
    """This process's part; groups run along a matrix's input, which is never cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _adder(master: Tensor):
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            # Added to zeros like every later one: a resumed run then has the same signs of zero.
            master.grad = torch.zeros_like(master)
        accumulate_(master.grad, parameter.grad)
        parameter.grad = None

    return add
