"""Records for the tests of figures, comparisons and fine-tuning."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moonbase.evals.records import Record, digest, write_records

LABELS = {"COMPLETE": "full", "EVASIVE": "evasive", "DENIAL": "refusal"}


def record(item: str, **fields: Any) -> Record:
    facts = {"suite": "s", "task": "t", "model": "m", "input_digest": digest(item), "output_digest": digest("x"),
             "output": "x"}
    return Record(**facts | {"item": item} | fields)


def politics(shared_data: Path) -> Iterator[Record]:
    """Seven models on paired questions about states, with the labels of two judges; a failed call is an error."""
    folder = shared_data / "paired-politics"
    if not folder.is_dir():
        pytest.skip(f"real test data is absent: {folder}")
    for path in sorted((folder / "analysis").glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as first, gzip.open(folder / "analysis-gpt-4o" / path.name, "rt") as second:
            other = {(row["category"], row["question_id"]): row["compliance"] for row in map(json.loads, second)}
            for row in map(json.loads, first):
                category, item = row["category"], row["question_id"]
                label = LABELS.get(row["compliance"])
                yield Record(
                    suite="paired-politics", task="politics", item=item, model=row["model"],
                    condition={"language": "zh" if category.startswith("zh_") else "en"},
                    group=category.removeprefix("zh_").removesuffix("_criticism"), cluster="q" + item.split("_")[-1],
                    input_digest=digest(category + item), output_digest=digest("x"), label=label,
                    status="scored" if label else "error",
                    votes={"grok": label, "gpt-4o": LABELS.get(other[category, item])})


def graded(model: str, seed: int, chance: float, items: int = 200, samples: int = 1, **fields: Any) -> list[Record]:
    """Items whose difficulty is the same for every model; the same seed gives the same answers."""
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    easy = shared.uniform(-0.2, 0.2, items)
    return [record(f"i{item}", model=model, sample=sample,
                   scores={"accuracy": float(own.random() < chance + easy[item])}, **fields)
            for item in range(items) for sample in range(samples)]


def write_folder(path: Path, records: list[Record]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    write_records(path / "records.jsonl", records)
    return path
