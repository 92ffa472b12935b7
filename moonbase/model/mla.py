"""Multi-head latent attention (DeepSeek-V2 §2.1, DeepSeek-V3 eq. 1-11, Kimi K2 §2.3).

Keys and values of all heads are read from one small latent per token, so a cache holds kv_lora_rank + qk_rope_head_dim
numbers per token and layer (576 for K2), whatever the number of heads. Training expands the latent into heads; decoding
absorbs the expansion into the query and reads the latent only.

Shapes: B batch, T time, D hidden, H heads, C kv latent, R rope dims, V value dims per head, K query and key dims per
head, X = C + R; N tokens of any number of sequences when decoding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.model.linear import Linear, RMSNorm
from moonbase.model.rope import rotate, rotated_heads
from moonbase.ops.attention import Documents, attention


class LatentCache(Protocol):
    """What decoding needs of a cache; the engine owns the real one, which also knows whose tokens these are."""

    def attend(
        self, layer: int, query_NHX: Tensor, latent_NC: Tensor, key_rope_NR: Tensor, scale: float
    ) -> Tensor:
        """Store N new tokens of any number of sequences, then let each read what its sequence may see [N, H, C]."""
        ...


class LatentAttention(nn.Module):
    """MLA with a low-rank query (`q_lora_rank` set) or a plain one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents | None, clip_threshold: float | None
    ) -> tuple[Tensor, Tensor]:
        """Expanded form. Returns [B, T, D] and the largest logit of each head [H] as `ops.attention` defines it."""
        config = self.config
        query_BTHK, latent_BTC, key_rope = self._low_rank(x_BTD)
        expanded = self.kv_b_proj(latent_BTC).unflatten(-1, (config.num_attention_heads, -1))
        query_BTHK, key_BTHK, value_BTHV = rotated_heads(query_BTHK, expanded, key_rope, *rotation)
        output_BTHV, max_logit_H = attention(
            query_BTHK, key_BTHK, value_BTHV, config.softmax_scale, documents, clip_threshold)
        return self.o_proj(output_BTHV.flatten(2)), max_logit_H

    def decode(self, x_ND: Tensor, rotation: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
        """Absorbed form for N tokens of any sequences: scores and values come straight from the latents. [N, D].

        q̃ = W_UKᵀ q, logits = [q̃; q_R]·[c; k_R], o = W_UV (p·c): the latent is never expanded (DeepSeek-V3.2 appendix).
        Logits stay in fp32, as they do in every fused kernel.
        """
        config = self.config
        query_nope, query_rope, latent_NC, key_rope = self._project(x_ND, rotation)
        weight_HXC = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        weight_key, weight_value = weight_HXC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        absorbed = torch.bmm(query_nope.transpose(0, 1), weight_key).transpose(0, 1)
        query_NHX = torch.cat([absorbed, query_rope], dim=-1)
        read_NHC = cache.attend(self.layer, query_NHX, latent_NC, key_rope.squeeze(-2), config.softmax_scale)
        output_HNV = torch.bmm(read_NHC.transpose(0, 1), weight_value.transpose(1, 2))
        return self.o_proj(output_HNV.transpose(0, 1).flatten(1))

    def _project(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [B,T,H,N] and its rotated part [B,T,H,R], normalised latent [B,T,C], rotated shared key [B,T,1,R].

        Decoding has one leading dim instead of two.
        """
        config, (cos, sin) = self.config, rotation
        query, latent_BTC, key_rope = self._low_rank(x_BTD)
        query_nope, query_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return (query_nope, rotate(query_rope, cos, sin), latent_BTC, rotate(key_rope.unsqueeze(-2), cos, sin))

    def _low_rank(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,T,H,K], normalised latent [B,T,C] and shared key [B,T,R], nothing rotated yet."""
        config = self.config
        if config.q_lora_rank is None:
            query = self.q_proj(x_BTD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        latent_BTC, key_rope = self.kv_a_proj_with_mqa(x_BTD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return query.unflatten(-1, (config.num_attention_heads, -1)), self.kv_a_layernorm(latent_BTC), key_rope
