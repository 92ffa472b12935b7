"""Where documents begin and end, as the CPU's loop and as the GPU's kernel want to hear it."""

from __future__ import annotations

import pytest
import torch

from moonbase.ops.documents import Documents, padded_boundaries


def test_documents_are_found_where_the_number_changes() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 4, 4], [1, 2, 3, 3, 9]], dtype=torch.int32)
    documents = Documents.from_ids(ids)
    assert documents is not None and documents.boundaries is None
    assert documents.segments == ((0, 0, 2), (0, 2, 5), (1, 0, 5), (2, 0, 1), (2, 1, 2), (2, 2, 4), (2, 4, 5))
    assert Documents.from_ids(None) is None
    assert Documents.from_ids(ids[1:2]) is None and Documents.from_ids(ids[:, :1]) is None


@pytest.mark.parametrize(("time", "chance"), [(5, 0.3), (16, 1.0), (200, 1.0), (200, 0.5), (300, 0.02)])
def test_boundaries_name_every_start_and_have_few_lengths(time: int, chance: float) -> None:
    ids = (torch.rand(3, time, generator=torch.Generator().manual_seed(0)) < chance).cumsum(1).to(torch.int32)
    ids[1] = 0
    starts = [row * time + i for row in range(3) for i in range(time) if i == 0 or ids[row, i] != ids[row, i - 1]]
    found = padded_boundaries(torch.tensor(starts), 3, time)
    assert found.dtype == torch.int32 and found[: len(starts)].tolist() == starts
    assert set(found[len(starts) :].tolist()) == {3 * time}, "one end at least, then empty documents"
    room = len(found) - 1
    assert len(starts) <= room <= max(2 * len(starts), 64 * 3)
    assert room in (3 * time, 64 * 3) or room & (room - 1) == 0
    documents = Documents.from_ids(ids, torch.device("meta"))
    assert documents is not None and documents.boundaries is not None and not documents.segments
    assert documents.ids_BT.device.type == "meta" and documents.boundaries.shape == found.shape
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], 3 * time], strict=True)]
    assert documents.extent is not None and documents.extent.tolist() == [len(starts), max(lengths)]


def test_attention_hands_the_name_on() -> None:
    from moonbase.ops import attention

    assert attention.Documents is Documents
