"""One forward pass over parts of many sequences: lays out its tensors, and pads so that nobody notices the others.

Shapes: N tokens of the pass, B sequences, M blocks of the longest possible one, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.graphs import Recorder
from moonbase.engine.pass_cpu import CpuPass
from moonbase.engine.scheduler import Part
from moonbase.model import Transformer

LEAST_ROWS = 8
"""A pass has at least so many rows. The libraries take other paths, with other rounding, for matrices of very few
rows; from eight rows on a row's result was the same bit for bit beside any number of others (docs/log.md)."""


class Forward:
    """A model with its cache. `run` computes parts; `logits` reads the head at some rows of what came out."""

    def __init__(
        self, model: Transformer, cache: LatentCache, max_running: int, blocks_each: int, cuda_graphs: bool = True
    ) -> None:
        self.model, self.cache = model, cache
        self.device = cache.store.device
        # Written on the host, one row per running sequence, and only where a sequence has grown.
        self._tables = torch.zeros(max_running, blocks_each, dtype=torch.int32)
        self._written: list[tuple[object, int]] = [(None, 0)] * max_running
        self._native = CpuPass(model, cache) if self.device.type == "cpu" else None
        self._in_one_call = False
        self._recorder: Recorder | None = None
        if self.device.type == "cuda" and cuda_graphs:
            self._recorder = Recorder(self._compute)

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Hidden states [N, D] of all tokens of `parts`, in order; rows beyond them are padding."""
        tokens: list[int] = []
        for part in parts:
            tokens += part.request.ids[part.start : part.start + part.count]
            if part.draft is not None:
                tokens.append(part.draft)
        self._in_one_call = self._native is not None and self._native.ready()
        if self._in_one_call:
            return self._native.compute(tokens, *self._places(parts), self._tables)
        positions, batch = self._lay_out(parts)
        # Prompts come in so many lengths that a recording would never be used again.
        decoding = self._recorder is not None and all(part.count == 1 for part in parts)
        return (self._recorder if decoding else self._compute)(self._padded(tokens), positions, batch)

    def further(self, parts: Sequence[Part], hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits of the token after the next of each part [B, V], by the first multi-token-prediction module.

        `rows`: where each part's tokens begin in `hidden_ND`. The module reads every token together with the one that
        follows it.
        """
        following: list[int] = []
        sources: list[int] = []
        ends: list[int] = []
        for part, row in zip(parts, rows, strict=True):
            following += part.request.ids[part.start + 1 : part.start + part.count + 1]
            sources += range(row, row + part.count)
            ends.append(len(sources) - 1)
        positions, self.cache.batch = self._lay_out(parts)
        hidden_ND = hidden_ND[self._padded(sources)]
        hidden_ND = self.model.decode_further(0, hidden_ND, self._padded(following), positions, self.cache)
        return self.logits(hidden_ND, ends)

    def logits(self, hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """The head's logits at `rows`, fp32 [len(rows), V]."""
        if self._in_one_call:
            return self._native.logits(hidden_ND, rows)
        return self.model.lm_head(hidden_ND[self._padded(rows)])[: len(rows)].float()

    def _compute(self, tokens_N: Tensor, positions_N: Tensor, batch: Batch) -> Tensor:
        self.cache.batch = batch
        return self.model.decode(tokens_N, positions_N, self.cache)

    def _lay_out(self, parts: Sequence[Part]) -> tuple[Tensor, Batch]:
        """The tokens' positions int64 [N], and for the cache whose they are."""
        sequences, positions = self._places(parts)
        slots: list[int] = []
        for part in parts:
            blocks = part.request.blocks
            slots += [blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                      for position in range(part.start, _stop(part))]
        position_N = self._padded(positions)
        longest = -(-(max(positions) + 1) // BLOCK_TOKENS)
        # Few widths, so that few shapes are ever seen by a compiler or a recorded graph.
        width = min(self._tables.shape[1], max(64, 1 << (longest - 1).bit_length()))
        tables = self._tables if self.device.type == "cpu" else self._tables[:, :width].to(self.device)
        batch = Batch(self._padded(sequences, fill=-1).int(), position_N.int(), self._padded(slots), tables)
        return position_N, batch

    def _places(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """The row of the tables and the position of each token; the tables are as they must be for these parts."""
        sequences: list[int] = []
        positions: list[int] = []
        for part in parts:
            self._write_table(part.request.row, part.request.blocks)
            stop = _stop(part)
            sequences += [part.request.row] * (stop - part.start)
            positions += range(part.start, stop)
        return sequences, positions

    def _write_table(self, row: int, blocks: list[int]) -> None:
        owner, count = self._written[row]
        # The same list has only grown; a new list is another sequence, or the same one after preemption.
        if owner is not blocks:
            count = 0
        if count < len(blocks):
            self._tables[row, count : len(blocks)] = torch.tensor(blocks[count:], dtype=torch.int32)
        self._written[row] = (blocks, len(blocks))

    def _padded(self, values: Sequence[int], fill: int = 0) -> Tensor:
        """int64 [max(N, LEAST_ROWS)] on the device."""
        values = [*values, *[fill] * (LEAST_ROWS - len(values))]
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


def _stop(part: Part) -> int:
    """The position after the last of `part`, its guess included."""
    return part.start + part.count + (part.draft is not None)
