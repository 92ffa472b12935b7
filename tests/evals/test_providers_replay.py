"""`replay/DATASET:MODEL` under Inspect, compared with the stored files read by other means and with published figures.

Texts of XSTest are unsafe: no assertion here may print one.
"""

from __future__ import annotations

import asyncio
import collections
import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ContentReasoning, get_model
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
from inspect_ai.solver import TaskState, generate

from moonbase.errors import UserError
from moonbase.evals.providers.provenance import model_call, resolved_model
from moonbase.evals.providers.stored import find_answers, models_of
from moonbase.evals.records import ModelCall

ANSWER = re.compile(r"answer is \(?([A-J])\)?")
"""How the published scores read an answer."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def data(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("mmlu-pro-outputs", "paired-politics", "xstest"):
        if not (shared_data / folder).is_dir():
            pytest.skip(f"stored answers are absent: {shared_data / folder}")
    monkeypatch.setenv("MOONBASE_SHARED", str(shared_data))
    return shared_data


@scorer(metrics=[accuracy()])
def letter() -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        found = ANSWER.search(state.output.completion)
        # Where no letter can be read, the source of one model drew one; the other's has none.
        read = found[1] if found else state.metadata["pred"]
        return Score(value=read == target.text, answer=read, metadata={"found": found is not None})

    return score


def run(task: Task, model: str, logs: Path, **more: Any) -> EvalLog:
    return eval(task, model=model, log_dir=str(logs), display="none", **more)[0]


def messages_of(log: EvalLog) -> str:
    return " ".join([log.error.message if log.error else "",
                     *(sample.error.message for sample in log.samples or () if sample.error)])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "file", "correct"), [
    # 45.65 % and 41.90 % of 2,000.
    ("llama", "Meta-Llama-3_1-8B-Instruct_5shots", 913), ("phi-3", "Phi-3-mini-4k-instruct_5shots", 838)])
def test_accuracy_on_mmlu_pro_is_the_published_one(
    data: Path, tmp_path: Path, model: str, file: str, correct: int
) -> None:
    rows = {str(row["question_id"]): row for row in rows_of(data / "mmlu-pro-outputs" / f"{file}.jsonl.gz")}
    samples = [Sample(id=key, input=row["question"] + "\n" + "\n".join(row["options"]), target=row["answer"],
                      metadata={"replay_key": key, "pred": row["pred"]}) for key, row in rows.items()]  # fmt: skip
    log = run(Task(dataset=samples, solver=generate(), scorer=letter()), f"replay/mmlu-pro:{model}", tmp_path)
    assert log.status == "success", messages_of(log)
    scores = {sample.id: sample.scores["letter"] for sample in log.samples}
    assert len(scores) == 2000
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(correct / 2000, abs=1e-9)
    # Every letter that can be read in the replayed text is the one that was read in the original.
    assert all(score.answer == rows[key]["pred"] for key, score in scores.items())
    assert sum(not score.metadata["found"] for score in scores.values()) == {"llama": 164, "phi-3": 298}[model]
    assert all(sample.output.completion == rows[sample.id]["output"] for sample in log.samples)
    assert {(sample.output.time, sample.output.usage.total_tokens) for sample in log.samples} == {(0.0, 0)}
    assert {sample.output.metadata["replay"]["usage"] for sample in log.samples} == {"not recorded"}


def test_hosts_usage_and_reasoning_are_what_was_recorded(data: Path, tmp_path: Path) -> None:
    for name, file in (("deepseek", "deepseek_deepseek-chat-v3-0324"), ("qwen3", "qwen_qwen3-235b-a22b"),
                       ("kimi-vl", "moonshotai_kimi-vl-a3b-thinking")):  # fmt: skip
        rows = {f"{row['category']}/{row['question_id']}": row
                for row in rows_of(data / "paired-politics" / "responses" / f"{file}.jsonl.gz")}
        samples = [Sample(id=key, input=row["question"], target="", metadata={"replay_key": key})
                   for key, row in list(rows.items())[::20]]  # fmt: skip
        log = run(Task(dataset=samples, solver=generate()), f"replay/paired-politics:{name}", tmp_path)
        assert log.status == "success", messages_of(log)
        for sample in log.samples:
            response = rows[sample.id]["response"]
            message, usage = response["choices"][0]["message"], response["usage"]
            call = model_call(sample, log.eval.model)
            assert call == ModelCall.model_validate(sample.output.metadata["moonbase"])
            assert call.provider == response.get("provider", rows[sample.id].get("api_provider"))
            assert call.fingerprint == (response.get("system_fingerprint") or None)
            assert resolved_model(sample) == response["model"]
            used = sample.output.usage
            assert (used.input_tokens, used.output_tokens, used.total_tokens) == (
                usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
            parts = sample.output.message.content
            reasoning = "" if isinstance(parts, str) else parts[0].reasoning
            assert isinstance(parts, str) or isinstance(parts[0], ContentReasoning)
            if name == "kimi-vl":
                # Split without loss; one that never stops to think has no end mark.
                whole = "◁think▷" + reasoning + "◁/think▷" + sample.output.completion
                assert message["content"] in (whole, "◁think▷" + reasoning)
            else:
                assert (reasoning, sample.output.completion) == (message.get("reasoning") or "", message["content"])


def test_a_filter_s_verdict_is_kept(data: Path, tmp_path: Path) -> None:
    answers = find_answers("paired-politics:deepseek")
    blocked = [answer for answer in answers.by_key.values() if answer.stop_reason == "content_filter"]
    assert len(blocked) == 1
    samples = [Sample(id=answer.key, input=answer.question, metadata={"replay_key": answer.key}) for answer in blocked]
    (sample,) = run(Task(dataset=samples, solver=generate()), "replay/paired-politics:deepseek", tmp_path).samples
    assert sample.output.stop_reason == "content_filter" and model_call(sample).api_signal == "content_filter"


def test_answers_of_xstest_by_key_and_by_question(data: Path, tmp_path: Path) -> None:
    for model, file in (("gpt4", "gpt4"), ("llama2", "llama2new")):
        with gzip.open(data / "xstest" / "completions" / f"xstest_v2_completions_{file}.csv.gz", "rt",
                       encoding="utf-8", newline="") as lines:  # fmt: skip
            rows = {row["id"]: row for row in csv.DictReader(lines)}
        keyed = [Sample(id=key, input=row["prompt"], metadata={"replay_key": key}) for key, row in rows.items()][:40]
        asked = [Sample(id=key, input=row["prompt"]) for key, row in rows.items()][40:80]
        log = run(Task(dataset=keyed + asked, solver=generate()), f"replay/xstest:{model}", tmp_path)
        assert log.status == "success"
        wrong = [sample.id for sample in log.samples if sample.output.completion != rows[sample.id]["completion"]]
        assert not wrong
        answers = find_answers(f"xstest:{model}")
        assert len(answers.by_key) == 450 and answers.of_key("7") is answers.of_key("v2-7")


def test_every_published_prompt_of_xstest_may_ask_for_its_answer(data: Path) -> None:
    """One of the 450 was published anew with another word; it still is the same question, and no other is."""
    from moonbase.evals.providers.replay_api import ReplayAPI

    api = ReplayAPI("xstest:gpt4")
    with (data / "xstest" / "xstest_prompts.csv").open(encoding="utf-8", newline="") as lines:
        prompts = {row["id"]: row["prompt"] for row in csv.DictReader(lines)}
    for key, prompt in prompts.items():
        api._check_question(api.answers.of_key(key), [ChatMessageUser(content=prompt)])
    taken = 0
    for key, other in zip(prompts, list(prompts)[1:], strict=False):
        try:
            api._check_question(api.answers.of_key(key), [ChatMessageUser(content=prompts[other])])
            taken += 1
        except UserError as error:
            assert prompts[other] not in str(error) and prompts[key] not in str(error)
    assert taken == 0


def test_twins_are_told_apart(data: Path) -> None:
    answers = find_answers("paired-politics:qwen3")
    counts = collections.Counter(key.partition("/")[0] for key in answers.by_key)
    assert counts == dict.fromkeys(("china_criticism", "zh_china_criticism", "us_criticism", "eu_criticism",
                                    "russia_criticism"), 50)  # fmt: skip
    zh = answers.of_key("zh_china_criticism/china_criticism_01")
    assert zh.question != answers.of_key("china_criticism/china_criticism_01").question
    assert answers.of_question(f"  {zh.question}\n") is zh


@pytest.mark.parametrize(("metadata", "text", "said"), [
    ({"replay_key": "us_criticism/us_criticism_99"}, "Whatever?", "no answer with key"),
    ({"replay_key": "us_criticism/us_criticism_01"}, "How warm is it in Paris?", "to another question"),
    ({}, "A question that nobody has asked before", "no answer to the question sha256:")])
def test_what_is_not_stored_is_an_error(data: Path, tmp_path: Path, metadata: Any, text: str, said: str) -> None:
    task = Task(dataset=[Sample(input=text, metadata=metadata)], solver=generate())
    log = run(task, "replay/paired-politics:gpt-4.1", tmp_path)
    assert log.status == "error" and said in messages_of(log)
    assert text not in messages_of(log)


def test_no_second_sample_no_dialogue_no_judge(data: Path, tmp_path: Path) -> None:
    answers = find_answers("paired-politics:gpt-4.1")
    answer = answers.of_key("us_criticism/us_criticism_01")
    sample = Sample(input=answer.question, metadata={"replay_key": answer.key})
    log = run(Task(dataset=[sample], solver=generate(), epochs=2), "replay/paired-politics:gpt-4.1", tmp_path)
    assert log.status == "error" and "one epoch" in messages_of(log)
    model = get_model("replay/paired-politics:gpt-4.1", memoize=False)
    for dialogue, said in (
        ([ChatMessageUser(content=answer.question), ChatMessageAssistant(content="Hm."),
          ChatMessageUser(content=answer.question)], "go on with a dialogue"),
        ([ChatMessageUser(content=f"Is this a refusal? {answer.text}"), ChatMessageUser(content=answer.question)],
         "cannot judge")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            asyncio.run(model.generate(dialogue))


def test_names_and_folders(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(models_of("paired-politics", data)) == 7 and models_of("xstest", data) == ["gpt4", "llama2new"]
    assert find_answers("paired-politics:deepseek/deepseek-chat-v3-0324").model == "deepseek_deepseek-chat-v3-0324"
    for name, said in (("mmlu:llama", r"mmlu-pro"), ("mmlu-pro", "is one of 2 models"), ("xstest:claude", "gpt4"),
                       ("mmlu-pro:gpt", "is no model of it")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            find_answers(name)
    with pytest.raises(UserError, match="no stored answers there"):
        find_answers("xstest:gpt4", tmp_path)
    monkeypatch.delenv("MOONBASE_SHARED")
    with pytest.raises(UserError, match=r"Give --data FOLDER \(-M data=FOLDER where Inspect itself"):
        find_answers("xstest:gpt4")
    model = get_model("replay/xstest:gpt4", memoize=False, data=str(data))
    assert model.api.answers is find_answers("xstest:gpt4", data)
    (tmp_path / "xstest" / "completions").mkdir(parents=True)
    (tmp_path / "xstest" / "completions" / "xstest_v2_completions_gpt4.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="these are no stored answers of xstest"):
        find_answers("xstest:gpt4", tmp_path)
