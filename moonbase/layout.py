"""Every tensor of a checkpoint, from the configuration alone: the one list that sizes, readers and writers share.

Names and shapes are those of the published checkpoints (Hugging Face layout, experts one by one). No tensor is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from moonbase.config import ModelConfig

FP8_BLOCK = (128, 128)
"""Rows and columns that share one fp32 scale."""
FP8_KINDS = frozenset({"attention", "dense", "shared", "expert", "indexer"})
"""What the published fp8 files quantise; router, embeddings, head, norms and eh_proj stay bf16."""
INT4_GROUP = 32
"""Columns that share one bf16 scale."""
INT4_KINDS = frozenset({"expert"})
Int4Rule = Literal["absmax/7", "absmax/7.5", "least-error"]
"""How a group of INT4 weights gets its scale (`ops.int4`)."""


class TensorSpec(NamedTuple):
    """One tensor on disk, or `count` equal ones: `{expert}` in the name then stands for the expert's number."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """embedding, head, norm, bias, router, attention, dense, shared, expert, indexer, indexer_small (kept unquantised),
    mtp (eh_proj), or copy (of the embedding or the head)."""
    count: int = 1

    @property
    def numel(self) -> int:
        """Elements of all `count` tensors together."""
        return math.prod(self.shape) * self.count


def checkpoint_layout(config: ModelConfig, mtp: bool = True) -> Iterator[TensorSpec]:
    """Yield every tensor in the published order; `mtp=False` leaves the multi-token-prediction modules out.

    The MTP modules repeat the embedding and the head under their own names, as DeepSeek-V3's files do; these copies
    have kind `copy`.
    """
    hidden = config.hidden_size
    yield TensorSpec("model.embed_tokens.weight", (config.vocab_size, hidden), "embedding")
    for layer in range(config.num_hidden_layers):
        yield from _layer_layout(config, f"model.layers.{layer}.", dense=layer < config.first_k_dense_replace)
    yield TensorSpec("model.norm.weight", (hidden,), "norm")
    yield TensorSpec("lm_head.weight", (config.vocab_size, hidden), "head")
    for module in range(config.num_nextn_predict_layers if mtp else 0):
        prefix = f"model.layers.{config.num_hidden_layers + module}."
        yield TensorSpec(prefix + "embed_tokens.weight", (config.vocab_size, hidden), "copy")
        yield TensorSpec(prefix + "enorm.weight", (hidden,), "norm")
        yield TensorSpec(prefix + "hnorm.weight", (hidden,), "norm")
        yield TensorSpec(prefix + "eh_proj.weight", (hidden, 2 * hidden), "mtp")
        yield from _layer_layout(config, prefix, dense=False)
        yield TensorSpec(prefix + "shared_head.norm.weight", (hidden,), "norm")
        yield TensorSpec(prefix + "shared_head.head.weight", (config.vocab_size, hidden), "copy")


def _layer_layout(config: ModelConfig, prefix: str, dense: bool) -> Iterator[TensorSpec]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    yield TensorSpec(prefix + "input_layernorm.weight", (hidden,), "norm")
    attention = prefix + "self_attn."
    if config.q_lora_rank is None:
        yield TensorSpec(attention + "q_proj.weight", (heads * config.qk_head_dim, hidden), "attention")
    else:
        yield TensorSpec(attention + "q_a_proj.weight", (config.q_lora_rank, hidden), "attention")
        yield TensorSpec(attention + "q_a_layernorm.weight", (config.q_lora_rank,), "norm")
        yield TensorSpec(attention + "q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank), "attention")
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    yield TensorSpec(attention + "kv_a_proj_with_mqa.weight", (latent, hidden), "attention")
    yield TensorSpec(attention + "kv_a_layernorm.weight", (config.kv_lora_rank,), "norm")
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield TensorSpec(attention + "kv_b_proj.weight", (expanded, config.kv_lora_rank), "attention")
    yield TensorSpec(attention + "o_proj.weight", (hidden, heads * config.v_head_dim), "attention")
    if config.index_n_heads is not None:
        assert config.index_head_dim is not None
        queries = config.index_n_heads * config.index_head_dim
        yield TensorSpec(attention + "indexer.wq_b.weight", (queries, config.q_lora_rank or hidden), "indexer")
        yield TensorSpec(attention + "indexer.wk.weight", (config.index_head_dim, hidden), "indexer")
        yield TensorSpec(attention + "indexer.k_norm.weight", (config.index_head_dim,), "indexer_small")
        yield TensorSpec(attention + "indexer.k_norm.bias", (config.index_head_dim,), "indexer_small")
        yield TensorSpec(attention + "indexer.weights_proj.weight", (config.index_n_heads, hidden), "indexer_small")
    yield TensorSpec(prefix + "post_attention_layernorm.weight", (hidden,), "norm")
    mlp = prefix + "mlp."
    if dense:
        yield from _ffn_layout(mlp, hidden, config.intermediate_size, "dense")
        return
    yield TensorSpec(mlp + "gate.weight", (config.n_routed_experts, hidden), "router")
    yield TensorSpec(mlp + "gate.e_score_correction_bias", (config.n_routed_experts,), "bias")
    width = config.moe_intermediate_size
    yield from _ffn_layout(mlp + "experts.{expert}.", hidden, width, "expert", config.n_routed_experts)
    if config.n_shared_experts:
        yield from _ffn_layout(mlp + "shared_experts.", hidden, config.n_shared_experts * width, "shared")


def _ffn_layout(prefix: str, hidden: int, width: int, kind: str, count: int = 1) -> Iterator[TensorSpec]:
    yield TensorSpec(prefix + "gate_proj.weight", (width, hidden), kind, count)
    yield TensorSpec(prefix + "up_proj.weight", (width, hidden), kind, count)
    yield TensorSpec(prefix + "down_proj.weight", (hidden, width), kind, count)
