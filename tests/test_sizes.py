"""Sizes against published numbers and against an independent count of every matrix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.config import ModelConfig
from moonbase.layout import checkpoint_layout
from moonbase.presets import preset_config
from moonbase.sizes import (
    decode_flops_per_token,
    forward_flops_per_token,
    kv_bytes_per_token,
    matmul_parameters,
    sizes,
    train_flops_per_token,
    weight_bytes,
)

GIB = 1024**3


@pytest.mark.parametrize(
    ("preset", "total", "attention", "kv_bytes"),
    [
        ("kimi-k2", 1_026_408_232_448, 101_124_096, 70_272),
        ("kimi-k2.5", 1_026_408_232_448, 101_124_096, 70_272),
        ("deepseek-v3", 671_026_419_200, 187_107_328, 70_272),
        ("moonlight-16b", 15_960_110_208, 13_763_072, 31_104),
    ],
)
def test_published_networks_to_the_last_digit(preset: str, total: int, attention: int, kv_bytes: int) -> None:
    facts = sizes(preset_config(preset))
    assert facts.parameters == total
    assert facts.attention_parameters_per_layer == attention
    assert facts.kv_bytes_per_token == kv_bytes


@pytest.mark.parametrize(
    ("preset", "active", "without_embeddings"),
    [("kimi-k2", 32.86e9, 30.51e9), ("deepseek-v3", 37.55e9, 35.70e9), ("moonlight-16b", 2.915e9, 2.244e9)],
)
def test_active_parameters_as_published(preset: str, active: float, without_embeddings: float) -> None:
    facts = sizes(preset_config(preset))
    assert facts.active_parameters == pytest.approx(active, rel=2e-4)
    assert facts.active_parameters_without_embeddings == pytest.approx(without_embeddings, rel=2e-4)


def test_one_expert_and_all_routed_experts() -> None:
    config = preset_config("kimi-k2")
    assert sizes(config).expert_parameters == 3 * 7168 * 2048 == 44_040_192
    routed = sum(tensor.numel for tensor in checkpoint_layout(config) if tensor.kind == "expert")
    assert routed == 60 * 384 * 44_040_192  # 1014.7B, 98.9% of the network


def test_mtp_module_of_deepseek_v3() -> None:
    """The card says 11.5B for the module's own weights; the layer is like any other, plus eh_proj and three norms."""
    config = preset_config("deepseek-v3")
    facts = sizes(config)
    layer = sum(t.numel for t in checkpoint_layout(config) if t.name.startswith("model.layers.60."))
    assert facts.mtp_parameters == layer + 2 * 7168 * 7168 + 3 * 7168
    assert facts.mtp_parameters == pytest.approx(11.5e9, rel=0.02)


def test_sparse_attention_indexer() -> None:
    layer = [t for t in checkpoint_layout(preset_config("deepseek-v3.2"), mtp=False) if ".indexer." in t.name]
    assert sum(t.numel for t in layer) / 61 == pytest.approx(13.96e6, rel=1e-3)
    gap = sizes(preset_config("deepseek-v3.2")).parameters - sizes(preset_config("deepseek-v3")).parameters
    assert gap == sum(t.numel for t in layer)


def test_int4_expert_storage_of_kimi_k25() -> None:
    config = preset_config("kimi-k2.5")
    weights = 60 * 384 * 2048 * 7168
    packed, scales = weights // 2, weights // 32 * 2
    assert packed / GIB == 157.5
    assert scales / GIB == pytest.approx(19.69, abs=0.005)
    experts_bf16 = 3 * weights * 2
    shapes = 60 * 384 * 3 * 8
    assert weight_bytes(config, "bf16") - weight_bytes(config, "int4") == experts_bf16 - 3 * (packed + scales) - shapes


def test_published_checkpoint_sizes() -> None:
    """K2-Instruct in fp8 is 1029 GB on disk; K2-Thinking, INT4 without a vision part, 594 GB."""
    assert round(weight_bytes(preset_config("kimi-k2"), "fp8") / 1e9) == 1029
    assert round(weight_bytes(preset_config("kimi-k2"), "int4") / 1e9) == 594


def test_router_bias_is_fp32_in_every_format() -> None:
    config = preset_config("kimi-k2")
    assert weight_bytes(config, "bf16") == 2 * sizes(config).parameters + 2 * 60 * 384


