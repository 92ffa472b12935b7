"""Routing, mixture and balance loss against brute force and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.model.moe import MixtureOfExperts, Router
from tests.model.tiny import hf_config, randomise, tiny_config


def hidden(batch: int = 2, time: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, time, 32, generator=torch.Generator().manual_seed(seed))


def route_by_hand(scores: list[float], bias: list[float], config) -> tuple[set[int], dict[int, float]]:
    """One token, plain Python, from the published description."""
    count, groups = len(scores), config.n_group
    biased = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = count // groups
    eligible = set(range(count))
    if groups > 1:
        worth = {group: sum(sorted(biased[group * size : (group + 1) * size])[-2:]) for group in range(groups)}
        best = sorted(worth, key=lambda group: worth[group])[-config.topk_group :]
        eligible = {group * size + i for group in best for i in range(size)}
    chosen = sorted(eligible, key=lambda expert: biased[expert])[-config.num_experts_per_tok :]
    total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return set(chosen), {expert: scores[expert] / total * config.routed_scaling_factor for expert in chosen}


@torch.no_grad()
@given(
    shape=st.sampled_from([(8, 1, 1), (8, 4, 2), (12, 3, 1), (12, 3, 3), (16, 4, 3)]), top=st.integers(1, 4),
    normed=st.booleans(), shift=st.sampled_from([0.0, -3.0, 2.0]), seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_routing_equals_plain_python(shape, top, normed, shift, seed) -> None:
    experts, groups, kept = shape
    config = tiny_config(n_routed_experts=experts, n_group=groups, topk_group=kept, norm_topk_prob=normed,
                         num_experts_per_tok=top, routed_scaling_factor=1.7)
    router = randomise(Router(config), seed)
    # All biases far below zero: an excluded expert counted as 0 would win.
    router.e_score_correction_bias += shift
    scores, indices, weights = router(hidden(seed=seed))
    assert scores.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(scores, torch.sigmoid(hidden(seed=seed) @ router.weight.T))
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(9)).tolist():
        row, token = place
        chosen, expected = route_by_hand(scores[row, token].tolist(), router.e_score_correction_bias.tolist(), config)
        assert set(indices[row, token].tolist()) == chosen
        for expert, weight in zip(indices[row, token].tolist(), weights[row, token].tolist(), strict=True):
            assert weight == pytest.approx(expected[expert], rel=1e-5)


def test_the_bias_selects_and_does_nothing_else() -> None:
    router = randomise(Router(tiny_config()))
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[3] = 10
    scores, indices, weights = router(hidden())
    assert (indices == 3).any(-1).all()
    unscaled = scores.gather(-1, indices)
    torch.testing.assert_close(weights, unscaled / unscaled.sum(-1, keepdim=True) * 2.5)
    assert "e_score_correction_bias" not in dict(router.named_parameters())
    weights.square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


VARIANTS: dict[str, dict[str, Any]] = {
    "one group": {},
    "four groups": dict(n_group=4, topk_group=2),
    "two shared": dict(n_shared_experts=2, num_experts_per_tok=3),
    "weights not normalised": dict(norm_topk_prob=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_forward_and_backward(variant: str) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    ours = randomise(MixtureOfExperts(tiny_config(**VARIANTS[variant])))
    theirs = DeepseekV3MoE(hf_config(ours.config))
    theirs.load_state_dict(ours.state_dict())
    x = hidden().requires_grad_()
    y = x.detach().clone().requires_grad_()
    found, expected = ours(x)[0], theirs(y)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_without_shared_experts() -> None:
    without = randomise(MixtureOfExperts(tiny_config(n_shared_experts=0)))
    shared = randomise(MixtureOfExperts(tiny_config(n_shared_experts=1)))
    shared.load_state_dict(without.state_dict(), strict=False)
    assert not hasattr(without, "shared_experts")
    torch.testing.assert_close(without(hidden())[0] + shared.shared_experts(hidden()), shared(hidden())[0])


@torch.no_grad()
def test_load_counts_every_choice_once() -> None:
    mixture = randomise(MixtureOfExperts(tiny_config(num_experts_per_tok=3)))
    _, load, _ = mixture(hidden(3, 11))
    _, indices, _ = mixture.gate(hidden(3, 11))
    assert load.dtype == torch.float32 and load.sum() == 3 * 11 * 3
    assert load.tolist() == [int((indices == expert).sum()) for expert in range(8)]


def test_balance_loss_equals_the_published_sums_and_moves_the_router_only() -> None:
    mixture = randomise(MixtureOfExperts(tiny_config(num_experts_per_tok=3)))
    x = hidden(3, 7)
    _, _, loss = mixture(x)
    scores, indices, _ = mixture.gate(x)
    expected = 0.0
    for row in range(3):
        for expert in range(8):
            fraction = 8 / (3 * 7) * sum(expert in indices[row, token].tolist() for token in range(7))
            share = sum((scores[row, token, expert] / scores[row, token].sum()).item() for token in range(7)) / 7
            expected += fraction * share / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in mixture.named_parameters()}
    moved = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert moved == {"gate.weight"}
    # The fractions count; only the shares have a slope.
    weight = mixture.gate.weight.detach().clone().requires_grad_()
    slope = torch.sigmoid(x @ weight.T)
    fraction = F.one_hot(indices, 8).sum((1, 2)) * (8 / (3 * 7))
    (fraction * (slope / slope.sum(-1, keepdim=True)).mean(1)).sum(-1).mean().backward()
    torch.testing.assert_close(mixture.gate.weight.grad, weight.grad)


def test_balance_loss_of_an_even_router_is_one() -> None:
    mixture = randomise(MixtureOfExperts(tiny_config()))
    with torch.no_grad():
        mixture.gate.weight.zero_()
    assert mixture(hidden())[2].item() == pytest.approx(1.0)


def test_scores_that_vanish_leave_everything_finite() -> None:
    """Logits below -104: sigmoid is 0 in fp32, and no share of nothing may become 0/0."""
    mixture = randomise(MixtureOfExperts(tiny_config()))
    with torch.no_grad():
        mixture.gate.weight.fill_(-10.0)
    x = torch.ones(1, 4, 32).requires_grad_()
    out, _, loss = mixture(x)
    (out.sum() + loss).backward()
    assert out.isfinite().all() and loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(("experts", "top", "published"), [(64, 6, 2.446), (384, 8, 2.827)])
def test_scaling_factor_derivation(experts: int, top: int, published: float) -> None:
    """Moonlight appendix C: normal logits, sigmoid, the best K normalised; the factor brings their norm to 1."""
    config = tiny_config(n_routed_experts=experts, num_experts_per_tok=top, routed_scaling_factor=1.0,
                         hidden_size=experts)
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        _, _, weights = router(torch.randn(1, 20_000, experts, generator=torch.Generator().manual_seed(0)))
    factor = (1 / weights.norm(dim=-1)).mean().item()
    assert factor == pytest.approx(published, rel=5e-3)
    assert factor < math.sqrt(top)
