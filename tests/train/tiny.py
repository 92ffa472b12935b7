"""The smallest recipe with every mechanism in it, and ways to look at what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moonbase.recipe import Recipe, load_recipe
from moonbase.report.console import Console
from moonbase.train.parallel import World
from moonbase.train.run import train
from moonbase.train.trainer import Trainer

MODEL = {
    "model_type": "kimi_k2", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.0, "max_position_embeddings": 128, "initializer_range": 0.05,
}
TIMES = ("tokens_per_second", "mfu", "memory_bytes", "seconds")
"""What differs between two runs of the same recipe."""
ONE = World(0, 1, torch.device("cpu"))


def write_yaml(folder: Path, texts: Path, tokenizer: Path, **fields: Any) -> Path:
    """A recipe file; JSON is YAML."""
    values: dict[str, Any] = {
        "name": "tiny", "model": MODEL, "data": {"sources": [{"path": str(texts)}], "tokenizer": str(tokenizer),
                                                 "validation_fraction": 0.1, "workers": 1},
        "sequence_length": 32, "batch_size": 4, "steps": 12, "validate_every": 5, "validation_batches": 2,
        "optimizer": {"lr": 0.01}, "schedule": {"warmup_steps": 3}, "checkpoint": {"every_minutes": 60}, "seed": 1,
    }
    for name, value in fields.items():
        section, _, field = name.partition("__")
        if field:
            values[section] = {**values.get(section, {}), field: value}
        else:
            values[name] = value
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def quiet() -> Console:
    return Console(quiet=True)


def run(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
    return train(recipe, folder, console=quiet(), **options)


def go_on(folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Resume the run of a folder as the command line does: its own recipe, perhaps with other fields."""
    return run(load_recipe(str(folder / "config.yaml"), overrides), folder, resume=True, **options)


def stop_after(step: int):
    """For `on_ready`: ask the run to stop after this step, as a signal would."""

    def ready(trainer: Trainer) -> None:
        original = trainer.train_step

        def train_step() -> dict[str, Any]:
            record = original()
            if trainer.step == step:
                trainer.stop("asked by a test")
            return record

        trainer.train_step = train_step

    return ready


def metrics(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines if timed else [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def content(checkpoint: Path) -> dict[str, Any]:
    """Everything that a checkpoint says but the time: bytes of its files, and the facts of its state."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    state = json.loads(found.pop("trainer_state.json"))
    del state["facts"]["seconds"]
    return {**found, "trainer_state.json": state}


def tensors(checkpoint: Path, prefix: str = "model") -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(checkpoint.glob(f"{prefix}-*.safetensors"))
            for name, value in load_file(path).items()}