def test_kv_cache_at_full_context() -> None:
    config = preset_config("kimi-k2.5")
    assert kv_bytes_per_token(config) == 61 * 576 * 2
    assert kv_bytes_per_token(config) * 262_144 / GIB == pytest.approx(17.2, abs=0.05)
    assert kv_bytes_per_token(config) * 131_072 / GIB == pytest.approx(8.6, abs=0.05)
    assert kv_bytes_per_token(config, bytes_per_value=1) == kv_bytes_per_token(config) // 2


def test_flops_written_out_for_kimi_k2() -> None:
    """2 FLOPs per weight that multiplies, plus attention over half the context; absorbed decode reads the latent."""
    config, context = preset_config("kimi-k2"), 4096
    attention = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168
    expert = 3 * 7168 * 2048
    weights = 61 * attention + 3 * 7168 * 18432 + 60 * (384 * 7168 + 9 * expert) + 7168 * 163840
    assert matmul_parameters(config) == weights
    forward = 2 * weights + 61 * 64 * 2 * (192 + 128) * context // 2
    assert forward_flops_per_token(config, context) == forward
    assert train_flops_per_token(config, context) == 3 * forward
    assert decode_flops_per_token(config, context) == 2 * weights + 61 * 64 * 2 * (512 + 64 + 512) * context


def test_flops_grow_with_context() -> None:
    config = preset_config("moonlight-16b")
    assert train_flops_per_token(config, 8192) > train_flops_per_token(config, 4096)
    assert sizes(config, 1).train_flops_per_token == pytest.approx(6 * matmul_parameters(config), rel=1e-4)


def test_sparse_attention_caps_the_decode_cost() -> None:
    dense, sparse = preset_config("deepseek-v3"), preset_config("deepseek-v3.2")
    assert decode_flops_per_token(sparse, 131_072) < 0.3 * decode_flops_per_token(dense, 131_072)


def test_preset_sizes_as_designed() -> None:
    nano = sizes(preset_config("nano"))
    assert nano.parameters == pytest.approx(1.27e9, rel=0.005)
    head = 32768 * 1024
    assert nano.active_parameters - head == pytest.approx(0.27e9, rel=0.01)
    pico = sizes(preset_config("pico"))
    assert pico.parameters < 8e6, "two cores have minutes"
    assert pico.active_parameters < 0.7 * pico.parameters


@st.composite
def _networks(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    experts = draw(st.sampled_from([4, 8]))
    return ModelConfig(
        vocab_size=draw(st.integers(8, 300)),
        hidden_size=draw(st.integers(1, 9)) * 8,
        intermediate_size=draw(st.integers(1, 300)),
        moe_intermediate_size=draw(st.integers(1, 300)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.none() | st.integers(1, 40)),
        kv_lora_rank=draw(st.integers(1, 140)),
        qk_nope_head_dim=draw(st.integers(1, 20)),
        qk_rope_head_dim=2 * draw(st.integers(1, 10)),
        v_head_dim=draw(st.integers(1, 20)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        n_shared_experts=draw(st.integers(0, 2)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        max_position_embeddings=64,
    )


@settings(max_examples=50, deadline=None)
@given(_networks())
def test_invariants_of_any_network(config: ModelConfig) -> None:
    facts = sizes(config, 64)
    idle = config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * facts.expert_parameters
    assert facts.parameters - facts.active_parameters == idle
    embedding = config.vocab_size * config.hidden_size
    assert facts.active_parameters - facts.active_parameters_without_embeddings == 2 * embedding
    assert (facts.mtp_parameters > 0) == (config.num_nextn_predict_layers > 0)
    with_names = [t.name.format(expert=e) for t in checkpoint_layout(config) for e in range(t.count)]
    assert len(with_names) == len(set(with_names))
    biases = config.num_moe_layers * config.n_routed_experts
    assert facts.weight_bytes["bf16"] == 2 * facts.parameters + 2 * biases
    # One fp32 scale per started 128 x 128 block: at worst four bytes beside a single weight.
    assert facts.parameters < facts.weight_bytes["fp8"] <= 5 * facts.parameters + 3 * biases


def test_no_torch_is_needed() -> None:
    code = """
import json, sys
from moonbase.presets import preset_config
from moonbase.sizes import sizes
print(json.dumps([sizes(preset_config("kimi-k2")).parameters, "torch" in sys.modules]))
"""
    root = Path(__file__).resolve().parents[1]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(answer.stdout) == [1_026_408_232_448, False]
