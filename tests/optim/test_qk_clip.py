"""QK-Clip against attention logits computed the long way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moonbase.config import ModelConfig
from moonbase.optim.qk_clip import AttentionWeights, attention_weights, qk_clip_, qk_clip_reference, reduce_max_logits

CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=8, moe_intermediate_size=6, num_hidden_layers=2,
                     num_attention_heads=3, q_lora_rank=10, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4,
                     v_head_dim=7, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=16)
HEADS, NOPE, ROPE, VALUE = 3, 5, 4, 7


def random_layer(seed: int, query_inputs: int = 10) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)
    return AttentionWeights(torch.randn(HEADS * (NOPE + ROPE), query_inputs, generator=generator),
                            torch.randn(HEADS * (NOPE + VALUE), 9, generator=generator))


def clone(weights: AttentionWeights) -> AttentionWeights:
    return AttentionWeights(weights.query.clone(), weights.key_value.clone())


def logits(weights: AttentionWeights, time: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Content and rotary logits [H, T, T] and values for fixed latents; rotation is orthogonal and left out."""
    generator = torch.Generator().manual_seed(7)
    query_latent = torch.randn(time, weights.query.shape[1], generator=generator)
    latent = torch.randn(time, 9, generator=generator)
    rotary_key = torch.randn(time, ROPE, generator=generator)
    query = (query_latent @ weights.query.mT).view(time, HEADS, NOPE + ROPE)
    expanded = (latent @ weights.key_value.mT).view(time, HEADS, NOPE + VALUE)
    content = torch.einsum("thd,shd->hts", query[..., :NOPE], expanded[..., :NOPE])
    rotary = torch.einsum("thd,sd->hts", query[..., NOPE:], rotary_key)
    causal = torch.ones(time, time).tril().bool()
    scale = (NOPE + ROPE) ** -0.5
    return (content * scale).masked_fill(~causal, -torch.inf), rotary * scale, expanded[..., NOPE:]


def max_logit(weights: AttentionWeights) -> Tensor:
    content, rotary, _ = logits(weights)
    return (content + rotary).amax(dim=(1, 2))


@pytest.mark.parametrize("query_inputs", [10, 16])  # q_b_proj, and q_proj of a model without query latent
def test_post_clip_maximum_scales_by_exactly_gamma(query_inputs: int) -> None:
    before = random_layer(0, query_inputs)
    weights = clone(before)
    largest = max_logit(before)
    tau = largest.sort().values[1].item()  # clips the largest head only: the middle one is at τ
    clipped = qk_clip_([weights], largest[None], tau, CONFIG)
    assert clipped.tolist() == [1]
    head = int(largest.argmax())
    gamma = tau / largest[head]
    torch.testing.assert_close(max_logit(weights)[head], torch.tensor(tau))
    content, rotary, values = logits(weights)
    content_before, rotary_before, values_before = logits(before)
    torch.testing.assert_close(content[head], gamma * content_before[head])
    torch.testing.assert_close(rotary[head], gamma * rotary_before[head])
    assert torch.equal(values, values_before)
    for other in set(range(HEADS)) - {head}:
        rows = slice(other * (NOPE + ROPE), (other + 1) * (NOPE + ROPE))
        assert torch.equal(weights.query[rows], before.query[rows])
        rows = slice(other * (NOPE + VALUE), (other + 1) * (NOPE + VALUE))
        assert torch.equal(weights.key_value[rows], before.key_value[rows])


def test_each_component_gets_its_published_factor() -> None:
    before = random_layer(1)
    weights = clone(before)
    qk_clip_([weights], torch.tensor([[50.0, 400.0, 100.0]]), 100.0, CONFIG)
    query = weights.query.view(HEADS, NOPE + ROPE, -1) / before.query.view(HEADS, NOPE + ROPE, -1)
    key_value = weights.key_value.view(HEADS, NOPE + VALUE, -1) / before.key_value.view(HEADS, NOPE + VALUE, -1)
    gamma = torch.tensor([1.0, 0.25, 1.0])
    torch.testing.assert_close(query[:, :NOPE], gamma.sqrt().view(-1, 1, 1).expand_as(query[:, :NOPE]))
    torch.testing.assert_close(query[:, NOPE:], gamma.view(-1, 1, 1).expand_as(query[:, NOPE:]))
    torch.testing.assert_close(key_value[:, :NOPE], gamma.sqrt().view(-1, 1, 1).expand_as(key_value[:, :NOPE]))
    assert torch.equal(weights.key_value.view(HEADS, -1, 9)[:, NOPE:], before.key_value.view(HEADS, -1, 9)[:, NOPE:])


