"""Kernels in CUDA C++ (`*.cu`): compiled at first use where `nvcc` is, called through ctypes.

Nothing depends on them: without a compiler, or with MOONBASE_NATIVE=0, `library` gives None and Triton's kernels do the
work.

What a module beside a `.cu` needs is `HopperKernels`, and for a kernel of many arguments a struct of them. Here beside
`extern "C" int moonbase_scale(const void* arguments, int blocks, void* stream)`, which returns CUDA's error code:

    _KERNELS = HopperKernels("scale_hopper")
    available = _KERNELS.available

    class _Arguments(Arguments):
        _fields_ = fields(pointers=("x", "out"), int32=("rows",))

    def scale(x_RC: Tensor) -> Tensor:
        out_RC, gpu = torch.empty_like(x_RC), _KERNELS.on(x_RC.device)
        gpu.launch("moonbase_scale", _Arguments((x_RC, out_RC), len(x_RC)), gpu.processors, about=f"x {x_RC.shape}")
        return out_RC
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moonbase.ops.compiled import load_or_compile

_log = logging.getLogger(__name__)

# wgmma and bulk copies are Hopper's own, hence sm_90a and no other.
_FLAGS = ("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")


def compiler() -> str | None:
    """nvcc of this machine: $NVCC, the path's, that of $CUDA_HOME, the usual place."""
    places = [os.environ.get("NVCC"), shutil.which("nvcc"), f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc",
              "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The kernels of `{name}.cu`, or None where they cannot be compiled; the first call takes some seconds."""
    nvcc = compiler()
    if nvcc is None or os.environ.get("MOONBASE_NATIVE", "1") == "0":
        _log.info("%s.cu: no nvcc; Triton's kernels are used", name)
        return None
    try:
        return build(name, [nvcc, *_FLAGS])
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s.cu: %s failed (%s); Triton's slower kernels are used", name, nvcc, error)
        return None


def build(name: str, command: list[str], headers: Sequence[Path] = ()) -> ctypes.CDLL:
    """Compile `{name}.cu` with `command`, which may name headers, and load it. Raises OSError or SubprocessError."""
    source = Path(__file__).parent / f"{name}.cu"
    return load_or_compile(name.replace("_", "-"), [[*command, str(source)]], [source, *headers])


class HopperKernels:
    """The kernels of `{name}.cu`, for GPUs of compute capability 9.0. One object a file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self) -> bool:
        """Whether they can be used on this machine's GPU; the first call compiles them."""
        return (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
                and library(self.name) is not None)

    def on(self, device: torch.device) -> Launcher:
        """To launch them there, on the current stream; they must be `available`."""
        kernels = library(self.name)
        assert kernels is not None
        return Launcher(self.name, kernels, _processors(device), torch.cuda.current_stream(device).cuda_stream)


class Launcher(NamedTuple):
    """Kernels, and where they run."""

    name: str
    kernels: ctypes.CDLL
    processors: int
    """Multiprocessors of the device: as many blocks that fill one run at once."""
    stream: int

    def launch(self, function: str, *arguments: Tensor | ctypes.Structure | int, about: str) -> None:
        """Call `function`: tensors go as their addresses, structs by reference, and the stream last.

        Raises RuntimeError, which says what the call was `about`, where it returns an error of CUDA's.
        """
        error = getattr(self.kernels, function)(*map(_passed, arguments), ctypes.c_void_p(self.stream))
        if error:
            raise RuntimeError(f"{self.name}: CUDA error {error}, {about}")


def fields(pointers: Sequence[str], int64: Sequence[str] = (), float32: Sequence[str] = (),
           int32: Sequence[str] = ()) -> list[tuple[str, type]]:
    """`_fields_` of a struct of arguments, in the order that the struct in the `.cu` must have them."""
    kinds = ((pointers, ctypes.c_void_p), (int64, ctypes.c_int64), (float32, ctypes.c_float), (int32, ctypes.c_int32))
    return [(name, kind) for names, kind in kinds for name in names]


class Arguments(ctypes.Structure):
    """Base of such a struct. It keeps no tensor alive; where there is none, the pointer is null."""

    def __init__(self, tensors: Sequence[Tensor | None], *numbers: float) -> None:
        assert len(tensors) + len(numbers) == len(self._fields_)
        super().__init__(*[None if each is None else each.data_ptr() for each in tensors], *numbers)


def _passed(argument: Tensor | ctypes.Structure | int) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
