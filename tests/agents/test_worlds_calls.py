"""Function calls judged. Skipped where the folder of shared data is absent."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moonbase.agents.tools.tool import ToolContext
from moonbase.agents.worlds import calls
from moonbase.errors import UserError

CONTEXT = ToolContext("main", 1, "main#1.0")


@pytest.fixture(scope="module")
def call_tasks(shared_data: Path) -> list[calls.CallTask]:
    folder = shared_data / "bfcl"
    if not folder.is_dir():
        pytest.skip(f"the function calls are absent: {folder}")
    return calls.load_calls(folder)


def _choose(values: Any, last: bool) -> Any:
    """A call's value from the accepted ones: the first, or the last that is not ""."""
    kept = [value for value in values if value != ""] or [""]
    value = kept[-1] if last else kept[0]
    return _plain(value, last)


def _plain(value: Any, last: bool) -> Any:
    if isinstance(value, dict):
        # One answer has a value without a list of choices around it.
        choices = {key: inner if isinstance(inner, list) else [inner] for key, inner in value.items()}
        return {key: _choose(inner, last) for key, inner in choices.items() if "" not in inner}
    return [_plain(one, last) for one in value] if isinstance(value, list) else value


def _gold(task: calls.CallTask, last: bool = False, optional: bool = True) -> list[dict[str, Any]]:
    required = {function["name"]: function["parameters"].get("required", []) for function in task.functions}
    made = []
    for name, accepted in task.answer:
        arguments = {key: _choose(values, last) for key, values in accepted.items()
                     if key in required[name] or "" not in values or (optional and values != [""])}
        made.append(calls.chat_call(name, arguments))
    return made


def test_gold_calls_are_right(call_tasks: list[calls.CallTask]) -> None:
    assert Counter(task.category for task in call_tasks) == {
        "simple_python": 400, "simple_java": 100, "simple_javascript": 50, "parallel": 200}
    for last in (False, True):
        for optional in (False, True):
            for task in call_tasks:
                verdict = calls.judge(task, _gold(task, last, optional))
                assert verdict.right, (task.id, last, optional, verdict.error)
    own = {task.id: calls.gold_calls(task) for task in call_tasks}
    assert set(calls.accuracy(call_tasks, own).values()) == {1.0}


def test_schemas_are_json_schemas_that_gold_calls_fit(call_tasks: list[calls.CallTask]) -> None:
    for task in call_tasks:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in calls.tool_schemas(task)}
        for schema in schemas.values():
            jsonschema.Draft202012Validator.check_schema(schema)
        for call in calls.gold_calls(task):
            name = call["function"]["name"]
            assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[name])


def test_corrupted_calls_are_wrong(call_tasks: list[calls.CallTask]) -> None:
    missing = values = 0
    for task in call_tasks:
        gold = _gold(task)
        assert calls.judge(task, gold[::-1]).right, task.id
        assert not calls.judge(task, gold[:-1]).right and not calls.judge(task, [*gold, gold[-1]]).right
        document = task.functions[0]["parameters"]

        def wrong(change: Any, task: calls.CallTask = task, gold: list[dict[str, Any]] = gold) -> bool:
            altered = copy.deepcopy(gold)
            arguments = json.loads(altered[-1]["function"]["arguments"])
            change(altered[-1]["function"], arguments)
            altered[-1]["function"]["arguments"] = json.dumps(arguments)
            return not calls.judge(task, altered).right

        assert wrong(lambda function, _: function.update(name=function["name"] + "_x")), task.id
        assert wrong(lambda _, arguments: arguments.update(no_such_parameter=1)), task.id
        for parameter in json.loads(gold[-1]["function"]["arguments"]):
            if parameter in document.get("required", []) or "" not in task.answer[-1][1][parameter]:
                missing += 1
                assert wrong(lambda _, arguments, parameter=parameter: arguments.pop(parameter)), (task.id, parameter)
            for value in ("entirely wrong", -987654321, [["x"]], {"x": "y"}, None):
                if value not in task.answer[-1][1][parameter]:
                    values += 1
                    assert wrong(lambda _, arguments, parameter=parameter, value=value: arguments.update(
                        {parameter: value})), (task.id, parameter, value)
        assert not calls.judge(task, [*gold[:-1], {"function": {"name": task.answer[-1][0], "arguments": "{"}}]).right
    assert missing > 1500 and values > 8000


