"""Replies read back: known texts by hand, every way of cutting, and soups of markers in which nothing may be lost."""

from __future__ import annotations

import codecs
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moonbase.chat import (
    STYLES,
    ArgumentsDelta,
    ContentDelta,
    Event,
    ReasoningDelta,
    Reply,
    StreamParser,
    ToolCall,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
    encode,
    generation_prefix,
    parse,
    render_parts,
)
from moonbase.chat.parse import call_name
from moonbase.data.tokenizer import Tokenizer, train_tokenizer
from moonbase.errors import UserError

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CB, AB, CE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
T, TE, END = "<think>", "</think>", "<|im_end|>"


def rebuild(events: Iterable[Event]) -> Reply:
    """What a listener who only sees events knows of the reply."""
    content, reasoning, started, ended = "", "", {}, []
    for event in events:
        if isinstance(event, ContentDelta):
            content += event.text
        elif isinstance(event, ReasoningDelta):
            reasoning += event.text
        elif isinstance(event, ToolCallStart):
            assert event.index == len(started) and not ended[len(started) :]
            started[event.index] = ToolCall(event.id, event.name, "")
        elif isinstance(event, ArgumentsDelta):
            assert event.index == len(started) - 1 and event.index not in ended
            started[event.index].arguments += event.text
        elif isinstance(event, ToolCallEnd):
            assert event.index == len(started) - 1
            ended.append(event.index)
        else:
            assert isinstance(event, ToolCallAborted) and event.index not in ended
            broken = started[event.index]
            assert event.text.startswith(f"{CB}{broken.id}{AB}{broken.arguments}")
            content += event.text
    return Reply(content, reasoning or None, [started[index] for index in ended])


def streamed(pieces: Sequence[str], style: str, prefix: str | None = None, special: bool | None = None) -> Reply:
    """The reply to pieces; and that its events say the same."""
    parser = StreamParser(style, prefix=prefix)
    events = [event for piece in pieces for event in parser.push(piece, special)] + parser.finish()
    assert all(event.text for event in events if not isinstance(event, ToolCallStart | ToolCallEnd)), "an empty delta"
    told = rebuild(events)
    reply = parser.reply
    assert (told.content, told.reasoning_content, told.tool_calls) == (
        reply.content, reply.reasoning_content, reply.tool_calls,
    )
    return reply


def a_call(id: str, arguments: str = "{}") -> str:
    return CB + id + AB + arguments + CE


F0 = a_call("functions.f:0")
F = ToolCall("functions.f:0", "f", "{}")

