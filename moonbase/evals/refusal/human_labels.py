"""Answers with human or stored labels, read from the user's own copy of the sets, and the published split into halves.

XSTest (Röttger et al., NAACL 2024): 450 prompts, the answers of two models, two human labels and a final one each. Some
prompts are unsafe: nothing here prints a text, and nothing else should. Paired politics: answers of seven models to
questions critical of a state, labelled by two language models; machine labels, so what is measured against them is
agreement, not error.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from moonbase.errors import UserError

SEED = "moonbase-refusal-1"
"""Published: it decides which half a prompt belongs to, and was fixed before any answer was looked at."""
XSTEST_MODELS = ("gpt4", "llama2new")
HUMAN_LABELS = {"1_full_compliance": "full", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}
JUDGE_LABELS = {"COMPLETE": "full", "EVASIVE": "evasive", "DENIAL": "refusal"}
"""What is in neither (a provider's error, a judge's own failure) is no answer's label."""


@dataclass(frozen=True)
class Answer:
    """One stored answer. `half` is "tune" or "hold"; `labels` are each labeller's, in our names."""

    item: str
    group: str
    model: str
    language: str
    half: str
    text: str
    label: str
    labels: tuple[str | None, str | None]


def halves(groups: dict[str, list[str]], seed: str = SEED) -> dict[str, str]:
    """item -> "tune" or "hold", half of every group, by the order of SHA-256 of seed and id.

    groups: group name -> its items. Of an odd number, every other group gives the odd one to the tuning half.
    """
    answer = {}
    for number, name in enumerate(sorted(groups)):
        order = sorted(groups[name], key=lambda item: hashlib.sha256(f"{seed}:{item}".encode()).digest())
        middle = (len(order) + number % 2) // 2
        answer.update({item: "tune" if rank < middle else "hold" for rank, item in enumerate(order)})
    return answer


def _lines(path: Path) -> list[dict]:
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            if path.name.endswith(".csv.gz"):
                return list(csv.DictReader(file))
            return [json.loads(line) for line in file]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {error}") from None


def xstest(folder: Path) -> list[Answer]:
    """The human-labelled answers under `folder`/xstest/completions; `folder` holds the user's copies of the sets."""
    answers = []
    for model in XSTEST_MODELS:
        rows = _lines(folder / "xstest" / "completions" / f"xstest_v2_completions_{model}.csv.gz")
        groups: dict[str, list[str]] = {}
        for row in rows:
            groups.setdefault(row["type"], []).append(row["id"])
        half = halves(groups)
        for row in rows:
            labels = (HUMAN_LABELS[row["annotation_1"]], HUMAN_LABELS[row["annotation_2"]])
            answers.append(Answer(row["id"], row["type"], model, "en", half[row["id"]], row["completion"],
                                  HUMAN_LABELS[row["final_label"]], labels))
    return answers


def paired_politics(folder: Path, language: str | None = None) -> list[Answer]:
    """The machine-labelled answers under `folder`/paired-politics; label: the first judge's. Provider errors left out.

    A question and its Chinese twin (and its mirrors about other states) share a number, and so a half.
    """
    home = folder / "paired-politics"
    answers = []
    half = halves({"questions": [f"{number:02d}" for number in range(1, 51)]})
    for path in sorted((home / "responses").glob("*.jsonl.gz")):
        judged: list[dict[tuple[str, str], str | None]] = []
        for judge in ("analysis", "analysis-gpt-4o"):
            judged.append({(row["category"], row["question_id"]): JUDGE_LABELS.get(row["compliance"])
                           for row in _lines(home / judge / path.name)})
        for row in _lines(path):
            key = (row["category"], row["question_id"])
            tongue = "zh" if row["category"].startswith("zh_") else "en"
            first = judged[0].get(key)
            if first is None or (language and tongue != language):
                continue
            answers.append(Answer(row["question_id"], row["category"], path.name.removesuffix(".jsonl.gz"), tongue,
                                  half[row["question_id"].rsplit("_", 1)[1]], answer_text(row["response"]), first,
                                  (first, judged[1].get(key))))
    return answers


def answer_text(response: dict) -> str:
    """Text of the first choice of a stored chat completion; "" where it holds none."""
    try:
        return response["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        return ""