def _one(document: dict[str, Any], accepted: list[Any], value: Any, category: str = "simple_python") -> bool:
    task = calls.CallTask("x", category, (), ({"name": "a.f", "parameters": {
        "type": "dict", "properties": {"p": document}, "required": ["p"]}},), (("a.f", {"p": accepted}),))
    return calls.judge(task, [calls.chat_call("a_f", {"p": value})]).right


@pytest.mark.parametrize(("kind", "accepted", "right", "wrong"), [
    ("string", ["New York, NY"], ["new york NY", "New-York.NY"], ["New Jersey", 5, None]),
    ("integer", [5], [5], [5.0, "5", True, 6]),
    ("float", [5.0], [5, 5.0], ["5.0", True, 5.1]),
    ("boolean", [True], [True], [1, "true", False]),
    ("float", [None], [None], [0, "None"]),
])
def test_values_of_python_calls(kind: str, accepted: list[Any], right: list[Any], wrong: list[Any]) -> None:
    """As the rules of the leaderboard's checker say."""
    assert all(_one({"type": kind}, accepted, value) for value in right)
    assert not any(_one({"type": kind}, accepted, value) for value in wrong)


def test_nested_values() -> None:
    floats = {"type": "tuple", "items": {"type": "float"}}
    assert _one(floats, [[1.0, 2.5]], [1, 2.5]) and not _one(floats, [[1.0, 2.5]], [2.5, 1.0])
    record = {"type": "dict", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    gold = [{"name": ["Ann Lee", "A. Lee"], "age": [30, ""]}]
    for value in ({"name": "ann lee", "age": 30}, {"name": "A Lee"}):
        assert _one(record, gold, value)
    for value in ({"age": 30}, {"name": "Ann Lee", "x": 1}, {"name": "Bob"}, {"name": "Ann Lee", "age": 31}, "Ann Lee"):
        assert not _one(record, gold, value)
    records = {"type": "array", "items": record}
    two = [[{"name": ["a"], "age": [1]}, {"name": ["b"], "age": [2]}]]
    assert _one(records, two, [{"name": "a", "age": 1}, {"name": "b", "age": 2}])
    assert not _one(records, two, [{"name": "b", "age": 2}, {"name": "a", "age": 1}])
    assert not _one(records, two, [{"name": "a", "age": 1}])


@pytest.mark.parametrize(("kind", "accepted", "text"), [
    ("long", [123], "123L"), ("double", [1.5], "1.5d"), ("boolean", [False], "false"),
    ("Array", [["-v", "-p"]], 'new String[]{"-v", "-p"}'), ("ArrayList", [[1, 2]], "Arrays.asList(1, 2)"),
    ("HashMap", [{"limit": [50]}], '{"limit": 50}'), ("dict", [{"role": ["admin"]}], "{role: 'admin'}"),
    ("integer", ["ResultSet.TYPE"], "ResultSet.TYPE"), ("any", [2.5], "2.5"),
])
def test_values_of_java_and_javascript_calls(kind: str, accepted: list[Any], text: str) -> None:
    document = {"type": kind}
    assert _one(document, accepted, text, "simple_java") and not _one(document, accepted, "9x9", "simple_java")


def test_parallel_calls_are_matched_in_the_best_way() -> None:
    """The first call fits both answers, the second only the first."""
    document = {"type": "dict", "properties": {"p": {"type": "integer"}}, "required": ["p"]}
    task = calls.CallTask("x", "parallel", (), ({"name": "f", "parameters": document},),
                          (("f", {"p": [1, 2]}), ("f", {"p": [1]})))
    made = [calls.chat_call("f", {"p": 1}), calls.chat_call("f", {"p": 2})]
    assert calls.judge(task, made).right and calls.judge(task, made[::-1]).right
    verdict = calls.judge(task, [made[1], made[1]])
    assert not verdict.right and "more often than expected" in verdict.error


def test_recorded_calls_are_judged(call_tasks: list[calls.CallTask]) -> None:
    task = next(task for task in call_tasks if task.category == "parallel")
    tools, noted = calls.recording_tools(task)

    async def play() -> None:
        for call in calls.gold_calls(task):
            answer = await tools.call(call["function"]["name"], call["function"]["arguments"], CONTEXT)
            assert not answer.error, answer

    asyncio.run(play())
    assert calls.judge(task, noted).right


def test_missing_calls_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the folder bfcl"):
        calls.load_calls(tmp_path)
    with pytest.raises(UserError, match="no category"):
        calls.load_calls(tmp_path, ["simple_cobol"])
