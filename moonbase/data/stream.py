"""Batches without end, from a corpus: shuffled, packed, resumable to the bit, the same for any number of processes.

The stream is a sequence of rows. Documents are drawn in a shuffled order, a few million tokens at a time (one buffer),
packed into rows, and the rows shuffled. Only lengths are held for a buffer; tokens are read when a row is delivered. A
position is therefore a few numbers: how far each source has been drawn when the buffer began, and the next row in it.
Process r of w takes rows r·b/w … of every batch of b rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moonbase.data.packing import IGNORED, Packing, Pieces, cut_documents, pack
from moonbase.data.shards import Corpus, Split
from moonbase.data.shuffle import Permutation, combine
from moonbase.errors import UserError

if TYPE_CHECKING:
    import torch

BUFFER_TOKENS = 4 << 20
"""Tokens whose documents are packed together; more packs tighter, less starts faster."""
_BUFFER_ROWS = 64
_DRAW = 4096


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents."""

    tokens: torch.Tensor
    """int64 [B, T]; the unused end of a row holds the padding id."""
    targets: torch.Tensor
    """int64 [B, T]: the token that follows in the document, -100 where none is known."""
    documents: torch.Tensor
    """int32 [B, T]: number of the piece in its row, non-decreasing; attention stays inside one number."""

    def whole_rows_first(self) -> Batch:
        """The same rows, those of one piece before the others, else in order. Micro-batches of such rows alone take the
        faster kernel on a GPU: rows that packing fills are few pieces, and where documents are long most are one."""
        order = (self.documents[:, 1:] != self.documents[:, :-1]).any(1).byte().argsort(stable=True)
        return Batch(self.tokens[order], self.targets[order], self.documents[order])


class _Pool:
    """Documents first .. last-1, drawn again and again, each time in another order."""

    def __init__(self, split: Split, first: int, last: int, seed: int, shuffle: bool) -> None:
        self._split, self._first, self._seed, self._shuffle = split, first, seed, shuffle
        self.size = last - first
        self.epoch = self.position = 0

    def draw(self, num_tokens: int, one_epoch: bool) -> tuple[np.ndarray, np.ndarray]:
        """(documents, lengths) of the next documents that together reach `num_tokens`; not past the epoch's end where
        `one_epoch`."""
        documents, lengths, missing = [], [], num_tokens
        while missing > 0:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
            if self._shuffle:
                drawn = Permutation(self.size, combine(self._seed, self.epoch)).take(self.position, _DRAW)
            else:
                drawn = np.arange(self.position, min(self.position + _DRAW, self.size), dtype=np.int64)
            drawn += self._first
            length = self._split.lengths(drawn)
            count = min(int(np.searchsorted(np.cumsum(length), missing)) + 1, len(drawn))
            documents.append(drawn[:count])
            lengths.append(length[:count])
            missing -= int(length[:count].sum())
            self.position += count
            if one_epoch and self.position == self.size:
                break
        return np.concatenate(documents), np.concatenate(lengths)


@dataclass(frozen=True)
class _Rows:
    """A packed buffer: which piece of which document stands where."""

    documents: np.ndarray
    pieces: Pieces
    packing: Packing
    order: np.ndarray
    """Rows in their order of delivery."""

    @classmethod
    def pack(cls, documents: np.ndarray, lengths: np.ndarray, sequence_length: int, seed: int | None) -> _Rows:
        pieces = cut_documents(lengths, sequence_length)
        packing = pack(pieces.length, sequence_length)
        num_rows = packing.num_rows
        order = np.arange(num_rows) if seed is None else Permutation(num_rows, seed).take(0, num_rows)
        return cls(documents, pieces, packing, order)

    def __len__(self) -> int:
        return len(self.order)

    def fill(self, row: int, split: Split, tokens: np.ndarray, targets: np.ndarray, numbers: np.ndarray) -> None:
        """Write one row into the given views of length T."""
        position = number = 0
        for number, piece in enumerate(self.packing.row(self.order[row]), start=1):
            length, continues = int(self.pieces.length[piece]), bool(self.pieces.continues[piece])
            document = int(self.documents[self.pieces.document[piece]])
            start = int(self.pieces.start[piece])
            ids = split.read(document, start, length + continues)
            end = position + length
            tokens[position:end] = ids[:length]
            targets[position : position + len(ids) - 1] = split.targets(document, start, ids)
            numbers[position:end] = number - 1
            position = end
        numbers[position:] = number


