"""More than one process: FSDP2 over all of them, gloo on CPUs and NCCL on GPUs, started by `torchrun`.

The model knows nothing of this. Expert, tensor and pipeline parallelism will be further functions here that wrap
`model.blocks()` from outside.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moonbase.errors import UserError

_PATIENCE = datetime.timedelta(days=7)
"""How long the others wait for the first process: making a corpus takes longer than any step."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who we are among the processes; one process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """A gloo group that waits for hours; None for one process."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, flag: bool) -> bool:
        """True on every process if it is true on any of them."""
        if self.size == 1:
            return flag
        answer = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer.item())

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Run `work` on the first process while all others wait; returns its result there, None elsewhere.

        Where it fails the first process raises, and the others leave with its exit code and without words: one
        complaint is enough. A collective call.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                failure = error
        told = [None if failure is None else getattr(failure, "exit_code", 1)]
        dist.broadcast_object_list(told, src=0, group=self.patient)
        if failure is not None:
            raise failure
        if told[0] is not None:
            raise SystemExit(told[0])
        return result


def announced(name: str, otherwise: int) -> int:
    """A number that torchrun tells its processes in the environment. Raises UserError where it is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not text.isdecimal():
        raise UserError(f"{name}={text!r} in the environment is no number. Unset it, or start processes with torchrun.")
    return int(text)


def start_world() -> World:
    """Join the process group that torchrun announced in the environment, or stand alone. Raises UserError."""
    has_gpu = torch.cuda.is_available()
    size, local_rank = announced("WORLD_SIZE", 1), announced("LOCAL_RANK", 0)
    if size < 1 or announced("RANK", 0) >= size or announced("LOCAL_WORLD_SIZE", 1) not in range(1, size + 1):
        names = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
        raise UserError(", ".join(f"{name}={os.environ[name]}" for name in names) + " in the environment do not belong "
                        "together. Unset them, or start processes with torchrun.")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing and not dist.is_initialized():
        raise UserError(f"WORLD_SIZE={size}, but {', '.join(missing)} is not set. "
                        "Start several processes with torchrun.")
    if has_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun: process {local_rank} has no GPU of its own; "
                        f"this machine has {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        if has_gpu:
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    if size == 1:
        return World(0, 1, device)
    return World(dist.get_rank(), size, device, dist.new_group(backend="gloo", timeout=_PATIENCE))


def stop_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, compute_dtype: torch.dtype) -> None:
    """FSDP2: every block, and the rest as one more group, sharded over all processes by rows (experts: whole ones).

    Parameters stay fp32 shards (they are the masters); blocks gather them in `compute_dtype` and reduce gradients in
    fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # The loss reads the head's weight itself, so the root's parameters must be gathered for it as for `forward`.
    register_fsdp_forward_method(model, "loss")
