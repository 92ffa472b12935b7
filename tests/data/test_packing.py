"""Packing against its definition, and what must hold of any packing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.data.packing import cut_documents, pack, pack_reference

lengths_and_room = st.integers(1, 40).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room))
)


@given(lengths_and_room)
@settings(max_examples=300, deadline=None)
def test_fast_equals_reference(case: tuple[list[int], int]) -> None:
    lengths, room = np.array(case[0], dtype=np.int64), case[1]
    fast, reference = pack(lengths, room), pack_reference(lengths, room)
    assert fast.order.tolist() == reference.order.tolist()
    assert fast.first.tolist() == reference.first.tolist()


@given(lengths_and_room)
@settings(max_examples=200, deadline=None)
def test_every_piece_once_and_rows_not_overfull(case: tuple[list[int], int]) -> None:
    lengths, room = np.array(case[0], dtype=np.int64), case[1]
    packing = pack(lengths, room)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    used = [int(lengths[packing.row(row)].sum()) for row in range(packing.num_rows)]
    assert all(0 < total <= room for total in used)
    # No row could have taken anything that waits in a later one.
    for row, total in enumerate(used):
        later = packing.order[packing.first[row + 1] :]
        assert all(total + lengths[piece] > room for piece in later)


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 12))
def test_cutting_covers_every_token(lengths: list[int], room: int) -> None:
    pieces = cut_documents(np.array(lengths, dtype=np.int64), room)
    covered = []
    for document, start, length, continues in zip(
        pieces.document, pieces.start, pieces.length, pieces.continues, strict=True
    ):
        assert 1 <= length <= room and (length == room or not continues)
        assert continues == (start + length < lengths[document])
        covered += [(document, start + step) for step in range(length)]
    assert covered == [(document, token) for document, length in enumerate(lengths) for token in range(length)]


def test_fills_rows_well() -> None:
    """Lengths as real documents have them: over 98% of the positions hold a token."""
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 5000).astype(np.int64) + 1
    pieces = cut_documents(lengths, 1024)
    assert pack(pieces.length, 1024).efficiency(pieces.length, 1024) > 0.98
