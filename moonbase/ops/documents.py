"""Packed documents: which tokens of a batch may see one another."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Which tokens of a batch may see one another; made once per batch, shared by all layers.

    `ids_BT` int32: the number of the document that a token belongs to, non-decreasing along a row.
    `segments` (row, start, stop) of every document: what the CPU form loops over.
    `boundaries` int32: what the GPU form reads, see `padded_boundaries`; `extent` int32 [2], always on the CPU: how
    many documents there are and how long the longest is.
    """

    ids_BT: Tensor
    segments: tuple[tuple[int, int, int], ...] = ()
    boundaries: Tensor | None = None
    extent: Tensor | None = None

    @staticmethod
    def from_ids(ids_BT: Tensor | None, device: torch.device | None = None) -> Documents | None:
        """Prepare what the kernels of `device` want (default: where the ids are). Rows of one document each give None:
        plain causal attention, which every kernel does fastest. Give ids that are still on the CPU: looking at ids on a
        GPU would wait for it."""
        if ids_BT is None or not bool((ids_BT[:, 1:] != ids_BT[:, :-1]).any()):
            return None
        device, (batch, time) = device or ids_BT.device, ids_BT.shape
        is_start = torch.ones(batch, time, dtype=torch.bool, device=ids_BT.device)
        is_start[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        starts = torch.nonzero(is_start.flatten()).flatten()
        if device.type == "cpu":
            ends = itertools.pairwise([*starts.tolist(), batch * time])
            return Documents(ids_BT, tuple((start // time, start % time, stop - start // time * time)
                                           for start, stop in ends))
        boundaries = padded_boundaries(starts, batch, time)
        extent = torch.tensor([len(starts), int(boundaries.diff().max())], dtype=torch.int32)
        return Documents(ids_BT.to(device, non_blocking=True), boundaries=boundaries.to(device, non_blocking=True),
                         extent=extent)


def padded_boundaries(starts: Tensor, batch: int, time: int) -> Tensor:
    """Offsets where documents start in the flattened batch, filled up with empty documents at its end B·T: int32.

    The room for documents is a power of two, at least 64 a row and at most one a token: compiled graphs, whose shapes
    are fixed, then meet few different ones.
    """
    room = min(batch * time, max(64 * batch, 1 << (len(starts) - 1).bit_length()))
    return torch.nn.functional.pad(starts, (0, room + 1 - len(starts)), value=batch * time).to(torch.int32)
