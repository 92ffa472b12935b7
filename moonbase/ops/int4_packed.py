"""INT4 weights as Kimi K2-Thinking and K2.5 store them (compressed-tensors "pack-quantized"): eight numbers in a word.

Groups of 32 along the input dimension share a bf16 scale. A number q in -8..7 is stored as the nibble q + 8; element
8c + i of a row sits in bits 4i..4i+3 of its int32 word c. A weight is q·s, which fp32 holds exactly (4 bits times 8).

In bf16 the product is rounded, once: that is what compressed-tensors multiplies out (it multiplies in the scale's
dtype), what vLLM's Marlin and Triton kernels feed their tensor cores, and what quantisation-aware training computes
with in bf16. A kernel that puts the scale on a group's sum instead is nearer to the exact product, and equal to these
within bf16's rounding.

Shapes: O output rows (any leading dimensions before them), I input columns of one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.layout import INT4_GROUP


def pack_int4(numbers: Tensor) -> Tensor:
    """Integers in -8..7, [..., O, I] -> int32 [..., O, I/8]."""
    nibbles = (numbers + 8).to(torch.uint8)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 [..., O, I/8] -> int8 numbers in -8..7, [..., O, I]."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).to(torch.int8) - 8


def dequantize_int4(
    packed: Tensor, scale: Tensor, group: int = INT4_GROUP, dtype: torch.dtype = torch.float32
) -> Tensor:
    """int32 [..., O, I/8] and scale [..., O, I/group] -> [..., O, I]: the exact products, rounded to `dtype` once."""
    numbers = unpack_int4(packed).float().unflatten(-1, (-1, group))
    return numbers.mul_(scale.float().unsqueeze(-1)).flatten(-2).to(dtype)