# text, prefix, content, reasoning, calls, how many notes; in style kimi-k2.5
CASES = [
    ("", None, "", None, [], 0),
    ("hello", None, "hello", None, [], 0),
    (f"hello{END}", "", "hello", None, [], 0),
    (f"{T}why{TE}so{END}", "", "so", "why", [], 0),
    (f"why{TE}so", T, "so", "why", [], 0),
    (f"why{TE}so", None, "so", "why", [], 0),
    (f" {T}why{TE}so", None, " so", "why", [], 0),
    (f"{T}{TE}so", None, "so", None, [], 0),
    (f"{TE}so", T, "so", None, [], 0),
    ("so", T + TE, "so", None, [], 0),
    (f"a<b{TE}c<", T, "c<", "a<b", [], 0),
    (f"x{SB}{F0}{SE}", "", "x", None, [F], 0),
    (f"{T}why{TE}x{SB}{F0}{SE}{END}", None, "x", "why", [F], 0),
    (f"{T}why{SB}{F0}{SE}", "", "", "why", [F], 0),
    (f"why{SB}{F0}{SE}", T, "", "why", [F], 0),
    (f"why{SB}{F0}{SE}", None, "why", None, [F], 0),
    (f"{SB}{F0}{a_call('functions.a.b:1', ' [1] ')}{SE}y", "", "y", None,
     [F, ToolCall("functions.a.b:1", "a.b", " [1] ")], 0),
    (f"<|tool_call_section_begin|>{F0}<|tool_call_section_end|>", "", "", None, [F], 0),
    (f"{SB}{F0}<|tool_call_section_end|>", "", "", None, [F], 0),
    (f"{SB}\n{F0} \n{F0}{SE}\n", "", "\n \n\n", None, [F, F], 0),
    (f"{SB}{F0}{SE}x{SB}{F0}{SE}", "", "x", None, [F, F], 0),
    # Arguments keep their bytes, whatever they are.
    (f'{SB}{a_call("functions.f:0", chr(123) + " x : 1")}{SE}', "", "", None,
     [ToolCall("functions.f:0", "f", "{ x : 1")], 1),
    (f"{SB}{a_call('functions.f:0', '')}{SE}", "", "", None, [ToolCall("functions.f:0", "f", "")], 1),
    # Ids of another make.
    (f"{SB}{a_call('search:12')}{SE}", "", "", None, [ToolCall("search:12", "search", "{}")], 1),
    (f"{SB}{a_call('tools.search:1')}{SE}", "", "", None, [ToolCall("tools.search:1", "search", "{}")], 1),
    (f"{SB}{a_call('search')}{SE}", "", "", None, [ToolCall("search", "search", "{}")], 1),
    (f"{SB}{a_call(' functions.f:0 ')}{SE}", "", "", None, [ToolCall(" functions.f:0 ", "f", "{}")], 1),
    (f"{SB}{a_call('a<b:0')}{SE}", "", "", None, [ToolCall("a<b:0", "a<b", "{}")], 1),
    (f"{SB}{a_call('')}{SE}", "", f"{CB}{AB}{{}}{CE}", None, [], 3),
    (f"{SB}{a_call('functions.:0')}{F0}{SE}", "", f"{CB}functions.:0{AB}{{}}{CE}", None, [F], 3),
    # Cut off.
    ("<think", "", "<think", None, [], 1),
    ("x<|tool_calls_sec", "", "x<|tool_calls_sec", None, [], 1),
    ("x</thin", T, "", "x</thin", [], 2),
    ("x", T, "", "x", [], 1),
    (f"x{END}", T, "", "x", [], 1),
    (f"x{SB}", "", f"x{SB}", None, [], 1),
    (f"x{SB}{SE}y", "", f"x{SB}{SE}y", None, [], 1),
    (f"x{SB}\n", "", f"x{SB}\n", None, [], 1),
    (f"x{SB} \n{SE}y", "", f"x{SB} \n{SE}y", None, [], 1),
    (f"{SB}\n{TE} {F0}", "", f"{SB}\n{TE} ", None, [F], 3),
    (f"{SB}{F0}", "", "", None, [F], 1),
    (f"{SB}{CB}functions.f:", "", f"{CB}functions.f:", None, [], 2),
    (f"{SB}{F0}{CB}functions.g:1{AB}{{\"a", "", f"{CB}functions.g:1{AB}{{\"a", None, [F], 2),
    (f"{SB}{CB}functions.g:1{AB}{{}}<|tool_call", "", f"{CB}functions.g:1{AB}{{}}<|tool_call", None, [], 3),
    (f"{SB}{CB}functions.g:1{AB}{{}}{END}", "", f"{CB}functions.g:1{AB}{{}}", None, [], 2),
    (f"{SB}{CB}functions.g:1{AB}{{}}{SE}y", "", f"{CB}functions.g:1{AB}{{}}y", None, [], 1),
    (f"{SB}{CB}functions.g:1{AB}{{}}{F0}{SE}y", "", f"{CB}functions.g:1{AB}{{}}y", None, [F], 1),
    (f"{SB}{CB}functions.g:1{AB}{{}}{SB}{F0}{SE}y", "", f"{CB}functions.g:1{AB}{{}}{SB}y", None, [F], 2),
    (f"{SB}{CB}functions.g:1{SB}{F0}{SE}", "", f"{CB}functions.g:1{SB}", None, [F], 2),
    (f"{SB}{CB}functions.g:1{CE}{F0}{SE}", "", f"{CB}functions.g:1{CE}", None, [F], 1),
    # Out of place.
    (f"x{TE}y", "", f"x{TE}y", None, [], 1),
    (f"x{T}y{TE}z", "", f"x{T}y{TE}z", None, [], 2),
    (f"x{T}y{TE}z", None, f"x{T}y{TE}z", None, [], 2),
    (f"{T}x{T}y{TE}z{TE}", "", f"z{TE}", f"x{T}y", [], 2),
    (f"{T}x{TE}{T}y", "", f"{T}y", "x", [], 1),
    (f"{T}x", T + TE, f"{T}x", None, [], 1),
    (F0, "", F0, None, [], 3),
    (f"{SE}{CE}", "", SE + CE, None, [], 2),
    (f"{CB}a{TE}b", None, "b", f"{CB}a", [], 1),
    (f"{SB}{SB}{F0}{SE}", "", SB + SB, None, [F], 2),
    (f"{SB}{F0}{SB}{F0}{SE}", "", SB, None, [F, F], 1),
    (f"{SB}hm{F0}and{T}{F0}{SE}", "", f"{SB}hmand{T}", None, [F, F], 3),
    (f"{SB}{a_call('functions.f:0', '{}' + AB + T + TE)}{SE}", "", "", None,
     [ToolCall("functions.f:0", "f", "{}" + AB + T + TE)], 4),
    (f"{SB}{a_call('functions.f' + TE + ':0')}{SE}", "", "", None,
     [ToolCall(f"functions.f{TE}:0", f"f{TE}", "{}")], 2),
    (f"a{END}b{END}{SB}{F0}", "", f"ab{END}{SB}{F0}", None, [], 6),
    ("<|im_user|>user<|im_middle|>x", "", "<|im_user|>user<|im_middle|>x", None, [], 2),
    (f"{T}<|nothing_known|>{TE}", None, "", "<|nothing_known|>", [], 1),
    ("a <b> <| |> <|UP|> </thinking> <think >", "", "a <b> <| |> <|UP|> </thinking> <think >", None, [], 0),
]


