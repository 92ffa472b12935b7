"""Suites as files: every one of ours is read, means what it says, and needs what it names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.suite import Suite, list_suites, load_suite, missing_needs, suite_names

EXPECTED = ["agent-harm", "capability", "contamination", "cyber-knowledge", "fresh", "over-refusal",
            "over-refusal-pairs", "paired-politics", "paired-states", "refusal", "swarm"]


def test_there_are_the_suites_that_there_should_be() -> None:
    assert set(suite_names()) >= set(EXPECTED)


@pytest.mark.parametrize("name", suite_names())
def test_a_suite_survives_being_written_and_read(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name and suite.title and suite.about and suite.smallest_n >= 20
    assert Suite.model_validate(json.loads(json.dumps(suite.canonical()))) == suite


@pytest.mark.parametrize("name", suite_names())
def test_what_downloads_says_so(name: str) -> None:
    for task in load_suite(name).tasks:
        package = task.source.startswith("inspect_evals/")
        # The package itself holds the data of tau2.
        downloads = package and not task.source.startswith("inspect_evals/tau2")
        assert any(need.startswith("network") for need in task.needs) == downloads, task.name
        assert ("package inspect_evals" in task.needs) == package, task.name
        assert task.source.partition(":")[0] in ("builtin", "file") or task.source.startswith("inspect_evals/")


def test_capability_has_what_the_models_are_reported_on() -> None:
    sources = {task.source.partition("/")[2] for task in load_suite("capability").tasks}
    assert sources >= {"aime2024", "aime2025", "gpqa_diamond", "mmlu_pro", "hle", "swe_bench", "livecodebench_pro",
                       "browse_comp", "tau2_retail", "bfcl", "mmmu_multiple_choice"}


@pytest.mark.parametrize("name", ["over-refusal", "refusal", "agent-harm", "cyber-knowledge"])
def test_hazardous_sets_are_withheld(name: str) -> None:
    assert load_suite(name).withhold


def test_digests_are_those_of_the_published_files(shared_data: Path) -> None:
    checked = 0
    for name in suite_names():
        for task in load_suite(name).tasks:
            given = task.params.get("sha256")
            files = {f"{task.params['folder']}/{file}": one for file, one in given.items()} if isinstance(
                given, dict) else {task.params["file"]: given} if given else {}
            for file, published in files.items():
                if (shared_data / file).exists():
                    assert hashlib.sha256((shared_data / file).read_bytes()).hexdigest() == published, file
                    checked += 1
    assert checked >= 10


def test_levels_that_yaml_reads_as_truth_values_are_words() -> None:
    values = {"name": "s", "title": "s", "metric": "m", "tasks": [{"name": "t", "source": "builtin:t"}],
              "crossed": {"thinking": [True, False], "reveals_test": [False, True], "samples": 3}}
    suite = Suite.model_validate(values)
    assert suite.crossed == {"thinking": ("on", "off"), "reveals_test": ("no", "yes"), "samples": ("3",)}
    assert suite.samples == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: s\n", "title: Field required"),
        ("name: s\ntitle: s\nmetric: m\ntasks: []\n", "tasks"),
        ("name: s\ntitle: s\nmetric: m\ncolour: red\ntasks: [{name: t, source: 'builtin:t'}]\n", "colour"),
        ("name: s\ntitle: s\nmetric: m\ntasks: [{name: t, source: x, needs: [luck]}]\n", "'luck' begins with none"),
        ("name: s\ntitle: s\nmetric: m\ncrossed: {mood: [good]}\ntasks: [{name: t, source: x}]\n", "'mood' is none of"),
        ("name: s\ntitle: s\nmetric: m\ncrossed: {language: [fr]}\ntasks: [{name: t, source: x}]\n", "'fr' is none of"),
        ("name: s\ntitle: s\nmetric: m\ntasks: [{name: t, source: x}, {name: t, source: y}]\n", "two tasks"),
        ("name: s\ntitle: s\nmetric: m\ntasks: [{name: t, source: x}]\n"
         "hypotheses: [{id: h, statement: s, kind: equivalence, figure: {id: f, function: mean}}]\n", "needs a margin"),
        ("name: s\ntitle: s\nmetric: m\ntasks: [{name: t, source: x}]\n"
         "hypotheses: [{id: h, statement: s, figure: {id: f, function: mean, tint: 1}}]\n", "figure"),
        ("a: [b\n", "not YAML"),
    ],
)
def test_a_slip_in_a_suite_is_one_line(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        load_suite(path)
    assert complaint in str(raised.value) and str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_suite_is_told_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"agent-harm, capability, .*cyber-knowledge"):
        load_suite("capabilities")


def test_the_list_says_what_runs_here(shared_data: Path) -> None:
    offline = {(one.suite, one.task) for one in list_suites(shared_data) if one.offline}
    assert offline >= {("capability", "mmlu-pro"), ("capability", "gsm8k"), ("capability", "humaneval"),
                       ("capability", "bfcl"), ("over-refusal", "xstest-safe"), ("refusal", "xstest"),
                       ("paired-politics", "paired-politics"), ("swarm", "wide-swarm"), ("agent-harm", "benign-tools")}
    without = {one.task: one.missing for one in list_suites(None)}
    assert without["gsm8k"] == ("gsm8k/test.jsonl.gz in the data folder (--data)",)
    assert without["wide-swarm"] == ()


def test_a_copy_of_a_set_takes_the_place_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def offline(data: Path | None) -> set[str]:
        return {one.task for one in list_suites(data) if one.offline and one.source.startswith("inspect_evals/")}

    (tmp_path / "huggingface" / "zefang-liu" / "secqa").mkdir(parents=True)
    assert offline(None) == {"tau2-retail", "tau2-airline", "tau2-telecom"}
    assert offline(tmp_path) - offline(None) == {"sec-qa-v1", "sec-qa-v2"}


def test_a_suite_without_foreign_scores_is_written_as_ever() -> None:
    tasks = {task["name"]: task for task in load_suite("capability").canonical()["tasks"]}
    assert set(tasks["gsm8k"]) == {"name", "source", "params", "needs", "metric", "limit", "stored", "about"}
    assert tasks["hle"]["scores"] == {"accuracy": "score"} and "grades" not in tasks["hle"]


def test_a_role_is_asked_for_when_it_is_time() -> None:
    retail = next(task for task in load_suite("swarm").tasks if task.name == "retail").model_copy(
        update={"needs": ("role user",)})
    assert missing_needs(retail, None) == ()
    assert missing_needs(retail, None, {"user": "x"}) == ()
    assert missing_needs(retail, None, {}) == ("a model in the role of user (--role user=MODEL)",)


def test_the_committed_files_hold_no_prompt_of_a_hazardous_set(shared_data: Path) -> None:
    import csv

    with (shared_data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    room = Path(__file__).resolve().parents[2] / "moonbase" / "evals"
    for path in room.rglob("*"):
        if path.suffix in (".py", ".yaml", ".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            assert not any(prompt in text for prompt in prompts), path.name


# Tasks


def test_every_question_on_china_has_mirrors_and_a_benign_twin(shared_data: Path) -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks import build_tasks

    samples = build_tasks(load_suite("paired-politics"), shared_data)[0].dataset
    assert len(samples) == 50 * 4 + 50 + 2 * 50
    by_form: dict[str, set[tuple[str, str]]] = {}
    for sample in samples:
        given = sample.metadata
        by_form.setdefault(given["cluster"], set()).add((given["group"], given["condition"]["language"]))
    whole = {("china", "en"), ("china", "zh"), ("benign", "en"), ("benign", "zh"), ("us", "en"), ("eu", "en"),
             ("russia", "en")}
    assert len(by_form) == 50 and all(found == whole for found in by_form.values())
    assert len({sample.id for sample in samples}) == len(samples)


def test_benign_twins_are_in_the_language_that_they_say() -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks.prompts import benign_twins

    twins = list(benign_twins())
    assert len({twin.texts["en"] for twin in twins}) == len({twin.texts["zh"] for twin in twins}) == 50
    for twin in twins:
        chinese = sum("一" <= letter <= "鿿" for letter in twin.texts["zh"])
        assert chinese > 0.7 * len(twin.texts["zh"]) and twin.texts["en"].isascii()


def test_a_limit_keeps_pairs_whole(shared_data: Path) -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks import build_tasks

    samples = build_tasks(load_suite("paired-politics"), shared_data, limit=2, stored="paired-politics")[0].dataset
    assert len(samples) == 2 * 5
    assert {sample.metadata["condition"]["thinking"] for sample in samples} == {"default"}
    with pytest.raises(UserError, match="no answers to any task"):
        build_tasks(load_suite("paired-politics"), shared_data, stored="mmlu-pro")


def test_gold_calls_are_right_and_others_wrong(shared_data: Path) -> None:
    """Every gold call through Inspect's own schema and message classes."""
    pytest.importorskip("inspect_ai")
    from moonbase.agents.worlds.calls import gold_calls, judge, load_calls, tool_name
    from moonbase.evals.tasks.calls import tool_infos

    tasks = load_calls(shared_data / "bfcl")
    assert len(tasks) == 750
    for task in tasks:
        infos = tool_infos(task)
        assert [info.name for info in infos] == [tool_name(function["name"]) for function in task.functions]
        for info, function in zip(infos, task.functions, strict=True):
            assert set(info.parameters.properties) == set(function["parameters"]["properties"])
        assert judge(task, gold_calls(task)).right and not judge(task, []).right


