"""The three arms of `bench int4` on a tiny network: what each one is, and the arithmetic of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from moonbase.bench import int4
from moonbase.ops.int4 import fake_quantize_
from moonbase.recipe import DataConfig
from moonbase.train.trainer import Trainer
from tests.bench.tiny import TRAINING, drawn_texts, preset_file

EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def preset(tmp_path: Path) -> str:
    return preset_file(tmp_path, {"moe_intermediate_size": 32}, optimizer={"lr": 0.03}, schedule={"warmup_steps": 1},
                       **TRAINING)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return drawn_texts(tmp_path)


def test_arms_and_table(preset: str, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    measure_loss = int4._held_out_loss

    def look(trainer: Trainer, corpus: Any) -> float:
        loss = measure_loss(trainer, corpus)
        seen.append({"seed": trainer.recipe.seed, "qat": trainer.recipe.qat, "loss": loss, "step": trainer.step,
                     "experts": trainer.model.get_parameter(EXPERTS).detach().clone(),
                     "router": trainer.model.get_parameter("model.layers.1.mlp.gate.weight").detach().clone()})
        return loss

    monkeypatch.setattr(int4, "_held_out_loss", look)
    rows = {row["shape"].partition(": ")[2]: row
            for row in int4.measure(preset, steps=4, seeds=(3, 8), data=data)}
    for seed in (3, 8):
        plain, rounded, least, trained = (each for each in seen if each["seed"] == seed)
        assert [each["step"] for each in (plain, rounded, least, trained)] == [4] * 4
        assert trained["qat"].start_step == 2 and plain["qat"] is None
        for each, rule in ((rounded, "absmax/7"), (least, "least-error")):
            expected = fake_quantize_(torch.empty_like(plain["experts"]), plain["experts"], rule)
            assert torch.equal(each["experts"], expected) and torch.equal(each["router"], plain["router"])
        assert not torch.equal(trained["router"], plain["router"]), "another run"
        again = fake_quantize_(torch.empty_like(trained["experts"]), trained["experts"], "absmax/7")
        assert torch.equal(again, trained["experts"]), "it computes with INT4"
        assert len({each["loss"] for each in (plain, rounded, least, trained)}) == 4
    losses = {name: [each["loss"] for each in seen][place::4]
              for place, name in enumerate(("plain", "rounded afterwards", "rounded afterwards, least error",
                                            "trained in INT4"))}
    for name, values in losses.items():
        row = rows[name]
        assert row["values"] == values and row["n"] == 2
        expected = stats.t.interval(0.95, 1, loc=sum(values) / 2, scale=stats.sem(values))
        assert (row["low"], row["high"]) == pytest.approx(expected)
        assert row["peer"] == (None if name == "plain" else pytest.approx(sum(losses["plain"]) / 2))
    difference = rows["trained in INT4 - rounded afterwards"]
    assert difference["values"] == [a - b for a, b in zip(losses["trained in INT4"], losses["rounded afterwards"],
                                                          strict=True)]
    assert len(rows) == 9 and json.dumps(list(rows.values()), allow_nan=False)