class PackedStream:
    """An endless iterator over the batches of one process. See the module's words for what a position is."""

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        """`batch_size` counts rows over all processes. Where the sources' weights differ they are the shares of the
        token stream; where all are equal every document comes once an epoch. Raises UserError where `batch_size` is no
        multiple of `world_size`."""
        assert 0 <= rank < world_size
        _check_share(batch_size, world_size)
        self.sequence_length, self.batch_size, self.seed, self.shuffle = sequence_length, batch_size, seed, shuffle
        self._corpus, self._split = corpus, corpus.split(split)
        self._mine = _share(batch_size, rank, world_size)
        ranges = {source: range for source, range in self._split.ranges().items() if range[1] > range[0]}
        weights = [corpus.sources[source]["weight"] for source in ranges]
        whole = len(set(weights)) <= 1
        bounds = [(0, self._split.num_documents)] if whole else list(ranges.values())
        self._weights = [1.0] if whole else [weight / sum(weights) for weight in weights]
        self._pools = [
            _Pool(self._split, first, last, combine(seed, number), shuffle)
            for number, (first, last) in enumerate(bounds)
        ]
        # Equal buffers that end with the epoch, so that no short one packs badly.
        total = self._split.num_tokens
        wanted = max(BUFFER_TOKENS, _BUFFER_ROWS * sequence_length)
        self._buffer_tokens = -(-total // max(1, round(total / wanted)))
        self._buffer = -1
        self._row = 0
        self._owed = [0.0] * len(self._pools)
        self._begin_buffer()

    def _begin_buffer(self) -> None:
        """Draw and pack the next buffer, remembering where it began."""
        self._buffer += 1
        self._row = 0
        self._start = {
            "buffer": self._buffer,
            "pools": [[pool.epoch, pool.position] for pool in self._pools],
            "owed": list(self._owed),
        }
        documents, lengths = [], []
        for number, pool in enumerate(self._pools):
            self._owed[number] += self._buffer_tokens * self._weights[number]
            if self._owed[number] <= 0:
                continue
            drawn, length = pool.draw(int(np.ceil(self._owed[number])), one_epoch=len(self._pools) == 1)
            # One pool has no share to keep: an epoch's short last buffer is not made up for in the next.
            self._owed[number] = 0.0 if len(self._pools) == 1 else self._owed[number] - int(length.sum())
            documents.append(drawn)
            lengths.append(length)
        seed = combine(self.seed, self._buffer, 1) if self.shuffle else None
        self._rows = _Rows.pack(np.concatenate(documents), np.concatenate(lengths), self.sequence_length, seed)

    @property
    def epoch(self) -> float:
        """How often the split has been read, counting the current buffer whole."""
        return max(pool.epoch + pool.position / pool.size for pool in self._pools)

    @property
    def fill_efficiency(self) -> float:
        """Share of the current buffer's row positions that hold a token."""
        return self._rows.packing.efficiency(self._rows.pieces.length, self.sequence_length)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        builder = _Builder(len(self._mine), self.sequence_length, self._corpus.pad_id)
        for number in range(self.batch_size):
            while self._row == len(self._rows):
                self._begin_buffer()
            if number in self._mine:
                self._rows.fill(self._row, self._split, *builder.row(number - self._mine.start))
            self._row += 1
        return builder.batch()

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able and small; the same on every process."""
        return {**self._identity(), **self._start, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, bit for bit; the number of processes and the batch size may have changed. Raises
        UserError where corpus, seed, shuffling or sequence length are not those that the position belongs to."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(f"cannot resume the data stream: {name} was {state.get(name)!r} and is now {value!r}")
        self._buffer = state["buffer"] - 1
        self._owed = [float(value) for value in state["owed"]]
        for pool, (epoch, position) in zip(self._pools, state["pools"], strict=True):
            pool.epoch, pool.position = epoch, position
        self._begin_buffer()
        self._row = state["row"]

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus.facts["digest"],
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sequence_length": self.sequence_length,
            "tokens": self._split.num_tokens,
        }


def validation_batches(
    corpus: Corpus,
    sequence_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_bytes: int | None = None,
) -> Iterator[Batch]:
    """One pass over the held-out documents in their fixed order, every token scored once but the first of each document
    (nothing predicts it). `max_bytes` stops after the documents of `corpus.validation_text(max_bytes)`.

    All processes get the same number of batches; rows that are left over in the last hold no targets.
    """
    _check_share(batch_size, world_size)
    mine = _share(batch_size, rank, world_size)
    split = corpus.validation
    order = corpus.validation_order(max_bytes)
    lengths = split.lengths(order)
    wanted = max(BUFFER_TOKENS, _BUFFER_ROWS * sequence_length)
    buffers = np.split(np.arange(len(order)), np.flatnonzero(np.diff(np.cumsum(lengths) // wanted)) + 1)
    rows = (
        (packed, row)
        for chosen in buffers
        for packed in [_Rows.pack(order[chosen], lengths[chosen], sequence_length, seed=None)]
        for row in range(len(packed))
    )
    while True:
        builder, delivered = _Builder(len(mine), sequence_length, corpus.pad_id), 0
        for number, (packed, row) in zip(range(batch_size), rows, strict=False):
            delivered += 1
            if number in mine:
                packed.fill(row, split, *builder.row(number - mine.start))
        if delivered:
            yield builder.batch()
        if delivered < batch_size:
            return


def _check_share(batch_size: int, world_size: int) -> None:
    if batch_size % world_size:
        raise UserError(f"batch_size={batch_size} must be a multiple of the number of processes, {world_size}")


def _share(batch_size: int, rank: int, world_size: int) -> range:
    rows = batch_size // world_size
    return range(rank * rows, (rank + 1) * rows)


class _Builder:
    """The arrays of one batch while it is filled."""

    def __init__(self, num_rows: int, sequence_length: int, pad_id: int) -> None:
        self._tokens = np.full((num_rows, sequence_length), pad_id, dtype=np.int64)
        self._targets = np.full((num_rows, sequence_length), IGNORED, dtype=np.int64)
        self._documents = np.zeros((num_rows, sequence_length), dtype=np.int32)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._tokens[index], self._targets[index], self._documents[index]

    def batch(self) -> Batch:
        import torch

        return Batch(*(torch.from_numpy(array) for array in (self._tokens, self._targets, self._documents)))