def test_equals_the_loop_over_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(seed) for seed in range(8)]
    maxima = torch.randn(8, HEADS, generator=generator) * 100 + 60
    maxima[0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = [qk_clip_reference(*pair, 50.0, CONFIG) for pair in zip(layers, maxima, strict=True)]
    clipped = qk_clip_(layers, maxima, 50.0, CONFIG)
    assert 0 < clipped.sum() < 8 * HEADS and clipped[0] == 0
    for found, loop in zip(layers, expected, strict=True):
        torch.testing.assert_close(found.query, loop.query)
        torch.testing.assert_close(found.key_value, loop.key_value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deactivates_itself_bit_for_bit(dtype: torch.dtype) -> None:
    before = AttentionWeights(*(weight.to(dtype) for weight in random_layer(2)))
    weights = clone(before)
    clipped = qk_clip_([weights], torch.tensor([[100.0, -3.0, 99.9]]), 100.0, CONFIG)
    assert clipped.tolist() == [0]
    assert torch.equal(weights.query, before.query) and torch.equal(weights.key_value, before.key_value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_maximum_that_is_not_finite_leaves_the_head_alone(bad: float) -> None:
    before = random_layer(3)
    weights = clone(before)
    reduced = reduce_max_logits([torch.tensor([bad, 200.0, 1.0])])
    assert qk_clip_([weights], reduced, 100.0, CONFIG).tolist() == [1]
    assert torch.equal(weights.query[:NOPE + ROPE], before.query[:NOPE + ROPE])
    assert weights.query.isfinite().all() and weights.key_value.isfinite().all()
    direct = clone(before)
    qk_clip_([direct], torch.tensor([[bad, 200.0, 1.0]]), 100.0, CONFIG)
    assert torch.equal(direct.query, weights.query)


def test_layers_are_clipped_each_by_its_own_maxima() -> None:
    together = [random_layer(4), random_layer(5)]
    alone = [clone(layer) for layer in together]
    maxima = torch.tensor([[150.0, 1.0, 300.0], [1.0, 2.0, 101.0]])
    assert qk_clip_(together, maxima, 100.0, CONFIG).tolist() == [2, 1]
    for layer, row in zip(alone, maxima, strict=True):
        qk_clip_([layer], row[None], 100.0, CONFIG)
    for first, second in zip(together, alone, strict=True):
        assert torch.equal(first.query, second.query) and torch.equal(first.key_value, second.key_value)


def test_log_sum_exp_bounds_the_maximum_and_may_stand_in_for_it() -> None:
    weights = random_layer(6)
    content, rotary, _ = logits(weights)
    rows = (content + rotary).double()
    largest, bound = rows.amax(dim=-1), rows.logsumexp(dim=-1)
    assert (largest <= bound).all() and (bound <= largest + torch.tensor(11.0).log()).all()
    exact, bound = largest.amax(dim=-1).float(), bound.amax(dim=-1).float()
    order = exact.argsort()
    tau = (exact[order[2]] - 1e-3).item()  # one head above, and bounds of the others below or above τ
    reported = torch.where(bound > tau, exact, bound)  # what the trainer hands in
    by_exact, by_reported = clone(weights), clone(weights)
    qk_clip_([by_exact], exact[None], tau, CONFIG)
    qk_clip_([by_reported], reported[None], tau, CONFIG)
    assert torch.equal(by_exact.query, by_reported.query) and torch.equal(by_exact.key_value, by_reported.key_value)


def test_attention_weights_finds_every_layer_in_order() -> None:
    config = CONFIG.model_copy(update={"num_nextn_predict_layers": 1})
    prefixes = ["mtp.0.layer.self_attn.", "model.layers.1.self_attn.", "model.layers.0.self_attn."]
    named = {prefix + name: torch.zeros(1) for prefix in prefixes for name in ("q_b_proj.weight", "kv_b_proj.weight")}
    found = attention_weights(named, config)
    assert [weights.query is named[prefix + "q_b_proj.weight"] for weights, prefix
            in zip(found, reversed(prefixes), strict=True)] == [True] * 3
    plain = CONFIG.model_copy(update={"q_lora_rank": None})
    named = {name.replace("q_b_proj", "q_proj"): tensor for name, tensor in named.items()}
    assert len(attention_weights(named, plain)) == 2
