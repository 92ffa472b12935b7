"""Single and parallel function calls, judged by their syntax trees: four categories of the Berkeley Function-Calling
Leaderboard (Patil et al. 2025), read from a folder with `BFCL_v4_CATEGORY.json.gz` and `possible_answer/` beside it.

A call is right where its function, its parameters and their values are among the accepted ones:

    names        equal; a dot may be an underscore, because the chat API takes no dots
    parameters   all required ones are there, none that is not documented, and of the optional ones none left out that
                 the answer does not let be left out (an accepted value "" says that it may)
    text         without case, spaces and , . / - _ * ^, and with one kind of quotation mark
    numbers      equal; a whole number may stand for a float, not a float for an integer
    lists        the same items in the same order; tuples are lists
    dicts        no key too many, none missing that may not be left out, each value among those accepted for its key
    Java, JavaScript   a value may stand in a string as the language writes it, and a variable is its name

Parallel calls are right where there are as many as in the answer and each can be given one of the answer's, in any
order. This differs from the leaderboard's own checker where that is narrower by accident: whole numbers stand for
floats inside lists too, text in nested values is compared as text is, Java and JavaScript values may come as JSON, and
calls are matched in the best way, not the first.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.agents.tools.tool import Tool, ToolContext, ToolResult, Toolset
from moonbase.errors import UserError

CATEGORIES = {"simple_python": "python", "simple_java": "java", "simple_javascript": "javascript",
              "parallel": "python"}
"""Each with the language of its functions."""
NAME_LIMIT = 64
"""Letters of a tool's name that the chat API takes."""

_TYPES = {name: json_type for json_type, names in {
    "object": "dict object HashMap Hashtable map",
    "array": "array tuple list Array ArrayList Set Queue Stack",
    "number": "float number double",
    "integer": "integer int long short byte Bigint",
    "string": "string String char",
    "boolean": "boolean Boolean"}.items() for name in names.split()}
