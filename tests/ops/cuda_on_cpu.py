"""Kernels in CUDA C++ for their tests: the machine's own where its GPU runs them, else compiled for the CPU, where they
are run thread by thread (`cuda_on_cpu.h`)."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moonbase.ops.cuda_library import HopperKernels, Launcher, build

HEADER = Path(__file__).with_suffix(".h")


def fixtures(kernels: HopperKernels, *options: str, processors: Sequence[int],
             headers: Sequence[Path] = (HEADER,)) -> tuple[Any, Any]:
    """Two fixtures of a test file, to be called `kernels` and `device`.

    The first is None where the machine's own are tested, on its GPU, and skips tests where neither can be had; the
    second says where tensors must lie. On a CPU calls have so many processors, in turns: what is computed must not
    depend on them. options: of the C++ compiler; headers: included before the kernels.
    """

    @pytest.fixture(scope="module")
    def kernels_here() -> ctypes.CDLL | None:
        if torch.cuda.is_available():
            if not kernels.available():
                pytest.skip("no nvcc, or not a Hopper GPU")
            return None
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-x", "c++", *options]
        command += [word for header in headers for word in ("-include", str(header))]
        return build(kernels.name, command, headers)

    @pytest.fixture
    def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        on_cpu = request.getfixturevalue("kernels")
        if on_cpu is None:
            return "cuda"
        turns = itertools.cycle(processors)
        monkeypatch.setattr(kernels, "on", lambda device: Launcher(kernels.name, on_cpu, next(turns), 0))
        return "cpu"

    return kernels_here, device
