"""One forward pass over parts of many sequences: lays out its tensors, and pads so that nobody notices the others.

Shapes: N tokens of the pass, B sequences, M blocks of the longest possible one, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.graphs import LARGEST, Recorder, batch_of
from moonbase.engine.pass_cpu import CpuPass
from moonbase.engine.pass_cuda import CHUNK_TOKENS, CudaPass, Reading
from moonbase.engine.scheduler import Part
from moonbase.model import Transformer

LEAST_ROWS = 8
"""A pass that PyTorch computes has at least so many rows. The libraries take other paths, with other rounding, for
matrices of very few rows. From eight rows on, rounding still moves with the number of rows for some shapes and dtypes,
though less: the same tokens are all that is promised there. The passes in C (fp32 on a CPU) and on a GPU (bf16) give a
row the same bits beside any others (docs/engine.md), and rows of padding would choose experts of their own there: for
one sequence of a large model, twice the weights to read."""


class Forward:
    """A model with its cache. `run` computes parts; `logits` reads the head at some rows of what came out."""

    def __init__(
        self, model: Transformer, cache: LatentCache, max_running: int, blocks_each: int, cuda_graphs: bool = True
    ) -> None:
        self.model, self.cache = model, cache
        self.device = cache.store.device
        on_gpu = self.device.type == "cuda"
        # Written on the host, one row per running sequence, and only where a sequence has grown.
        self._tables = torch.zeros(max_running, blocks_each, dtype=torch.int32, pin_memory=on_gpu)
        self._tables_version = 0
        self._written: list[tuple[object, int]] = [(None, 0)] * max_running
        self._native = CpuPass(model, cache) if not on_gpu else None
        self._fused = CudaPass(model, cache, max_running) if on_gpu and CudaPass.fits(model) else None
        self._least_rows = LEAST_ROWS if self._fused is None else 1
        self._in_one_call = False
        decode = self._compute if self._fused is None else self._fused.decode
        self._recorder = Recorder(decode, self.device) if on_gpu and cuda_graphs else None

    @property
    def one_form(self) -> bool:
        """A generated token's latents have the bits that the same token of a prompt would have. Not where prompts are
        expanded and replies absorbed."""
        return self._fused is None

    def weights_changed(self) -> None:
        """Weights may have been replaced or moved."""
        if self._recorder is not None:
            self._recorder.forget()

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
        decoding = next((number for number, part in enumerate(parts) if _of_prompt(part)), len(parts))
        # Prompts come in so many lengths that a recording would never be used again.
        recorded = self._recorder is not None and decoding == len(parts) and len(tokens) <= LARGEST
        rows_4N, width = self._lay_out(parts, tokens, round_up=recorded)
        if recorded:
            return self._recorder(rows_4N, self._tables[:, :width], self._tables_version)
        arguments = batch_of(rows_4N.to(self.device, non_blocking=True), self._tables_there(width))
        if self._fused is None:
            return self._compute(*arguments)
        return self._fused.decode(*arguments, self._reading(parts, decoding, arguments[2].tables_BM))

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
        rows_4N, width = self._lay_out(parts, following)
        tokens, positions, batch = batch_of(rows_4N.to(self.device), self._tables_there(width))
        sources += [0] * (len(tokens) - len(sources))
        hidden_ND = hidden_ND[self._padded(sources)]
        if self._fused is not None:
            decoding = next((number for number, part in enumerate(parts) if _of_prompt(part)), len(parts))
            reading = self._reading(parts, decoding, batch.tables_BM)
            return self.logits(self._fused.further(hidden_ND, tokens, positions, batch, reading), ends)
        self.cache.batch = batch
        return self.logits(self.model.decode_further(0, hidden_ND, tokens, positions, self.cache), ends)

    def logits(self, hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """The head's logits at `rows`, fp32 [len(rows), V]."""
        if self._in_one_call:
            return self._native.logits(hidden_ND, rows)
        count = max(self._least_rows, len(rows))
        # Where everybody decodes, these are the first rows, and no list of them need travel.
        in_order = list(rows) == list(range(len(rows))) and count <= hidden_ND.shape[0]
        chosen_ND = hidden_ND[:count] if in_order else hidden_ND[self._padded(rows)]
        head = self.model.lm_head if self._fused is None else self._fused.logits
        return head(chosen_ND)[: len(rows)].float()

    def _compute(self, tokens_N: Tensor, positions_N: Tensor, batch: Batch) -> Tensor:
        self.cache.batch = batch
        return self.model.decode(tokens_N, positions_N, self.cache)

    def _lay_out(self, parts: Sequence[Part], tokens: list[int], round_up: bool = False) -> tuple[Tensor, int]:
        """Token, position, slot and sequence of every row, int64 [4, N] on the host, with padding (`round_up`: to a
        power of two); and how many blocks the longest sequence has, rounded up likewise."""
        sequences, positions = self._places(parts)
        slots: list[int] = []
        for request, start, count, draft in parts:
            blocks = request.blocks
            slots += [blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                      for position in range(start, start + count + (draft is not None))]
        longest = -(-(max(positions) + 1) // BLOCK_TOKENS)
        # Few widths, so that few shapes are ever seen by a compiler or a recorded graph.
        width = min(self._tables.shape[1], max(64, 1 << (longest - 1).bit_length()))
        count = len(tokens)
        rows = max(self._least_rows, 1 << (count - 1).bit_length() if round_up else count)
        rows_4N = torch.zeros(4, rows, dtype=torch.int64, pin_memory=self._tables.is_pinned())
        rows_4N[:, :count] = torch.tensor([tokens, positions, slots, sequences])
        rows_4N[3, count:] = -1  # padding is nobody's, and what it writes goes to the block that nobody owns
        return rows_4N, width

    def _tables_there(self, width: int) -> Tensor:
        on_cpu = self.device.type == "cpu"
        return self._tables if on_cpu else self._tables[:, :width].to(self.device, non_blocking=True)

    def _reading(self, parts: Sequence[Part], decoding: int, tables_BM: Tensor) -> Reading | None:
        """Where the contexts of the parts from number `decoding` on lie; None where there are none."""
        reading = parts[decoding:]
        if not reading:
            return None
        stops = [_stop(part) for part in reading]
        places = [torch.arange(stop, device=self.device) for stop in stops]
        slots = [tables_BM[part.request.row].long()[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS
                 for part, place in zip(reading, places, strict=True)]
        first = sum(_stop(part) - part.start for part in parts[:decoding])
        return Reading(first, [_stop(part) - part.start for part in reading], stops, torch.cat(slots))

    def _places(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """The row of the tables and the position of each token; the tables are as they must be for these parts."""
        sequences: list[int] = []
        positions: list[int] = []
        for request, start, count, draft in parts:
            count += draft is not None
            self._write_table(request.row, request.blocks)
            sequences += [request.row] * count
            positions += range(start, start + count)
        return sequences, positions

    def _write_table(self, row: int, blocks: list[int]) -> None:
        owner, count = self._written[row]
        # The same list has only grown; a new list is another sequence, or the same one after preemption.
        if owner is not blocks:
            count = 0
        elif count == len(blocks):
            return
        self._tables[row, count : len(blocks)] = torch.tensor(blocks[count:], dtype=torch.int32)
        self._tables_version += 1
        self._written[row] = (blocks, len(blocks))

    def _padded(self, values: Sequence[int]) -> Tensor:
        """int64 on the device, with zeros behind a few."""
        values = [*values, *[0] * (self._least_rows - len(values))]
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


def chunk_tokens(model: Transformer) -> int:
    """Prompt tokens per pass that suit the model where it is."""
    on_gpu = next(model.parameters()).is_cuda
    return CHUNK_TOKENS if on_gpu and CudaPass.fits(model) else 512


def _of_prompt(part: Part) -> bool:
    return part.start < len(part.request.prompt_ids)


def _stop(part: Part) -> int:
    """The position after the last of `part`, its guess included."""
    return part.start + part.count + (part.draft is not None)