CHOICES = {
    "nested.json": ('{"about": "tea", "questions": [{"q": {"text": "Which is a drink?"}, "options": '
                    '{"A": "a stone", "B": "tea", "C": "a hill"}, "answer": "ANSWER"}]}',
                    {"root": "questions", "question": "q.text"}, ("B", "Z")),
    "lists.jsonl": ('{"question": "Which is a drink?", "options": ["a stone", "tea", "a hill"], "answer": ANSWER}',
                    {}, ("1", "3")),
    "columns.csv": ("question,one,two,three,answer\nWhich is a drink?,a stone,tea,a hill,ANSWER\n",
                    {"options": ["one", "two", "three"]}, ("tea", "coffee"))}


@pytest.mark.parametrize("name", CHOICES)
def test_multiple_choice_of_any_columns_is_one_question(name: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks import build_tasks

    text, params, (right, wrong) = CHOICES[name]

    def sample_of(answer: str) -> Any:
        (tmp_path / name).write_text(text.replace("ANSWER", answer))
        sha256 = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        return build_tasks(Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "tasks": [
            {"name": "t", "source": "builtin:choices", "params": {"file": name, "sha256": sha256, **params}}]}),
            tmp_path)[0].dataset[0]  # fmt: skip

    sample = sample_of(right)
    assert "Which is a drink?\n\nOptions:\nA. a stone\nB. tea\nC. a hill\n" in sample.input
    assert (sample.target, sample.id, sample.metadata["item"]) == ("The answer is (B).", "1", "1")
    with pytest.raises(UserError, match="row 1: its answer is none of its 3 options"):
        sample_of(wrong)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("… The answer is (C).", "C"), ("the answer is: (b)", "B"), ("Answer: **D**", "D"), ("\\boxed{E}", "E"),
     ("The answer is (A).\n\nQuestion: … The answer is (J).", "A"), ("thinking\n(F)", "F"),
     ("I cannot tell", None), ("", None),
     ("The answer is a matter of taste", None), ("The answer is Apple", None)],
)
def test_letters(text: str, letter: str | None) -> None:
    pytest.importorskip("inspect_ai")
    from moonbase.evals.tasks.exact import letter_in

    assert letter_in(text) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 18", "18"), ("so $1,200.50 in all", "1200.5"), ("5 apples, the answer is 7. Then 9", "7"),
     ("\\boxed{42}", "42"), ("#### -3", "-3"), ("####  $70000", "70000"), ("none", None)],
)
def test_numbers(text: str, number: str | None) -> None:
    pytest.importorskip("inspect_ai")
    from decimal import Decimal

    from moonbase.evals.tasks.exact import number_in

    assert number_in(text) == (None if number is None else Decimal(number))