@pytest.mark.parametrize(("text", "prefix", "content", "reasoning", "calls", "num_notes"), CASES)
def test_known_texts(text: str, prefix: str | None, content: str, reasoning: str | None, calls: list[ToolCall],
                     num_notes: int) -> None:
    reply = parse(text, "kimi-k2.5", prefix=prefix)
    assert (reply.content, reply.reasoning_content, reply.tool_calls) == (content, reasoning, calls)
    assert len(reply.notes) == num_notes, reply.notes
    assert streamed(list(text), "kimi-k2.5", prefix) == reply, "one character at a time"
    assert parse(text, "kimi-k2-thinking", prefix=prefix) == reply


@pytest.mark.parametrize(("text", "prefix", "content", "reasoning", "calls", "num_notes"), CASES)
def test_kimi_k2_knows_no_thinking(text: str, prefix: str | None, content: str, reasoning: str | None,
                                   calls: list[ToolCall], num_notes: int) -> None:
    reply = parse(text, "kimi-k2")
    assert reply.reasoning_content is None
    if T not in text and TE not in text and prefix != T:
        assert reply == parse(text, "kimi-k2.5", prefix=prefix)
    elif T + "why" in text:
        assert T + "why" in reply.content


@pytest.mark.parametrize(
    ("id", "names", "name"),
    [
        ("functions.get_weather:0", None, "get_weather"),
        ("functions.a.b:3", None, "a.b"),
        ("functions.a.b:3", ["b", "c"], "b"),
        ("functions.a.b:3", ["a.b", "b"], "a.b"),
        ("functions.a.b:3", ["other"], "a.b"),
        ("functions.functions.x:3", None, "functions.x"),
        ("functions.x:3", ["functions.x"], "functions.x"),
        ("functions.a:b:3", None, "a:b"),
        ("x.y.z:3", None, "z"),
        ("z:3", None, "z"),
        ("z", None, "z"),
        ("functions.z", None, "z"),
        (" functions.z:0\n", None, "z"),
        ("functions.:0", None, ""),
        (":0", None, ""),
        ("", ["a"], ""),
        (".", None, ""),
    ],
)
def test_which_function_an_id_calls(id: str, names: list[str] | None, name: str) -> None:
    assert call_name(id, names) == name
    if name:
        (found,) = parse(f"{SB}{a_call(id)}{SE}", tool_names=names).tool_calls
        assert found == ToolCall(id, name, "{}")


