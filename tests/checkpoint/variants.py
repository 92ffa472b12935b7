"""Tiny models of every variant, made by transformers, and what the tests of this room do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moonbase.checkpoint import load_weights, read_config
from moonbase.checkpoint.formats import dequantize_fp8, quantize_fp8, quantize_int4
from moonbase.checkpoint.names import checkpoint_pieces, model_shapes
from moonbase.checkpoint.quantization import quantization_block
from moonbase.ops.int4_packed import dequantize_int4

SENTINEL = -12345.0

BASE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=32, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
    topk_group=1, n_shared_experts=1, num_nextn_predict_layers=0, norm_topk_prob=True, routed_scaling_factor=2.446,
    rms_norm_eps=1e-6, rope_theta=50000.0, max_position_embeddings=1024, initializer_range=0.1, bos_token_id=1,
    eos_token_id=2,
)


def yarn(factor: float, beta_fast: float) -> dict[str, Any]:
    return dict(type="yarn", factor=factor, original_max_position_embeddings=16, beta_fast=beta_fast, beta_slow=1.0,
                mscale=1.0, mscale_all_dim=1.0)


VARIANTS: dict[str, dict[str, Any]] = {
    "moonlight": dict(q_lora_rank=None, n_shared_experts=2, rms_norm_eps=1e-5),
    "k2": dict(rope_scaling=yarn(32, 1.0), routed_scaling_factor=2.827),
    "k2.5": dict(rope_scaling=yarn(64, 32.0), rms_norm_eps=1e-5, first_k_dense_replace=1),
    "v3": dict(rope_scaling=yarn(40, 32.0), n_group=4, topk_group=2, first_k_dense_replace=3, num_hidden_layers=4,
               rope_theta=10000.0, routed_scaling_factor=2.5, num_nextn_predict_layers=1),
    "groups-no-lora": dict(q_lora_rank=None, n_group=4, topk_group=2, first_k_dense_replace=2, n_shared_experts=2,
                           rope_scaling=yarn(1, 32.0), num_experts_per_tok=3),
    "all-sparse": dict(first_k_dense_replace=0, num_hidden_layers=2, norm_topk_prob=False),
}


def hf_values(variant: str) -> dict[str, Any]:
    return BASE | VARIANTS[variant]


def hf_model(values: dict[str, Any], seed: int = 0):
    """A transformers model with nothing at its default: gains and router biases are random too."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**values)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
            if "e_score_correction_bias" in name:
                tensor.copy_(0.1 * torch.randn(tensor.shape))
    return model


def add_mtp(folder: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    """Put a multi-token-prediction module, named as DeepSeek-V3's files do, into a folder with one weight file."""
    values = json.loads((folder / "config.json").read_text())
    layers, hidden = values["num_hidden_layers"], values["hidden_size"]
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    last = f"model.layers.{layers - 1}."
    prefix = f"model.layers.{layers}."
    module = {prefix + name.removeprefix(last): torch.randn(tensor.shape, generator=generator) * 0.1
              for name, tensor in tensors.items() if name.startswith(last)}
    assert any(".experts." in name for name in module)
    for name, shape in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden)),
                        ("shared_head.norm", (hidden,))):
        module[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator)
    module[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    module[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | module, folder / "model.safetensors", metadata={"format": "pt"})
    return module


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty_state(config, mtp: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, SENTINEL, dtype=torch.float32 if "bias" in name else dtype)
            for name, shape in model_shapes(config, mtp).items()}


def load(folder: Path, mtp: bool = True, **options) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    state = empty_state(config, mtp)
    load_weights(state, folder, config, mtp=mtp, **options)
    return state


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def quantise_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Store the folder's matrices as DeepSeek does; returns what they mean, by disk name."""
    tensors = load_file(folder / "model.safetensors")
    stored, meaning = {}, {}
    for piece in checkpoint_pieces(read_config(folder), mtp=False):
        tensor = meaning[piece.disk] = tensors[piece.disk]
        stored[piece.disk] = tensor
        if piece.kind in ("attention", "dense", "shared", "expert"):
            stored[piece.disk], scale = quantize_fp8(tensor)
            stored[piece.disk + "_scale_inv"] = scale
            meaning[piece.disk] = dequantize_fp8(stored[piece.disk], scale)
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config=quantization_block("hf-fp8"))
    return meaning


def quantise_int4(folder: Path, shape_dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    """Store the folder's routed experts as Kimi K2.5 does; returns what they mean, by disk name."""
    tensors = load_file(folder / "model.safetensors")
    meaning = dict(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        packed, scale = quantize_int4(weight)
        tensors |= {name + "_packed": packed, name + "_scale": scale,
                    name + "_shape": torch.tensor(weight.shape, dtype=shape_dtype)}
        meaning[name] = dequantize_int4(packed, scale)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=quantization_block("hf-int4"))
    return meaning


def as_disk(state: dict[str, torch.Tensor], config, mtp: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    for piece in checkpoint_pieces(config, mtp):
        tensor = state[piece.target]
        if piece.expert is not None:
            tensor = tensor[piece.expert, piece.row : piece.row + piece.shape[0]]
        found[piece.disk] = tensor
    return found
