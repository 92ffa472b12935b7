"""Fresh problems through Inspect: from a scripted model's answers to records that check."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import eval as inspect_eval
from inspect_ai.model import ChatMessageAssistant, GenerateConfig, ModelOutput, ModelUsage, get_model
from inspect_ai.tool import ToolCall

from moonbase.agents.tools.sandbox import find_bubblewrap
from moonbase.errors import UserError
from moonbase.evals.fresh import FAMILIES, scripted, tool_use, verify
from moonbase.evals.fresh.itemset import Configuration, problems
from moonbase.evals.records import digest
from moonbase.evals.tasks import fresh_task


def said(output: ModelOutput) -> ModelOutput:
    """With its usage told: Inspect would count with a vocabulary that it loads from the network."""
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    return output


def spec(source: str, **params) -> SimpleNamespace:
    return SimpleNamespace(name="fresh", source=source, params=params)


def test_a_task_for_every_family_or_for_the_one_that_is_named() -> None:
    if find_bubblewrap()[0] is None:
        pytest.skip("bubblewrap does not work here")
    tasks = fresh_task.build(spec("builtin:fresh", difficulties=[1], count=1), seed=3)
    assert [task.name for task in tasks] == [f"fresh_{family}" for family in FAMILIES]
    (task,) = fresh_task.build(spec("builtin:fresh/maths", count=4, languages=["zh"]), seed=3)
    assert task.name == "fresh" and len(task.dataset) == 20
    assert {sample.metadata["condition"]["language"] for sample in task.dataset} == {"zh"}


def test_a_limit_is_spread_over_difficulties_with_twins_together() -> None:
    (task,) = fresh_task.build(spec("builtin:fresh/logic", count=50), seed=3, limit=10)
    told = [(sample.metadata["difficulty"], sample.metadata["language"]) for sample in task.dataset]
    assert told == [(str(level), language) for level in range(1, 6) for language in ("en", "zh")]


def test_what_is_asked_is_what_the_seed_makes() -> None:
    (task,) = fresh_task.build(spec("builtin:fresh/tables", count=3), seed="abc")
    wanted = list(problems(Configuration(families=("tables",), count=3), "abc"))
    assert [digest(sample.input) for sample in task.dataset] == [problem.input_digest for problem in wanted]
    assert [digest(sample.target) for sample in task.dataset] == [problem.target_digest for problem in wanted]
    assert len({sample.id for sample in task.dataset}) == 30 and len({sample.metadata["item"]
                                                                      for sample in task.dataset}) == 15


@pytest.mark.parametrize(("params", "said"), [
    ({"families": ["poetry"]}, "families"), ({"difficulties": [9]}, "difficulties"),
    ({"languages": ["fr"]}, "languages"),
    ({"count": 0}, "count"), ({"colour": 1}, "colour")])
def test_wrong_parameters_are_said(params: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fresh_task.build(spec("builtin:fresh", **params))


def test_inspect_can_run_a_family_by_itself() -> None:
    for languages, difficulties in (("en,zh", "1,2"), (["en", "zh"], [1, 2])):
        task = fresh_task.fresh(family="logic", count=2, languages=languages, difficulties=difficulties)
        assert len(task.dataset) == 8 and task.name == "fresh_logic"


@pytest.mark.parametrize("family", [
    "maths", "tables", "code", *(pytest.param(family, marks=pytest.mark.slow) for family in ("logic", "gym"))])
def test_inspect_runs_and_grades_a_family(family: str, tmp_path: Path) -> None:
    """Right answers to the English items, wrong ones to the Chinese."""
    if family == "code" and find_bubblewrap()[0] is None:
        pytest.skip("bubblewrap does not work here")
    (task,) = fresh_task.build(spec(f"builtin:fresh/{family}", count=1, difficulties=[1, 3]), seed=5)
    by_prompt = {problem.prompt: problem for problem in problems(
        Configuration(families=(family,), count=1, difficulties=(1, 3)), 5)}
    pictures = []

    def say(messages, tools, tool_choice, config: GenerateConfig) -> ModelOutput:
        message = messages[-1]
        if not isinstance(message.content, str):
            pictures.append(message.content[0].image[:30])
        problem = by_prompt[message.text]
        text = scripted.wording(problem, problem.language == "en", random.Random(1))
        return said(ModelOutput.from_content("mockllm/model", text))

    model = get_model("mockllm/model", custom_outputs=say, memoize=False)
    (log,) = inspect_eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    for sample in log.samples:
        assert sample.scores["verifier"].value == {"accuracy": float(sample.metadata["language"] == "en")}, sample.id
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)


def calls_of_tools(log_dir: Path, say, params: dict, languages: tuple[str, ...] = ("en", "zh")) -> list:
    """The samples of an evaluation in which `say(problem, messages, tools)` is the model."""
    params = {"count": 1, "difficulties": [3], "languages": list(languages), **params}
    (task,) = fresh_task.build(spec("builtin:fresh/tools", **params), seed=5)
    asked = list(problems(Configuration(families=("tools",), count=1, difficulties=(3,), languages=languages), 5))

    def answer(messages, tools, tool_choice, config: GenerateConfig) -> ModelOutput:
        problem = next(one for one in asked if messages[0].text.startswith(one.prompt))
        given = say(problem, messages, tools)
        if isinstance(given, str):
            return said(ModelOutput.from_content("mockllm/model", given))
        output = ModelOutput.for_tool_call("mockllm/model", "", {})
        calls = [ToolCall(id=f"{len(messages)}-{number}", function=call["name"], arguments=call["arguments"])
                 for number, call in enumerate(given)]
        output.choices[0].message = ChatMessageAssistant(content="", tool_calls=calls)
        return said(output)

    model = get_model("mockllm/model", custom_outputs=answer, memoize=False)
    (log,) = inspect_eval(task, model=model, log_dir=str(log_dir), display="none")
    assert log.status == "success", log.error
    return log.samples


def test_functions_are_called_and_carried_out_in_both_languages_and_as_text(tmp_path: Path) -> None:
    """A refused call is told of and changes nothing; then one call in a turn, two in the next, and words at the end."""
    def say(problem, messages, tools):
        calls = tool_use.calls_of(problem.spec)
        if not tools:
            functions = messages[0].text.removeprefix(problem.prompt)
            assert all(json.dumps(schema, ensure_ascii=False) in functions for schema in
                       tool_use.schemas(problem.spec, problem.language))
            return f"```json\n{json.dumps(calls)}\n```"
        assert {tool.name: tool.parameters.model_dump(exclude_none=True)["required"] for tool in tools} == {
            schema["name"]: schema["parameters"]["required"] for schema in tool_use.schemas(problem.spec)}
        turn = sum(message.role == "assistant" for message in messages)
        wrong = {"name": calls[0]["name"], "arguments": calls[0]["arguments"] | {problem.spec["keys"]["id"]: "Z9"}}
        return [[wrong], calls[:1], calls[1:], "Done."][turn]

    samples = calls_of_tools(tmp_path, say, {"calls": ["tools", "text"]})
    assert [sample.metadata["condition"] for sample in samples] == [
        {"language": language, "difficulty": "3", "calls": form} for language in ("en", "zh")
        for form in ("tools", "text")]
    assert [sample.scores["verifier"].value for sample in samples] == [{"accuracy": 1.0}] * 4
    for sample in samples[::2]:
        assert sample.scores["verifier"].metadata["details"] | {"kind": "", "remark": ""} == {
            "calls": 3, "refused_calls": 1, "kind": "", "remark": ""}
        told = [message for message in sample.messages if message.role == "tool"]
        assert "Z9" in told[0].error.message and json.loads(told[1].text)
        # Whoever has the record alone can carry out what was carried out.
        problem = next(problems(Configuration(families=("tools",), count=1, difficulties=(3,), languages=(
            sample.metadata["language"],)), 5))
        assert verify(problem, sample.output.completion) == (1.0, "")


def test_calls_end_at_their_limits_and_words_are_no_deed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_task, "TURNS", 4)

    def forever(problem, messages, tools):
        return tool_use.calls_of(problem.spec)[:1]

    def many(problem, messages, tools):
        return tool_use.calls_of(problem.spec)[:1] * (tool_use.MOST_CALLS + 1)

    for number, (say, turns) in enumerate(((forever, fresh_task.TURNS), (many, 1), (lambda *_: "Done.", 1))):
        (sample,) = calls_of_tools(tmp_path / str(number), say, {}, ("en",))
        assert sum(message.role == "assistant" for message in sample.messages) == turns
        assert sample.scores["verifier"].value == {"accuracy": 0.0}


def test_our_engine_gets_the_functions_as_tools(tmp_path: Path) -> None:
    """Random weights: what counts is that the interface reaches the engine, and that its answer is graded."""
    (task,) = fresh_task.build(spec("builtin:fresh/tools", count=1, difficulties=[1], languages=["zh"]), seed=5)
    (log,) = inspect_eval(task, model="moonbase/preset:pico", max_tokens=8, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    for sample in log.samples:
        offered = [event.tools for event in sample.events if event.event == "model"]
        assert offered and all(len(tools) == tool_use.FUNCTIONS[0] for tools in offered)
        assert sample.scores["verifier"].value == {"accuracy": 0.0}


def test_a_world_is_searched_through_tools(tmp_path: Path) -> None:
    """The scripted model opens the pages of the oracle and answers."""
    from moonbase.evals.fresh import wide

    (task,) = fresh_task.build(spec("builtin:fresh/wide", count=1, difficulties=[2]), seed=6)
    by_prompt = {problem.prompt: problem for problem in problems(
        Configuration(families=("wide",), count=1, difficulties=(2,)), 6)}

    def say(messages, tools, tool_choice, config: GenerateConfig) -> ModelOutput:
        problem = by_prompt[messages[0].text]
        calls = wide.task_of(problem.spec, problem.language).oracle
        done = sum(message.role == "assistant" for message in messages)
        if done < len(calls):
            assert {tool.name for tool in tools} == {"search", "open"}
            return said(ModelOutput.for_tool_call("mockllm/model", calls[done].tool, calls[done].arguments))
        read = "\n".join(message.text for message in messages if message.role == "tool")
        assert "404" not in read and ("Source: " if problem.language == "en" else "来源: ") in read
        return said(ModelOutput.from_content("mockllm/model", scripted.wording(problem, True, random.Random(1))))

    model = get_model("mockllm/model", custom_outputs=say, memoize=False)
    (log,) = inspect_eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert [sample.scores["verifier"].value for sample in log.samples] == [{"accuracy": 1.0}] * 2


def test_what_is_longer_than_the_context_is_unscored_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The context of pico has 4,096 tokens; the shortest of the long texts takes its small vocabulary 14,000."""
    from moonbase.evals.records import read_records
    from moonbase.evals.run import run_suite
    from moonbase.evals.suite import Suite

    size = {"difficulties": [1], "languages": ["en"], "count": 1}
    suite = Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "tasks": [
        {"name": family, "source": f"builtin:fresh/{family}", "params": size} for family in ("long", "maths")]})
    found = run_suite(suite, ["preset:pico"], tmp_path / "out", quiet=True)
    assert (found.records, found.errors) == (2, 0)
    long, short = read_records(tmp_path / "out" / "records.jsonl")
    assert (long.status, long.output, long.scores) == ("unscored", "", {})
    assert long.reason.startswith("longer than the model's context: the prompt has ")
    assert (short.status, short.scores) == ("scored", {"accuracy": 0.0})
