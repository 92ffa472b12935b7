"""More than one process: FSDP2 over all of them, gloo on CPUs and NCCL on GPUs, started by `torchrun`.

The model knows nothing of this. Expert, tensor and pipeline parallelism will be further functions here that wrap
`model.blocks()` from outside.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moonbase.errors import UserError


@dataclass(frozen=True)
class World:
    """Who we are among the processes; one process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

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

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_world() -> World:
    """Join the process group that torchrun announced in the environment, or stand alone. Raises UserError."""
    has_gpu = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun: process {local_rank} has no GPU of its own; this machine has {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        if has_gpu:
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return World(int(os.environ.get("RANK", "0")) if size > 1 else 0, size, device)


def stop_world(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, world: World, compute_dtype: torch.dtype) -> None:
    """FSDP2: every block, and the rest as one more group, sharded over all processes by rows (experts: whole ones).

    Parameters stay fp32 shards (they are the masters); blocks gather them in `compute_dtype` and reduce gradients in fp32.
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
