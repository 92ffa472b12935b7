"""Writing bf16 weights: against fp64, against chance, and against torch's own optimizers in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from moonbase.config import ModelConfig
from moonbase.errors import CheckpointError
from moonbase.optim import MuonClip, qk_clip_
from moonbase.optim.qk_clip import AttentionWeights, qk_clip_reference
from moonbase.optim.rounding import Key, random_words, round_stochastically, write_
from moonbase.presets import preset_config

SHAPES = [(24, 16), (3, 16, 24), (12, 8)]


def neighbours(value: float) -> tuple[float, float]:
    """The bf16 numbers on both sides of a number, by counting through their bits."""
    nearest = torch.tensor(value, dtype=torch.float64).bfloat16()
    bits = nearest.view(torch.int16)
    around = sorted((bits + step).view(torch.bfloat16).item() for step in (-1, 0, 1))
    below = max(x for x in around if x <= value)
    return below, min(x for x in around if x >= value)


# --- the random numbers -----------------------------------------------------------------------------------------------

def test_words_are_uniform_and_independent_of_pieces_steps_and_names() -> None:
    whole = random_words(Key.of(0, 7, "a"), 0, 1 << 16)
    pieces = [random_words(Key.of(0, 7, "a"), start, 1 << 14) for start in range(0, 1 << 16, 1 << 14)]
    assert torch.equal(torch.cat(pieces), whole)
    for other in (Key.of(0, 8, "a"), Key.of(0, 7, "b"), Key.of(1, 7, "a")):
        words = random_words(other, 0, 1 << 16)
        for shift in (0, 16):  # the halves that roundings take
            counts = np.bincount((words >> shift & 0xFF).numpy(), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-4
            pairs = (words[:-1] >> shift & 15) * 16 + (words[1:] >> shift & 15)
            assert stats.chisquare(np.bincount(pairs.numpy(), minlength=256)).pvalue > 1e-4
            pairs = (words >> shift & 15) * 16 + (whole >> shift & 15)
            assert stats.chisquare(np.bincount(pairs.numpy(), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("value", [1.001, -0.3337, 3e-5, 255.3, -1e-39, 1.0, 0.0])
def test_rounding_is_exact_on_average(value: float) -> None:
    """Only the two neighbours, with the probabilities that an fp64 division gives."""
    value, count = float(np.float32(value)), 40_000
    found = round_stochastically(torch.full((count,), value), random_words(Key.of("draws", value), 0, count) >> 16)
    below, above = neighbours(value)
    ups = (found.double() == above).sum().item()
    if below == above:
        assert ups == count
        return
    assert ((found.double() == below) | (found.double() == above)).all()
    chance = (value - below) / (above - below)
    assert stats.binomtest(ups, count, chance).pvalue > 1e-4
    error = (found.double().mean() - value).abs() / (above - below)
    assert error < 4 * (chance * (1 - chance) / count) ** 0.5


def test_every_value_goes_up_as_often_as_its_last_bits_say() -> None:
    """All 2^16 random numbers, one by one: exactly as many go up as the part that is cut off counts."""
    everything = torch.arange(1 << 16)
    for bits in (0x3F800001, 0x3F808000, 0xBF80FFFF, 0x00000123):
        value = torch.tensor(bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int32).view(torch.float32)
        found = round_stochastically(value.expand(1 << 16).contiguous(), everything)
        assert (found.view(torch.int16) != (bits >> 16 if bits >> 31 == 0 else (bits >> 16) - (1 << 16))).sum() \
            == bits & 0xFFFF


def test_what_is_not_finite_stays() -> None:
    odd = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    found = round_stochastically(odd, torch.full((5,), 0xFFFF))
    assert found[:2].tolist() == [float("inf"), -float("inf")] and found[2:].isnan().all()


# --- many small steps -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["nearest", "stochastic", "compensated"])
def test_small_steps_against_sums_in_fp64(kind: str) -> None:
    """300 steps of a tenth of a last bit, with decay: to the nearest nothing moves at all."""
    draw = torch.Generator().manual_seed(0)
    start = (torch.rand(4096, generator=draw) + 1).bfloat16()
    weight, exact = start.clone(), start.double()
    residual = torch.zeros_like(weight) if kind == "compensated" else None
    for step in range(300):
        update = (torch.rand(4096, generator=draw) + 0.5).bfloat16()
        write_(weight, update, kind, Key.of(kind, step), keep=1 - 1e-5, rate=8e-4, residual=residual)
        exact = exact * (1 - 1e-5) - update.double() * 8e-4
    held = weight.double() + (0 if residual is None else residual.double())
    error = held - exact
    if kind == "nearest":
        assert torch.equal(weight, start)
    elif kind == "stochastic":  # a random walk of the last bits, its mean at the fp64 sum
        walk = 2**-7 * (300 * 0.1) ** 0.5
        assert error.abs().max() < 5 * walk and error.mean().abs() < 4 * walk / 4096**0.5
    else:
        assert error.abs().max() < 300 * 2**-17 and residual.abs().max() <= 2**-8


# --- the optimizer ----------------------------------------------------------------------------------------------------

def pairs(kind: str, group: str, shapes: list[tuple[int, ...]], **options: object) -> tuple:
    draw = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=draw).bfloat16()) for shape in shapes]
    exact = [torch.nn.Parameter(parameter.detach().float()) for parameter in ours]
    names = [f"w{i}" for i in range(len(ours))]
    groups = [{"params": ours, "kind": group, "names": names}]
    return ours, exact, MuonClip(groups, bf16_rounding=kind, seed=3, **options)


def train(ours: list, exact: list, optimizer: MuonClip, oracle: torch.optim.Optimizer, steps: int) -> None:
    draw = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for one, other in zip(ours, exact, strict=True):
            one.grad = torch.randn(one.shape, generator=draw).bfloat16()
            other.grad = one.grad.float()
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize(("kind", "bound"), [("stochastic", 0.02), ("compensated", 0.004)])
@pytest.mark.parametrize("group", ["muon", "adamw"])
def test_steps_equal_torch_in_fp32_within_the_rounding(kind: str, bound: float, group: str) -> None:
    """The distance is of weights near 1: bf16 has a last bit of 0.004 to 0.008 there, and momentum keeps 8 bits."""
    shapes = [(24, 16), (12, 8)]
    ours, exact, optimizer = pairs(kind, group, shapes, lr=3e-3, weight_decay=0.1)
    if group == "muon":
        oracle = torch.optim.Muon(exact, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    else:
        oracle = torch.optim.AdamW(exact, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    before = [parameter.detach().clone() for parameter in exact]
    train(ours, exact, optimizer, oracle, 30)
    for one, other, start in zip(ours, exact, before, strict=True):
        residual = optimizer.state[one].get("residual", torch.zeros_like(one))
        distance = (one.double() + residual.double() - other).square().mean().sqrt()
        moved = (other - start).square().mean().sqrt()
        assert distance < bound and moved > 0.01
        assert {value.dtype for key, value in optimizer.state[one].items() if key != "step"} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["stochastic", "compensated"])
def test_a_resumed_run_and_one_in_other_pieces_draw_the_same(kind: str) -> None:
    """State through `named_state`; scratch memory for one matrix at a time; stacks updated before the step."""
    ours, _, optimizer = pairs(kind, "muon", SHAPES, lr=1e-3)
    small, _, pieces = pairs(kind, "muon", SHAPES, lr=1e-3, workspace_bytes=1)
    again, _, resumed = pairs(kind, "muon", SHAPES, lr=1e-3)
    draw = torch.Generator().manual_seed(2)
    for step in range(4):
        if step == 2:
            with torch.no_grad():
                for one, other in zip(again, ours, strict=True):
                    one.copy_(other)
            resumed.load_named_state(*optimizer.named_state())
        pieces.begin_step()
        for triple in zip(ours, small, again, strict=True):
            gradient = torch.randn(triple[0].shape, generator=draw).bfloat16()
            for parameter in triple:
                parameter.grad = gradient.clone()
            if triple[1].ndim == 3:
                pieces.update_early(triple[1])
                assert triple[1].grad is None
        for one in (optimizer, pieces, *([resumed] if step >= 2 else [])):
            one.step()
            for parameter in {id(optimizer): ours, id(pieces): small, id(resumed): again}[id(one)]:
                one.scale_rows_(parameter, torch.full(parameter.shape[-2:-1], 0.999)) if parameter.ndim == 2 else None
    for one, other, third in zip(ours, small, again, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    tensors, scalars = optimizer.named_state()
    with pytest.raises(CheckpointError, match="needs"):
        pairs("stochastic" if kind == "compensated" else "compensated", "muon", SHAPES)[2].load_named_state(
            tensors, scalars)


@pytest.mark.parametrize("kind", ["stochastic", "compensated"])
def test_qk_clip_of_a_tenth_of_a_per_cent_arrives(kind: str) -> None:
    """100 clips by 0.999, less than half a last bit each, against the clip's definition in fp64. Others keep their
    bits."""
    config: ModelConfig = preset_config("pico")
    heads, head_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    shapes = [(heads * head_dim, 64), (heads * (config.qk_nope_head_dim + config.v_head_dim), 48)]
    ours, _, optimizer = pairs(kind, "muon", shapes)
    exact = AttentionWeights(*(parameter.detach().double() for parameter in ours))
    start = [parameter.detach().clone() for parameter in ours]
    largest = torch.tensor([100 / 0.999, 50.0, float("nan"), 100 / 0.999])
    for step in range(100):
        optimizer.begin_step(step)
        qk_clip_([AttentionWeights(*ours)], largest[None], 100.0, config, optimizer.scale_rows_)
        exact = qk_clip_reference(exact, largest, 100.0, config)
    for one, other, before in zip(ours, exact, start, strict=True):
        held = one.detach().double() + optimizer.state[one].get("residual", torch.zeros(())).double()
        same = other == before.double()
        assert torch.equal(one[same], before[same]) and not same.all()
        ratio = (held[~same] / other[~same]).mean().item()  # 0.95 and 0.90 of what it was
        assert ratio == pytest.approx(1, abs=2e-3 if kind == "stochastic" else 1e-5)


def test_fp32_parameters_beside_them_are_none_of_its_business() -> None:
    gain, twin = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    one = MuonClip([{"params": [gain], "kind": "adamw"}], lr=1e-3, bf16_rounding="stochastic")
    oracle = torch.optim.AdamW([twin], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for parameter in (gain, twin):
        parameter.grad = torch.linspace(-1, 1, 5)
    one.step()
    oracle.step()
    torch.testing.assert_close(gain, twin, rtol=1e-7, atol=0)
