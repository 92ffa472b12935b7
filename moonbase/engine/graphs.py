"""Decoding passes recorded as CUDA graphs: a pass of small kernels otherwise waits for Python between any two of them.

One graph per number of rows and width of the block tables, both rounded up to powers of two, made when first needed.
All graphs share one memory pool: they never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moonbase.engine.cache import Batch

LARGEST = 512
"""Rows beyond which kernels are large enough to be started one by one."""


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    rows_4N: Tensor
    tables_BM: Tensor
    hidden_ND: Tensor
    tables_version: int = -1


class Recorder:
    """Runs `compute(tokens, positions, batch)` from a recording. The result is overwritten by the next call."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Batch], Tensor], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._pool: tuple[int, int] | None = None

    def __call__(self, rows_4N: Tensor, tables_BM: Tensor, tables_version: int) -> Tensor:
        """`rows_4N`: as `batch_of` reads them, on the host, N a power of two; `tables_BM` on the host as well, with a
        number that changes whenever something was written there."""
        key = rows_4N.shape[1], tables_BM.shape[1]
        recording = self._recordings.get(key) or self._record(*key, tables_BM.shape[0])
        self._recordings[key] = recording
        recording.rows_4N.copy_(rows_4N, non_blocking=True)
        if recording.tables_version != tables_version:
            recording.tables_BM.copy_(tables_BM, non_blocking=True)
            recording.tables_version = tables_version
        recording.graph.replay()
        return recording.hidden_ND

    def forget(self) -> None:
        """The recordings read weights where they lay; call when these have been replaced or moved."""
        self._recordings.clear()
        self._pool = None  # it ends with the last graph that used it

    def _record(self, rows: int, width: int, sequences: int) -> _Recording:
        # Rows of nobody, which write to the block that nobody owns.
        rows_4N = torch.zeros(4, rows, dtype=torch.int64, device=self._device)
        rows_4N[3] = -1
        tables_BM = torch.zeros(sequences, width, dtype=torch.int32, device=self._device)
        # Kernels are built and libraries set up outside of the recording, on a stream of its own as torch asks.
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(*batch_of(rows_4N, tables_BM))
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_ND = self._compute(*batch_of(rows_4N, tables_BM))
        self._pool = self._pool or graph.pool()
        return _Recording(graph, rows_4N, tables_BM, hidden_ND)


def batch_of(rows_4N: Tensor, tables_BM: Tensor) -> tuple[Tensor, Tensor, Batch]:
    """Tokens, positions and where they belong, of rows that hold token, position, slot and sequence each."""
    tokens_N, positions_N, slots_N, sequences_N = rows_4N
    return tokens_N, positions_N, Batch(sequences_N.int(), positions_N.int(), slots_N, tables_BM)
