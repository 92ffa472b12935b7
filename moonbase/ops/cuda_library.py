"""Kernels in CUDA C++ (`*.cu`): compiled at first use where `nvcc` is, called through ctypes.

Nothing depends on them: without a compiler, or with MOONBASE_NATIVE=0, `library` gives None and Triton's kernels do the
work.
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
