"""The CPU kernels in C (`cpu_kernels*.c`): compiled at first use with the system's compiler, called through ctypes.

Nothing depends on them: without a compiler, or with MOONBASE_NATIVE=0, `available()` is false and every operation takes
its PyTorch form. Where the library is kept: `compiled.py`.

The kernels start no threads. They borrow those of the OpenMP runtime that PyTorch has loaded, by its entry point
GOMP_parallel, which the GNU and the LLVM runtimes both have; a second runtime would fight the first for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from moonbase.ops.compiled import load_or_compile

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
GRAIN = 16
"""The kernels want widths of matrices that are multiples of this (GRAIN in cpu_kernels.h)."""

# No -ffast-math: infinities and NaN must pass through, and sums keep the order in which they are written.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
          "-fPIC", "-shared")
_PLAIN = (Tensor, torch.nn.Parameter)  # not those whose memory is elsewhere: sharded, fake


def available() -> bool:
    """Whether the kernels can be used in this process; the first call compiles or loads them."""
    return library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels work on these: plain fp32 tensors on the CPU, last dimension a multiple of `GRAIN`."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if not (x.is_cpu and x.dtype is torch.float32 and x.shape[-1] % GRAIN == 0 and x.numel() and type(x) in _PLAIN):
            return False
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where there are none."""
    if os.environ.get("MOONBASE_NATIVE", "1") == "0":
        return None
    parallel = _parallel_entry()
    if parallel is None:
        _log.info("CPU kernels off: no OpenMP runtime with GOMP_parallel is loaded")
        return None
    for compiler in compilers():
        try:
            loaded = _build_or_load(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            _log.info("CPU kernels: %s failed: %s", compiler, error)
            continue
        loaded.moonbase_set_parallel.argtypes = [ctypes.c_void_p]
        loaded.moonbase_set_parallel(parallel)
        return loaded
    _log.info("CPU kernels off: no working C compiler; PyTorch's own operations are used")
    return None


def compilers() -> list[str]:
    """C compilers of this machine, $CC first."""
    names = [*os.environ.get("CC", "").split()[:1], "cc", "gcc", "clang"]
    found = [shutil.which(name) for name in names]
    return list(dict.fromkeys(path for path in found if path))


def _build_or_load(compiler: str) -> ctypes.CDLL:
    sources = sorted([*SOURCES.glob("cpu_kernels*.c"), *SOURCES.glob("cpu_kernels*.h")])
    files = [str(source) for source in sources if source.suffix == ".c"]
    # Some compilers know a processor's own name only as -mcpu.
    commands = [[compiler, *_FLAGS, *tuning, *files, "-lm"] for tuning in (["-march=native"], ["-mcpu=native"], [])]
    return load_or_compile("cpu-kernels", commands, sources, [_processor()])


def _processor() -> str:
    """What -march=native looks at, as far as a file tells; a home folder may be shared by unlike machines."""
    facts = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        first = lines[: lines.index("")] if "" in lines else lines
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "cpu family", "model")
        facts += [line for line in first if line.split(":")[0].strip() in wanted]
    except OSError:
        pass
    return "\n".join(facts)


def _parallel_entry() -> int | None:
    """Address of GOMP_parallel in the runtime that torch has loaded."""
    candidates: list[str | None] = [None]
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        candidates += sorted({line.split(maxsplit=5)[5] for line in maps if "omp" in line.rpartition("/")[2]})
    except OSError:
        candidates += [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/lib*omp*"))]
    for name in candidates:
        try:
            entry = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None


def rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, D] whose rows are evenly spaced, without a copy where that is so already."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def call(name: str, structure: ctypes.Structure) -> int:
    """Call a kernel, without Python's lock. Tensors whose addresses are in `structure` must stay alive until then."""
    kernels = library()
    assert kernels is not None
    return getattr(kernels, name)(ctypes.byref(structure))
