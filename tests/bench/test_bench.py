"""Rows of the right form from a tiny network; no figure is judged here."""

from __future__ import annotations

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from moonbase import bench
from moonbase.bench import moe, muon, networks, timing, train
from moonbase.bench import slice as layers
from moonbase.errors import UserError
from moonbase.recipe import load_recipe
from tests.bench.tiny import KEYS, preset_file


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny recipe in the place of a preset, and every measurement made once."""
    once, in_turns = timing.seconds, timing.alternating_seconds
    for module in (muon, timing, train):
        monkeypatch.setattr(module, "seconds", lambda work, rounds, warmup=1: once(work, 1, 0))
    for module in (muon, train):
        monkeypatch.setattr(module, "alternating_seconds", lambda works, rounds, warmup=1: in_turns(works, 1, 0))
    return preset_file(tmp_path, {"max_position_embeddings": 512})


def check(result: dict[str, Any], peer: bool) -> None:
    assert set(result) >= {"name", "title", "command", "machine", "commit", "versions", "seed", "rows"}
    assert result["machine"] and result["command"].startswith(f"moonbase bench {result['name'].split()[0]} --preset ")
    assert result["versions"]["torch"] == metadata.version("torch")
    assert result["rows"] and json.dumps(result, allow_nan=False)
    for row in result["rows"]:
        assert set(row) == KEYS or set(row) >= {*KEYS, "label", "seconds"}, "kernels say more"
        assert row["ours"] > 0 and math.isfinite(row["ours"]) and row["unit"]
        assert (row["peer"] is None) == (row["ratio"] is None) == (row["peer_name"] is None)
        if row["peer"] is not None:
            assert row["ratio"] == pytest.approx(row["ours"] / row["peer"]), "larger is better for both units"
    assert any(row["peer"] for row in result["rows"]) == peer


@pytest.mark.parametrize("peer", [None, "transformers"])
def test_training(peer: str | None, preset: str) -> None:
    result = bench.run("train", preset, peer)
    check(result, peer is not None)
    rows = result["rows"]
    assert {row["unit"] for row in rows} == {"tokens/s"} and all(0 < row["roof_share"] < 1 for row in rows)
    if peer:
        names = {f"transformers, {name}" for name in train.EXPERT_IMPLEMENTATIONS}
        assert {row["peer_name"] for row in rows} == names
        assert [row["ratio"] for row in rows] == sorted(row["ratio"] for row in rows), "the hardest peer comes first"


def test_both_sides_train_the_same_network(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parameters, and a first loss that random weights of the same spread give."""
    seen: dict[str, Any] = {}

    def look(works: dict[str, Any], rounds: int, warmup: int = 1) -> dict[str, float]:
        trainer = works["ours"].__self__
        closure = dict(zip(works["eager"].__code__.co_freevars, works["eager"].__closure__, strict=True))
        seen["ours"] = sum(value.numel() for value in trainer.model.parameters())
        seen["peer"] = sum(value.numel() for value in closure["run"].cell_contents.parameters())
        seen["losses"] = [trainer.train_step()["loss"]]
        part = closure["parts"].cell_contents[0]
        seen["losses"].append(closure["run"].cell_contents(input_ids=part, labels=part).loss.item())
        return dict.fromkeys(works, 1.0)

    # Equally fast, so that none is left out for being slow on a busy machine.
    monkeypatch.setattr(train, "seconds", lambda work, rounds, warmup: 1.0)
    monkeypatch.setattr(train, "alternating_seconds", look)
    train.measure(preset, "transformers")
    assert seen["ours"] == seen["peer"]
    assert seen["losses"] == pytest.approx([math.log(512)] * 2, rel=0.05)


@pytest.mark.parametrize("name", ["moe", "slice"])
@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 2}, {"moe_intermediate_size": 24}])
def test_a_network_without_experts_in_int4(name: str, changes: dict[str, int], tmp_path: Path) -> None:
    model = {"max_position_embeddings": 512, "moe_intermediate_size": 32, **changes}
    with pytest.raises(UserError, match=rf"bench {name}: .*tiny\.yaml has no layer of routed experts in groups of 32"):
        bench.run(name, preset_file(tmp_path, model))


def test_timing_takes_medians_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = {"now": 0.0}, []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])

    def work(name: str, durations: list[float]):
        def once() -> None:
            calls.append(name)
            clock["now"] += durations.pop(0)

        return once

    assert timing.seconds(work("x", [9.0, 1.0, 5.0, 2.0]), rounds=3, warmup=1) == 2.0
    calls.clear()
    found = timing.alternating_seconds({"a": work("a", [9.0, 1.0, 3.0, 2.0]), "b": work("b", [9.0, 4.0, 4.0, 5.0])},
                                       rounds=3, warmup=1)
    assert found == {"a": 2.0, "b": 4.0} and calls == ["a", "b"] * 4


@pytest.mark.parametrize(("arguments", "words"), [
    (("speed",), r"no bench 'speed' \(did you mean 'speedrun'\?\)\. Benches: train, muon, moe, mla, decode, serve"),
    (("swarm", "nano"), "bench swarm takes no preset: it measures no network"),
    (("train", "pico", "torch"), "bench train knows no peer 'torch'. Peers: transformers"),
    (("muon", "femto"), "femto: neither a preset"),
])
def test_unknown_names_are_mistakes(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench.run(*arguments)


@pytest.mark.parametrize("name", ["train", "decode", "serve"])
def test_a_peer_that_is_not_installed_is_named(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not after our side was measured."""
    monkeypatch.setattr(bench, "_measured", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="peer transformers is not installed here"):
        bench.run(name, preset, "transformers")
    with pytest.raises(UserError, match="peer transformers is not installed here"):
        networks.transformers_model(load_recipe(preset).model, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["train", "decode", "serve", "slice", "int4", "speedrun", "moe"])
def test_a_network_that_does_not_fit_is_a_mistake(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is filled with numbers: 4 TB of them."""
    monkeypatch.setattr(networks, "free_memory_bytes", lambda: 5e9)
    monkeypatch.setattr(layers, "free_memory_bytes", lambda: 5e9)
    monkeypatch.setattr(networks.torch.cuda, "is_available", lambda: False)
    for module in (layers, moe):
        monkeypatch.setattr(module, "measured_roofs", lambda: timing.Roofs(1e10, 1e11))
    options = {"out": tmp_path} if name == "speedrun" else {}
    with pytest.raises(UserError, match=r"kimi-k2 needs at least [\d,]+ GB|not one sparse layer of kimi-k2 fits here"):
        bench.run(name, "kimi-k2", **options)


def test_a_ceiling_is_the_best_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 2.0, 0.5, *[3.0] * 7])
    monkeypatch.setattr(timing, "seconds", lambda work, rounds, warmup: next(times))
    assert timing.matmul_ceiling() == 2 * 1024**3 / 0.5 or torch.cuda.is_available()
