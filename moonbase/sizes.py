"""Parameters, FLOPs and bytes of a network, from its configuration alone (no tensor is made, torch is not imported).

Conventions, stated because published figures differ:
- `parameters` counts everything a checkpoint without MTP holds, router bias included.
- `active_parameters` is what one token touches: all of it, with only `num_experts_per_tok` of the routed experts.
- A multiply-add is 2 FLOPs; the embedding look-up, norms, rope, softmax and the router's top-k are not counted.
- Training is three forward passes (one forward, two in the backward); causal attention sees half the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moonbase.config import ModelConfig
from moonbase.layout import FP8_BLOCK, FP8_KINDS, INT4_GROUP, INT4_KINDS, TensorSpec, checkpoint_layout

if TYPE_CHECKING:
    from moonbase.recipe import Recipe

LOGITS_AT_ONCE = 64 << 20
"""How many logits the loss makes together (`ops.cross_entropy`)."""
MUON_WORKSPACE = 1 << 30
"""Bytes that Newton-Schulz works in on a GPU (`ops.newton_schulz`)."""


@dataclass(frozen=True)
class Sizes:
    """What `moonbase info` prints."""

    parameters: int
    active_parameters: int
    active_parameters_without_embeddings: int
    mtp_parameters: int
    attention_parameters_per_layer: int
    expert_parameters: int
    train_flops_per_token: int
    decode_flops_per_token: int
    weight_bytes: dict[str, int]
    kv_bytes_per_token: int
    context: int


def sizes(config: ModelConfig, context: int = 4096) -> Sizes:
    """Sizes of `config`; the FLOPs are those of a token in sequences of `context` (training) or after it (decoding)."""
    tensors = list(checkpoint_layout(config, mtp=False))
    total = sum(tensor.numel for tensor in tensors)
    active = sum(_active(config, tensor) for tensor in tensors)
    embeddings = sum(tensor.numel for tensor in tensors if tensor.kind in ("embedding", "head"))
    everything = list(checkpoint_layout(config, mtp=True))
    first = "model.layers.0.self_attn."
    first_attention = [t for t in tensors if t.name.startswith(first) and not t.kind.startswith("indexer")]
    return Sizes(
        parameters=total,
        active_parameters=active,
        active_parameters_without_embeddings=active - embeddings,
        mtp_parameters=sum(t.numel for t in everything if t.kind != "copy") - total,
        attention_parameters_per_layer=sum(tensor.numel for tensor in first_attention),
        expert_parameters=3 * config.hidden_size * config.moe_intermediate_size,
        train_flops_per_token=train_flops_per_token(config, context),
        decode_flops_per_token=decode_flops_per_token(config, context),
        weight_bytes={name: weight_bytes(config, name) for name in ("bf16", "fp8", "int4")},
        kv_bytes_per_token=kv_bytes_per_token(config),
        context=context,
    )


def _active(config: ModelConfig, tensor: TensorSpec) -> int:
    if tensor.kind == "expert":
        return tensor.numel // tensor.count * config.num_experts_per_tok
    return tensor.numel


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: the active ones less embedding, norms and biases."""
    skipped = ("embedding", "norm", "bias")
    return sum(_active(config, t) for t in checkpoint_layout(config, mtp=False) if t.kind not in skipped)


def forward_flops_per_token(config: ModelConfig, context: int) -> int:
    """One forward pass, expanded (training) form of MLA, causal attention: a token sees context/2 others on average."""
    per_pair = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * matmul_parameters(config) + config.num_hidden_layers * per_pair * context // 2


def train_flops_per_token(config: ModelConfig, context: int) -> int:
    """Forward and backward. With MTP modules the extra layer is not counted."""
    return 3 * forward_flops_per_token(config, context)


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """One decoded token after `context` others, absorbed form of MLA: scores and values are read from the latent."""
    seen = context if config.index_topk is None else min(context, config.index_topk)
    per_pair = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    flops = 2 * matmul_parameters(config) + config.num_hidden_layers * per_pair * seen
    if config.index_n_heads is not None:
        flops += config.num_hidden_layers * 2 * config.index_n_heads * config.index_head_dim * context
    return flops


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, bf16 unless told otherwise."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def weight_bytes(config: ModelConfig, fmt: str) -> int:
    """Bytes of the published storage formats: `bf16`, `fp8` (128×128 blocks, fp32 scales), `int4` (routed experts only,
    groups of 32, bf16 scales, plus two int32 of shape per tensor). Router biases stay fp32 everywhere."""
    return sum(_tensor_bytes(tensor, fmt) for tensor in checkpoint_layout(config, mtp=False))