def test_gsm8k_reads_its_own_worked_answers(shared_data: Path) -> None:
    pytest.importorskip("inspect_ai")
    import gzip

    from moonbase.evals.tasks.exact import number_in

    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            answer = json.loads(line)["answer"]
            gold = answer.rpartition("####")[2].strip().replace(",", "")
            assert number_in(answer) is not None and float(number_in(answer)) == float(gold)


def test_published_solutions_pass_their_tests_and_others_do_not(shared_data: Path) -> None:
    pytest.importorskip("inspect_ai")
    import gzip
    import subprocess
    import sys

    from moonbase.evals.tasks.humaneval import PASSED, program

    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:164:20]

    def passes(row: dict, answer: str) -> bool:
        # The published solutions are harmless: no sandbox is needed to run them.
        found = subprocess.run([sys.executable, "-I", "-"], input=program(row, answer, "m"), capture_output=True,
                               text=True, timeout=300)
        return found.returncode == 0 and found.stdout.rstrip().endswith(PASSED.format(mark="m"))

    for row in rows:
        whole = row["prompt"] + row["canonical_solution"]
        assert passes(row, row["canonical_solution"]) and passes(row, f"Here it is:\n```python\n{whole}\n```\nDone.")
        assert not passes(row, f"```python\ndef {row['entry_point']}(*given):\n    return None\n```")
        assert not passes(row, "    import os\n    os._exit(0)\n")