# --- cutting ----------------------------------------------------------------------------------------------------------

SHORT = [f"a{TE}b", f"{T}a", f"{CE}<|", f"{END}b", "<|<think><|a<|", f"</{TE}<|", f"<|x|>{T}", f"{T}{TE}"]


@pytest.mark.parametrize("text", SHORT)
@pytest.mark.parametrize("prefix", [None, T])
def test_every_way_of_cutting_a_short_text(text: str, prefix: str | None) -> None:
    """All 2^(n-1) of them, for up to 15 characters; of longer ones, the marker at the beginning in one piece."""
    head = max(0, len(text) - 14)
    whole = parse(text, "kimi-k2.5", prefix=prefix)
    for bits in range(2 ** (len(text) - head - 1)):
        cuts = [gap for gap in range(head + 1, len(text)) if bits >> (gap - head - 1) & 1]
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert streamed(pieces, "kimi-k2.5", prefix) == whole, pieces


@pytest.mark.parametrize("text", [f"a{SB}{F0}{SE}", f"{SB}{CB}x:0{AB}1{CB}"])
def test_every_pair_of_cuts_in_a_tool_call(text: str) -> None:
    whole = parse(text)
    for a, b in itertools.combinations(range(1, len(text)), 2):
        assert streamed([text[:a], text[a:b], text[b:]], "kimi-k2") == whole, (a, b)


@pytest.mark.parametrize(("text", "prefix"), [case[:2] for case in CASES])
def test_every_single_cut_of_the_known_texts(text: str, prefix: str | None) -> None:
    whole = parse(text, "kimi-k2.5", prefix=prefix)
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], "", text[cut:]], "kimi-k2.5", prefix) == whole, text[:cut]


MARKERS = [SB, SE, CB, AB, CE, T, TE, END, "<|tool_call_section_begin|>", "<|tool_call_section_end|>", "<|im_user|>",
           "<|unknown|>"]
WELL = [f"{SB}{F0}{SE}", F0, f"{CB}functions.f:1{AB}", "functions.f:2", '{"a": "<"}', " ", "\n"]
soups = st.lists(
    st.sampled_from(MARKERS) | st.sampled_from(WELL) | st.sampled_from([m[:5] for m in MARKERS] + ["|>", "<|", "<"])
    | st.text(max_size=6),
    max_size=20,
)
prefixes = st.sampled_from([None, "", T, T + TE])


def cut(draw: Any, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


@given(soups, prefixes, st.sampled_from(STYLES), st.data())
@settings(max_examples=200, deadline=None)
def test_any_cutting_of_any_soup(soup: list[str], prefix: str | None, style: str, data: st.DataObject) -> None:
    text = "".join(soup)
    whole = parse(text, style, prefix=prefix)
    assert streamed(cut(data.draw, text), style, prefix) == whole
    assert streamed(list(text), style, prefix) == whole


# --- nothing is lost --------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([*MARKERS, CB, AB, CE, None, None, None]), max_size=30), prefixes,
       st.sampled_from(STYLES), st.booleans())
