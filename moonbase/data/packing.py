"""Best-fit packing: documents into rows of one length, with next to no padding and no document cut without need.

A document longer than a row is cut into row-long pieces and a remainder ("Fewer Truncations Improve Language Modeling",
Ding et al. 2024). Rows are then filled one by one, each time with the longest waiting piece that fits the room left.
Attention does not cross pieces; the loss does where a document was cut: the last token of a piece is asked for the
first token of the next, so that cutting loses no token's loss.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Target of a position without loss."""


@dataclass(frozen=True)
class Pieces:
    """Cut documents, as parallel arrays [num_pieces] of int64 (`continues`: bool)."""

    document: np.ndarray
    """Which of the given documents."""
    start: np.ndarray
    """First token inside the document."""
    length: np.ndarray
    continues: np.ndarray
    """Whether the document goes on in another piece."""

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True)
class Packing:
    """Rows of pieces: row r holds the pieces order[first[r]:first[r + 1]]."""

    order: np.ndarray
    first: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.first) - 1

    def row(self, index: int) -> np.ndarray:
        """The pieces of one row, in their order."""
        return self.order[self.first[index] : self.first[index + 1]]

    def efficiency(self, lengths: np.ndarray, sequence_length: int) -> float:
        """Share of all row positions that hold a token."""
        return float(lengths.sum() / (self.num_rows * sequence_length)) if self.num_rows else 1.0


def cut_documents(lengths: np.ndarray, sequence_length: int) -> Pieces:
    """Cut documents of these lengths into pieces of at most `sequence_length` tokens; empty documents have none."""
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * sequence_length
    rest = lengths[document] - start
    return Pieces(document, start, np.minimum(rest, sequence_length), rest > sequence_length)


def pack_reference(lengths: np.ndarray, sequence_length: int) -> Packing:
    """`pack` by its definition, in quadratic time: take the longest piece that fits, the earliest of equals."""
    waiting = list(range(len(lengths)))
    order, first, room = [], [0], sequence_length
    while waiting:
        fitting = [piece for piece in waiting if lengths[piece] <= room]
        if not fitting:
            first.append(len(order))
            room = sequence_length
            continue
        piece = max(fitting, key=lambda piece: (lengths[piece], -piece))
        waiting.remove(piece)
        order.append(piece)
        room -= int(lengths[piece])
    if order:
        first.append(len(order))
    return Packing(np.array(order, dtype=np.int64), np.array(first, dtype=np.int64))


def pack(lengths: np.ndarray, sequence_length: int) -> Packing:
    """Fill rows of `sequence_length` with pieces of these lengths (1 .. sequence_length), int64 [num_pieces].

    O(n log n): the pieces are sorted once, and the longest length that fits is found by jumping over lengths that have
    run out (union-find).
    """
    if len(lengths) == 0:
        return Packing(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    assert lengths.min() > 0 and lengths.max() <= sequence_length, "pieces must fit a row and hold a token"
    # Longest first, the earliest of equals first. Pieces as long as a row are rows of their own.
    by_length = np.argsort(-lengths, kind="stable")
    num_full = int((lengths == sequence_length).sum())
    full, short = by_length[:num_full], by_length[num_full:]
    distinct, counts = np.unique(lengths[short], return_counts=True)
    queues = [iter(queue.tolist()) for queue in np.split(short, np.cumsum(counts[::-1])[:-1])][::-1]
    sizes, waiting = distinct.tolist(), counts.tolist()
    # Slot i + 1 stands for sizes[i], slot 0 for none; a slot whose pieces have run out points to the next shorter one.
    below = list(range(len(sizes) + 1))
    order, ends, room = [], [], sequence_length
    while len(order) < len(short):
        slot = bisect_right(sizes, room)
        while below[slot] != slot:
            below[slot] = below[below[slot]]
            slot = below[slot]
        if slot == 0:
            ends.append(len(order))
            room = sequence_length
            continue
        order.append(next(queues[slot - 1]))
        waiting[slot - 1] -= 1
        if not waiting[slot - 1]:
            below[slot] = slot - 1
        room -= sizes[slot - 1]
    if order:
        ends.append(len(order))
    first = np.concatenate([np.arange(num_full + 1), num_full + np.array(ends, dtype=np.int64)])
    return Packing(np.concatenate([full, np.array(order, dtype=np.int64)]), first.astype(np.int64))
