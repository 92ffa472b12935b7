"""What the optimizer must know about sharded parameters: which rows are here, and how whole matrices meet on one
process.

FSDP2's `fully_shard` cuts every parameter along dimension 0 into equal chunks, the last ones shorter or empty.
Everything elementwise stays local. A matrix that is cut needs its rows together for orthogonalisation: `Exchange`
brings the rows of a batch of matrices to their owners, each matrix to one, and the results back, so the work is
divided and nothing is done twice (Moonlight §2.3 gathers likewise, within ZeRO-1).

Shapes: J matrices of one shape [rows, columns], W processes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class RowShard(NamedTuple):
    """Position of this process among those that hold the rows of a parameter."""

    rank: int
    world_size: int
    group: dist.ProcessGroup

    def rows(self, total: int, rank: int | None = None) -> slice:
        """The rows of dimension 0, of `total`, that `rank` (this one unless told) holds."""
        rank = self.rank if rank is None else rank
        chunk = -(-total // self.world_size)
        return slice(min(rank * chunk, total), min((rank + 1) * chunk, total))

    def whole(self, total: int, block: int) -> bool:
        """Whether no border between processes cuts one of the blocks of `block` rows that make up `total`."""
        return -(-total // self.world_size) % block == 0 or self.world_size == 1


def row_shard(tensor: Tensor) -> RowShard | None:
    """How `tensor` is sharded along dimension 0, or None where this process holds all of it."""
    if not isinstance(tensor, DTensor):
        return None
    cuts = [dimension for dimension, placement in enumerate(tensor.placements) if placement != Replicate()]
    if not cuts:
        return None
    # A mesh of several shard dimensions, or a shard of columns, would need another exchange than the one written here.
    assert [tensor.placements[cut] for cut in cuts] == [Shard(0)], f"one Shard(0) expected, found {tensor.placements}"
    mesh, dimension = tensor.device_mesh, cuts[0]
    return RowShard(mesh.get_local_rank(dimension), mesh.size(dimension), mesh.get_group(dimension))


def local_part(tensor: Tensor) -> Tensor:
    """The rows that live here, as a plain tensor that shares memory; call under no_grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(full: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, laid out as `parameter` is."""
    if not isinstance(parameter, DTensor) or isinstance(full, DTensor):
        return full
    shard, local = row_shard(parameter), full.to(parameter.device)
    if shard is not None:
        local = local[shard.rows(full.shape[0])].clone()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=full.shape, stride=full.stride())


class Exchange:
    """Brings J row-sharded matrices together, each on one owner, and the results back.

    Matrix j goes to process (first_owner + j) mod W. Fill `outgoing[j]` ([local rows, columns], views of one buffer),
    call `collect` for this process's whole matrices [owned, rows, columns], then `scatter`; `outgoing` then holds the
    local rows of every result. Every process must make the same calls in the same order.
    """

    def __init__(self, shard: RowShard, count: int, rows: int, columns: int, first_owner: int,
                 dtype: torch.dtype, device: torch.device) -> None:
        world = range(shard.world_size)
        self.shard, self.columns = shard, columns
        self.slices = [shard.rows(rows, rank) for rank in world]
        self.local_rows = self._height(shard.rank)
        owned_by = [[j for j in range(count) if (first_owner + j) % shard.world_size == rank] for rank in world]
        self.owned = len(owned_by[shard.rank])
        block = self.local_rows * columns
        self.buffer = torch.empty(count * block, dtype=dtype, device=device)
        self.send_sizes = [len(matrices) * block for matrices in owned_by]
        self.receive_sizes = [self.owned * self._height(rank) * columns for rank in world]
        blocks = self.buffer.view(count, self.local_rows, columns)
        position = {j: index for index, j in enumerate(j for matrices in owned_by for j in matrices)}
        self.outgoing = [blocks[position[j]] for j in range(count)]

    def _height(self, rank: int) -> int:
        return self.slices[rank].stop - self.slices[rank].start

    def collect(self) -> Tensor:
        """The matrices owned here, whole: [owned, rows, columns]."""
        received = self.buffer.new_empty(sum(self.receive_sizes))
        dist.all_to_all_single(received, self.buffer, self.receive_sizes, self.send_sizes, group=self.shard.group)
        parts = received.split(self.receive_sizes)
        shaped = [part.view(self.owned, self._height(rank), self.columns) for rank, part in enumerate(parts)]
        return torch.cat(shaped, dim=1)

    def scatter(self, results: Tensor) -> None:
        """Send the rows of the owned results home; `outgoing` holds them afterwards."""
        parts = torch.cat([results[:, rows].reshape(-1) for rows in self.slices])
        dist.all_to_all_single(self.buffer, parts, self.send_sizes, self.receive_sizes, group=self.shard.group)