@settings(max_examples=400, deadline=None)
@example([SB, None, CB, None, AB, None, SE], "", "kimi-k2", False)
def test_every_character_comes_out_once(soup: list[str | None], prefix: str | None, style: str, flagged: bool) -> None:
    """Each text between markers is a number of its own, so that what comes out can be counted and ordered."""
    numbers = itertools.count(1)
    pieces = [f"[{next(numbers)}]" if piece is None else piece for piece in soup]
    parser = StreamParser(style, prefix=prefix)
    for piece in pieces:
        parser.push(piece, (piece in MARKERS) if flagged else None)
    parser.finish()
    reply = parser.reply
    channels = [reply.content, reply.reasoning_content or ""]
    channels += [text for call in reply.tool_calls for text in (call.id, call.arguments)]
    everything = "".join(channels)
    for number in range(1, next(numbers)):
        assert everything.count(f"[{number}]") == 1
    for channel in channels:
        order = [int(part.partition("]")[0]) for part in channel.split("[")[1:]]
        assert order == sorted(order)
    # Nothing is made up: what is left beside the numbers are markers, each as often as it was there at most.
    for marker in MARKERS:
        assert everything.count(marker) <= pieces.count(marker)
    bare = everything
    for piece in {*MARKERS, *pieces}:
        bare = bare.replace(piece, "")
    assert not bare
    assert bool(reply.notes) >= any(marker in everything for marker in MARKERS)


def replay(reply: Reply, style: str) -> Reply:
    """The reply as a turn of history, written out in parts and read again."""
    message = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning_content}
    calls = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in reply.tool_calls]
    parts = render_parts([message | {"tool_calls": calls}], style=style, add_generation_prompt=False,
                         preserve_thinking=True)
    parser = StreamParser(style, prefix="")
    for part in parts[[part.text for part in parts].index("<|im_assistant|>") + 3 :]:
        parser.push(part.text, part.special)
    parser.finish()
    return parser.reply


@given(soups, prefixes, st.sampled_from(STYLES))
@settings(max_examples=150, deadline=None)
def test_what_was_read_reads_the_same_again(soup: list[str], prefix: str | None, style: str) -> None:
    """A reply, kept as history: leftover markers in it are text and stay text. Ids are renumbered, nothing else."""
    first = parse("".join(soup), style, prefix=prefix)
    if len({call.id for call in first.tool_calls}) < len(first.tool_calls):
        return
    again = replay(first, style)
    assert (again.content, again.reasoning_content) == (first.content, first.reasoning_content)
    assert [(call.name, call.arguments) for call in again.tool_calls] == [
        (call.name, call.arguments) for call in first.tool_calls
    ]
    assert replay(again, style) == again
    assert all("not JSON" in note or "not functions" in note for note in again.notes)


texts = st.text(max_size=20) | st.sampled_from([f"{SB}{F0}", TE, END, "a<b", "<|im_", "</th"])
function_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,10}", fullmatch=True)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                                                       max_size=2), max_leaves=5)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    calls = [
        {"id": f"functions.{name}:{i}", "type": "function",
         "function": {"name": name, "arguments": json.dumps(draw(json_values), ensure_ascii=draw(st.booleans()))}}
        for i, name in enumerate(draw(st.lists(function_names, max_size=3)))
    ]
    turn = {"role": "assistant", "content": draw(texts), "reasoning_content": draw(st.none() | texts)}
    return turn | ({"tool_calls": calls} if calls else {})


