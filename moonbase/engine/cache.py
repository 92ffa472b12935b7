"""The latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, never expanded into heads.

Shapes: B sequences, S cached time, T new tokens, C kv latent, R rope dims.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moonbase.config import ModelConfig


class LatentCache:
    """One contiguous buffer per layer for a batch of sequences that start together.

    `length` slots are filled; prompts of different lengths are right-aligned by `skip` [B] leading slots that no query
    may see.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.rank = config.kv_lora_rank
        self.store = torch.zeros(config.num_hidden_layers, batch, capacity, width, dtype=dtype, device=device)
        self.length = 0
        self.skip = torch.zeros(batch, dtype=torch.int64, device=device)

    def extend(self, layer: int, latent_BTC: Tensor, key_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """See `model.mla.LatentCache`. `length` moves on only in `advance`, once all layers have stored."""
        time = latent_BTC.shape[1]
        stop = self.length + time
        self.store[layer, :, self.length : stop, : self.rank] = latent_BTC
        self.store[layer, :, self.length : stop, self.rank :] = key_rope_BTR
        kept = self.store[layer, :, :stop]
        slots = torch.arange(stop, device=kept.device)
        queries = torch.arange(self.length, stop, device=kept.device)
        visible = (slots[None, None, :] <= queries[None, :, None]) & (slots[None, None, :] >= self.skip[:, None, None])
        # A query in a skipped slot sees itself, so that its (unused) softmax stays finite.
        visible |= slots[None, None, :] == queries[None, :, None]
        mask = torch.zeros(visible.shape, dtype=torch.float32, device=kept.device).masked_fill_(~visible, -math.inf)
        return kept, mask

    def advance(self, time: int) -> None:
        self.length += time