def _tensor_bytes(tensor: TensorSpec, fmt: str) -> int:
    if tensor.kind == "bias":
        return 4 * tensor.numel
    if fmt == "fp8" and tensor.kind in FP8_KINDS:
        blocks = math.prod(-(-size // block) for size, block in zip(tensor.shape, FP8_BLOCK, strict=True))
        return tensor.numel + 4 * blocks * tensor.count
    if fmt == "int4" and tensor.kind in INT4_KINDS:
        rows, columns = tensor.shape
        packed = rows * -(-columns // 8) * 4
        scales = rows * -(-columns // INT4_GROUP) * 2
        return (packed + scales + 8) * tensor.count
    return 2 * tensor.numel


def training_memory(recipe: Recipe) -> dict[str, int]:
    """Bytes of GPU memory that a recipe takes on one GPU, part by part; their sum is about its peak.

    What lasts from step to step is exact. Activations are counted from what each operation keeps, see `_activations`.
    All parts are added up as if they were there together, which they nearly are in the backward pass of the last
    block. `nano`, 16 × 2048 tokens, a whole step: 46.7 GiB counted, 46.1 measured on an H200.
    """
    groups = {"matrices": 0, "experts": 0, "tables": 0, "gains": 0}
    for tensor in checkpoint_layout(recipe.model):
        kind = {"expert": "experts", "embedding": "tables", "head": "tables", "norm": "gains"}.get(tensor.kind)
        if tensor.kind not in ("bias", "copy"):
            groups[kind or "matrices"] += tensor.numel
    tables, gains = groups["tables"], groups["gains"]
    matrices = groups["matrices"] + groups["experts"]
    in_bf16 = recipe.masters != "fp32"
    wide = 4  # bytes of fp32
    computed, kept = (2 if recipe.precision != "fp32" else wide), (2 if in_bf16 else wide)
    all_moments = 2 * (tables + matrices) if recipe.optimizer.name == "adamw" else matrices + 2 * tables
    parts = {
        "weights": computed * (matrices + tables + gains),
        "masters": (wide * gains if computed == 2 else 0) if in_bf16 else
                   wide * (matrices + tables + gains) * (computed == 2),
        "second halves of the weights": 2 * (matrices + tables) if recipe.masters == "compensated" else 0,
        "momentum and moments": kept * all_moments + 2 * wide * gains,
    }
    if recipe.gradients == "freed":
        block = 3 * recipe.model.n_routed_experts * recipe.model.moe_intermediate_size * recipe.model.hidden_size
        parts["gradients"] = 2 * (groups["matrices"] + max(block, tables // 2)) + wide * gains
    else:
        parts["gradients"] = kept * (matrices + tables) + wide * gains
    if recipe.qat is not None and computed == wide:
        parts["quantised experts"] = wide * groups["experts"]
    tokens = (recipe.micro_batch_size or recipe.batch_size) * recipe.sequence_length
    per_layer, working = _activations(recipe.model, recipe.recompute)
    vocabulary, hidden = recipe.model.vocab_size, recipe.model.hidden_size
    layers = recipe.model.num_hidden_layers + recipe.model.num_nextn_predict_layers
    parts["activations kept"] = computed * tokens * (layers * per_layer + 3 * hidden)
    parts["one block at work"] = computed * tokens * working
    # Its gradient is summed in fp32 and then handed on in the weights' dtype.
    parts["head and loss"] = (wide + computed) * vocabulary * hidden + 2 * computed * max(256 * vocabulary,
                                                                                         LOGITS_AT_ONCE)
    parts["Muon workspace"] = 0 if recipe.optimizer.name == "adamw" else MUON_WORKSPACE
    return parts


def least_training_bytes(recipe: Recipe) -> int:
    """What a recipe needs whatever its batch: weights, gradients and one moment in fp32, 12 bytes a parameter; or,
    without fp32 masters, what lasts from step to step and the gradients."""
    if recipe.masters == "fp32":
        copies = sum(tensor.numel for tensor in checkpoint_layout(recipe.model) if tensor.kind in INT4_KINDS)
        return 12 * sizes(recipe.model).parameters + (4 * copies if recipe.qat else 0)
    names = ("weights", "masters", "second halves of the weights", "momentum and moments", "gradients")
    parts = training_memory(recipe)
    return sum(parts[name] for name in names)


def _activations(config: ModelConfig, recompute: str) -> tuple[int, int]:
    """Numbers per token: kept of each layer until the backward pass reaches it, and held while one block is at work
    there (all that it keeps without recomputation, and its gradients)."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    chosen, shared = config.num_experts_per_tok, (config.n_shared_experts or 0) * config.moe_intermediate_size
    query, value = heads * config.qk_head_dim, heads * config.v_head_dim
    latents = (config.q_lora_rank or 0) * 2 + config.kv_lora_rank * 2 + config.qk_rope_head_dim
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = latents + expanded + 3 * query + value  # projected and rotated query, whole keys, output
    # Two norms, two residual sums, what attention and experts return; the router's input is fp32.
    everything = attention + 8 * hidden + 2 * chosen * width + 3 * shared
    # Backward of the experts: gathered gradients, inputs and their gradients; activations, pre-activations, gradients.
    passing = chosen * (3 * hidden + 4 * width) + 2 * hidden + 3 * shared
    if recompute == "none":
        return everything, passing
    if recompute == "full":
        # Nine quarters: what the compiler was seen to hold on an H200 (docs/log.md, recomputation), unexplained.
        return hidden, 9 * (everything + passing) // 4
    products = latents + value + 2 * hidden + 2 * shared
    return hidden + products, everything - products + passing