@given(turns(), st.sampled_from(STYLES), st.sampled_from([None, True, False]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_rendered_turn_reads_back(turn: dict[str, Any], style: str, thinking: bool | None, flagged: bool) -> None:
    """With flags always; as one string where the turn itself spells no marker."""
    parts = render_parts([turn], style=style, thinking=thinking, add_generation_prompt=False, preserve_thinking=True)
    parts = parts[[part.text for part in parts].index("<|im_assistant|>") + 3 :]
    parser = StreamParser(style, prefix=None if flagged else "")
    if not flagged and any("<" in part.text for part in parts if not part.special):
        return
    for part in parts:
        parser.push(part.text, part.special if flagged else None)
    parser.finish()
    calls = [ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
             for call in turn.get("tool_calls", ())]
    reasoning = None if style == "kimi-k2" else turn["reasoning_content"] or None
    assert parser.reply == Reply(turn["content"], reasoning, calls, [])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"{T}why not{TE} the moon {F0}{SB}" * 20], 400)


@given(turns(), st.sampled_from(["kimi-k2-thinking", "kimi-k2.5"]))
@settings(max_examples=100, deadline=None)
@example({"role": "assistant", "content": f"a{SB}é🌕{END}", "reasoning_content": f"{TE}{T}"}, "kimi-k2.5")
def test_a_turn_sampled_token_by_token(tokenizer: Tokenizer, turn: dict[str, Any], style: str) -> None:
    """From ids, as an engine sees them: special tokens one by one, bytes until they are whole characters."""
    prompt = render_parts([], style=style)
    parts = render_parts([turn], style=style, add_generation_prompt=False, preserve_thinking=True)[len(prompt) :]
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    decoder = codecs.getincrementaldecoder("utf-8")()
    parser = StreamParser(style, prefix=generation_prefix(style))
    for id in encode(tokenizer, parts):
        parser.push(names.get(id) or decoder.decode(tokenizer.token_bytes(id)), id in names)
    parser.finish()
    calls = [ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
             for call in turn.get("tool_calls", ())]
    assert parser.reply == Reply(turn["content"], turn["reasoning_content"] or None, calls, [])


# --- flags, liveness, speed -------------------------------------------------------------------------------------------


def test_plain_text_is_never_a_marker() -> None:
    parser = StreamParser("kimi-k2.5", prefix=T)
    assert parser.push(f"{TE}{SB}{F0}", False) == [ReasoningDelta(f"{TE}{SB}{F0}")]
    parser.push(TE, True)
    assert parser.push(f"{SB}{END}{T}", False) == [ContentDelta(f"{SB}{END}{T}")]
    for piece, special in ((SB, True), (CB, True), ("functions.f:0", False), (AB, True), (f'"{CE}"', False), (CE, True),
                           (SE, True)):
        parser.push(piece, special)
    parser.finish()
    assert parser.reply == Reply(f"{SB}{END}{T}", f"{TE}{SB}{F0}", [ToolCall("functions.f:0", "f", f'"{CE}"')], [])


def test_a_special_token_nobody_expects_is_text() -> None:
    parser = StreamParser("kimi-k2")
    assert parser.push("[EOS]", True) == [ContentDelta("[EOS]")]
    assert parser.reply.notes == ["misplaced [EOS] kept as text"]
    assert StreamParser("kimi-k2").push("[EOS]") == [ContentDelta("[EOS]")]


def test_a_flagged_piece_settles_what_was_held_back() -> None:
    parser = StreamParser("kimi-k2")
    assert parser.push("a<|tool_calls_section") == [ContentDelta("a")]
    assert parser.push("_begin|>", False) == [ContentDelta(SB)]
    assert parser.push("<", None) == []
    assert parser.push(SB, True) == [ContentDelta("<")]


