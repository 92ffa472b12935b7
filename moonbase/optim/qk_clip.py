"""QK-Clip (Kimi K2 §2.1, Appendix D): heads whose attention logits grow too large get their query and key weights
shrunk.

Per head h let S_h be the largest scaled logit of the step, over all rows, micro-batches and processes. After the
optimizer step, where S_h > τ, with γ = τ / S_h: the head's content queries (W_qc) and keys (W_kc) are multiplied by √γ
each, its rotary queries (W_qr) by γ. The rotary key is shared by all heads and stays, as do the values. Every logit of
the head, content and rotary part alike, is then γ times what it was for the same latents; no other head changes.

What the maximum may be, so that it costs nothing. For one query let l_j be its scaled logits over the keys it may see
and L = log Σ_j exp(l_j), which every attention kernel computes for its softmax. All terms are positive, so exp(max_j
l_j) ≤ Σ_j exp(l_j) and max_j l_j ≤ L; with T keys also L ≤ max_j l_j + log T. A head whose L never exceeded τ
therefore has S_h ≤ τ, cannot need a clip, and may report L in place of S_h; only heads whose L exceeded τ need an
exact maximum. The rule below gives the same result for both, since it looks at the amount only above τ.

A maximum that is not finite tells nothing about how far to scale: the head is left alone. (The gradients of such a
step are not finite either, and the trainer's guard throws the step away.)

Shapes: L layers, H heads, N non-rope and R rope dims of a query, V value dims, D input dims of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moonbase.config import ModelConfig
from moonbase.optim.sharding import local_part, row_shard


class AttentionWeights(NamedTuple):
    """The two projections of one layer that the clip touches."""

    query: Tensor
    """q_b_proj, or q_proj where q_lora_rank is None: [H · (N + R), D]; rows of a head: N content, then R rotary."""
    key_value: Tensor
    """kv_b_proj: [H · (N + V), D]; rows of a head: N content keys, then V values."""


def attention_weights(named_parameters: Mapping[str, Tensor], config: ModelConfig) -> list[AttentionWeights]:
    """The clip's weights of every attention layer, in the order of the network: decoder layers, then MTP modules."""
    query = "q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"
    prefixes = [f"model.layers.{layer}.self_attn." for layer in range(config.num_hidden_layers)]
    prefixes += [f"mtp.{module}.layer.self_attn." for module in range(config.num_nextn_predict_layers)]
    return [AttentionWeights(named_parameters[prefix + query], named_parameters[prefix + "kv_b_proj.weight"])
            for prefix in prefixes if prefix + query in named_parameters]


def reduce_max_logits(max_logits: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Stack the layers' maxima [H] to [L, H] fp32 and take the maximum over the processes of `group` (all by default).

    NaN becomes infinity, which no process's maximum can hide. A collective call where torch.distributed is initialised.
    """
    stacked = torch.nan_to_num(torch.stack([m.float() for m in max_logits]), nan=torch.inf, posinf=torch.inf,
                               neginf=-torch.inf)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX, group=group)
    return stacked


def qk_clip_reference(weights: AttentionWeights, max_logit: Tensor, tau: float,
                      config: ModelConfig) -> AttentionWeights:
    """The clip of one layer, head by head, as new weights: the definition that `qk_clip_` is held to.

    max_logit: [H], the largest scaled logit of each head.
    """
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query, key_value = weights.query.clone(), weights.key_value.clone()
    for head, largest in enumerate(max_logit.tolist()):
        if tau < largest < math.inf:
            gamma = tau / largest
            query_start, key_start = head * (nope + rope), head * (nope + value)
            query[query_start : query_start + nope] *= math.sqrt(gamma)
            query[query_start + nope : query_start + nope + rope] *= gamma
            key_value[key_start : key_start + nope] *= math.sqrt(gamma)
    return AttentionWeights(query, key_value)


@torch.no_grad()
def qk_clip_(weights: Sequence[AttentionWeights], max_logit: Tensor, tau: float, config: ModelConfig,
             scale: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
    """Apply the clip in place to all layers at once; returns how many heads were clipped in each, int64 [L].

    max_logit: fp32 [L, H], for each head its largest scaled logit, or anything between that and τ where that is at
    most τ. Weights may be of any floating dtype, plain or sharded by rows (a head may lie across a border). Heads that
    need no clip keep their weights bit for bit. scale: multiplies the rows of a weight by factors in place, None as
    its dtype does; bf16 weights without masters need `MuonClip.scale_rows_`. Where masters and compute copies exist,
    pass the masters and copy afterwards. Nothing waits for the device.
    """
    heads = config.num_attention_heads
    assert max_logit.shape == (len(weights), heads), f"max_logit {tuple(max_logit.shape)} for {len(weights)} layers"
    assert tau > 0
    clipped = (max_logit > tau) & max_logit.isfinite()
    gamma = torch.where(clipped, tau / max_logit, 1.0).unsqueeze(-1)
    root = gamma.sqrt()
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query_rows = torch.cat([root.expand(-1, -1, nope), gamma.expand(-1, -1, rope)], dim=-1).flatten(1)
    untouched = torch.ones_like(root)
    key_value_rows = torch.cat([root.expand(-1, -1, nope), untouched.expand(-1, -1, value)], dim=-1).flatten(1)
    for layer, (query, key_value) in enumerate(weights):
        (scale or scale_rows_)(query, query_rows[layer])
        (scale or scale_rows_)(key_value, key_value_rows[layer])
    return clipped.sum(dim=-1)


@torch.no_grad()
def scale_rows_(weight: Tensor, factors: Tensor) -> None:
    """Multiply row i by factors[i] where it lives; a factor of exactly 1 changes no bit."""
    assert len(factors) == weight.shape[0], f"{weight.shape[0]} rows, {len(factors)} expected"
    shard = row_shard(weight)
    if shard is not None:
        factors = factors[shard.rows(weight.shape[0])]
    local_part(weight).mul_(factors.unsqueeze(-1))
