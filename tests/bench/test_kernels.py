"""The benches of kernels: rows of the right form, and the arithmetic and bytes that their roofs are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moonbase import bench
from moonbase.bench import mla, moe, muon, timing
from moonbase.bench.timing import Roofs
from moonbase.ops.newton_schulz import orthogonalize
from moonbase.recipe import load_recipe
from tests.bench.test_bench import check, preset  # noqa: F401

ROOFS = Roofs(read=4e10, product=4e11)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything once, little of it, and a machine whose ceilings are known."""
    once = timing.kernel_seconds
    for module in (mla, moe, muon):
        monkeypatch.setattr(module, "kernel_seconds", lambda works, rounds, warmup: once(works, 1, 0))
        monkeypatch.setattr(module, "measured_roofs", lambda: ROOFS)
    for module in (mla, muon):
        monkeypatch.setattr(module, "_SPREAD", {"cpu": 2**20})
    monkeypatch.setattr(mla, "_RUN_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(mla, "_CPU_SHAPES", ((2, 1024), (3, 64)))


def check_kernels(result: dict[str, Any], peer: bool) -> list[dict[str, Any]]:
    check(result, peer)
    assert result["roofs"] == {"bytes_per_second": ROOFS.read, "flops_per_second": ROOFS.product}
    assert result["title"] and "in turns" in result["method"]
    kernels = [row for row in result["rows"] if "flops" in row]
    for row in kernels:
        floor = max(row["flops"] / ROOFS.product, row["bytes"] / ROOFS.read)
        assert row["roof_share"] == pytest.approx(floor / row["seconds"])
        assert ("peer_seconds" in row) == peer
        if peer:
            assert row["ratio"] == pytest.approx(row["peer_seconds"] / row["seconds"])
    return kernels


@pytest.mark.parametrize("peer", [None, "torch"])
def test_latent_attention(peer: str | None, quick: None) -> None:
    result = bench.run("mla", "pico", peer)
    rows = check_kernels(result, peer is not None)
    assert [row["shape"] for row in rows] == ["2 x 1k tokens, 4 heads x 64", "3 x 64 tokens, 4 heads x 64"]
    if find_spec("flash_mla") is None:
        assert "FlashMLA: not installed here" in result["absent"]


def test_routed_experts(quick: None) -> None:
    rows = check_kernels(bench.run("moe", "pico", "torch"), peer=True)
    assert [row["label"] for row in rows] == ["1 token", "16 tokens"]
    assert rows[0]["peer_bytes"] / rows[0]["bytes"] == pytest.approx(4 / 0.5625), "fp32 beside four bits and a scale"


def test_muon(preset: str, quick: None, capsys: pytest.CaptureFixture[str],  # noqa: F811
              monkeypatch: pytest.MonkeyPatch) -> None:
    once, training = muon.seconds, [2.0, 4.0]
    monkeypatch.setattr(muon, "_MICRO_BATCH", {"cpu": (2, 64)})

    def seconds(work: Callable[[], object], rounds: int, warmup: int = 1) -> float:
        elapsed = once(work, 1, 0)
        return training.pop(0) if getattr(work, "__name__", "") == "train_step" else elapsed

    monkeypatch.setattr(muon, "seconds", seconds)
    result = bench.run("optimizer", preset, "torch")
    assert "moonbase bench optimizer is called moonbase bench muon now" in capsys.readouterr().err
    kernels = check_kernels(result, peer=True)
    assert len(kernels) == 3 and {row["unit"] for row in kernels} == {"TFLOP/s"}
    for row in result["rows"][3:]:
        # One micro-batch of 128 tokens takes 2 s with the update, and every two further ones 2 s more.
        assert row["unit"] == "updates/s" and row["share_of_step"] == pytest.approx(row["seconds"] / (2 + 4095))
    assert [row["label"].split(", ")[1] for row in result["rows"][3:]] == ["all parameters", "QK-Clip of every head"]


def test_whole_steps_that_do_not_fit_are_named(quick: None, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The published network is no more than a list of shapes here."""
    monkeypatch.setattr(muon, "_orthogonalisation", lambda shape, device, peer, roofs: {"shape": shape})
    monkeypatch.setattr(muon, "say", lambda row: None)
    result = muon.measure("kimi-k2", "torch")
    assert result["rows"][0]["shape"] == (64, 2048, 7168), "of experts' gate and up"
    assert "whole steps of kimi-k2 are not measured" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "spoil"), [
    ("mla", lambda: (mla, "latent_attention", 0)), ("moe", lambda: (moe, "_torch", 1)),
    ("muon", lambda: (muon, "orthogonalize", 0)),
])
def test_what_is_wrong_is_not_timed(name: str, spoil: Callable[[], tuple[Any, str, int]], quick: None,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, depth = spoil()
    right = getattr(module, attribute)

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        return (lambda *inner: found(*inner) * 1.2) if depth else found * 1.2

    monkeypatch.setattr(module, attribute, wrong)
    monkeypatch.setattr(module, "kernel_seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="against fp64"):
        bench.run(name, "pico", "torch")


def test_costs_are_those_of_the_published_shapes() -> None:
    """Kimi K2 on one GPU: bytes and FLOP of a layer's experts, and of the absorbed attention."""
    config = load_recipe("kimi-k2").model
    for batch, hit, gigabytes, gigaflops in ((1, 8.0, 0.198, 0.70), (16, 109.8, 2.72, 11.3), (4096, 384, 9.51, 2886)):
        cost = moe._cost(config, batch, hit, moe.INT4_BYTES)
        assert cost.bytes / 1e9 == pytest.approx(gigabytes, rel=5e-3)
        assert cost.flops / 1e9 == pytest.approx(gigaflops, rel=1e-2)
    cost = mla.Shape(32, 4096, 64, 512, 576).cost(2)
    assert cost.bytes == 32 * 4096 * 1152 and cost.flops / cost.bytes == pytest.approx(121, rel=2e-3)


@pytest.mark.parametrize("size", [(64, 96), (256, 64)])
def test_the_orthogonalisations_arithmetic_is_what_torch_counts(size: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        for gram, cost in ((False, muon._plain_cost(*size)), (True, muon._gram_cost(*size, dtype))):
            with FlopCounterMode(display=False) as counter:
                orthogonalize(torch.randn(3, *size), dtype=dtype, gram=gram)
            assert counter.get_total_flops() == 3 * cost.flops


def test_the_roof_is_the_later_of_both() -> None:
    assert ROOFS.seconds(timing.Cost(flops=4e11, bytes=1.0)) == 1.0
    assert ROOFS.seconds(timing.Cost(flops=1.0, bytes=8e10)) == 2.0
    assert math.isclose(ROOFS.seconds(timing.Cost(4e11, 4e10)), 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Recorded, between events, with the kernels that the engine takes; few and small shapes."""
    monkeypatch.setattr(mla, "_GPU_SHAPES", ((2, 1024),))
    monkeypatch.setattr(mla, "_RUN_BYTES", {"cuda": 2**26})
    monkeypatch.setattr(moe, "_BATCHES_GPU", (1, 300))
    monkeypatch.setattr(muon, "_GPU_SHAPES", ((4, 256, 1024),))
    monkeypatch.setattr(muon, "_whole_steps", lambda preset, peer, device: [])
    rows = bench.run("mla", "kimi-k2", "torch")["rows"]
    assert [row["label"] for row in rows] == ["2 x 1k, 64 heads", "2 x 1k, 128 heads"]
    assert len(bench.run("moe", "nano", "torch")["rows"]) == 2
    assert bench.run("muon", preset, "torch")["rows"][-1]["shape"] == "4 x 256 x 1024"
