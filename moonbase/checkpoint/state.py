"""Optimizer and trainer state: named tensors and JSON facts, never pickled, checked by digest before anything is used.

A folder gets `PREFIX-00001-of-0000N.safetensors` and a JSON file with the facts and the SHA-256 of every shard. The
JSON file is written last: where it exists, the shards are complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moonbase import files
from moonbase.checkpoint.placement import full_tensor, is_sharded, local_part, raise_together
from moonbase.checkpoint.safetensors_file import NAMES, SafetensorsWriter, StoredTensor, TensorSlot, read_header
from moonbase.config import read_json
from moonbase.errors import CheckpointError, UserError

MAX_SHARD_BYTES = 5_000_000_000
_READ_BYTES = 1 << 20


def save_state(folder: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *,
               prefix: str = "optimizer", state_file: str = "trainer_state.json", 
               max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write named tensors (any shape and dtype, 0-d included) and JSON facts into an existing folder.

    Sharded tensors are gathered one by one: every process calls this with the same names, the first one writes and
    alone uses `folder`. Raises UserError on a full disk or a forbidden folder.
    """
    sharded = is_sharded(tensors)
    writes = not sharded or dist.get_rank() == 0
    folder, shards = Path(folder), _plan(tensors, max_shard_bytes)
    digests: dict[str, str] = {}
    failure: Exception | None = None
    for number, names in enumerate(shards, 1):
        whole = (full_tensor(tensors[name]) for name in names)
        if writes and failure is None:
            path = folder / f"{prefix}-{number:05d}-of-{len(shards):05d}.safetensors"
            try:
                _write_shard(path, [_slot(name, tensors[name]) for name in names], whole)
                digests[path.name] = _digest(path)
            except OSError as error:
                failure = files.explain_os_error(error, folder)
        # Gathering needs every process, so what a failed writer did not reach is gathered all the same.
        for _ in whole:
            pass
    if writes and failure is None:
        try:
            text = json.dumps({"facts": facts, "sha256": digests}, indent=1)
            files.write_text(folder / state_file, text + "\n")
        except UserError as error:
            failure = error
    if sharded:
        raise_together(failure)
    elif failure is not None:
        raise failure


def _write_shard(path: Path, slots: list[TensorSlot], tensors: Iterator[Tensor]) -> None:
    writer = SafetensorsWriter(path, slots)
    try:
        for slot in slots:
            writer.write(slot.name, next(tensors))
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    files.fsync_path(path)


def load_state(folder: str | Path, *, state_file: str = "trainer_state.json",
               into: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote: (tensors, facts).

    With `into`, its tensors (sharded ones too) are filled in place and returned; names and shapes must be exactly the
    stored ones, dtypes are converted. Every shard is checked against its digest first. Raises CheckpointError, one
    line, for a missing, corrupt or unfitting file; nothing has been filled then.
    """
    folder = Path(folder)
    content = read_json(folder / state_file)
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), dict) or "facts" not in content:
        raise CheckpointError(f"{folder / state_file}: not a state file (no facts or digests)")
    stored: dict[str, StoredTensor] = {}
    for name, digest in content["sha256"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: the file is missing")
        if _digest(path) != digest:
            raise CheckpointError(f"{path}: corrupt: its content does not match the digest in {state_file}")
        stored |= read_header(path)
    if into is None:
        return {name: tensor.read() for name, tensor in stored.items()}, content["facts"]
    _check_fit(folder, into, stored)
    with torch.no_grad():
        for name, target in into.items():
            local, offsets = local_part(target)
            region = tuple(slice(start, start + size) for start, size in zip(offsets, local.shape, strict=True))
            local.copy_(stored[name].read()[region])
    return dict(into), content["facts"]


def _check_fit(folder: Path, into: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    for name in [*into, *stored]:
        if name not in stored:
            raise CheckpointError(f"{folder}: state of {name} is missing")
        if name not in into:
            raise CheckpointError(f"{folder}: state of {name} does not belong to this optimizer")
        if tuple(into[name].shape) != stored[name].shape:
            raise CheckpointError(f"{folder}: state of {name} has shape {list(stored[name].shape)} "
                                  f"instead of {list(into[name].shape)}")


def _plan(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = _slot(name, tensor).num_bytes
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return [shard for shard in shards if shard]


def _slot(name: str, tensor: Tensor) -> TensorSlot:
    assert tensor.dtype in NAMES, f"{name}: {tensor.dtype} cannot be stored"
    return TensorSlot(name, tensor.dtype, tuple(tensor.shape))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
