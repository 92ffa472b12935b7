"""Schemas over HTTP, on both surfaces: bad ones are refused by name of their place, good ones are kept to.

The schemas and the words that a refusal must have are Moonshot's own test data; what the model says to the good ones is
checked by the `jsonschema` package.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.serve.service_double import Running
from tests.serve.test_errors import told

USER = [{"role": "user", "content": "hi"}]
CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"
HOLE = "the schema"


def openai_tool(**more: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": HOLE} | more}]}


def claude_tool(**more: Any) -> dict[str, Any]:
    return {"tools": [{"name": "f", "input_schema": HOLE} | more]}


FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": HOLE}}
CLAUDE_FORMAT = {"type": "json_schema", "schema": HOLE}
PLACES = [
    (CHAT, openai_tool(), "tools[0].function.parameters"),
    (CHAT, openai_tool(strict=True), "tools[0].function.parameters"),
    (CHAT, openai_tool() | {"tool_choice": "none", "stream": True}, "tools[0].function.parameters"),
    (CHAT, {"response_format": FORMAT}, "response_format.json_schema.schema"),
    (MESSAGES, claude_tool(), "tools[0].input_schema"),
    (MESSAGES, claude_tool(strict=True) | {"stream": True}, "tools[0].input_schema"),
    (MESSAGES, {"output_config": {"format": CLAUDE_FORMAT}}, "output_config.format.schema"),
    (MESSAGES, {"output_format": CLAUDE_FORMAT}, "output_format.schema"),
    (COUNT, claude_tool(), "tools[0].input_schema"),
    (COUNT, {"output_config": {"format": CLAUDE_FORMAT}}, "output_config.format.schema"),
]  # fmt: skip
"""Where a request may hold a schema, and what it calls that place."""


def schemas(shared_data: Path, kind: str) -> list[str]:
    folder = shared_data / "tool-schemas"
    if not folder.is_dir():
        pytest.skip(f"the test data of tool schemas is absent: {folder}")
    files = sorted(folder.glob(f"*/{kind}.jsonl"))
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def body_of(path: str, more: dict[str, Any], schema: str) -> str:
    """A request with the schema's own text in the place for it, which need not be JSON."""
    limit = {} if path == COUNT else {"max_tokens": 250}
    return json.dumps({"model": "moon", "messages": USER} | limit | more).replace(json.dumps(HOLE), schema)


def steps_of(place: str) -> list[str | int]:
    """`.a[0]["b c"]` as its steps."""
    found = re.findall(r'\.([^.\[]+)|\[(\d+)\]|\[("(?:[^"\\]|\\.)*")\]', place)
    return [name or (int(number) if number else json.loads(quoted)) for name, number, quoted in found]


@pytest.mark.parametrize(("path", "more", "place"), PLACES)
def test_every_invalid_schema_is_refused_by_the_name_of_its_place(
    http: httpx.Client, server: Running, shared_data: Path, path: str, more: dict[str, Any], place: str
) -> None:
    rows = [json.loads(line) for line in schemas(shared_data, "invalid")]
    assert len(rows) == 90
    for row in rows:
        response = http.post(path, content=body_of(path, more, row["schema"]))
        error = told(response)
        assert (response.status_code, error["type"]) == (400, "invalid_request_error"), (row, response.text)
        message = error["message"]
        if row["unmarshal"]:
            # The schema is no JSON, so the request is none either.
            assert re.search(r"not valid JSON: .* line \d+ column \d+", message), message
            continue
        assert row["expect"] in message and message.startswith(place), (row, message)
        where = error["param"] if path == CHAT else message.split(": ")[0]
        assert message.startswith(f"{where}: ") and where.startswith(place)
        # What is named is there: all of the path, references followed, but its last step, which may be missing.
        schema = value = json.loads(row["schema"])
        for step in steps_of(where.removeprefix(place))[:-1]:
            if step not in value and "$ref" in value:
                value = schema["$defs"][value["$ref"].removeprefix("#/$defs/")]
            value = value[step]
    assert not server.service.asked


