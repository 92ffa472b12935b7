"""Dialogues on the page: every turn and call is there, whatever it holds, and none of it is markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moonbase.report import write_report
from moonbase.report.dialogues import MOST_DIALOGUES, read_examples
from tests.report.test_page import Page as ParsedPage
from tests.report.test_page import assert_self_contained, read

CALL = {"id": "functions.calculator:0", "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "47 * 86"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 47 * 86? <b>&amp;"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "functions.calculator:0", "name": "calculator", "content": "4042"},
    {"role": "assistant", "content": "47 * 86 = 4042."},
]
QUESTIONS = {"questions": 200, "right_calls": 0.955, "right": 0.945,
             "by_kind": {"calculator": {"questions": 53, "right": 0.98}},
             "new_phrasings": {"questions": 40, "right": 0.9}}


def example(**fields: Any) -> dict[str, Any]:
    return {"kind": "calculator", "right": True, "reason": "", "tools": ["calculator"], "messages": MESSAGES, **fields}


def test_turns_calls_results_and_rates_are_shown(make_run) -> None:
    folder = make_run(facts={"results": {"tool_questions": QUESTIONS}})
    wrong = example(right=False, reason="the arguments are wrong")
    (folder / "examples.json").write_text(json.dumps([example(), wrong]))
    page = read(folder)
    words = page.words
    assert "Dialogues" in page.texts_in["h2"]
    assert "200 questions that are in no training dialogue" in words and "94.5% right" in words
    assert "through the right tool call in 95.5%" in words
    assert "calculator 53 98.0%" in words and "asked in new words 40 90.0%" in words
    assert words.count("What is 47 * 86? <b>&amp;") == 2 and words.count('{"expression": "47 * 86"}') == 2
    assert words.count("4042 ") >= 2 and "wrong the arguments are wrong" in words
    turns = [attributes["class"] for tag, attributes in page.elements if "turn" in (attributes.get("class") or "")]
    assert turns == ["turn user", "turn assistant", "turn tool", "turn assistant"] * 2
    assert "94.5% of held-out tool questions right" in words


def test_a_run_without_dialogues_has_no_such_section(make_run) -> None:
    assert "Dialogues" not in read(make_run()).texts_in["h2"]


@pytest.mark.parametrize("content", [
    "{", "null", "[]", '[1, {}, {"messages": 5}]',
    '[{"messages": [1, {"role": 5, "tool_calls": "x", "content": [1]}]}]',
    '[{"messages": [{"role": "assistant", "tool_calls": [1, {"function": 2}, {"function": {"name": [], "x": 1}}]}]}]',
])
def test_foreign_content_never_fails(content: str, make_run) -> None:
    folder = make_run(facts={"results": {"tool_questions": {"questions": "many", "right": [], "by_kind": 5}}})
    (folder / "examples.json").write_text(content)
    read(folder)


def test_what_a_model_writes_is_text(make_run) -> None:
    nasty = "</p><script>alert(1)</script>\u202e\x00" + "x" * 5000
    turns = [{"role": role, "content": nasty, "name": nasty, "tool_calls": [
        {"function": {"name": nasty, "arguments": nasty}}]} for role in ("user", "assistant", "tool", "system", nasty)]
    folder = make_run()
    shown = example(messages=turns, kind=nasty, reason=nasty, tools=[nasty])
    (folder / "examples.json").write_text(json.dumps([shown]))
    text = write_report(folder).read_text(encoding="utf-8")
    assert_self_contained(ParsedPage(text), text)
    assert len(re.findall("x{100,}", text)) >= 5 and "x" * 2000 not in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "examples.json"
    path.write_text(json.dumps([example(messages=MESSAGES * 100)] * 50))
    notes: list[str] = []
    dialogues = read_examples(path, notes)
    assert len(dialogues) == MOST_DIALOGUES and len(dialogues[0].turns) == 60 and not notes


def test_the_run_that_it_started_from(make_run) -> None:
    folder = make_run(facts={"base_run": "pretrain", "results": {}})
    (make_run(name="inner")).rename(folder / "pretrain")
    page = read(folder)
    assert "Before: the run it started from" in page.texts_in["h2"]
    assert {"base-loss", "base-bits", "loss", "bits"} <= {figure["id"] for figure in page.all("figure")}
    assert "xz −9: 1.71" in page.words and "Its own report is in the folder pretrain." in page.words


@pytest.mark.parametrize("name", ["../outside", "..", "", ".", "missing", 5, None, "/etc"])
def test_only_a_folder_inside_counts(name: object, make_run) -> None:
    make_run(name="outside")
    assert "Before" not in read(make_run(facts={"base_run": name})).words
