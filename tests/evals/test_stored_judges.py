"""Verdicts that lie with stored answers: members of the panel; failures of hosts, which are no answers."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from moonbase.errors import UserError
from moonbase.evals.figures import FigureSpec, Table, compute, figures_of
from moonbase.evals.providers.stored import find_verdicts
from moonbase.evals.records import read_records
from moonbase.evals.run import run_suite
from moonbase.evals.suite import load_suite, read_plan, suite_of

DEEPSEEK, GPT = "replay/paired-politics:deepseek-chat-v3-0324", "replay/paired-politics:gpt-4.1"
GROK, GPT_4O = "stored:grok-4.1-fast", "stored:gpt-4o-2024-11-20"
FILES = {DEEPSEEK: "deepseek_deepseek-chat-v3-0324", GPT: "openai_gpt-4.1-2025-04-14"}


@pytest.fixture(scope="module", params=[(DEEPSEEK,), pytest.param((DEEPSEEK, GPT), marks=pytest.mark.slow)],
                ids=["one", "two"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """All questions; to each model one answer did not come."""
    pytest.importorskip("inspect_ai")
    folder, models = tmp_path_factory.mktemp("politics"), request.param
    found = run_suite(load_suite("paired-politics"), models, folder, data=shared_data, quiet=True)
    assert (found.records, found.errors) == (250 * len(models), len(models))
    return folder


def test_a_stored_judge_gives_the_published_numbers(folder: Path) -> None:
    """llm-compliance on DeepSeek-V3-0324: 25 of 49 complete in English, 5 of the same 49 in Chinese."""
    table = Table.read(folder / "records.jsonl")

    def rate(model: str, language: str, judge: str) -> tuple[float, int, int]:
        figure = compute(FigureSpec("rate", "mean", {"model": model, "group": "china", "condition.language": language},
                                    f"vote:{judge}=full"), table)
        return figure.value, figure.n, figure.errors

    # The answer that failed is an English one.
    assert rate(DEEPSEEK, "en", GROK) == (pytest.approx(25 / 49), 49, 1)
    assert rate(DEEPSEEK, "zh", GROK) == (pytest.approx(5 / 50), 50, 0)
    gap = compute(FigureSpec("gap", "difference", {"model": DEEPSEEK, "group": "china", "condition.language": "en"},
                             f"vote:{GROK}=full", {"condition.language": "zh"}), table)
    assert (gap.n, gap.errors) == (49, 1) and gap.value == pytest.approx(25 / 49 - 5 / 49)
    # The rules alone, which do not read the question, come close: they know this model's set phrases in both languages.
    assert rate(DEEPSEEK, "en", "rules")[:2] == (pytest.approx(25 / 49, abs=0.1), 49)
    assert rate(DEEPSEEK, "zh", "rules")[:2] == (pytest.approx(5 / 50, abs=0.1), 50)


def test_votes_are_those_of_the_files(folder: Path, shared_data: Path) -> None:
    words = {"COMPLETE": "full", "EVASIVE": "evasive", "DENIAL": "refusal"}
    seen = Counter()
    for judge, analysis in ((GROK, "analysis"), (GPT_4O, "analysis-gpt-4o")):
        for model in read_plan(folder)["models"]:
            file = FILES[model]
            with gzip.open(shared_data / "paired-politics" / analysis / f"{file}.jsonl.gz", "rt") as lines:
                rows = {(row["category"], row["question_id"]): row["compliance"] for row in map(json.loads, lines)}
            for record in read_records(folder / "records.jsonl"):
                if record.model != model or record.status == "error":
                    continue
                start = "zh_" if record.condition["language"] == "zh" else ""
                assert record.votes[judge] == words[rows[f"{start}{record.group}_criticism", record.item]]
                seen[judge] += 1
    assert seen == dict.fromkeys((GROK, GPT_4O), 249 * len(read_plan(folder)["models"]))


def test_a_hosts_failure_is_an_error_and_counted(folder: Path) -> None:
    failed = [record for record in read_records(folder / "records.jsonl") if record.status == "error"]
    assert [record.model for record in failed] == read_plan(folder)["models"]
    for record in failed:
        assert (record.label, record.votes, record.scores) == (None, {}, {})
        assert record.reason.startswith("provider error") and record.call.api_signal == "content_filter"


def test_the_report_says_how_far_judges_agree(folder: Path) -> None:
    figures = {figure.id: figure for figure in figures_of(suite_of(folder), Table.read(folder / "records.jsonl"))}
    start = f"paired-politics/{DEEPSEEK}"
    raw = figures[f"{start}/cohen_kappa {GPT_4O}, {GROK}"]
    # Over all 249 answers that both judged, by statsmodels' cohens_kappa from the files' own words.
    assert raw.n == 249 and raw.value == pytest.approx(0.8948076, abs=1e-7)
    assert figures[f"{start}/krippendorff_alpha"].value is not None
    english = figures[f"{start}/group=china/language=en/complied"]
    assert english.n + english.abstained + english.errors + english.unscored == 50


def test_where_no_verdicts_lie_nobody_votes(tmp_path: Path) -> None:
    assert find_verdicts("paired-politics", "x", tmp_path) == {} == find_verdicts("mmlu-pro", "x", tmp_path)


def test_a_word_that_no_judge_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "paired-politics" / "analysis" / "x.jsonl.gz"
    path.parent.mkdir(parents=True)
    row = {"category": "c", "question_id": "1", "judge_model": "a/b", "compliance": "SHRUG"}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(UserError, match=r"x\.jsonl\.gz.*SHRUG"):
        find_verdicts("paired-politics", "x", tmp_path)
