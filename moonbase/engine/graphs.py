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
    tokens_N: Tensor
    positions_N: Tensor
    batch: Batch
    hidden_ND: Tensor


class Recorder:
    """`Recorder(compute)(tokens, positions, batch)` gives what `compute` gives, from a recording where there is one.

    The result is overwritten by the next call.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor, Batch], Tensor]) -> None:
        self._compute = compute
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._pool: tuple[int, int] | None = None

    def __call__(self, tokens_N: Tensor, positions_N: Tensor, batch: Batch) -> Tensor:
        rows, width = 1 << (len(tokens_N) - 1).bit_length(), batch.tables_BM.shape[1]
        if rows > LARGEST:
            return self._compute(tokens_N, positions_N, batch)
        recording = self._recordings.get((rows, width))
        if recording is None:
            recording = self._recordings[rows, width] = self._record(rows, batch)
        for there, here in ((recording.tokens_N, tokens_N), (recording.positions_N, positions_N),
                            (recording.batch.position_N, batch.position_N), (recording.batch.slot_N, batch.slot_N)):
            there[: len(here)].copy_(here, non_blocking=True)
            there[len(here) :].zero_()
        # Rows without a token belong to nobody, and what they write goes to the block that nobody owns.
        recording.batch.sequence_N[: len(tokens_N)].copy_(batch.sequence_N, non_blocking=True)
        recording.batch.sequence_N[len(tokens_N) :].fill_(-1)
        recording.batch.tables_BM.copy_(batch.tables_BM, non_blocking=True)
        recording.graph.replay()
        return recording.hidden_ND

    def _record(self, rows: int, batch: Batch) -> _Recording:
        device = batch.slot_N.device
        long = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)]
        short = torch.zeros(rows, dtype=torch.int32, device=device)
        still = Batch(torch.full_like(short, -1), short, long[2], torch.zeros_like(batch.tables_BM))
        # Kernels are built and libraries set up outside of the recording, on a stream of its own as torch asks.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(long[0], long[1], still)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_ND = self._compute(long[0], long[1], still)
        self._pool = self._pool or graph.pool()
        return _Recording(graph, long[0], long[1], still, hidden_ND)
