"""The codecs of quantised weights: fp8 in blocks and INT4 in groups.

fp8 (DeepSeek-V3, Kimi K2): float8_e4m3fn with one fp32 scale per block of 128x128, stored as `weight_scale_inv`; a
weight is the stored value times the scale, whatever the name says. Blocks at the edges are smaller.

INT4 (Kimi K2-Thinking, K2.5; compressed-tensors "pack-quantized"): groups of 32 along the input dimension share a bf16
scale; how eight numbers share a word: `ops.int4_packed`. Only routed experts are stored this way.

Shapes: O output rows, I input columns of one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moonbase.layout import FP8_BLOCK, INT4_GROUP, Int4Rule
from moonbase.ops.int4 import int4_numbers, int4_scales
from moonbase.ops.int4_packed import pack_int4

FP8_MAX = 448.0


# --- fp8 --------------------------------------------------------------------------------------------------------------


def quantize_fp8(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """Weight [O, I] in any float dtype -> float8_e4m3fn [O, I] and fp32 scale [⌈O/128⌉, ⌈I/128⌉]: absmax / 448."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    largest = tiles.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    stored = (tiles / scale[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).reshape(padded.shape)
    return stored[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_fp8(stored: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """float8_e4m3fn [O, I] and its scales -> fp32 [O, I]."""
    rows, columns = stored.shape
    weight = stored.float()
    weight *= scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight


# --- INT4 -------------------------------------------------------------------------------------------------------------


def quantize_int4(weight: Tensor, rule: Int4Rule = "absmax/7", group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """Weight [O, I] -> int32 [O, I/8] and bf16 scale [O, I/group].

    The number is the weight over the *stored* (bf16) scale, rounded half to even: what a reader multiplies back.
    """
    groups = weight.float().unflatten(1, (-1, group))
    scales = int4_scales(groups, rule)
    return pack_int4(int4_numbers(groups, scales).flatten(1).to(torch.int8)), scales
