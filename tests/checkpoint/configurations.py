"""Tiny configurations beyond the published ones: drawn at random, and a set in which every two settings meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any

import torch
from hypothesis import strategies as st

from moonbase.config import ModelConfig
from moonbase.model import Transformer
from tests.checkpoint.variants import BASE, yarn

# Every value that the proof must contain.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "q_lora_rank": (None, 20),
    "n_group, topk_group": ((1, 1), (2, 1), (4, 1), (4, 2), (4, 3)),
    "first_k_dense_replace": (1, 2, 3),
    "factor": (None, 1, 32, 40, 64),
    "n_shared_experts": (1, 2),
    "num_nextn_predict_layers": (0, 1),
    "num_attention_heads": (1, 4),
    "norm_topk_prob": (False, True),
}
# YaRN's mscale and mscale_all_dim; a zero is where implementations differ.
TEMPERATURES = ((1.0, 1.0), (0.707, 1.0), (0.707, 0.707), (1.0, 0.0), (0.707, 0.0), (0.0, 1.0))
Choice = dict[str, Any]


def pairs_of(choice: Choice) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(combinations(choice.items(), 2))


def covering_choices() -> list[Choice]:
    """Choices in which every value of every setting meets every value of every other one, found greedily."""
    every = [dict(zip(SETTINGS, values, strict=True)) for values in product(*SETTINGS.values())]
    missing = set().union(*map(pairs_of, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda choice: len(pairs_of(choice) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def values_of(choice: Choice, **others: Any) -> dict[str, Any]:
    """The Hugging Face configuration of a choice, `others` changed."""
    choice = dict(choice)
    n_group, topk_group = choice.pop("n_group, topk_group")
    factor = choice.pop("factor")
    values = BASE | choice | dict(
        n_group=n_group, topk_group=topk_group, num_key_value_heads=choice["num_attention_heads"],
        num_hidden_layers=choice["first_k_dense_replace"] + 1, initializer_range=0.15, rope_theta=100.0)
    if factor is not None:
        # Long enough for the two bounds of YaRN's blending to lie apart.
        values["rope_scaling"] = yarn(factor, 32.0) | dict(original_max_position_embeddings=256)
    return values | others


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any of the settings with any widths, odd ones too, and any temperature of YaRN."""
    choice = {name: draw(st.sampled_from(values), label=name) for name, values in SETTINGS.items()}
    n_group, topk_group = choice["n_group, topk_group"]
    per_group = draw(st.integers(2, 8 // n_group + 1))
    heads, hidden = draw(st.integers(1, 5)), draw(st.integers(12, 48))
    if choice["q_lora_rank"] is not None:
        choice["q_lora_rank"] = draw(st.integers(4, 32))
    values = values_of(
        choice, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads,
        num_hidden_layers=choice["first_k_dense_replace"] + draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(40, 120)), intermediate_size=draw(st.integers(8, 70)),
        moe_intermediate_size=draw(st.integers(4, 40)), kv_lora_rank=draw(st.integers(4, 24)),
        qk_nope_head_dim=draw(st.integers(2, 20)), qk_rope_head_dim=2 * draw(st.integers(1, 5)),
        v_head_dim=draw(st.integers(2, 20)), n_routed_experts=n_group * per_group,
        num_experts_per_tok=draw(st.integers(1, min(4, per_group * topk_group))),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.446, 2.827])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 50000.0])),
        # The spread of logits, of attention's too, is the same for every width.
        initializer_range=1.2 * hidden**-0.5)
    if "rope_scaling" in values:
        mscale, mscale_all_dim = draw(st.sampled_from(TEMPERATURES))
        values["rope_scaling"] |= dict(mscale=mscale, mscale_all_dim=mscale_all_dim,
                                       beta_fast=draw(st.sampled_from([1.0, 32.0])),
                                       original_max_position_embeddings=draw(st.sampled_from([16, 64, 256])))
    return values


# --- what would be wrong ----------------------------------------------------------------------------------------------


def misread(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """The same weights under a configuration of which one piece was misunderstood: name of the piece, configuration."""
    changes: dict[str, Any] = {"rope_theta": dict(rope_theta=2 * config.rope_theta),
                               "norm_topk_prob": dict(norm_topk_prob=not config.norm_topk_prob),
                               "routed_scaling_factor": dict(routed_scaling_factor=1.05 * config.routed_scaling_factor)}
    if config.n_group > 1:
        changes["n_group"] = dict(n_group=1, topk_group=1)
    if 1 < config.topk_group:
        changes["topk_group"] = dict(topk_group=config.topk_group - 1)
    if config.rope_scaling is not None and config.rope_scaling.factor > 1:
        scaling = config.rope_scaling
        changes["rope_scaling"] = dict(rope_scaling=None)
        changes["mscale"] = dict(rope_scaling=scaling.model_copy(update={"mscale": 0.5}))
        changes["mscale_all_dim"] = dict(rope_scaling=scaling.model_copy(update={"mscale_all_dim": 0.0, "mscale": 0.0}))
        changes["factor"] = dict(rope_scaling=scaling.model_copy(update={"factor": 0.8 * scaling.factor}))
        changes["beta_fast"] = dict(rope_scaling=scaling.model_copy(update={"beta_fast": 1.0}))
    for name, change in changes.items():
        yield name, config.model_copy(update=change)


def _swap_halves(stack: torch.Tensor) -> torch.Tensor:
    return torch.cat(stack.chunk(2, dim=1)[::-1], dim=1)


def _untwist(weight: torch.Tensor, rope_dims: int) -> torch.Tensor:
    """Rope rows as files of half-split rotation would have them."""
    rows = weight[-rope_dims:]
    return torch.cat([weight[:-rope_dims], rows[0::2], rows[1::2]])


def misplaced(model: Transformer) -> Iterator[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]]:
    """One tensor filled wrongly: what was mistaken, the tensor's name, and what it becomes."""
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    rope_dims = model.config.qk_rope_head_dim
    yield "gate and up", last + "mlp.experts.gate_up_proj", _swap_halves
    yield "order of experts", last + "mlp.experts.down_proj", lambda stack: stack.roll(1, 0)
    yield "router bias", last + "mlp.gate.e_score_correction_bias", torch.zeros_like
    yield "gains of the latent", last + "self_attn.kv_a_layernorm.weight", torch.ones_like
    yield "pairs of rope", last + "self_attn.kv_a_proj_with_mqa.weight", lambda weight: _untwist(weight, rope_dims)
    yield "shared experts", last + "mlp.shared_experts.down_proj.weight", torch.zeros_like
