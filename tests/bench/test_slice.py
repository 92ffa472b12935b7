"""Layers of a model through the engine: extrapolation, costs and random weights against figures made otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moonbase import bench
from moonbase.bench import slice as layers_bench
from moonbase.bench.slice import Shape, Share
from moonbase.bench.timing import Roofs
from moonbase.model.quantized_experts import QuantizedExperts
from moonbase.ops.int4_packed import dequantize_int4
from moonbase.presets import preset_config
from tests.bench.tiny import KEYS
from tests.model.tiny import tiny_config

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_bench, "STEPS", 2)
    monkeypatch.setattr(layers_bench, "measured_roofs", lambda: Roofs(1e15, 1e18))


def test_rows(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured, whatever the time says; the deeper network is the slower one, at least on average."""
    monkeypatch.setattr(layers_bench, "_CPU_SHAPES", (Shape(3, 32, True), Shape(2, 40, False)))
    monkeypatch.setattr(layers_bench, "_GPU_SHAPES", layers_bench._CPU_SHAPES)
    result = bench.run("slice", "pico")
    assert json.dumps(result, allow_nan=False) and "random latents" in result["method"]
    for row in result["rows"]:
        assert KEYS <= set(row) and row["ours"] > 0 and 0 < row["roof_share"] < 1 and row["peer"] is None
    assert {row["unit"] for row in result["rows"]} <= {"layers/s", "tokens/s"}


def _measured(seconds: Callable[[int], float]) -> Callable[..., tuple[float, None]]:
    return lambda model, shape: (seconds(model.config.num_hidden_layers), None)


def test_extrapolation_and_shares(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything around the sparse layers 5 s, each of these 2 s: 3 of pico's 4 layers say what all take."""
    monkeypatch.setattr(layers_bench, "measure_shape", _measured(lambda layers: 5.0 + 2.0 * (layers - 1)))
    monkeypatch.setattr(layers_bench, "_is_k2", lambda config: True)
    decode, prompts = Shape(8, 100, True), Shape(2, 100, False)
    monkeypatch.setattr(layers_bench, "_BESIDE_PUBLISHED", (prompts,))
    rows: list[dict[str, Any]] = layers_bench.measure(
        "pico", None, (decode, prompts), layers=3, shares=(Share(decode, 16),))["rows"]
    assert [row["ours"] for row in rows] == pytest.approx(
        [1 / 2, 8 / 9, 8 / 11, 1 / 2, 200 / 9, 200 / 11, 8 / 11])
    assert [row["peer"] for row in rows] == [None, None, None, None, None, 7000, 3000]
    assert rows[5]["ratio"] == pytest.approx(200 / 11 / 7000) and "pipeline" in rows[2]["unit"]
    assert "share" in rows[6]["shape"] and "left out" in rows[6]["unit"]
    said = layers_bench._method(rows, on_gpu=True), layers_bench._method(rows[:2], on_gpu=True)
    for words in ("a pipeline that holds them", "expert parallelism", "Published figures"):
        assert words in said[0] and words not in said[1]


def test_on_a_cpu_layers_take_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse layer of K2 takes 9.5 GB of experts in INT4 and 0.6 GB in fp32; what is around them 11.4 GB."""
    for free, layers in ((11e9, 0), (12e9, 1), (21e9, 1), (22e9, 2), (51e9, 4), (53e9, 5), (1e12, 61)):
        monkeypatch.setattr(layers_bench, "free_memory_bytes", lambda free=free: free)
        assert layers_bench._fitting(preset_config("kimi-k2"), (), torch.device("cpu")) == layers


def test_a_layer_costs_what_its_shapes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """K2 in bf16 and INT4, from the published shapes: attention 202 MB, a shared expert of 88, a router of 5.5, experts
    of 24.8 each, 1,152 bytes a token of context."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config, shape = preset_config("kimi-k2"), Shape(16, 2048, True)
    few, more = (layers_bench.cost(config.model_copy(update={"num_hidden_layers": layers}), shape, 100.0)
                 for layers in (10, 11))
    assert more.bytes - few.bytes == pytest.approx(
        202.1e6 + 88.1e6 + 5.5e6 + 100 * 24.77e6 + 16 * 2048 * 1152, rel=1e-3)
    # Two FLOPs a weight: attention 101 M, nine experts of 44 M, the router; scores and values of 64 heads.
    assert more.flops - few.flops == pytest.approx(
        16 * (2 * (101.1e6 + 9 * 44.04e6 + 2.75e6) + 2 * 64 * 2048 * (576 + 512)), rel=1e-3)
    hit = layers_bench._expected_hit(config, Shape(64, 2048, True))
    assert hit == pytest.approx(284.2, abs=0.05), "the expectation of roofline tables"
    assert layers_bench._expected_hit(config, Shape(16, 2048, False)) == pytest.approx(384)


def test_random_experts_in_either_order() -> None:
    config = tiny_config(hidden_size=128, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2)
    for arranged in (False, True):
        stack = QuantizedExperts(config)
        layers_bench._fill(stack, config, torch.device("cpu"), arranged)
        assert stack.is_arranged == arranged
        for name, rows in (("gate_up_proj", 256), ("down_proj", 128)):
            words, scales = stack.stored(name)
            assert words.shape == (4, rows, 16) and scales.shape == (4, rows, 4)
            least, most = 0.5 / (4 * 128**0.5), 1.5 / (4 * 128**0.5)
            assert scales.float().abs().min() >= least * 0.99 and scales.float().abs().max() <= most * 1.01
            values = dequantize_int4(words, scales)
            assert values.std() == pytest.approx(1.2 / 128**0.5, rel=0.05)
            assert abs(values.mean()) < 0.02 * values.std(), "else all tokens become alike behind a few layers"


def test_the_first_layers_are_the_same_weights() -> None:
    config = tiny_config(num_hidden_layers=3)
    model = layers_bench.random_model(config, torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    first = layers_bench.first_layers(model, 2)
    assert len(first.model.layers) == first.config.num_hidden_layers == 2 and len(model.model.layers) == 3
    assert all(any(one is other for other in model.parameters()) for one in first.parameters())


@pytest.mark.gpu
@on_gpu
def test_one_sequence_reads_no_more_experts_than_it_chooses() -> None:
    """A pass is no wider than what it computes: rows of padding would choose experts of their own."""
    config = tiny_config(hidden_size=128, moe_intermediate_size=128, n_routed_experts=64, num_experts_per_tok=4,
                         n_group=1, topk_group=1, num_hidden_layers=3, max_position_embeddings=1024)
    model = layers_bench.random_model(config, torch.device("cuda"))
    stacks = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(stacks) == 2 and all(stack.is_arranged for stack in stacks)
    seconds, hits = layers_bench.measure_shape(model, Shape(1, 256, True))
    assert seconds > 0 and hits and set(hits) == {4}
    _, hits = layers_bench.measure_shape(model, Shape(4, 256, True))
    assert all(4 <= hit <= 16 for hit in hits)
