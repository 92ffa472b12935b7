"""Multi-head latent attention: absorbed = expanded = transformers', and what a token may see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.model.mla import LatentAttention
from moonbase.model.rope import rotations
from moonbase.ops.attention import Documents
from tests.model.tiny import hf_config, random_documents, randomise, tiny_config, yarn

VARIANTS: dict[str, dict[str, Any]] = {
    "query latent": {},
    "plain query": dict(q_lora_rank=None),
    "yarn": dict(rope_scaling=yarn(40)),
    "plain query, yarn": dict(q_lora_rank=None, rope_scaling=yarn(32, beta_fast=1.0)),
}


def layer(seed: int = 0, **changes: Any) -> LatentAttention:
    return randomise(LatentAttention(tiny_config(**changes), 0), seed)


def hidden(batch: int, time: int, seed: int = 1, dims: int = 32) -> torch.Tensor:
    return torch.randn(batch, time, dims, generator=torch.Generator().manual_seed(seed))


def decoded(attention: LatentAttention, x: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """The absorbed form, fed `steps` tokens at a time."""
    batch, time, _ = x.shape
    blocks = -(-time // BLOCK_TOKENS)
    config = attention.config.model_copy(update={"num_hidden_layers": 1, "num_nextn_predict_layers": 0})
    cache = LatentCache(config, 1 + batch * blocks, x.dtype, x.device)
    tables = 1 + torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    parts, first = [], 0
    for part in x.split(steps, dim=1):
        position = torch.arange(first, first + part.shape[1]).repeat(batch)
        sequence = torch.arange(batch).repeat_interleave(part.shape[1])
        slots = tables[sequence, position // BLOCK_TOKENS].long() * BLOCK_TOKENS + position % BLOCK_TOKENS
        cache.batch = Batch(sequence.int(), position.int(), slots, tables)
        turn = rotations(attention.config, position)
        parts.append(attention.decode(part.flatten(0, 1), turn, cache).view_as(part))
        first += part.shape[1]
    return torch.cat(parts, dim=1)


@torch.no_grad()
@given(
    variant=st.sampled_from(sorted(VARIANTS)), heads=st.integers(1, 4), latent=st.integers(1, 12),
    nope=st.integers(1, 9), rope=st.sampled_from([2, 4, 10]), value=st.integers(1, 9), prompt=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_absorbed_equals_expanded_at_every_position(variant, heads, latent, nope, rope, value, prompt, seed) -> None:
    attention = layer(seed, **VARIANTS[variant], num_attention_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=nope,
                      qk_rope_head_dim=rope, v_head_dim=value)
    x = hidden(2, 12, seed)
    expanded, _ = attention(x, rotations(attention.config, torch.arange(12)), None, None)
    torch.testing.assert_close(decoded(attention, x, [prompt, *[1] * (12 - prompt)]), expanded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(attention, x, [prompt, 12 - prompt]), expanded, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "small enough for epsilon to tell"])
def test_equals_transformers(variant: str, size: float) -> None:
    """rms_norm_eps is 1e-5 here; the two latent norms keep 1e-6 all the same."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    ours = layer(**VARIANTS[variant])
    config = hf_config(ours.config)
    theirs = DeepseekV3Attention(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict())
    x = hidden(2, 17) * size
    positions = torch.arange(17)
    mask = torch.full((17, 17), -math.inf).triu(1)[None, None]
    embeddings = DeepseekV3RotaryEmbedding(config)(x, positions[None])
    expected = theirs(x, position_embeddings=embeddings, attention_mask=mask)[0]
    found, _ = ours(x, rotations(ours.config, positions), None, None)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    other = randomise(LatentAttention(ours.config.model_copy(update={"latent_norm_eps": ours.config.rms_norm_eps}), 0))
    wrong, _ = other(x, rotations(ours.config, positions), None, None)
    assert size == 1.0 or (wrong - expected).abs().max() > 1e-2


@torch.no_grad()
def test_packed_documents_equal_each_alone() -> None:
    attention = layer(rope_scaling=yarn(8))
    ids = random_documents(torch.Generator().manual_seed(4), 3, 23)
    ids[2] = 5
    x = hidden(3, 23)
    packed, _ = attention(x, rotations(attention.config, torch.arange(23)), Documents.from_ids(ids), None)
    for row in range(3):
        for number in ids[row].unique():
            here = torch.nonzero(ids[row] == number).flatten()
            turn = rotations(attention.config, torch.arange(len(here)))
            alone, _ = attention(x[row : row + 1, here], turn, None, None)
            torch.testing.assert_close(packed[row, here], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_what_comes_later() -> None:
    attention, x = layer(), hidden(1, 14)
    turn = rotations(attention.config, torch.arange(14))
    before, _ = attention(x, turn, None, None)
    x[:, 9:] += 1
    after, _ = attention(x, turn, None, None)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert ((before - after)[:, 9:].abs().amax((0, 2)) > 1e-3).all()


@torch.no_grad()
def test_largest_logit_is_that_of_the_plain_formula() -> None:
    """-inf asks for exact values; here they are made by hand from the weights: logit = s (q_C·k_C + q_R·k_R)."""
    attention, x = layer(rope_scaling=yarn(32)), hidden(2, 9)
    config, turn = attention.config, rotations(attention.config, torch.arange(9))
    query_nope, query_rope, latent, key_rope = attention._project(x, turn)
    weights = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))[:, : config.qk_nope_head_dim]
    key_nope = torch.einsum("bsc,hnc->bshn", latent, weights)
    logits = torch.einsum("bthn,bshn->bhts", query_nope, key_nope)
    logits += torch.einsum("bthr,bsr->bhts", query_rope, key_rope[:, :, 0])
    expected = (logits * config.softmax_scale).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).amax((0, 2, 3))
    torch.testing.assert_close(attention(x, turn, None, -math.inf)[1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_absorbed_in_bfloat16_is_as_exact_as_expanded_at_large_logits(seed: int) -> None:
    """At 50, bf16 numbers are a quarter apart: logits rounded on the way to the softmax would show."""
    changes = dict(kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, q_lora_rank=None)
    attention, x = layer(seed, **changes).bfloat16(), hidden(2, 48, seed).bfloat16()
    wide, turn = layer(seed, **changes), rotations(attention.config, torch.arange(48))
    size = 50 / wide(x.float(), turn, None, -math.inf)[1].max().item()
    for one in (attention, wide):
        one.q_proj.weight *= size
        one.load_state_dict({name: tensor.bfloat16() for name, tensor in one.state_dict().items()})
    expected, largest = wide(x.float(), turn, None, -math.inf)
    assert largest.max() == pytest.approx(50, rel=0.02)
    expanded, _ = attention(x, turn, None, None)
    absorbed = decoded(attention, x, [40, *[1] * 8])
    off = [(found.float() - expected).norm() / expected.norm() for found in (expanded, absorbed)]
    assert off[1] < 1.06 * off[0] < 0.02
