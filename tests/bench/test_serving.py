"""Decoding, load and trace benches: rows of the right form, both sides doing the same work; no figure is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moonbase.bench import decode, serve, timing, trace
from moonbase.bench.networks import NoText
from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.sizes import sizes
from tests.bench.tiny import KEYS, preset_file
from tests.train.tiny import MODEL


@pytest.fixture
def preset(tmp_path: Path) -> str:
    return preset_file(tmp_path, {"max_position_embeddings": 512})


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == KEYS and row["unit"] and math.isfinite(row["ours"])
        if row["ratio"] is not None:
            assert row["ratio"] > 0 and row["peer"] > 0 and row["peer_name"]


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = timing.seconds
    monkeypatch.setattr(timing, "seconds", lambda work, rounds, warmup=1: seconds(work, 1, 0))


def test_decoding(preset: str, once: None) -> None:
    shapes = (decode.Shape(1, 20, 8), decode.Shape(3, 20, 8))
    rows = decode.measure(preset, "transformers", shapes)
    check(rows)
    assert [row["unit"] for row in rows] == ["tokens/s", "ms to the first token"] * 2
    assert all(row["peer_name"].startswith("transformers, ") and row["ratio"] for row in rows)
    assert all(0 < row["roof_share"] for row in rows[::2])


def test_of_what_less_is_better() -> None:
    """The ratio says how many times better ours is; of nothing there is none."""
    ours, theirs = ({"tokens/s": rate, "ms to the first token, median": wait, "errors": errors}
                    for rate, wait, errors in ((300.0, 20.0, 1), (100.0, 50.0, 4)))
    rows = serve._load_rows("tiny", ours, theirs, {"cache_blocks_used": 0.0})
    assert [row["ratio"] for row in rows] == [3.0, 2.5, 4.0, None]
    assert [row["peer_name"] for row in rows] == ["transformers serve"] * 3 + [None]


def test_both_sides_say_the_same() -> None:
    model = Transformer(ModelConfig.parse(MODEL)).initialize().eval()
    prompts = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    _, theirs = decode._peer(model, prompts)
    ours = decode._ours(model, prompts, decode.Shape(3, 20, 12))
    assert ours(12) == theirs(12)[:, 20:].tolist()


def test_the_floor_counts_what_a_step_reads() -> None:
    """With enough tokens every weight but the embedding, once; for one token the active ones."""
    config = ModelConfig.parse(MODEL)
    embedding = config.vocab_size * config.hidden_size
    numbers = sizes(config)
    cache = config.num_hidden_layers * (16 + 4)
    assert decode.step_bytes(config, 10_000, 0, 2) == pytest.approx(2 * (numbers.parameters - embedding), rel=1e-6)
    one = 2 * (numbers.active_parameters - embedding) + 2 * 100 * cache
    assert decode.step_bytes(config, 1, 100, 2) == pytest.approx(one)


def write_trace(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_trace_keeps_what_is_shared(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", [
        {"timestamp": 0, "input_length": 2000, "output_length": 500, "hash_ids": [0, 1, 2, 3]},
        {"timestamp": 0, "input_length": 1400, "output_length": 10, "hash_ids": [0, 1, 9]},
        {"timestamp": 5, "input_length": 5, "output_length": 1, "hash_ids": [7]},
    ])
    first, second, third = trace.read_trace(path, 10, vocab_size=100, context=512)
    assert [len(one.prompt_ids) for one in (first, second, third)] == [62, 43, 1]
    assert [one.new_tokens for one in (first, second, third)] == [15, 1, 1]
    assert first.prompt_ids[:32] == second.prompt_ids[:32] != third.prompt_ids[:32]
    assert first.prompt_ids[32:43] != second.prompt_ids[32:]
    # Where that is too long for the model, everything shrinks alike.
    short = trace.read_trace(path, 10, vocab_size=100, context=32)
    assert max(len(one.prompt_ids) + one.new_tokens for one in short) <= 32
    assert short[0].prompt_ids[:12] == short[1].prompt_ids[:12]
    assert len(trace.read_trace(path, 2, 100, 512)) == 2


def test_the_cache_changes_the_work_and_not_the_replies(tmp_path: Path) -> None:
    model = Transformer(ModelConfig.parse({**MODEL, "max_position_embeddings": 512})).initialize().eval()
    rows = [{"input_length": 1024 + 600 * n, "output_length": 200, "hash_ids": list(range(3 + n))} for n in range(4)]
    found = trace.measure_trace("tiny", model, NoText(), write_trace(tmp_path / "t.jsonl", rows * 2),
                                max_running=2)
    check(found)
    units = {row["unit"]: row["ours"] for row in found}
    assert units["% of replies with the same tokens"] == 100
    assert 30 < units["% of prompt tokens from the cache"] < 100
    assert units["% of prompt tokens from the cache"] == pytest.approx(
        units["% of prompt tokens that the trace repeats"])


@pytest.mark.parametrize("line", ["{}", "nonsense", '{"input_length": "x", "output_length": 1, "hash_ids": []}'])
def test_a_line_that_is_no_request_is_named(line: str, tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", [{"input_length": 5, "output_length": 1, "hash_ids": [7]}])
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.jsonl: line 2: not a request"):
        trace.read_trace(path, 10, 100, 512)
    with pytest.raises(UserError, match="absent"):
        trace.read_trace(tmp_path / "absent", 10, 100, 512)


@pytest.mark.slow
def test_load_on_a_real_server(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = serve.measure(preset, None, clients=3, seconds=1.0)
    check(rows)
    units = {row["unit"]: row["ours"] for row in rows}
    assert units["errors"] == 0 and units["blocks left in use"] == 0 and units["tokens/s"] > 0
    assert "ms to the first token, p95" in units