def test_text_arrives_while_it_is_written() -> None:
    parser = StreamParser("kimi-k2.5", prefix=T)
    assert parser.push("why") == [ReasoningDelta("why")]
    assert parser.push(" <") == [ReasoningDelta(" ")]
    assert parser.push("/think>so") == [ContentDelta("so")]
    assert parser.push("!") == [ContentDelta("!")]
    assert parser.push(SB + CB + "functions.") == []
    assert parser.push("f:0" + AB) == [ToolCallStart(0, "functions.f:0", "f")]
    assert parser.push('{"a"') == [ArgumentsDelta(0, '{"a"')]
    assert parser.push(": 1<") == [ArgumentsDelta(0, ": 1")]
    assert parser.push("2}") == [ArgumentsDelta(0, "<2}")]
    assert parser.push(CE + CB + "functions.g:1" + AB + "[") == [
        ToolCallEnd(0), ToolCallStart(1, "functions.g:1", "g"), ArgumentsDelta(1, "["),
    ]
    assert parser.finish() == [ToolCallAborted(1, f"{CB}functions.g:1{AB}[")]
    assert parser.finish() == []
    assert parser.reply.tool_calls == [ToolCall("functions.f:0", "f", '{"a": 1<2}')]
    assert parser.reply.content == f"so!{CB}functions.g:1{AB}["


def test_an_aborted_call_keeps_its_number() -> None:
    parser = StreamParser()
    events = parser.push(f"{SB}{CB}functions.f:0{AB}1{a_call('functions.g:1', '2')}")
    assert events == [
        ToolCallStart(0, "functions.f:0", "f"), ArgumentsDelta(0, "1"),
        ToolCallAborted(0, f"{CB}functions.f:0{AB}1"),
        ToolCallStart(1, "functions.g:1", "g"), ArgumentsDelta(1, "2"), ToolCallEnd(1),
    ]


def test_an_unknown_beginning_is_held_back() -> None:
    """Whether a text without a prefix began as reasoning is known at its first marker, or at its end."""
    parser = StreamParser("kimi-k2.5")
    assert parser.push("so") == []
    assert parser.push(TE) == [ReasoningDelta("so")]
    parser = StreamParser("kimi-k2.5")
    assert parser.push("so") == [] and parser.finish() == [ContentDelta("so")]
    assert StreamParser("kimi-k2").push("so") == [ContentDelta("so")]


@pytest.mark.parametrize(("style", "prefix"), [("kimi", ""), ("kimi-k2", "<thought>"), ("kimi-k2.5", 3)])
def test_unknown_styles_and_prefixes(style: str, prefix: Any) -> None:
    with pytest.raises(UserError, match=r"style|prefix"):
        parse("", style, prefix=prefix)


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [("{}", True), (' {"a": [1, null]} ', True), ("9" * 5000, True), ("NaN", False), ("-Infinity", False), ("", False),
     ("{'a': 1}", False), ('{"a": 1,}', False), ("{} {}", False), ("[" * 100_000, False)],
)
def test_arguments_that_are_not_json_are_kept_and_noted(arguments: str, valid: bool) -> None:
    reply = parse(f"{SB}{a_call('functions.f:0', arguments)}{SE}")
    assert reply.tool_calls == [ToolCall("functions.f:0", "f", arguments)]
    assert reply.notes == ([] if valid else ["the arguments of 'functions.f:0' are not JSON"])


def test_notes_stay_few() -> None:
    reply = parse("".join(f"<|m{i}|>" for i in range(10_000)), "kimi-k2")
    assert len(reply.notes) <= 50 and reply.content.count("<|m") == 10_000


@pytest.mark.parametrize("unit", ["word", "<|a", "<|im_user|>", SB, CB, f"{SB}{CB}x{AB}", "<", f"{SB} "])
def test_time_grows_with_the_text_and_no_faster(unit: str) -> None:
    """In pieces of four characters and at once. The bounds leave room for a slow machine: a parser that looks again
    at what it has read would need minutes."""
    words = unit == "word"
    text = (f"{T}{SB}{CB}functions.f:0{AB}" if words else T) + unit * ((1_000_000 if words else 200_000) // len(unit))
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    parser = StreamParser("kimi-k2.5", prefix="")
    start = time.process_time()
    for piece in pieces:
        parser.push(piece)
    parser.finish()
    assert time.process_time() - start < 20
    start = time.process_time()
    whole = parse(text, "kimi-k2.5", prefix="")
    assert time.process_time() - start < 20
    assert whole == parser.reply
