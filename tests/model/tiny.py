"""Tiny networks with nothing at its default value, for every test that needs a model."""

from __future__ import annotations

from typing import Any

import torch

from moonbase.config import ModelConfig
from moonbase.model import Transformer

BASE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=3, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=9, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
    routed_scaling_factor=2.5, rms_norm_eps=1e-5, max_position_embeddings=256, initializer_range=0.1,
)


def yarn(factor: float, beta_fast: float = 32.0) -> dict[str, Any]:
    return dict(type="yarn", factor=factor, original_max_position_embeddings=16, beta_fast=beta_fast, beta_slow=1.0,
                mscale=1.0, mscale_all_dim=1.0)


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig.parse(BASE | changes)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0, width: float = 0.3) -> torch.nn.Module:
    """Fill parameters and buffers from a seed: gains around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if "inv_freq" not in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * width + ("norm" in name))
    return module


def tiny_model(seed: int = 0, width: float = 0.3, **changes: Any) -> Transformer:
    return randomise(Transformer(tiny_config(**changes)), seed, width)


def hf_config(config: ModelConfig):
    """transformers' view of the same configuration, its plain attention and its plain loop over experts."""
    from transformers import DeepseekV3Config

    values = config.to_hf()
    theirs = DeepseekV3Config(**values)
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    return theirs


def random_documents(generator: torch.Generator, batch: int, time: int, chance: float = 0.2) -> torch.Tensor:
    """Document numbers int32 [B, T], non-decreasing."""
    return (torch.rand(batch, time, generator=generator) < chance).cumsum(1).to(torch.int32)
