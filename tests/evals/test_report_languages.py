"""The Chinese page: every text from the figure's numbers, nothing left in English but names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from moonbase.evals.figures import FigureSpec, Table, compute, figures_of
from moonbase.evals.printing import text_of
from moonbase.evals.report.phrases import say
from moonbase.evals.suite import load_suite, suite_names
from tests.evals.figure_samples import record

ENGLISH = re.compile(r"[A-Za-z]{3,}")
NAMES = {"Wilson", "Newcombe", "McNemar", "Rogan", "Gladen", "Lang", "Reiczigel", "Krippendorff", "Cohen", "pass"}
"""People, and the names of measures."""


def samples() -> Table:
    """Something for every function: repeats, prices, clusters, abstentions, two judges, two languages."""
    found = []
    for item in range(12):
        for language in ("en", "zh"):
            for number in range(2):
                label = "refusal" if (item + number) % 3 == 0 else "full"
                found.append(record(
                    f"i{item}", sample=number, cluster=f"c{item // 2}", group=("china", "us", "safe")[item % 3],
                    condition={"language": language}, cost=0.5, label=label, scores={"accuracy": float(item % 2)},
                    votes={"one": label, "two": "full" if item % 4 else None}))
    return Table.of(found)


def test_chinese_texts_have_the_same_numbers_and_no_english_words() -> None:
    table = samples()
    suite = load_suite("over-refusal").model_copy(update={"metric": "label:full", "cluster": "item"})
    figures = [*figures_of(None, table), *figures_of(suite, table), *(compute(
        FigureSpec("x", function, select, "score:accuracy", None, params, 1), table) for function, select, params in (
        ("cost_per_correct", {"item": "i0"}, {}), ("mean", {"item": "absent"}, {}), ("mean", {"item": "i0"}, {}),
        ("mean", {"item": "i1"}, {}), ("missing", {"item": "absent"}, {}), ("power", {"item": "i0"}, {}),
        ("design_effect", {"item": "i0"}, {}), ("corrected_rate", {}, {
            "true_positives": 5, "positives": 9, "true_negatives": 2, "negatives": 9}), ("pass_at_k", {}, {"k": 5})))]
    functions = {figure.function for figure in figures}
    assert {"mean", "missing", "difference", "power", "design_effect", "cost_per_correct", "pass_at_k", "agreement",
            "members", "bootstrap", "corrected_rate", "difference_in_differences"} <= functions
    for figure in figures:
        chinese = text_of(figure, "zh")
        assert text_of(figure) == figure.text == text_of(json.loads(figure.model_dump_json()))
        assert chinese == text_of(figure.model_dump(mode="json"), "zh")
        assert not ENGLISH.search(re.sub("|".join(NAMES), "", chinese)), chinese
        # The numbers are those of the English text, whatever order the sentence has.
        digits = [sorted(re.findall(r"\d[\d,.]*\d|\d", text.replace("%", ""))) for text in (figure.text, chinese)]
        assert set(digits[0]) == set(digits[1]), (figure.text, chinese)
        for words in (figure.method, figure.note or ""):
            said = say(words, "zh")
            left = set(ENGLISH.findall(re.sub("one, two|language", "", said))) - NAMES
            assert not left or words.startswith("judges: "), (words, said)


def test_what_is_known_by_heart() -> None:
    zero = {"id": "x", "metric": "m", "value": 0.0, "low": 0.0, "high": 0.0727, "n": 49, "clusters": 49, "unit": "rate",
            "spec": {"id": "x", "function": "mean"}}
    assert text_of(zero, "zh") == "49 条中 0 条（上界 7.3%）" and text_of(zero) == "0 of 49 (upper bound 7.3%)"
    assert text_of(zero | {"clusters": 2}, "zh") == "49 条中 0 条，分属 2 簇（上界 7.3%）"
    assert say("1 of 50 pairs left out: a side has no value; asked on one side only: 150 and 0", "zh") == (
        "50 对中有 1 对未计入：一方没有数值；只有一方被问到：150 与 0")
    assert say("the sides also differ in: thinking, dose; the sides had other mixes of hosts: A Host 1:2, …", "zh") == (
        "两方的不同还在于：thinking, dose；两方由不同比例的服务商作答：A Host 1:2, …")
    assert say("1 empty, 2 broken", "zh") == "空回答 1 条，损坏的回答 2 条"
    assert say("judges: rules, stored:x", "zh") == "评判者：rules, stored:x"
    for ours in ("somebody's own note, as it is", "", "a: b, {c} %s"):
        assert say(ours, "zh") == say(ours, "en") == ours


@pytest.mark.parametrize("name", suite_names())
def test_our_own_suites_speak_chinese(name: str) -> None:
    suite = load_suite(name)
    for sentence in (suite.title, *(one.statement for one in suite.hypotheses)):
        assert re.search("[\u4e00-\u9fff]", say(" ".join(sentence.split()), "zh")), sentence


def test_no_phrase_is_there_twice_and_blanks_agree() -> None:
    path = Path(say.__code__.co_filename).parent / "words" / "phrases.zh.yaml"
    content = path.read_text(encoding="utf-8")
    phrases = yaml.safe_load(content)
    assert len(phrases) == len([line for line in content.splitlines() if line[:1] not in ("", "#", ":", " ")])
    for english, chinese in phrases.items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), english
