"""Timing and ceilings.

A GPU under sustained load slows (at its power limit by up to a fifth, and not all kernels alike), and a neighbour's
work comes and goes. So what is compared is timed in turns, in short runs, and the median is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

Work = Callable[[], object]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Work, rounds: int, warmup: int = 1) -> float:
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


def alternating_seconds(works: dict[str, Work], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that a noisy neighbour disturbs all alike."""
    return _in_turns(works, rounds, warmup, lambda work: seconds(work, rounds=1, warmup=0))


def kernel_seconds(works: dict[str, Work], rounds: int, warmup: int = 1) -> dict[str, float]:
    """The same for work that the device does without the host (`recorded`): between two events on a GPU, so that the
    way there and back is no part of it."""
    return _in_turns(works, rounds, warmup, _device_seconds if torch.cuda.is_available() else
                     lambda work: seconds(work, rounds=1, warmup=0))


def _in_turns(works: dict[str, Work], rounds: int, warmup: int, once: Callable[[Work], float]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warmup + rounds):
        for name, work in works.items():
            elapsed = once(work)
            if number >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _device_seconds(work: Work) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def recorded(calls: Iterable[Work], on_gpu: bool) -> Work:
    """All calls one after the other; on a GPU recorded as one graph, so that the host is no part of it."""
    calls = list(calls)

    def run() -> None:
        for call in calls:
            call()

    if not on_gpu:
        return run
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Cost(NamedTuple):
    """The arithmetic that a piece of work needs and the memory that it must at least read or write."""

    flops: float
    bytes: float


class Roofs(NamedTuple):
    """What this machine was measured to do: bytes/s read, and FLOP/s of a large matrix product."""

    read: float
    product: float

    def seconds(self, cost: Cost) -> float:
        """No version of the work is much faster than this."""
        return max(cost.bytes / self.read, cost.flops / self.product)


def measured_roofs() -> Roofs:
    return Roofs(read_ceiling(), matmul_ceiling())


def matmul_ceiling() -> float:
    """FLOP/s of a large matrix product on random data: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device="cuda" if on_gpu else "cpu", dtype=dtype) for _ in range(2))
    return 2 * size**3 / _least_seconds(lambda: a @ b, rounds=10, warmup=3)


def read_ceiling() -> float:
    """Bytes/s at which a large array is read: a sum over more than the caches hold."""
    on_gpu = torch.cuda.is_available()
    size = 2**30 if on_gpu else 2**26
    data = torch.ones(size, dtype=torch.float32, device="cuda" if on_gpu else "cpu")
    return 4 * size / _least_seconds(data.sum, rounds=10, warmup=2)


def _least_seconds(work: Work, rounds: int, warmup: int) -> float:
    """A ceiling is the best that was seen: a neighbour's work must not make it lower than what it is a ceiling of."""
    return min(seconds(work, rounds=1, warmup=warmup if number == 0 else 0) for number in range(rounds))
