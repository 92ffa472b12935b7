"""Timing and ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], rounds: int, warmup: int = 1) -> float:
    """Median wall-clock seconds of `work`."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def alternating_seconds(works: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that a noisy neighbour disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + rounds):
        for name, work in works.items():
            elapsed = seconds(work, rounds=1, warmup=0)
            if number >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_ceiling() -> float:
    """FLOP/s of a large matrix product on random data: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device="cuda" if on_gpu else "cpu", dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, rounds=10, warmup=3)


def read_ceiling() -> float:
    """Bytes/s at which a large array is read: a sum over more than the caches hold."""
    on_gpu = torch.cuda.is_available()
    size = 2**30 if on_gpu else 2**26
    data = torch.ones(size, dtype=torch.float32, device="cuda" if on_gpu else "cpu")
    return 4 * size / seconds(data.sum, rounds=10, warmup=2)
