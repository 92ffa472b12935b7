"""MuonClip's two updates as one `torch.optim.Optimizer`: Muon for matrices, AdamW for everything else.

Muon (Jordan 2024; Moonlight §2, Kimi K2 §2.1, Algorithm 1), for a matrix W [n, m] with gradient G:

    M ← μ M + G                      N = μ M + G  (Nesterov; else N = M)
    O = Newton-Schulz(N)             W ← W − η (0.2 · sqrt(max(n, m)) · O + λ W)

A full-rank orthogonal O has RMS 1 / sqrt(max(n, m)), so the factor gives every matrix AdamW's usual update RMS of 0.2,
and AdamW's learning rate and weight decay carry over. A 3-D parameter is a stack of matrices and `splits` cuts every
matrix into equal blocks of rows (gate and up of a fused projection; the heads of q_b and kv_b); each is treated as if
it were alone. The clip itself, which acts after the step, is in `qk_clip`.

Equal shapes of different parameters are orthogonalised together, in chunks of bounded memory: one matrix at a time
would be all launch overhead. On a CPU the small fp32 ones of all shapes go through one call (`ops.muon_cpu`). Nothing
here waits for the device. Sharded parameters (DTensor, FSDP2) get the update of the unsharded ones; see `sharding`.

Parameters may be bf16 with no fp32 masters behind them; `rounding` says how small steps are kept then. And they may be
updated one at a time before `step` (`update_early`), so that their gradients need not be alive together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from moonbase.errors import CheckpointError
from moonbase.ops import muon_cpu
from moonbase.ops.accumulate import accumulate_
from moonbase.ops.momentum import momentum_
from moonbase.ops.newton_schulz import (
    Coefficients,
    compute_dtype,
    default_workspace_bytes,
    iteration_on_cpu,
    matrices_per_chunk,
    orthogonalize,
    orthogonalize_reference,
    step_coefficients,
)
from moonbase.optim import rounding
from moonbase.optim.bf16_weights import Bf16Weights
from moonbase.optim.decayed import decay_and_subtract_
from moonbase.optim.qk_clip import scale_rows_
from moonbase.optim.sharding import Exchange, RowShard, like_parameter, local_part, row_shard


class _Shape(NamedTuple):
    """Matrices that may share a batch: same size and same treatment."""

    rows: int
    columns: int
    splits: int
    steps: int
    coefficients: Coefficients
    scale: float
    device: torch.device
    shard: RowShard | None
    """Where the parameters are sharded; None for plain tensors."""
    cut: bool
    """Whether the borders of that sharding run through matrices, so that rows must be exchanged."""


@dataclass
class _Stack:
    """The matrices of one parameter that are here: three views [count, rows, columns], rows perhaps a shard's."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor
    group: dict[str, Any]
    key: rounding.Key | None = None
    """Names the random numbers of weights that are written by `rounding`; None for all others."""
    residual: Tensor | None = None
    first: int = 0
    """Where in the parameter the first matrix starts, in elements."""

    def part(self, start: int, stop: int) -> _Stack:
        residual = None if self.residual is None else self.residual[start:stop]
        return _Stack(self.weight[start:stop], self.momentum[start:stop], self.gradient[start:stop], self.group,
                      self.key, residual, self.first + start * self.weight[0].numel())

    def accumulate(self, out: Tensor) -> None:
        """M ← μ M + G and out = the matrix to orthogonalise."""
        momentum_(self.gradient, self.momentum, out, self.group["momentum"], self.group["nesterov"])

    @property
    def decays(self) -> bool:
        """Whether `apply` takes off the weight decay too: on a GPU its pass over the weights serves for both."""
        return self.key is not None or (self.weight.is_cuda and not isinstance(self.group["lr"], Tensor))

    def apply(self, update: Tensor, scale: float, kind: rounding.Kind | None = None) -> None:
        lr, decay = self.group["lr"], self.group["weight_decay"]
        if self.key is not None:
            # Decay belongs to the same rounding: 1 − 1e-4 times a bf16 number is, to the nearest, that number.
            rounding.write_(self.weight, update, kind, self.key, first=self.first, residual=self.residual,
                            keep=1 - lr * decay, rate=lr * scale)
        elif self.decays:
            decay_and_subtract_(self.weight, update, keep=1 - lr * decay, rate=lr * scale)
        elif isinstance(lr, Tensor):
            self.weight.addcmul_(update, lr * -scale)
        else:
            accumulate_(self.weight, update, -lr * scale)


