"""Optimizer state: exact round trip, and every corruption found before anything is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moonbase.checkpoint import load_state, save_state
from moonbase.errors import CheckpointError, UserError

FACTS = {"step": 7, "lr": 0.1 + 0.2, "stream": {"file": "ä.txt", "offsets": [1, 2, None]}, "loss": float("nan")}


def some_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"w/step": torch.tensor(3.0), "w/momentum": torch.randn(4, 3, 2), "w/half": torch.randn(5).bfloat16(),
            "rng": torch.get_rng_state(), "counts": torch.arange(6), "flags": torch.tensor([True, False]),
            "double": torch.randn(2, dtype=torch.float64), "none": torch.empty(0, 3), "view": torch.randn(6, 4).T}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100])
def test_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    state = some_state()
    save_state(tmp_path, state, FACTS, max_shard_bytes=max_shard_bytes)
    loaded, facts = load_state(tmp_path)
    assert list(loaded) and loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert str(facts) == str(FACTS)
    shards = len(files(tmp_path)) - 1
    assert files(tmp_path)[0] == f"optimizer-00001-of-{shards:05d}.safetensors"
    assert files(tmp_path)[-1] == "trainer_state.json" and (shards > 3) == (max_shard_bytes == 100)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save_state(tmp_path, {}, {"a": 1}, prefix="other", state_file="other.json")
    assert load_state(tmp_path, state_file="other.json") == ({}, {"a": 1})


def test_fills_in_place(tmp_path: Path) -> None:
    state = some_state()
    save_state(tmp_path, state, FACTS)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in target.items()}
    loaded, _ = load_state(tmp_path, into=target)
    assert all(torch.equal(target[name], state[name]) for name in state)
    assert {name: tensor.data_ptr() for name, tensor in loaded.items()} == pointers


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda f: flip_a_bit(f / "optimizer-00001-of-00001.safetensors"), "00001.safetensors: corrupt: its"),
    (lambda f: (f / "optimizer-00001-of-00001.safetensors").write_bytes(b""), "corrupt: its content does not match"),
    (lambda f: (f / "optimizer-00001-of-00001.safetensors").unlink(), "the file is missing"),
    (lambda f: (f / "trainer_state.json").unlink(), "no such file"),
    (lambda f: (f / "trainer_state.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "trainer_state.json").write_text("[]"), "not a state file"),
    (lambda f: (f / "trainer_state.json").write_text(json.dumps({"facts": {}, "sha256": {"../a": ""}})), "is missing"),
])
def test_corruption(tmp_path: Path, spoil, message: str) -> None:
    save_state(tmp_path, some_state(), FACTS)
    spoil(tmp_path)
    target = {name: torch.zeros_like(tensor) for name, tensor in some_state().items()}
    with pytest.raises(UserError, match=message) as error:
        load_state(tmp_path, into=target)
    assert "\n" not in str(error.value)
    assert not any(tensor.any() for tensor in target.values())


def test_another_optimizer(tmp_path: Path) -> None:
    save_state(tmp_path, {"a": torch.ones(2), "b": torch.ones(3)}, {})
    for target, message in (({"a": torch.ones(2)}, "state of b does not belong"),
                            ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "state of c is missing"),
                            ({"a": torch.ones(2), "b": torch.ones(4)}, r"b has shape \[3\] instead of \[4\]")):
        with pytest.raises(CheckpointError, match=message):
            load_state(tmp_path, into=target)


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        save_state(tmp_path / "absent", some_state(), FACTS)
