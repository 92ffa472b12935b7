"""The report over real records: stored judgements of real answers, through the table, the figures and the page."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
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


def hosts(folder: Path, model: str) -> dict[tuple[str, str], str]:
    """Who served each answer, as its router said."""
    with gzip.open(folder / "responses" / f"{model}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {(row["category"], str(row["question_id"])): row["response"].get("provider") or row["api_provider"]
                for row in map(json.loads, lines)}


def records(shared: Path) -> list[Record]:
    found = []
    for model in MODELS:
        served = hosts(shared / "paired-politics", model)
        said = {judge: judgements(shared / "paired-politics" / name, model) for name, judge in JUDGES.items()}
        for (category, item), word in said["grok"].items():
            failed, group = word.startswith("ERROR"), category.removeprefix("zh_").partition("_")[0]
            found.append(Record(
                schema="moonbase.record/1", suite="paired-politics", task="paired-politics", item=f"{group}-{item}",
                model=model, condition={"language": "zh" if category.startswith("zh") else "en"}, group=group,
                input_digest=digest(category + item), output_digest=digest("answer"),
                call={"provider": served[category, item]},
                label=None if failed else LABELS[word], status="error" if failed else "scored",
                votes={judge: LABELS.get(words.get((category, item), "")) for judge, words in said.items()}))
    return found


def test_published_numbers_reach_the_page(shared_data: Path, tmp_path: Path) -> None:
    figures_module = pytest.importorskip("moonbase.evals.figures")
    from moonbase.evals.suite import load_suite

    suite = load_suite("paired-politics")
    known = records(shared_data)
    write_records(tmp_path / "records.jsonl", known)
    figures = figures_module.figures_of(suite, figures_module.Table.read(tmp_path / "records.jsonl"))
    plan = {"suite": suite.canonical(), "models": list(MODELS), "seed": 0}
    (tmp_path / "suite.json").write_text(json.dumps(plan), encoding="utf-8")
    (tmp_path / "results.json").write_text(json.dumps({
        "schema": "moonbase.results/1", "figures": [figure.model_dump(mode="json") for figure in figures]}))
    for path in write_reports(tmp_path):
        text = path.read_text(encoding="utf-8")
        sections = set(re.findall(r'<section id="(\w+)"', text))
        assert {"languages", "controlled", "providers", "agreement", "differences", "conclusions", "absent"} <= sections
        shown = dict(re.findall(r'<data class="figure" data-id="([^"]*)" value="[^"]*">([^<]*)</data>', text))
        assert set(shown) == {figure.id for figure in figures}
        language = "zh" if path.name == "report.zh.html" else "en"
        assert all(unescape(shown[figure.id]) == text_of(figure, language) for figure in figures)
        # Llm-compliance, DeepSeek-V3-0324 on China: 51.0% of 49 in English, 10.2% in Chinese; GPT-4.1 95.9% in both.
        # All questions in Chinese are on China: the figure is not there twice.
        start = f"paired-politics/{MODELS[0]}"
        assert shown[f"{start}/group=china/language=en/full"].startswith("51.0% [")
        assert shown[f"{start}/language=zh/full"].startswith("10.")
        # Eight hosts served DeepSeek, and of the questions on China not the same share in both languages.
        served = Counter((one.call.provider, one.condition["language"]) for one in known if one.model == MODELS[0]
                         and one.label)
        drift = {figure.spec.select["provider"]: figure.n for figure in figures if "provider" in figure.spec.select
                 and figure.spec.select.get("condition.language") == "zh" and figure.model == MODELS[0]}
        assert drift == {host: n for (host, spoken), n in served.items() if spoken == "zh"} and len(drift) == 8
        assert not [name for name in shown if "provider=" in name and MODELS[1] in name]
        plain = unescape(re.sub("<[^>]*>", "", text))
        about = ".*(other hosts of|的其他服务商：|That hosts of|的各服务商本身)"
        said = [line for line in plain.splitlines() if re.match(about, line)]
        assert [[model in line for model in MODELS] for line in said] == [[False, True], [True, False]]
        note = {"en": "the sides had other mixes of hosts: ", "zh": "两方由不同比例的服务商作答："}[language]
        owed = [line for line in plain.splitlines() if re.match(".*(owes nothing to the hosts|与服务商无关)", line)]
        assert owed and all(MODELS[0] in line and note in line and "L0" in line for line in owed)
        assert re.search("40.8 (points|个百分点)", owed[0]) and f"{note}DeepSeek 8:23," in owed[0]
        assert f"{note}DeepSeek 23:8, DeepInfra 12:16, InferenceNet 3:7, SambaNova 0:3, …" in plain
        if language == "zh":
            # All that is left in Latin letters are names, and what is called by its English name in any language.
            own = {"moonbase", "English", "results", "json", "csv", "paired", "politics", *JUDGES.values(), *NAMES,
                   *(one.call.provider for one in known)}
            body = re.sub(r"<(style|code|pre)\b.*?</\1>|<section id=.made.>.*", "", text, flags=re.DOTALL)
            left = set(re.findall("[A-Za-z]{3,}", unescape(re.sub("<[^>]*>", " ", body)))) - own
            # A name may be cut in a chart.
            parts = [part for model in MODELS for part in re.findall("[A-Za-z]+", model)]
            assert not {word for word in left if not any(word in part for part in parts)}
        assert any(re.search("40.8 (points|个百分点)", words) for name, words in shown.items() if MODELS[0] in name)
