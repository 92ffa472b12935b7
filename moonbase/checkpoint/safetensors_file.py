"""One safetensors file: eight bytes with the header's length, a JSON header, then the tensors' bytes without gaps.

Read and written here rather than through the safetensors library for two reasons. A memory-mapped file counts as
resident memory next to the model that it fills, which doubles the peak; and the library's writer wants all tensors of a
file at once. Here rows are read into a small buffer, and tensors are written one at a time. Tests hold both directions
equal to the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from moonbase.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the safetensors library; a longer header is a corrupt file.
LONGEST_HEADER = 100_000_000


class StoredTensor(NamedTuple):
    """Where one tensor lies: `start` and `end` are byte positions in the file."""

    path: Path
    name: str
    dtype: str
    """The file's word: BF16, F32, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    end: int

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of dimension 0 on the CPU, in the stored dtype."""
        assert 0 <= first <= last <= self.shape[0], (self, first, last)
        row_bytes = (self.end - self.start) // max(self.shape[0], 1)
        part = self._replace(shape=(last - first, *self.shape[1:]), start=self.start + first * row_bytes,
                             end=self.start + last * row_bytes)
        return part.read()

    def part(self, first: int, shape: tuple[int, ...]) -> StoredTensor:
        """The contiguous run of elements from number `first` on, as a tensor of its own."""
        size = DTYPES[self.dtype].itemsize
        start = self.start + first * size
        return self._replace(shape=shape, start=start, end=start + math.prod(shape) * size)

    def read(self) -> Tensor:
        """The whole tensor on the CPU, in the stored dtype. Raises CheckpointError when the bytes do not come."""
        content = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        if content.numel() == 0:
            return content
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                view, done = memoryview(_bytes_of(content)), 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: ends inside tensor {self.name}")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read tensor {self.name}: {error.strerror or error}") from None
        return content


def _bytes_of(tensor: Tensor):
    """The bytes of a contiguous CPU tensor as a NumPy array that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file, checked against its size. Raises CheckpointError, one line, on any disagreement."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut off inside its header")
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text, object_pairs_hook=_refuse_repeats)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt safetensors header: {error}") from None
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != position:
            raise CheckpointError(f"{path}: corrupt safetensors header: tensor {tensor.name} overlaps or leaves a gap")
        position = tensor.end
    if position != size:
        what = "truncated" if size < position else "corrupt"
        raise CheckpointError(f"{path}: {what}: {size:,} bytes on disk, its header describes {position:,}")
    return tensors


def _refuse_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name appears twice")
    return values


def _stored(path: Path, name: str, entry: dict, data: int) -> StoredTensor:
    if not name.isprintable():
        # It would break the one line of an error, or the terminal that shows it.
        raise ValueError(f"{name!r} is no name of a tensor")
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, start, end)):
        raise ValueError(f"tensor {name} has an impossible shape or position")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"tensor {name} has an impossible dtype")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} has {end - start} bytes, its shape needs {math.prod(shape) * dtype.itemsize}")
    return StoredTensor(path, name, entry["dtype"], shape, data + start, data + end)


class TensorSlot(NamedTuple):
    """A tensor to be written: what the header says about it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one file tensor by tensor, in any order; the bytes depend on the slots and contents alone.

    Within the file the widest dtypes come first (each group in the order given), so that every tensor is aligned to its
    element size and can be mapped in place.
    """

    def __init__(self, path: Path, slots: Iterable[TensorSlot]) -> None:
        ordered = sorted(slots, key=lambda slot: -slot.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, TensorSlot]] = {}
        position = 0
        for slot in ordered:
            assert slot.name not in self._places, f"{slot.name} twice in one file"
            end = position + slot.num_bytes
            header[slot.name] = {"dtype": NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": [position, end]}
            self._places[slot.name] = (position, slot)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file: BinaryIO = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its slot; its dtype and shape must be the promised ones."""
        position, slot = self._places.pop(name)
        assert tensor.dtype == slot.dtype and tuple(tensor.shape) == slot.shape, (slot, tensor.dtype, tensor.shape)
        self._file.seek(self._data + position)
        if tensor.numel():
            self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))

    def close(self) -> None:
        """Finish the file; every slot must have been written."""
        self._file.close()
        assert not self._places, f"never written: {list(self._places)[:3]}"

    def abandon(self) -> None:
        """Close without finishing, after an error; the caller removes the file."""
        self._file.close()
