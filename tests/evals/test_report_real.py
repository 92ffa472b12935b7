"""The report over real records: stored judgements of real answers, through the table, the figures and the page."""

from __future__ import annotations

import gzip
import json
import re
from html import unescape
from pathlib import Path

import pytest

from moonbase.evals.printing import text_of
from moonbase.evals.records import Record, digest, write_records
from moonbase.evals.report import write_reports
from tests.evals.test_report_languages import NAMES

LABELS = {"COMPLETE": "full", "EVASIVE": "evasive", "DENIAL": "refusal"}
MODELS = ("deepseek_deepseek-chat-v3-0324", "openai_gpt-4.1-2025-04-14")
JUDGES = {"analysis": "grok", "analysis-gpt-4o": "gpt"}


def judgements(folder: Path, model: str) -> dict[tuple[str, str], str]:
    path = folder / f"{model}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real test data is absent: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return {(row["category"], str(row["question_id"])): row["compliance"] for row in map(json.loads, lines)}


def records(shared: Path) -> list[Record]:
    found = []
    for model in MODELS:
        said = {judge: judgements(shared / "paired-politics" / name, model) for name, judge in JUDGES.items()}
        for (category, item), word in said["grok"].items():
            failed, group = word.startswith("ERROR"), category.removeprefix("zh_").partition("_")[0]
            found.append(Record(
                schema="moonbase.record/1", suite="paired-politics", task="paired-politics", item=f"{group}-{item}",
                model=model, condition={"language": "zh" if category.startswith("zh") else "en"}, group=group,
                input_digest=digest(category + item), output_digest=digest("answer"),
                label=None if failed else LABELS[word], status="error" if failed else "scored",
                votes={judge: LABELS.get(words.get((category, item), "")) for judge, words in said.items()}))
    return found


def test_published_numbers_reach_the_page(shared_data: Path, tmp_path: Path) -> None:
    figures_module = pytest.importorskip("moonbase.evals.figures")
    from moonbase.evals.suite import load_suite

    suite = load_suite("paired-politics")
    write_records(tmp_path / "records.jsonl", records(shared_data))
    figures = figures_module.figures_of(suite, figures_module.Table.read(tmp_path / "records.jsonl"))
    plan = {"suite": suite.canonical(), "models": list(MODELS), "seed": 0}
    (tmp_path / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps({
        "schema": "moonbase.results/1", "figures": [figure.model_dump(mode="json") for figure in figures]}))
    for path in write_reports(tmp_path):
        text = path.read_text(encoding="utf-8")
        sections = set(re.findall(r'<section id="(\w+)"', text))
        assert {"languages", "controlled", "agreement", "differences", "conclusions", "absent"} <= sections
        shown = dict(re.findall(r'<data class="figure" data-id="([^"]*)" value="[^"]*">([^<]*)</data>', text))
        assert set(shown) == {figure.id for figure in figures}
        language = "zh" if path.name == "report.zh.html" else "en"
        assert all(unescape(shown[figure.id]) == text_of(figure, language) for figure in figures)
        # Llm-compliance, DeepSeek-V3-0324 on China: 51.0% of 49 in English, 10.2% in Chinese; GPT-4.1 95.9% in both.
        # All questions in Chinese are on China: the figure is not there twice.
        start = f"paired-politics/{MODELS[0]}"
        assert shown[f"{start}/group=china/language=en/full"].startswith("51.0% [")
        assert shown[f"{start}/language=zh/full"].startswith("10.")
        if language == "zh":
            # All that is left in Latin letters are names, and what is called by its English name in any language.
            own = {"moonbase", "English", "results", "json", "csv", "paired", "politics", *JUDGES.values(), *NAMES}
            body = re.sub(r"<(style|code|pre)\b.*?</\1>|<section id=.made.>.*", "", text, flags=re.DOTALL)
            left = set(re.findall("[A-Za-z]{3,}", unescape(re.sub("<[^>]*>", " ", body)))) - own
            # A name may be cut in a chart.
            parts = [part for model in MODELS for part in re.findall("[A-Za-z]+", model)]
            assert not {word for word in left if not any(part.startswith(word) for part in parts)}
        assert any(re.search("40.8 (points|个百分点)", words) for name, words in shown.items() if MODELS[0] in name)
