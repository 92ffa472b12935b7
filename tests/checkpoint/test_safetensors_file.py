"""Our reading and writing of single files against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moonbase.checkpoint.safetensors_file import DTYPES, SafetensorsWriter, TensorSlot, read_header
from moonbase.errors import CheckpointError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t.{name}": (torch.randn(3, 5, generator=generator) * 50).to(dtype) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(7), "empty": torch.empty(0, 4), "odd": torch.ones(3, dtype=torch.bfloat16)}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    def content(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
        return {name: (tensor.dtype, tensor.shape, raw(tensor)) for name, tensor in tensors.items()}

    return content(one) == content(other)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert same({name: stored.read() for name, stored in header.items()}, some_tensors())
    assert same({"rows": header["t.BF16"].rows(1, 3)}, {"rows": some_tensors()["t.BF16"][1:3]})


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path, tensors = tmp_path / "b.safetensors", some_tensors()
    writer = SafetensorsWriter(path, [TensorSlot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.close()
    assert same(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = read_header(path)
    assert all(stored.start % DTYPES[stored.dtype].itemsize == 0 for stored in header.values()), "unaligned"


def test_an_unwritten_slot_is_an_assertion(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "c.safetensors", [TensorSlot("a", torch.float32, (2,))])
    with pytest.raises(AssertionError, match="never written"):
        writer.close()


def put_header(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "garbage": (b"\xff\xfe{{{", b""),
    "a list": ([1, 2], b""),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"8" * 8),
    "negative shape": ({"a": ENTRY | {"shape": [-2]}}, b"8" * 8),
    "bytes against shape": ({"a": ENTRY | {"shape": [3]}}, b"8" * 8),
    "overlap": ({"a": ENTRY, "b": ENTRY}, b"8" * 8),
    "gap": ({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, b"8" * 24),
    "repeated name": (b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}", b"8" * 8),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_corrupt_headers(tmp_path: Path, case: str) -> None:
    path = tmp_path / "d.safetensors"
    put_header(path, *BAD_HEADERS[case])
    with pytest.raises(CheckpointError, match=r"d\.safetensors: corrupt safetensors header") as error:
        read_header(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a safetensors file, or cut off"),
    (b"\x10\0\0", "not a safetensors file, or cut off"),
    (b"\xff" * 200, "not a safetensors file, or cut off"),
])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "e.safetensors")


def test_cut_or_extended_files(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file(some_tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"truncated: .* bytes on disk, its header describes"):
        read_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=r"corrupt: .* bytes on disk"):
        read_header(path)
    with pytest.raises(CheckpointError, match="the file is missing"):
        read_header(tmp_path / "absent.safetensors")