def muon_reference(
    weight: Tensor, gradient: Tensor, momentum: Tensor, lr: float, mu: float = 0.95, weight_decay: float = 0.1,
    nesterov: bool = True, update_rms: float = 0.2, steps: int = 5, coefficients: Coefficients = "quintic",
) -> tuple[Tensor, Tensor]:
    """One step of Muon for one matrix [n, m], all in its dtype: the definition that `MuonClip` is held to.

    Returns the new weight and momentum; `momentum` is zero before the first step.
    """
    momentum = mu * momentum + gradient
    direction = mu * momentum + gradient if nesterov else momentum
    update = update_rms * math.sqrt(max(weight.shape)) * orthogonalize_reference(direction, steps, coefficients)
    return weight - lr * (update + weight_decay * weight), momentum


class MuonClip(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer; `groups.parameter_groups` sorts a model's parameters into groups.

    params: groups with `kind` "muon" (2-D matrices, 3-D stacks) or "adamw", optionally `names` (one per parameter,
    used by `named_state`), `splits` (blocks of rows per matrix) and any option below; or bare matrices, which get Muon.
    lr: float or 0-d tensor on the parameters' device (for CUDA graphs); AdamW groups get `lr · adam_lr_ratio`.
    update_rms: RMS of a full-rank Muon update before the learning rate.
    ns_dtype: dtype of the Newton-Schulz products; None takes bf16 on accelerators and fp32 on CPUs.
    momentum_dtype: dtype of the momentum; None takes the parameter's. It is the only state of a Muon matrix.
    workspace_bytes: bound on the scratch memory of a step beside parameters, gradients and state.
    bf16_rounding: how bf16 parameters are written; None writes them as any others, which loses small steps. Momentum
    and AdamW's moments of such parameters are bf16 too. Not for sharded parameters nor a rate in a tensor. `seed`: of
    the random numbers that this takes.

    Raises ValueError for a group that cannot be treated as it asks. Parameters without gradient are left alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        update_rms: float = 0.2,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "quintic",
        ns_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        adam_lr_ratio: float = 1.0,
        workspace_bytes: int | None = None,
        bf16_rounding: rounding.Kind | None = None,
        seed: int = 0,
    ) -> None:
        step_coefficients(ns_steps, ns_coefficients)
        self.bf16_weights, self._begun = Bf16Weights(bf16_rounding, seed), False
        self.ns_dtype, self.momentum_dtype, self.workspace_bytes = ns_dtype, momentum_dtype, workspace_bytes
        self.adam_lr_ratio = adam_lr_ratio
        self._squares: dict[RowShard | None, Tensor] = {}
        self._measured_elements, self._measured = 0, False
        defaults = {
            "lr": lr, "kind": "muon", "splits": 1, "weight_decay": weight_decay, "momentum": momentum,
            "nesterov": nesterov, "update_rms": update_rms, "ns_steps": ns_steps, "ns_coefficients": ns_coefficients,
            "adam_betas": tuple(adam_betas), "adam_eps": adam_eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError where its parameters do not fit its `kind`, `splits` or `names`."""
        group = dict(param_group)
        kind = group.setdefault("kind", "muon")
        if kind not in ("muon", "adamw"):
            raise ValueError(f"kind={kind!r}: 'muon' or 'adamw' expected")
        group.setdefault("lr_ratio", self.adam_lr_ratio if kind == "adamw" else 1.0)
        if "lr" not in group and group["lr_ratio"] != 1.0:
            group["lr"] = self.defaults["lr"] * group["lr_ratio"]
        super().add_param_group(group)
        group = self.param_groups[-1]
        first = sum(len(other["params"]) for other in self.param_groups[:-1])
        group.setdefault("names", group.get("param_names", [str(first + i) for i in range(len(group["params"]))]))
        if len(group["names"]) != len(group["params"]):
            raise ValueError(f"{len(group['names'])} names for {len(group['params'])} parameters")
        self.bf16_weights.add(group["params"], group["names"])
        if kind == "adamw":
            return
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.ndim not in (2, 3):
                raise ValueError(f"{name}: shape {tuple(parameter.shape)} is no matrix; use a group of kind 'adamw'")
            if parameter.shape[-2] % group["splits"]:
                raise ValueError(f"{name}: {parameter.shape[-2]} rows do not split into {group['splits']} equal blocks")

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's rate to lr times its `lr_ratio`; rates held in tensors are filled in place."""
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * group["lr_ratio"])
            else:
                group["lr"] = lr * group["lr_ratio"]

    def begin_step(self, number: int | None = None, *, measure_update: bool = False) -> None:
        """Before the first `update_early` of a step; `step` alone begins by itself. number: what the random numbers of
        `bf16_rounding` are keyed by, the steps made so far unless told."""
        self.bf16_weights.number = self.bf16_weights.number if number is None else number
        self._squares, self._measured_elements, self._measured = {}, 0, measure_update
        self._begun = True

    @torch.no_grad()
    def update_early(self, parameter: Tensor) -> None:
        """Update one parameter with the gradient that it has, and drop that; `step` finds it without one then."""
        assert self._begun, "begin_step() comes first"
        group = next(g for g in self.param_groups if any(parameter is other for other in g["params"]))
        self._update([(group, [parameter])])
        parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, measure_update: bool = False) -> Any:
        """One update. With `measure_update` the RMS of the Muon updates can be read by `update_rms` afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._begun:
            self.begin_step(measure_update=measure_update)
        self._update([(group, group["params"]) for group in self.param_groups])
        self._begun = False
        self.bf16_weights.number += 1
        return loss

    @torch.no_grad()
    def scale_rows_(self, parameter: Tensor, factors: Tensor) -> None:
        """Multiply row i by factors[i], rounded as updates are: what `qk_clip_` scales with, after the step."""
        if self.bf16_weights.takes(parameter):
            self.bf16_weights.scale_rows_(parameter, factors, self.state[parameter])
        else:
            scale_rows_(parameter, factors)

    def _update(self, groups: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        """Update those of each group's parameters that have a gradient."""
        measure_update = self._measured
        batches: dict[_Shape, list[_Stack]] = {}
        native: list[tuple[_Shape, _Stack]] = []
        for group, parameters in groups:
            if group["kind"] == "adamw":
                self._adamw_step(group, parameters)
                continue
            decayed = []
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                shape, stack = self._stack(parameter, group)
                self._measured_elements += parameter.numel()
                if measure_update and shape.shard not in self._squares:
                    # Even where no matrix is here (fewer experts than processes): update_rms is a collective call.
                    self._squares[shape.shard] = torch.zeros((), dtype=torch.float32, device=shape.device)
                if self._takes_native(shape, stack):
                    native.append((shape, stack))
                else:
                    batches.setdefault(shape, []).append(stack)
                    decayed += [] if stack.decays else [stack.weight]
            if decayed and group["weight_decay"]:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
        if native:
            self._native_update(native, measure_update)
        first_owner = 0
        for shape, stacks in batches.items():
            if shape.cut:
                self._cut_matrices(shape, stacks, measure_update, first_owner)
                first_owner += len(stacks)  # continue in turn, or the first processes would own all the remainders
            else:
                self._whole_matrices(shape, stacks, measure_update)

    @torch.no_grad()
    def update_rms(self) -> Tensor:
        """RMS over all Muon matrices of the last step's update before the learning rate and decay: a 0-d fp32 tensor.

        About `update_rms` of the options where gradients have full rank; 0 where nothing got a Muon update. Needs
        `step(measure_update=True)`. With sharded parameters this is a collective call: every process must make it.
        """
        assert self._measured, "update_rms() needs a preceding step(measure_update=True)"
        total = torch.zeros((), dtype=torch.float32, device=self.param_groups[0]["params"][0].device)
        for shard, square in self._squares.items():
            if shard is not None:
                dist.all_reduce(square, group=shard.group)
            total = total + square
        self._squares = {None: total}  # asking twice must not sum over the processes twice
        return (total / max(1, self._measured_elements)).sqrt()

    # --- Muon ---------------------------------------------------------------------------------------------------------

    def _stack(self, parameter: Tensor, group: dict[str, Any]) -> tuple[_Shape, _Stack]:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self.momentum_dtype or parameter.dtype)
        shard, splits = row_shard(parameter), group["splits"]
        rows, columns = parameter.shape[-2] // splits, parameter.shape[-1]
        # A stack of experts is cut between matrices, and so may be a projection between heads: then all work is local.
        cut = shard is not None and parameter.ndim == 2 and not shard.whole(parameter.shape[0], rows)
        scale = group["update_rms"] * math.sqrt(max(rows, columns))
        shape = _Shape(rows, columns, splits if cut else 1, group["ns_steps"], group["ns_coefficients"], scale,
                       parameter.device, shard, cut)

        def matrices(tensor: Tensor) -> Tensor:
            tensor = local_part(tensor)
            height = tensor.shape[0] if cut else rows
            return tensor.reshape(1 if cut else tensor.numel() // (rows * columns), height, columns)

        weight, momentum = matrices(parameter), matrices(state["momentum"])
        assert weight.data_ptr() == local_part(parameter).data_ptr(), "parameters must be contiguous"
        key, residual = self.bf16_weights.key(parameter, "muon"), self.bf16_weights.residual(parameter, state)
        return shape, _Stack(weight, momentum, matrices(parameter.grad), group, key,
                             None if residual is None else matrices(residual))

    def _takes_native(self, shape: _Shape, stack: _Stack) -> bool:
        return (not shape.cut and self.ns_dtype in (None, torch.float32)
                and muon_cpu.takes(stack.weight, stack.momentum, stack.gradient))

    def _native_update(self, stacks: list[tuple[_Shape, _Stack]], measure: bool) -> None:
        """Small fp32 matrices on a CPU: all of them in one call, decay included."""
        updates = []
        for shape, stack in stacks:
            lr, group = float(stack.group["lr"]), stack.group
            updates.append(muon_cpu.Update(
                stack.weight, stack.momentum, stack.gradient,
                iteration_on_cpu(shape.rows, shape.columns, shape.steps, shape.coefficients), group["momentum"],
                group["nesterov"], keep=1 - lr * group["weight_decay"], rate=lr * shape.scale))
        squares = muon_cpu.update_(updates)
        if measure:
            for (shape, _), square in zip(stacks, squares, strict=True):
                self._squares[shape.shard] += square * shape.scale**2

    def _matrices_at_once(self, shape: _Shape, dtype: torch.dtype) -> int:
        # The orthogonaliser overwrites the combined matrices, so they are part of its own reckoning.
        budget = self.workspace_bytes or default_workspace_bytes(shape.device)
        return matrices_per_chunk(shape.rows, shape.columns, dtype, budget)

    def _orthogonalize(self, matrices: Tensor, shape: _Shape) -> Tensor:
        return orthogonalize(matrices, shape.steps, shape.coefficients, matrices.dtype, overwrite=True,
                             workspace_bytes=self.workspace_bytes)

    def _whole_matrices(self, shape: _Shape, stacks: list[_Stack], measure: bool) -> None:
        dtype = self.ns_dtype or compute_dtype(shape.device)
        for chunk in _chunks(stacks, self._matrices_at_once(shape, dtype)):
            ends = [0]
            for stack in chunk:
                ends.append(ends[-1] + len(stack.weight))
            combined = torch.empty(ends[-1], shape.rows, shape.columns, dtype=dtype, device=shape.device)
            for stack, start, stop in zip(chunk, ends, ends[1:], strict=False):
                stack.accumulate(combined[start:stop])
            updates = self._orthogonalize(combined, shape)
            for stack, start, stop in zip(chunk, ends, ends[1:], strict=False):
                stack.apply(updates[start:stop], shape.scale, self.bf16_weights.kind)
            if measure:
                self._measure(updates, shape)

    def _cut_matrices(self, shape: _Shape, stacks: list[_Stack], measure: bool, first_owner: int) -> None:
        assert shape.shard is not None
        dtype = self.ns_dtype or compute_dtype(shape.device)
        rows = shape.rows * shape.splits
        at_once = max(1, self._matrices_at_once(shape, dtype) // shape.splits) * shape.shard.world_size
        for start in range(0, len(stacks), at_once):
            part = stacks[start:start + at_once]
            exchange = Exchange(shape.shard, len(part), rows, shape.columns, first_owner + start, dtype, shape.device)
            for stack, outgoing in zip(part, exchange.outgoing, strict=True):
                stack.accumulate(outgoing.unsqueeze(0))
            whole = exchange.collect()
            if len(whole):
                blocks = whole.view(-1, shape.rows, shape.columns)
                whole = self._orthogonalize(blocks, shape).view_as(whole)
            exchange.scatter(whole)
            for stack, update in zip(part, exchange.outgoing, strict=True):
                stack.apply(update.unsqueeze(0), shape.scale)
            if measure:
                self._measure(exchange.buffer, shape)

    def _measure(self, updates: Tensor, shape: _Shape) -> None:
        self._squares[shape.shard] += (torch.linalg.vector_norm(updates, dtype=torch.float32) * shape.scale) ** 2

    # --- AdamW --------------------------------------------------------------------------------------------------------

    def _adamw_step(self, group: dict[str, Any], candidates: list[Tensor]) -> None:
        parameters, gradients, means, squares, steps = [], [], [], [], []
        for parameter in candidates:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if local_part(parameter).numel() == 0:
                state["step"] += 1
                continue
            if (key := self.bf16_weights.key(parameter, "adamw")) is not None:
                self.bf16_weights.adamw_(parameter, state, group, key)
                continue
            parameters.append(local_part(parameter))
            gradients.append(local_part(parameter.grad).to(parameter.dtype))
            means.append(local_part(state["exp_avg"]))
            squares.append(local_part(state["exp_avg_sq"]))
            steps.append(state["step"])
        if not parameters:
            return
        beta1, beta2 = group["adam_betas"]
        adamw(parameters, gradients, means, squares, [], steps, fused=True, amsgrad=False, beta1=beta1, beta2=beta2,
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["adam_eps"], maximize=False)

    # --- state --------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, which would give the momentum its parameter's dtype."""
        super().load_state_dict(state_dict)
        if self.momentum_dtype is not None:
            for state in self.state.values():
                if "momentum" in state:
                    state["momentum"] = state["momentum"].to(self.momentum_dtype)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                yield name, parameter, group

    def named_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state by parameter name, for safetensors: (tensors, scalars).

        tensors: "<parameter>/momentum", or "<parameter>/exp_avg", "<parameter>/exp_avg_sq" and "<parameter>/step"; not
        copied; DTensors where the parameters are. scalars: JSON-able facts on the groups.
        """
        tensors = {f"{name}/{key}": value for name, parameter, _ in self._named_parameters()
                   for key, value in self.state.get(parameter, {}).items()}
        kinds = {name: group["kind"] for name, _, group in self._named_parameters()}
        rates = {group["kind"]: float(group["lr"]) for group in self.param_groups}
        return tensors, {"optimizer": "MuonClip", "kinds": kinds, "learning_rates": rates,
                         "num_steps": self.bf16_weights.number}

    @torch.no_grad()
    def load_named_state(self, tensors: dict[str, Tensor], scalars: dict[str, Any] | None = None) -> None:
        """Take over what `named_state` gave, on any number of processes: whole tensors are cut for sharded parameters.

        A parameter with no entry starts afresh (it had no gradient yet). Learning rates belong to the schedule and are
        not restored. Raises CheckpointError, before anything changes, for unknown names, incomplete state, wrong
        shapes, and parameters that `scalars` say another update is due to (they would start afresh unnoticed).
        """
        expected = {"muon": {"momentum"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, item = key.rpartition("/")
            found.setdefault(name, {})[item] = value
        parameters = {name: (parameter, group) for name, parameter, group in self._named_parameters()}
        for name, kind in (scalars or {}).get("kinds", {}).items():
            if name in parameters and parameters[name][1]["kind"] != kind:
                raise CheckpointError(f"optimizer state: {name} is updated by {parameters[name][1]['kind']} here, "
                                      f"but was updated by {kind} where the state comes from")
        for name, items in found.items():
            if name not in parameters:
                raise CheckpointError(f"optimizer state: {name} is no parameter of this model")
            parameter, group = parameters[name]
            needed = expected[group["kind"]]
            if self.bf16_weights.kind == "compensated" and self.bf16_weights.takes(parameter):
                needed = needed | {"residual"}
            if set(items) != needed:
                raise CheckpointError(f"optimizer state: {name} is updated by {group['kind']} and needs "
                                      f"{sorted(needed)}, found {sorted(items)}")
            for item, value in items.items():
                if item != "step" and value.shape != parameter.shape:
                    raise CheckpointError(f"optimizer state: {name}/{item} has shape {tuple(value.shape)}, "
                                          f"the parameter has {tuple(parameter.shape)}")
        self.state.clear()
        self.bf16_weights.number = (scalars or {}).get("num_steps", self.bf16_weights.number)
        for name, items in found.items():
            parameter, _ = parameters[name]
            dtypes = {"momentum": self.momentum_dtype or parameter.dtype, "step": torch.float32}
            for item, value in items.items():
                dtype = dtypes.get(item, parameter.dtype)
                value = value if item == "step" else like_parameter(value, parameter)
                self.state[parameter][item] = value.to(device=parameter.device, dtype=dtype, copy=True)


def _chunks(stacks: list[_Stack], limit: int) -> Iterator[list[_Stack]]:
    """Lists of (parts of) stacks with at most `limit` matrices together."""
    chunk: list[_Stack] = []
    room = limit
    for stack in stacks:
        start, count = 0, len(stack.weight)
        while start < count:
            take = min(room, count - start)
            chunk.append(stack.part(start, start + take))
            start, room = start + take, room - take
            if not room:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk
