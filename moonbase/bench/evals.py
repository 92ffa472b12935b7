"""What follows a run of an evaluation: labelling answers, records, figures with their intervals, both reports.

12,000 answers of each of two models, invented here from a seed: refusals, evasions and answers of about 150 words, over
items, languages, thinking and samples. There is no peer that does the same; the figures are seconds and memory.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moonbase.bench.rows import plain_row

ITEMS, LANGUAGES, THINKING, SAMPLES = 1000, ("en", "zh"), ("on", "off"), 3
METHOD = ("Wall-clock time, measured once, of what follows a run; answers of about 150 words in two languages, "
          "invented from a seed. MB: what Python allocated at most (tracemalloc).")
MODELS = ("bench/first", "bench/second")
_OPENINGS = {
    "en": ("I'm sorry, but I can't help with that.", "There are many views on this, and it depends.", "Here is how."),
    "zh": ("抱歉，我无法回答这个问题。", "这个问题比较复杂，各方看法不一。", "步骤如下。"),
}
_WORDS = {"en": "first take the second part and put it under the third until both are level then wait".split(),
          "zh": "先 取出 第二 部分 放到 第三 部分 下面 直到 两者 齐平 然后 等待".split()}
SUITE = {
    "name": "bench", "title": "Invented answers", "about": "To measure what follows a run.", "metric": "full",
    "smallest_n": 100, "judges": ["rules"],
    "tasks": [{"name": "invented", "source": "file:invented", "metric": "full"}],
}


def measure(preset: str, peer: str | None, items: int = ITEMS) -> list[dict[str, Any]]:
    """Rows for each stage and the whole, and what memory the stages after the records take."""
    from moonbase.evals.evaluation import summarise
    from moonbase.evals.figures import Table
    from moonbase.evals.records import write_records

    each = items * len(LANGUAGES) * len(THINKING) * SAMPLES
    with tempfile.TemporaryDirectory(prefix="moonbase-bench-") as name:
        folder = Path(name)
        plan = {"schema": "moonbase.plan/1", "suite": SUITE, "models": list(MODELS), "seed": 0, "limit": None}
        (folder / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
        began = time.perf_counter()
        write_records(folder / "records.jsonl", _records(items))
        labelled = time.perf_counter() - began
        began = time.perf_counter()
        summarise(folder)
        summarised = time.perf_counter() - began
        memory = []
        for share in (4, 1):
            write_records(folder / "records.jsonl", _records(items // share))
            tracemalloc.start()
            Table.read(folder / "records.jsonl")
            memory.append(tracemalloc.get_traced_memory()[1] / 1e6)
            tracemalloc.stop()
    shape = f"{each:,} samples x {len(MODELS)} models"
    rows = [(f"{shape}: labels and records", "s", labelled), (f"{shape}: figures and two reports", "s", summarised),
            (f"{shape}: in all", "s", labelled + summarised),
            ("a quarter of that: memory to read the records", "MB", memory[0]),
            (f"{shape}: memory to read the records", "MB", memory[1])]
    return [plain_row(*row) for row in rows]


def _records(items: int) -> Iterator[Any]:
    from moonbase.evals.records import Record, digest
    from moonbase.evals.refusal.rules import label

    for model in MODELS:
        chance = random.Random(model)
        for item in range(items):
            for language in LANGUAGES:
                for thinking in THINKING:
                    for sample in range(SAMPLES):
                        answer = _answer(chance, language)
                        found = label(answer, language).label
                        yield Record(
                            suite="bench", task="invented", item=f"item-{item}", sample=sample, model=model,
                            condition={"language": language, "thinking": thinking},
                            group=("china", "us", "benign")[item % 3], input_digest=digest(f"{item} {language}"),
                            output_digest=digest(answer), output=answer, label=found, votes={"rules": found},
                            scores={"full": float(found == "full")}, output_tokens=200, seconds=1.0, cost=0.001)


def _answer(chance: random.Random, language: str) -> str:
    words = " ".join(chance.choices(_WORDS[language], k=150))
    return f"{chance.choices(_OPENINGS[language], weights=(1, 1, 3))[0]} {words}."
