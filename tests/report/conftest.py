"""A run folder with plausible content, for every test of this room."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moonbase.data.sources import Skipped
from moonbase.recipe import load_recipe


def training_line(step: int, steps: int) -> dict[str, Any]:
    share = 1 - step / steps
    line: dict[str, Any] = {
        "step": step, "loss": 3 + 5 * math.exp(-step / 10), "balance_loss": 1e-4, "lr": 1e-3 * share, "grad_norm": 0.5,
        "update_rms": 0.2, "tokens": step * 4096, "tokens_per_second": 17_000.0 + step, "mfu": None,
        "max_logit": [10.0 + step, 20.0, 101.0 if step == 7 else 30.0, 40.0],
        "clipped_heads": [0, 0, 2 if step == 7 else 0, 0], "expert_load": [1.2, 1.4 + share, 1.1],
        "memory_bytes": 10**9, "seconds": step * 0.25,
    }
    if step % 10 == 0:
        line |= {"validation_loss": line["loss"] + 0.1, "validation_bits_per_byte": 1.2 + share,
                 "expert_share": [[0.8, 1.2, 1.1, 0.9]] * 3}
    return line


def skipped_files() -> dict[str, Any]:
    """As the corpus writes it: three counted, two named."""
    skipped = Skipped(keep=2)
    for name in ("/a/one.txt", "/a/two.txt", "/a/three.txt"):
        skipped.add("not UTF-8", name)
    return skipped.to_json()


FACTS = {
    "name": "quick <b>start</b>", "status": "finished", "command": "moonbase quickstart --preset pico",
    "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T03:09:05+00:00", "seconds": 300.0,
    "machine": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 16 << 30, "gpu": None, "os": "Some Linux"},
    "versions": {"python": "3.11.9", "torch": "2.13.0"}, "commit": "0" * 40,
    "parameters": 5_102_784, "active_parameters": 3_112_000,
    "corpus": {"sources": [{"path": "/usr/lib/python3", "documents": 120, "bytes": 4_000_000, "tokens": 1_200_000}],
               "documents": 120, "bytes": 4_000_000, "tokens": 1_200_000, "bytes_per_token": 3.33,
               "skipped": skipped_files()},
    "results": {"validation_bits_per_byte": 1.2, "xz_bits_per_byte": 1.71, "uniform_bits_per_byte": 3.9},
    "next_commands": ["moonbase chat runs/quickstart"],
}
SAMPLES = ("=== step 20 | temperature 0.0\n" '>>> "def "\n' '... "early(self):"\n'
           "=== step 40 | temperature 0.0\n" '>>> "def "\n' '... "late(self):\\n    return 1"\n')


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(steps=40, facts={}, samples=None, name="run") -> the folder."""

    def make(steps: int = 40, facts: dict[str, Any] | None = None, samples: str = SAMPLES, name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(load_recipe("pico", [f"steps={max(steps, 1)}", "data=/texts"]).to_yaml())
        lines = [json.dumps(training_line(step, steps)) + "\n" for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "samples.txt").write_text(samples)
        (folder / "run.json").write_text(json.dumps(FACTS | (facts or {})))
        return folder

    return make
