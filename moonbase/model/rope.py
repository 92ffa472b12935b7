"""Rotary positions with YaRN, on interleaved pairs as the published checkpoints store them (DeepSeek-V3, Kimi K2).

Shapes: T positions, R rope dims per head, B batch, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moonbase.config import ModelConfig, RopeScaling, yarn_mscale
from moonbase.ops import rotation


def yarn_range(dims: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Between which pairs YaRN blends: frequencies below `low` stay, those above `high` are divided by the factor."""

    def corrected(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (2 * math.pi * rotations)
        return dims * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(corrected(scaling.beta_fast)), 0)
    high = min(math.ceil(corrected(scaling.beta_slow)), dims - 1)
    return low, high + 0.001 if low == high else high


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """fp32 [R/2]: radians per position of each rotated pair, YaRN applied where the configuration has it."""
    dims = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    if config.rope_scaling is None:
        return frequencies
    low, high = yarn_range(dims, config.rope_theta, config.rope_scaling)
    ramp = ((torch.arange(dims // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / config.rope_scaling.factor * ramp


def rotations(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [*positions.shape, R/2]."""
    angles = positions.float()[..., None] * inverse_frequencies(config, positions.device)
    multiplier = 1.0
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        multiplier = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return angles.cos() * multiplier, angles.sin() * multiplier


def rotate(x_BTHR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate adjacent pairs (2k, 2k+1). `cos`, `sin` [T, R/2] or [B, T, R/2]; computed in fp32, returned in x's dtype.

    The pairs come out half-split (all first members, then all second): a fixed permutation of query and key alike,
    which no dot product sees, and cheaper than weaving them back.
    """
    if rotation.takes(x_BTHR, cos_TR):
        return rotation.rotate(x_BTHR, cos_TR, sin_TR)
    cos, sin = cos_TR.unsqueeze(-2), sin_TR.unsqueeze(-2)
    pairs = x_BTHR.float().unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BTHR.dtype)


def rotated_heads(
    query_BTHK: Tensor, expanded_BTHX: Tensor, key_rope_BTR: Tensor, cos_TR: Tensor, sin_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, K], keys [B, T, H, K] and values [B, T, H, X + R - K] of multi-head latent attention.

    The last R dims of a query rotate; a key is the first K - R dims of its head's expanded latent and then the rotated
    part that all heads share; values are the rest of the expanded latent.
    """
    if query_BTHK.is_cuda:
        from moonbase.ops import rotation_cuda

        if rotation_cuda.takes(query_BTHK, expanded_BTHX, key_rope_BTR, cos_TR, sin_TR):
            return rotation_cuda.rotated_heads(query_BTHK, expanded_BTHX, key_rope_BTR, cos_TR, sin_TR)
    rotated = key_rope_BTR.shape[-1]
    nope = query_BTHK.shape[-1] - rotated
    query_nope, query_rope = query_BTHK.split([nope, rotated], dim=-1)
    key_nope, value = expanded_BTHX.split([nope, expanded_BTHX.shape[-1] - nope], dim=-1)
    query = torch.cat([query_nope, rotate(query_rope, cos_TR, sin_TR)], dim=-1)
    key_rope = rotate(key_rope_BTR.unsqueeze(-2), cos_TR, sin_TR)
    key = torch.cat([key_nope, key_rope.expand(-1, -1, query.shape[2], -1)], dim=-1)
    return query, key, value
