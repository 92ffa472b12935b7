"""Between whole tensors and the pieces of them that a process holds: meta tensors, dtypes, sharded parameters.

All that the reader and writer know about distributed training is in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moonbase.errors import UserError

# What wrappers (torch.compile, activation checkpointing) insert into parameter names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> tensor that shares the model's memory (persistent buffers included), wrapper names removed."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    named = {}
    for name, tensor in state.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = tensor
    return named


def materialise(model: nn.Module | Mapping[str, Tensor], names: set[str], dtype: torch.dtype | None,
                device: torch.device | str | None, keep_dtype: set[str]) -> None:
    """Give every named tensor real memory of the wanted dtype and device; contents are left undefined.

    Tensors that already fit keep their memory, so views of them (an optimizer's, say) stay valid. `keep_dtype` names
    the tensors whose dtype never changes. Tensors without memory land on `device`, or on the CPU.
    """
    owners = _owners(model) if isinstance(model, nn.Module) else {}
    for name, old in named_tensors(model).items():
        if name not in names:
            continue
        path, _, leaf = name.rpartition(".")
        assert not owners or leaf in owners[path]._parameters or leaf in owners[path]._buffers, (
            f"{name} lies in another order: restore() it before loading")
        wanted = old.dtype if dtype is None or name in keep_dtype else dtype
        place = torch.device(device) if device is not None else torch.device("cpu") if old.is_meta else old.device
        if old.dtype == wanted and (old.device == place or (place.index is None and old.device.type == place.type)):
            continue
        assert not (isinstance(old, DTensor) and old.is_meta), "call model.to_empty(device=...) after sharding"
        fresh = torch.empty_like(old, dtype=wanted, device=place)
        if isinstance(model, nn.Module):
            module = owners[path]
            if leaf in module._parameters:
                fresh = nn.Parameter(fresh, requires_grad=module._parameters[leaf].requires_grad)
                module._parameters[leaf] = fresh
            else:
                module._buffers[leaf] = fresh
        else:
            assert isinstance(model, MutableMapping), f"{name}: cannot change dtype or device in a read-only mapping"
            model[name] = fresh


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Path without wrapper names -> the innermost module there, which owns the parameters."""
    owners = {}
    for path, module in model.named_modules():
        for wrapper in _WRAPPERS:
            path = f"{path}.".replace(wrapper, "").removesuffix(".")
        owners[path] = module
    return owners


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The memory that this process holds and its offset within the whole tensor, per dimension."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement) is Replicate:
            continue
        assert type(placement) is Shard, f"cannot place weights under {placement}"
        # torch splits like torch.chunk: equal pieces rounded up, the last ones shorter or empty.
        dim, ranks, rank = placement.dim, tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
        chunk = -(-sizes[dim] // ranks)
        start = min(rank * chunk, sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(chunk, sizes[dim] - start)
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(sizes), (tensor.placements, local.shape, sizes)
    return local, tuple(offsets)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. Of a sharded one every process must ask, in the same order."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are spread over processes, so that all of these must take part in writing."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def raise_together(failure: Exception | None) -> None:
    """Every process of a group calls this; if the first one failed, all raise."""
    told = [None if failure is None else str(failure)]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise UserError(told[0])
