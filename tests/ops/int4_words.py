"""INT4 words put together by hand, beside which those of a checkpoint are held."""

from __future__ import annotations

import torch
from torch import Tensor


def words_of(numbers: Tensor) -> Tensor:
    """Numbers in -8..7 [..., inputs] -> int32 [..., inputs / 8]: the lowest four bits are the first of eight
    neighbours, plus 8."""
    words = sum((numbers[..., place::8].long() + 8) << (4 * place) for place in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int()