_LANGUAGES = {"java": "Java", "javascript": "JavaScript"}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_JAVA_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[lLfFdD]?")
_JAVA_LIST = re.compile(r"(?:new [\w<>]*(?:\[\])? ?\{|(?:Arrays\.asList|List\.of|Set\.of)\()(.*)[})]", re.DOTALL)
_BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_$][\w$]*)\s*:")
Answer = tuple[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class CallTask:
    """A request, functions, and the calls that answer it."""

    id: str
    category: str
    messages: tuple[dict[str, Any], ...]
    functions: tuple[dict[str, Any], ...]
    """As the leaderboard documents them; `tool_schemas` makes tools of them."""
    answer: tuple[Answer, ...]
    """Of each call the function's name and, for each parameter, the values that are accepted."""

    @property
    def language(self) -> str:
        """python, java or javascript."""
        return CATEGORIES[self.category]


@dataclass(frozen=True)
class Verdict:
    """Whether calls are right, and if not, what is wrong first."""

    right: bool
    error: str = ""


def load_calls(folder: Path | str, categories: Iterable[str] = tuple(CATEGORIES)) -> list[CallTask]:
    """The tasks of some categories, in order. Raises UserError where a file is missing or is not what it should be."""
    tasks = []
    for category in categories:
        if category not in CATEGORIES:
            raise UserError(f"there is no category {category!r} of calls: it is one of {', '.join(CATEGORIES)}")
        path = Path(folder) / f"BFCL_v4_{category}.json.gz"
        try:
            answers = {line["id"]: line["ground_truth"] for line in _lines(path.parent / "possible_answer" / path.name)}
            for line in _lines(path):
                tasks.append(CallTask(
                    line["id"], category, tuple(line["question"][0]), tuple(line["function"]),
                    tuple(next(iter(call.items())) for call in answers[line["id"]])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} or its answers cannot be read ({error}): name the folder bfcl") from None
    return tasks


def _lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


# Functions as tools


def tool_name(name: str) -> str:
    """A function's name as the chat API takes it."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:NAME_LIMIT]


def tool_schemas(task: CallTask) -> list[dict[str, Any]]:
    """The functions as OpenAI tools with JSON schemas."""
    note = _LANGUAGES.get(task.language)
    tools = []
    for function in task.functions:
        description = function.get("description", "")
        if note:
            description += f" (A {note} function: variables and expressions are written as strings.)"
        tools.append({"type": "function", "function": {
            "name": tool_name(function["name"]), "description": description,
            "parameters": _json_schema(function["parameters"], strings=note is not None) | {"type": "object"}}})
    return tools


def _json_schema(document: Mapping[str, Any], strings: bool) -> dict[str, Any]:
    """`strings`: a value may be a string instead, the name of a variable."""
    json_type = _TYPES.get(document.get("type", ""))
    schema: dict[str, Any] = {}
    if json_type is not None:
        schema["type"] = [json_type, "string"] if strings and json_type != "string" else json_type
    for key in ("description", "enum", "default"):
        if key in document:
            schema[key] = document[key]
    if "properties" in document:
        schema["properties"] = {name: _json_schema(inner, strings) for name, inner in document["properties"].items()}
        schema["required"] = [name for name in document.get("required") or () if name in schema["properties"]]
    if json_type == "array":
        schema["items"] = _json_schema(document.get("items") or {}, strings)
    return schema


def recording_tools(task: CallTask) -> tuple[Toolset, list[dict[str, Any]]]:
    """Tools that note each call in the list, in the form of the chat API, and answer that they did."""
    noted: list[dict[str, Any]] = []

    def tool_of(schema: dict[str, Any]) -> Tool:
        async def call(arguments: dict[str, Any], context: ToolContext) -> ToolResult | str:
            noted.append(chat_call(schema["name"], arguments, context.call_id))
            return "Done."

        return Tool(schema["name"], schema["description"], schema["parameters"], call)

    return Toolset(tool_of(schema["function"]) for schema in tool_schemas(task)), noted


def chat_call(name: str, arguments: dict[str, Any], call_id: str = "call") -> dict[str, Any]:
    """A call as an assistant message of the chat API has it."""
    return {"id": call_id, "type": "function", "function": {
        "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}


# Judging


def judge(task: CallTask, tool_calls: Sequence[Mapping[str, Any]]) -> Verdict:
    """Whether the `tool_calls` of an assistant message answer a task."""
    if len(tool_calls) != len(task.answer):
        return Verdict(False, f"{len(tool_calls)} calls, {len(task.answer)} expected")
    wrong = [[_wrong_with(task, call, answer) for answer in task.answer] for call in tool_calls]
    taken: dict[int, int] = {}
    for place in range(len(tool_calls)):
        if not _give(place, wrong, taken, set()):
            text = f": {wrong[place][0]}" if all(wrong[place]) else " is there more often than expected"
            return Verdict(False, f"call {place + 1}{text}")
    return Verdict(True)


def _give(place: int, wrong: list[list[str]], taken: dict[int, int], seen: set[int]) -> bool:
    """Find an answer for a call, moving other calls to other answers where needed (Kuhn's matching)."""
    for number, text in enumerate(wrong[place]):
        if not text and number not in seen:
            seen.add(number)
            if number not in taken or _give(taken[number], wrong, taken, seen):
                taken[number] = place
                return True
    return False


def accuracy(tasks: Sequence[CallTask], predictions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Of each category the part of its tasks that is right; tasks without a prediction are wrong."""
    right: dict[str, list[bool]] = {}
    for task in tasks:
        right.setdefault(task.category, []).append(judge(task, predictions.get(task.id, ())).right)
    return {category: sum(verdicts) / len(verdicts) for category, verdicts in right.items()}


def _wrong_with(task: CallTask, call: Mapping[str, Any], answer: Answer) -> str:
    """What keeps a call from being this one of the answer; empty where nothing does."""
    name, accepted = answer
    try:
        said, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, KeyError, TypeError, RecursionError):
        return "the arguments are not JSON"
    if said not in (name, tool_name(name)):
        return f"function {said!r} instead of {name!r}"
    if not isinstance(arguments, dict):
        return "the arguments are not an object"
    document = next(function for function in task.functions if function["name"] == name)["parameters"]
    for required in document.get("required") or ():
        if required not in arguments:
            return f"parameter {required!r} is missing"
    for parameter, value in arguments.items():
        inner = document["properties"].get(parameter)
        if inner is None or parameter not in accepted:
            return f"parameter {parameter!r} was not expected"
        if not _accepted(value, accepted[parameter], inner, task.language):
            return f"parameter {parameter!r} is {value!r}"[:200]
    for parameter, values in accepted.items():
        if parameter not in arguments and "" not in values:
            return f"parameter {parameter!r} is missing"
    return ""


def _accepted(value: Any, values: Sequence[Any], document: Mapping[str, Any], language: str) -> bool:
    return any(_agrees(value, one, document, language) for one in values)


def _agrees(value: Any, gold: Any, document: Mapping[str, Any], language: str) -> bool:
    """Whether a value is the gold one, under what the document says of its type."""
    if gold == "" and isinstance(gold, str):
        return value in ("", [])
    if isinstance(value, str) and not isinstance(gold, str) and language != "python":
        value = read_literal(value)
    if isinstance(gold, bool) or isinstance(value, bool):
        return isinstance(gold, bool) and isinstance(value, bool) and gold == value
    if isinstance(gold, str):
        return isinstance(value, str) and _plain(gold) == _plain(value)
    if isinstance(gold, (int, float)):
        # JSON has one kind of number; the documents have two.
        whole = _TYPES.get(document.get("type", "")) == "integer"
        return isinstance(value, int if whole else (int, float)) and value == gold
    if isinstance(gold, list):
        inner = document.get("items") or {}
        return (isinstance(value, list) and len(value) == len(gold)
                and all(_agrees(ours, theirs, inner, language) for ours, theirs in zip(value, gold, strict=True)))
    if isinstance(gold, dict):
        properties = document.get("properties") or {}
        return (isinstance(value, dict) and set(value) <= set(gold)
                and all(_accepted(value[key], _values(gold[key]), properties.get(key, {}), language) for key in value)
                and all("" in _values(gold[key]) for key in gold if key not in value))
    return gold is None and value is None


def _values(gold: Any) -> list[Any]:
    """The accepted values of a key; a few answers have one value without a list around it."""
    return gold if isinstance(gold, list) else [gold]


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def read_literal(text: str) -> Any:
    """The value that a text writes in Java or JavaScript: a number, true, null, a list, an object; else the text."""
    text = text.strip()
    if found := _JAVA_NUMBER.fullmatch(text[:40]):
        return int(found[1]) if found[1].lstrip("+-").isdigit() else float(found[1])
    if found := _JAVA_LIST.fullmatch(text):
        text = f"[{found[1]}]"
    for form in (text, _BARE_KEY.sub(r'\1"\2":', text), _BARE_KEY.sub(r'\1"\2":', text).replace("'", '"')):
        try:
            return json.loads(form)
        except (ValueError, RecursionError):
            continue
    return text


def gold_calls(task: CallTask) -> list[dict[str, Any]]:
    """Calls that are right: of each parameter the first accepted value, optional ones left out where they may be."""
    return [chat_call(tool_name(name), {
        parameter: _first(values) for parameter, values in accepted.items()
        if "" not in values or parameter in _required(task, name)}) for name, accepted in task.answer]


def _required(task: CallTask, name: str) -> Sequence[str]:
    return next(function for function in task.functions if function["name"] == name)["parameters"].get("required") or ()


def _first(values: Sequence[Any]) -> Any:
    return _plain_value(next((value for value in values if value != ""), ""))


def _plain_value(gold: Any) -> Any:
    """A gold value with one choice in the place of each list of choices: only dicts have these inside."""
    if isinstance(gold, dict):
        return {key: _first(_values(values)) for key, values in gold.items() if "" not in _values(values)}
    if isinstance(gold, list):
        return [_plain_value(value) for value in gold]
    return gold
