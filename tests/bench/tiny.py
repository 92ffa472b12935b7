"""What tests of benches share: a tiny network in the place of a preset, a corpus for it, and what every row has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from moonbase.recipe import DataConfig
from tests.train.tiny import MODEL

KEYS = {"shape", "unit", "ours", "peer", "peer_name", "ratio", "roof_share"}
TRAINING = {"sequence_length": 32, "batch_size": 4, "micro_batch_size": 2}


def preset_file(folder: Path, model: dict[str, Any], **recipe: Any) -> str:
    """A recipe of the tiny network with other fields; JSON is YAML."""
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({"model": {**MODEL, **model}, **recipe}), encoding="utf-8")
    return str(path)


def drawn_texts(folder: Path) -> DataConfig:
    """Forty texts of words of five letters."""
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(40):
        words = " ".join("".join(draw.choices("abcde", k=draw.randint(1, 5))) for _ in range(60))
        (folder / "texts" / f"{number}.txt").write_text(words, encoding="utf-8")
    return DataConfig.model_validate({"sources": [{"path": str(folder / "texts")}], "workers": 1,
                                      "validation_fraction": 0.2})
