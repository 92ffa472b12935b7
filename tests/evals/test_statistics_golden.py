"""Published numbers on real data: the paired questions critical of China, in English and in Chinese."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from moonbase.evals.statistics import mcnemar_exact, paired_difference

# model: English %, Chinese %, pairs, complete in English only, in Chinese only
PUBLISHED = {
    "deepseek_deepseek-chat-v3-0324": (51.0, 10.2, 49, 20, 0),
    "qwen_qwen3-235b-a22b": (62.0, 32.0, 50, 16, 1),
    "anthropic_claude-3-7-sonnet-20250219": (96.0, 76.0, 50, 10, 0),
    "openai_gpt-4.1-2025-04-14": (95.9, 95.9, 49, 2, 2),
}


def complete(shared_data: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """1 where the answer is labelled COMPLETE, NaN where the provider failed; questions in the same order."""
    path = shared_data / "paired-politics" / "analysis" / f"{model}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real test data is absent: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = {(row["category"], row["question_id"]): row["compliance"] for row in map(json.loads, lines)}
    items = sorted(item for category, item in found if category == "china_criticism")

    def side(category: str) -> np.ndarray:
        labels = [found[category, item] for item in items]
        return np.array([math.nan if label.startswith("ERROR") else float(label == "COMPLETE") for label in labels])

    return side("china_criticism"), side("zh_china_criticism")


@pytest.mark.parametrize("model", PUBLISHED)
def test_paired_politics(shared_data: Path, model: str) -> None:
    english, chinese, pairs, only_english, only_chinese = PUBLISHED[model]
    found = paired_difference(*complete(shared_data, model))
    assert (round(100 * found.first, 1), round(100 * found.second, 1)) == (english, chinese)
    assert (found.n, found.only_first, found.only_second) == (pairs, only_english, only_chinese)
    assert found.low <= found.difference <= found.high


def test_deepseek_in_full(shared_data: Path) -> None:
    found = paired_difference(*complete(shared_data, "deepseek_deepseek-chat-v3-0324"))
    assert round(100 * found.difference, 1) == 40.8
    assert round(100 * found.standard_error, 1) == 7.1
    assert round(100 * found.unpaired_standard_error, 1) == 8.3
    assert f"{found.p_value:.1e}" == "1.9e-06" and found.p_value == 2 * 0.5**20
    assert (found.missing_first, found.missing_second) == (1, 0)


def test_mcnemar_of_the_others() -> None:
    assert mcnemar_exact(16, 1) == pytest.approx(2 * (1 + 17) / 2**17)
    assert mcnemar_exact(10, 0) == 2 / 2**10
    assert mcnemar_exact(2, 2) == mcnemar_exact(0, 0) == 1.0