EVERY = [3, pytest.param(1, marks=pytest.mark.slow)]
"""Of the schemas: a third in the ordinary run."""


def valid_answers(schema: Any, texts: list[str]) -> None:
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("every", EVERY)
def test_every_valid_schema_is_accepted_and_kept_to(every: int, real: Running, shared_data: Path) -> None:
    lines = schemas(shared_data, "valid")
    assert len(lines) == 103
    instant = {"thinking": {"type": "disabled"}, "seed": 5, "temperature": 1.0}
    with httpx.Client(base_url=real.url, timeout=300) as http:
        for line in lines[::every]:
            schema = json.loads(line)
            chat = http.post(CHAT, content=body_of(CHAT, {"response_format": FORMAT} | instant, line))
            assert chat.status_code == 200, (line, chat.text)
            # Nothing was left out: there is nothing to be told.
            assert "x-moonbase-notes" not in chat.headers
            valid_answers(schema, [chat.json()["choices"][0]["message"]["content"]])
            count = http.post(f"{MESSAGES}/count_tokens",
                              content=body_of(COUNT, {"output_config": {"format": CLAUDE_FORMAT}}, line))
            said = http.post(MESSAGES, content=body_of(MESSAGES, {"output_config": {"format": CLAUDE_FORMAT}}, line))
            assert (count.status_code, said.status_code) == (200, 200), (line, said.text)
            valid_answers(schema, [block["text"] for block in said.json()["content"]])


@pytest.mark.parametrize("every", EVERY)
def test_every_valid_schema_of_an_object_may_be_a_tools(every: int, real: Running, shared_data: Path) -> None:
    found = [line for line in schemas(shared_data, "valid") if json.loads(line).get("type") in ("object", ["object"])]
    assert len(found) > 50
    with httpx.Client(base_url=real.url, timeout=300) as http:
        for number, line in enumerate(found[::every]):
            schema, strict = json.loads(line), number % 2 == 0
            more = {"tool_choice": "required", "thinking": {"type": "disabled"}, "parallel_tool_calls": False}
            chat = http.post(CHAT, content=body_of(CHAT, openai_tool(strict=strict) | more, line))
            assert chat.status_code == 200 and "x-moonbase-notes" not in chat.headers, (line, chat.text)
            valid_answers(schema, [call["function"]["arguments"]
                                   for call in chat.json()["choices"][0]["message"]["tool_calls"]])
            choice = {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
            said = http.post(MESSAGES, content=body_of(MESSAGES, claude_tool(strict=strict) | choice, line))
            assert said.status_code == 200, (line, said.text)
            blocks = [block for block in said.json()["content"] if block["type"] == "tool_use"]
            # `max_tokens` where the budget made the model finish a call shorter than it might have.
            assert len(blocks) == 1 and said.json()["stop_reason"] in ("tool_use", "max_tokens")
            valid_answers(schema, [json.dumps(block["input"]) for block in blocks])


@pytest.mark.parametrize(("path", "tool", "place"), [
    (CHAT, openai_tool, "tools[0].function.parameters"), (MESSAGES, claude_tool, "tools[0].input_schema"),
])  # fmt: skip
def test_what_is_left_out_of_a_schema_is_said(
    http: httpx.Client, server: Running, path: str, tool: Any, place: str
) -> None:
    """Without `strict` a keyword that cannot be enforced is left out and named; with it the request is refused."""
    schema = '{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, ' \
             '"uniqueItems": true}}}'
    for strict in ({}, {"strict": False}):
        loose = http.post(path, content=body_of(path, tool(**strict), schema))
        assert loose.status_code == 200
        assert loose.headers["x-moonbase-notes"].startswith(f"{place}.properties.a.uniqueItems: ")
    strict = http.post(path, content=body_of(path, tool(strict=True), schema))
    assert strict.status_code == 400 and told(strict)["message"].startswith(f"{place}.properties.a.uniqueItems: ")
