"""Scales and fake quantisation against brute force and compressed-tensors; what is on a grid stays there."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from moonbase.ops.int4 import INT4_RULES, fake_quantize_

RULES = list(INT4_RULES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(weight: torch.Tensor, rule: str) -> torch.Tensor:
    return fake_quantize_(torch.empty_like(weight), weight, rule)


def test_the_rule_of_compressed_tensors_gives_its_values() -> None:
    weight = random(8, 96)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = weight.unflatten(1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    theirs = fake_quantize(weight, scale.bfloat16().float(), zero, arguments)
    assert torch.equal(quantized(weight, "absmax/7.5"), theirs)


@pytest.mark.parametrize("rule", RULES)
def test_every_group_by_hand(rule: str) -> None:
    weight = random(2, 2, 64) * torch.tensor([1e-3, 1.0])[:, None, None]
    weight[1, 1, :32] = 0
    found = quantized(weight, rule)
    for group, ours in zip(weight.view(-1, 32), found.view(-1, 32), strict=True):
        candidates = []
        for divisor in {"absmax/7": [7], "absmax/7.5": [7.5], "least-error": [7, 7.5, 8]}[rule]:
            scale = max(group.abs().max().item() / divisor, 1e-5)
            scale = torch.tensor(scale).bfloat16().float()
            values = [max(-8, min(7, round((value / scale).item()))) * scale.item() for value in group]
            error = sum((a - b) ** 2 for a, b in zip(values, group.tolist(), strict=True))
            candidates.append((error, values))
        torch.testing.assert_close(ours, torch.tensor(min(candidates)[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("made", "kept"), list(itertools.product(RULES, RULES)))
def test_what_came_from_int4_is_left_alone_by_every_rule(made: str, kept: str) -> None:
    """Bit for bit; so an INT4 release, dequantised to fp32, is a valid start whichever rule made it."""
    weight = random(64, 320, seed=1) * torch.logspace(-4, 2, 64)[:, None]
    release = quantized(weight, made)
    assert not torch.equal(release, weight)
    assert torch.equal(quantized(release, kept), release)


def test_any_scale_and_any_numbers_are_recognised() -> None:
    """Not only what our own rules make: small numbers, and the one magnitude, -8, that absmax/7 never uses."""
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(-8, 8, (500, 32), generator=generator)
    numbers[:100] = numbers[:100] // 4
    scales = (torch.rand(500, 1, generator=generator) + 1e-3).bfloat16().float()
    for rule in RULES:
        assert torch.equal(quantized(numbers * scales, rule), numbers * scales)


def test_scales_far_below_the_rules_floor_are_recognised() -> None:
    """compressed-tensors has no floor."""
    scales = torch.logspace(-30, -6, 200)[:, None].bfloat16().float()
    numbers = torch.randint(-8, 8, (200, 32), generator=torch.Generator().manual_seed(4))
    numbers[:, 0] = -7
    for rule in RULES:
        assert torch.equal(quantized(numbers * scales, rule), numbers * scales)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_seen(odd: float) -> None:
    """A guard against steps gone wrong looks at the loss; a group of zeros would hide it."""
    weight = random(2, 64)
    weight[0, 5] = odd
    for rule in RULES:
        found = quantized(weight, rule)
        assert found[0, :32].isnan().any() and torch.equal(found[1], quantized(random(2, 64), rule)[1])
    assert quantized(random(1, 32) * 1e30, "least-error").isfinite().all()


def test_a_small_step_away_from_a_release_moves_little_under_least_error() -> None:
    """absmax/7.5 would give groups whose largest magnitude is 7 or 8 scales another grid at the first step."""
    release = quantized(random(256, 256, seed=3), "absmax/7.5")
    stepped = release * (1 + 1e-4)
    moved = {rule: (quantized(stepped, rule) - release).square().mean().sqrt() / release.std() for rule in RULES}
    assert moved["least-error"] < 0.01 < 0.05 < moved["absmax/7.5"]


def test_other_dtypes_and_places() -> None:
    weight = random(3, 64)
    out = torch.empty(3, 64, dtype=torch.bfloat16)
    assert fake_quantize_(out, weight) is out
    assert torch.equal(out, quantized(weight, "absmax/7").bfloat16())
    assert torch.equal(fake_quantize_(weight, weight), quantized(random(3, 64), "absmax/7"))
