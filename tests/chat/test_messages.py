"""What clients send: every accepted form, every refusal by name, and whose call a result answers."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.chat import STYLES, next_call_index, normalise_messages, render
from moonbase.errors import UserError


def call(id: str, name: str = "f", arguments: object = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*given: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(given), **fields}


def result(id: str, content: str = "r") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def ids(messages: list[dict[str, Any]]) -> list[str]:
    """All ids of a normalised dialogue, in order."""
    found = []
    for message in normalise_messages(messages):
        found += [one["id"] for one in message.get("tool_calls", [])]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    return found


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (USER, USER),
        ({"role": "developer", "content": "be kind"}, {"role": "system", "content": "be kind"}),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "x": 1}]},
            {"role": "user", "content": "a b"},
        ),
        ({"role": "user", "content": "hi", "name": "Ada"}, {"role": "user", "content": "hi", "name": "Ada"}),
        ({"role": "user", "content": "hi", "name": ""}, USER),
        (
            # What the official client sends back of its own message.
            {"role": "assistant", "content": "a", "refusal": None, "audio": None, "function_call": None,
             "tool_calls": None, "annotations": [], "reasoning_content": None, "name": None},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "assistant", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "a"}),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
        (
            calls({"id": "functions.f:0", "function": {"name": "f", "arguments": {"é": [1]}}}),
            {"role": "assistant", "content": "", "tool_calls": [call("functions.f:0", "f", '{"é": [1]}')]},
        ),
    ],
)
def test_accepted_forms(message: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(message)
    assert normalise_messages([message]) == [expected]
    assert message == before, "the caller's object was changed"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", r"messages\[1\]: expected an object with role and content, found a string"),
        (None, r"messages\[1\]: .*found null"),
        ({}, r"messages\[1\]\.role: expected one of system, user, assistant, tool, found nothing"),
        ({"role": "robot", "content": ""}, r"messages\[1\]\.role: .*found 'robot'"),
        ({"role": ["user"], "content": ""}, r"messages\[1\]\.role: .*found a list"),
        ({"role": "user"}, r"messages\[1\]\.content: a user message needs one"),
        ({"role": "user", "content": 3}, r"messages\[1\]\.content: expected a string, .*found a number"),
        ({"role": "user", "content": True}, r"messages\[1\]\.content: .*found a boolean"),
        ({"role": "user", "content": {"type": "text"}}, r"messages\[1\]\.content: .*found an object"),
        ({"role": "user", "content": ["a"]}, r"messages\[1\]\.content\[0\]: .*found a string"),
        (
            {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url", "image_url": {}}]},
            r"messages\[1\]\.content\[1\]\.type: expected \"text\", found 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\]\.content\[0\]\.text: .*found null"),
        ({"role": "user", "content": [{"text": "a"}]}, r"messages\[1\]\.content\[0\]\.type: .*found nothing"),
        ({"role": "user", "content": "", "name": 3}, r"messages\[1\]\.name: expected a string, found a number"),
        ({"role": "user", "content": "", "tool_calls": [call("a")]}, r"messages\[1\]\.tool_calls: only an assistant"),
        ({"role": "assistant", "reasoning_content": []}, r"messages\[1\]\.reasoning_content: .*found a list"),
        ({"role": "assistant", "function_call": {"name": "f"}}, r"messages\[1\]\.function_call: .*use tool_calls"),
        ({"role": "assistant", "tool_calls": {"id": 1}}, r"messages\[1\]\.tool_calls: .*found an object"),
        (calls("f"), r"messages\[1\]\.tool_calls\[0\]: .*found a string"),  # type: ignore[arg-type]
        (calls(call("a"), {}), r"messages\[1\]\.tool_calls\[1\]\.function: .*found null"),
        (calls(call("a") | {"type": "custom"}), r"messages\[1\]\.tool_calls\[0\]\.type: .*found 'custom'"),
        (calls(call("a") | {"type": None}), r"messages\[1\]\.tool_calls\[0\]\.type: .*found None"),
        (calls(call("a", "")), r"messages\[1\]\.tool_calls\[0\]\.function\.name: a call needs"),
        (calls(call("a", 3)), r"messages\[1\]\.tool_calls\[0\]\.function\.name: .*found a number"),  # type: ignore
        (calls(call("a", "f", None)), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: .*found null"),
        (calls(call("a", "f", [1])), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: .*found a list"),
        (calls(call("a", "f", {"x": {1}})), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: has no JSON form"),
        (calls({"function": {"name": "f", "arguments": ""}}), r"messages\[1\]\.tool_calls\[0\]\.id: a call needs"),
        (calls(call(7)), r"messages\[1\]\.tool_calls\[0\]\.id: .*found a number"),  # type: ignore[arg-type]
        (calls(call("a"), call("a")), r"messages\[1\]\.tool_calls\[1\]\.id: 'a' is used twice"),
        ({"role": "tool", "content": "r"}, r"messages\[1\]\.tool_call_id: a tool message needs the id"),
        (result("a"), r"messages\[1\]\.tool_call_id: 'a' answers no earlier tool call \(there is none\)"),
        ({"role": "tool", "content": "r", "tool_call_id": 3}, r"messages\[1\]\.tool_call_id: .*found a number"),
    ],
)
def test_refusals_name_the_place(message: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        normalise_messages([USER, message])
    assert re.match(words, str(error.value)), error.value
    assert "\n" not in str(error.value)
    for style in STYLES:
        with pytest.raises(UserError):
            render([USER, message], style=style)


@pytest.mark.parametrize("messages", [None, "hi", {"role": "user"}, 3])
def test_messages_are_a_list(messages: Any) -> None:
    with pytest.raises(UserError, match="messages: expected a list"):
        normalise_messages(messages)


def test_a_wrong_id_hears_of_the_right_ones() -> None:
    with pytest.raises(UserError, match="the last ones are 'call_1'"):
        normalise_messages([calls(call("call_1")), result("call_2")])


# --- ids --------------------------------------------------------------------------------------------------------------


def test_foreign_ids_count_over_the_whole_dialogue() -> None:
    dialogue = [
        USER, calls(call("call_x", "search"), call("toolu_01", "read")), result("toolu_01"), result("call_x"),
        USER, calls(call("search:0", "search")), result("search:0"),
    ]
    assert ids(dialogue) == [
        "functions.search:0", "functions.read:1", "functions.read:1", "functions.search:0",
        "functions.search:2", "functions.search:2",
    ]
    assert next_call_index(dialogue) == 3
    assert next_call_index([]) == next_call_index([USER]) == 0


def test_own_ids_stay() -> None:
    dialogue = [calls(call("functions.f:0")), result("functions.f:0"), calls(call("functions.a.b-c:1", "a.b-c"))]
    assert ids(dialogue) == ["functions.f:0", "functions.f:0", "functions.a.b-c:1"]
    # A dialogue whose beginning was cut off goes on counting.
    assert ids([calls(call("functions.f:7")), calls(call("x"))]) == ["functions.f:7", "functions.f:8"]
    assert next_call_index([calls(call("functions.f:7"))]) == 8
    assert ids([calls(call("functions.f:7", "g"))]) == ["functions.g:0"], "names another function"


@pytest.mark.parametrize(
    "id",
    ["functions.g:0", "functions.f:x", "functions.f", "f:0", "functions.f:-1", "functions.f:0 ", "functions.f:٣",
     "functions.f:" + "9" * 5000, "functions.f:0\n"],
)
def test_nearly_own_ids_are_foreign(id: str) -> None:
    assert ids([calls(call(id, "f")), result(id)]) == ["functions.f:0", "functions.f:0"]


def test_a_counter_for_each_turn_becomes_one_for_all() -> None:
    """Other servers start at 0 in every turn."""
    turn = [calls(call("functions.f:0"), call("functions.g:1", "g")), result("functions.f:0"), result("functions.g:1")]
    assert ids(turn + turn) == [
        "functions.f:0", "functions.g:1", "functions.f:0", "functions.g:1",
        "functions.f:2", "functions.g:3", "functions.f:2", "functions.g:3",
    ]


def test_an_id_used_again_is_answered_in_its_own_turn() -> None:
    assert ids([calls(call("a")), calls(call("a")), result("a"), result("a")]) == [
        "functions.f:0", "functions.f:1", "functions.f:1", "functions.f:0",
    ]
    # A second result to one call is the client's affair.
    assert ids([calls(call("a")), result("a"), result("a")])[1:] == ["functions.f:0"] * 2


names = st.text(alphabet="ab.:-_é", min_size=1, max_size=6)
given_ids = st.sampled_from(["call_1", "x", "functions.a:0", "functions.a:1", "functions.a:5", "functions.b:2"])


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages, known = [], []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["user", "calls", "result"] if known else ["user", "calls"]))
        if kind == "user":
            messages.append(USER)
        elif kind == "result":
            messages.append(result(draw(st.sampled_from(known))))
        else:
            chosen = draw(st.lists(given_ids, min_size=1, max_size=3, unique=True))
            messages.append(calls(*(call(id, draw(names | st.just("a"))) for id in chosen)))
            known += chosen
    return messages


@given(dialogues())
@settings(max_examples=100, deadline=None)
def test_ids_are_own_growing_and_stable(messages: list[dict[str, Any]]) -> None:
    once = normalise_messages(messages)
    assert normalise_messages(once) == once
    made = [(one["id"], one["function"]["name"]) for message in once for one in message.get("tool_calls", [])]
    indices = [int(id.removeprefix(f"functions.{name}:")) for id, name in made]
    assert indices == sorted(set(indices))
    assert next_call_index(messages) == next_call_index(once) == (indices[-1] + 1 if indices else 0)
    seen: set[str] = set()
    for before, after in zip(messages, once, strict=True):
        for old, new in zip(before.get("tool_calls", []), after.get("tool_calls", []), strict=True):
            seen.add(new["id"])
            assert old["function"] == new["function"]
        assert after.get("tool_call_id") in seen | {None}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "function_call",
          "type", "text", "function", "id", "arguments")
roles = st.sampled_from(["user", "assistant", "system", "tool", "developer", "text", "function"])
shapes = st.recursive(
    anything | roles,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(fields), inner, max_size=5),
    max_leaves=12,
)


messages_of_any_shape = st.fixed_dictionaries({"role": roles}, optional=dict.fromkeys(fields[1:7], shapes))


@given(st.lists(shapes | messages_of_any_shape, max_size=3))
@settings(max_examples=150, deadline=None)
def test_wrong_types_never_end_in_a_traceback(messages: list[Any]) -> None:
    try:
        normalised = normalise_messages(messages)
    except UserError as error:
        assert str(error).startswith("messages")
    else:
        assert normalise_messages(normalised) == normalised
