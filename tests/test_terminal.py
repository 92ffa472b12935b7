"""The chat loop as a user meets it: in a pipe, in a real terminal, with a model here and with an endpoint elsewhere."""

from __future__ import annotations

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moonbase import chat, terminal
from moonbase.chat import (
    ArgumentsDelta,
    ContentDelta,
    ReasoningDelta,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
)
from moonbase.checkpoint import save_weights
from moonbase.data.tokenizer import train_tokenizer
from moonbase.engine import Engine, Sampling
from moonbase.errors import TryAgain, UserError
from moonbase.loading import load, load_tokenizer_of
from moonbase.terminal.screen import Screen, harmless
from moonbase.terminal.session import COMMANDS, MAX_ROUNDS, Session
from moonbase.terminal.speakers import Finished, LocalSpeaker, RemoteSpeaker, Wishes
from tests.model.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]


def make_run(folder: Path, recipe: str | None) -> Path:
    tokenizer = train_tokenizer(["some words to merge, some more words"] * 9, 320)
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    save_weights(model, folder / "checkpoints" / "step-000001", model.config)
    tokenizer.save(folder / "checkpoints" / "step-000001")
    if recipe is not None:
        (folder / "config.yaml").write_text(recipe, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "base", "stage: pretrain\nstyle: null\n")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tuned", "stage: sft\nstyle: kimi-k2.5\n")


class Script:
    """A speaker that says what is written, and keeps what it was asked. An exception is raised in its place."""

    name, chats = "script", True

    def __init__(self, *replies: list[Any]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[list[dict[str, Any]], list[str], Wishes, int]] = []

    def reply(self, messages: Any, tools: Any, wishes: Wishes, seed: int) -> Iterator[Any]:
        self.asked.append(([dict(message) for message in messages], [tool["function"]["name"] for tool in tools],
                           Wishes(**vars(wishes)), seed))
        for event in self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]:
            if isinstance(event, BaseException):
                raise event
            yield event

    def proceed(self, text: str, wishes: Wishes, seed: int) -> Iterator[Any]:
        return self.reply([{"content": text}], [], wishes, seed)


def says(text: str) -> list[Any]:
    return [*map(ContentDelta, re.findall(r"\S+\s*|\s+", text)), Finished(3, "stop")]


def calls(name: str, arguments: str, index: int = 0) -> list[Any]:
    return [ToolCallStart(index, f"functions.{name}:{index}", name),
            *[ArgumentsDelta(index, letter) for letter in arguments], ToolCallEnd(index)]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str]):
    """`talk(speaker, lines...)` -> (standard output, standard error, session)."""

    def say(speaker: Any, *lines: str) -> tuple[str, str, Session]:
        session = Session(speaker, Screen())
        for line in lines:
            if not session.take(line):
                break
        return *capsys.readouterr(), session

    return say


# --- a conversation ---------------------------------------------------------------------------------------------------


def test_a_conversation_is_remembered(talk) -> None:
    speaker = Script(says("Hello there."), says("Fine."))
    out, _, session = talk(speaker, "/system Be kind.", "hello", "how are you?")
    assert out == "Hello there.\nFine.\n"
    system = {"role": "system", "content": "Be kind."}
    assert speaker.asked[0][0] == [system, {"role": "user", "content": "hello"}]
    assert speaker.asked[1][0] == [system, {"role": "user", "content": "hello"},
                                   {"role": "assistant", "content": "Hello there."},
                                   {"role": "user", "content": "how are you?"}]
    assert speaker.asked[0][3] != speaker.asked[1][3], "each reply is drawn anew"
    talk_on = session.take("/new") and session.take("again")
    assert talk_on and speaker.asked[2][0] == [system, {"role": "user", "content": "again"}]


def test_a_round_trip_through_tools(talk) -> None:
    speaker = Script([ReasoningDelta("I compute."), ContentDelta("Let me see."),
                      *calls("calculator", '{"expression": "48 * 17"}'),
                      *calls("convert", '{"value": 1, "unit": "km", "to": "m"}', 1), Finished(9, "tool_calls")],
                     says("816 and 1000."))
    out, notes, _ = talk(speaker, "/tools", "48 * 17, and a km?")
    assert out == "Let me see.\n816 and 1000.\n", "a pipe gets the text alone"
    assert 'calls calculator({"expression": "48 * 17"})' in notes and "→ 816" in notes and "→ 1000" in notes
    assert speaker.asked[0][1] == ["calculator", "convert", "lookup"]
    assistant, *results = speaker.asked[1][0][-3:]
    assert assistant["reasoning_content"] == "I compute." and assistant["content"] == "Let me see."
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["calculator", "convert"]
    assert results == [{"role": "tool", "tool_call_id": "functions.calculator:0", "content": "816"},
                       {"role": "tool", "tool_call_id": "functions.convert:1", "content": "1000"}]
    chat.normalise_messages(speaker.asked[1][0])


@pytest.mark.parametrize(("name", "arguments"), [("calculator", '{"expression": "__import__(1)"}'), ("calculator", "{"),
                                                 ("calculator", "[]"), ("shell", "{}"), ("calculator", '{"x": 1}')])
def test_a_call_that_cannot_be_run_is_answered_with_the_reason(talk, name: str, arguments: str) -> None:
    speaker = Script([*calls(name, arguments), Finished(2, "tool_calls")], says("Oh."))
    out, notes, _ = talk(speaker, "/tools", "go")
    assert out == "Oh.\n" and "→ error: " in notes
    assert speaker.asked[1][0][-1]["content"].startswith("error: ")


def test_rounds_of_tools_end(talk) -> None:
    speaker = Script([*calls("calculator", '{"expression": "1"}'), Finished(2, "tool_calls")])
    _, notes, _ = talk(speaker, "/tools", "go")
    assert len(speaker.asked) == MAX_ROUNDS and f"after {MAX_ROUNDS} rounds" in notes


def test_a_call_that_broke_off_is_text(talk) -> None:
    speaker = Script([ToolCallStart(0, "functions.a:0", "a"), ToolCallAborted(0, "<|tool_call_begin|>functions.a:0"),
                      Finished(4, "length")])
    out, notes, session = talk(speaker, "go")
    assert out == "<|tool_call_begin|>functions.a:0\n" and "cut at the token limit" in notes
    assert session.messages[-1] == {"role": "assistant", "content": "<|tool_call_begin|>functions.a:0"}


def test_a_refusal_is_one_line_and_leaves_the_conversation_whole(talk) -> None:
    """What cannot be answered goes; what could not be answered this time stays, for another try."""
    speaker = Script(says("one"), [ContentDelta("half"), UserError("the prompt\nis too long")], [TryAgain("busy")],
                     says("two"))
    out, notes, session = talk(speaker, "a", "b", "c", "d")
    assert out == "one\nhalf\ntwo\n" and "the prompt is too long\n" in notes and "busy\n" in notes
    assert [message["content"] for message in session.messages] == ["a", "one", "c", "d", "two"]


def test_a_refusal_in_a_later_round_takes_the_whole_turn_back(talk) -> None:
    speaker = Script([*calls("calculator", '{"expression": "1"}'), Finished(2, "tool_calls")], [UserError("no")],
                     says("ok"))
    _, _, session = talk(speaker, "/tools", "a", "b")
    assert session.messages == [{"role": "user", "content": "b"}, {"role": "assistant", "content": "ok"}]


def test_ctrl_c_stops_the_reply_only(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Script([ContentDelta("The answer"), KeyboardInterrupt()],
                     [*calls("calculator", '{"expression": "1"}'), KeyboardInterrupt()], says("on"))
    session = Session(speaker, Screen())
    for line in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            session.take(line)
    session.take("c")
    assert [message["content"] for message in session.messages] == ["a", "The answer", "b", "c", "on"]
    assert not any(message.get("tool_calls") for message in session.messages), "a call that nobody answers is dropped"


def test_ctrl_c_ends_a_program_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    monkeypatch.setattr("moonbase.terminal.session.LocalSpeaker", lambda _: Script([KeyboardInterrupt()]))
    with pytest.raises(KeyboardInterrupt):
        terminal.chat("model")


def test_retry(talk) -> None:
    speaker = Script(says("one"), [*calls("calculator", '{"expression": "1"}'), Finished(2, "tool_calls")],
                     says("two"), says("three"))
    out, notes, session = talk(speaker, "/retry", "/tools", "a", "b", "/retry")
    assert "there is no message to answer" in notes and out == "one\ntwo\nthree\n"
    assert [message["content"] for message in session.messages] == ["a", "one", "b", "three"]
    assert speaker.asked[-1][0] == speaker.asked[1][0] and speaker.asked[-1][3] != speaker.asked[1][3]


@pytest.mark.parametrize("error", [UserError("too long"), TryAgain("busy")])
def test_a_retry_that_fails_leaves_the_answer_that_there_was(talk, error: Exception) -> None:
    speaker = Script(says("one"), says("two"), [ContentDelta("half"), error], says("three"))
    _, notes, session = talk(speaker, "a", "b", "/retry")
    assert str(error) in notes
    assert [message["content"] for message in session.messages] == ["a", "one", "b", "two"]


def test_a_question_that_met_a_busy_model_can_be_asked_again(talk) -> None:
    speaker = Script(says("one"), [TryAgain("busy")], says("two"))
    _, _, session = talk(speaker, "a", "b", "/retry")
    assert [message["content"] for message in session.messages] == ["a", "one", "b", "two"]


def test_a_call_without_tools_is_not_run(talk) -> None:
    speaker = Script([ContentDelta("Hm."), *calls("calculator", '{"expression": "1"}'), Finished(2, "tool_calls")])
    _, notes, session = talk(speaker, "go")
    assert session.messages == [{"role": "user", "content": "go"}, {"role": "assistant", "content": "Hm."}]
    assert len(speaker.asked) == 1 and "/tools" in notes and "→" not in notes


def test_settings_reach_the_model(talk) -> None:
    speaker = Script(says("x"))
    talk(speaker, "a", "/temperature 0.25", "/tokens 7", "/thinking off", "b", "/thinking default", "/tools", "/tools",
         "c")
    assert [wishes for _, _, wishes, _ in speaker.asked] == [Wishes(), Wishes(0.25, 7, False), Wishes(0.25, 7, None)]
    assert speaker.asked[-1][1] == []


@pytest.mark.parametrize(
    ("command", "complaint"),
    [*[(f"/tokens{value}", "/tokens wants a whole number") for value in ("", " 0", " many", " inf", " nan", " 1e12")],
     *[(f"/temperature{value}", "/temperature wants a number") for value in ("", " -1", " nan", " inf", " x")],
     ("/thinking maybe", "/thinking wants on, off or default"), ("/tools maybe", "/tools wants"),
     ("/save", "/save wants a file name"), ("/load", "/load wants a file name"),
     ("/load no/such", "no/such: No such file"), ("/save no/such/folder", "no such folder")],
)
def test_bad_values_are_answered_and_change_nothing(talk, tmp_path: Path, command: str, complaint: str) -> None:
    speaker = Script(says("x"))
    if command.startswith("/save "):
        command = f"/save {tmp_path}/no/such"
    _, notes, _ = talk(speaker, command, "a")
    assert complaint in notes and speaker.asked[0][1:3] == ([], Wishes())


def test_unknown_commands_show_the_known_ones(talk) -> None:
    for command in ("/help", "/", "/nonsense 3", "/_on_help", "/__class__"):
        out, notes, _ = talk(Script(says("x")), command)
        assert out == "" and all(name in notes for name in COMMANDS)


def test_save_and_load(talk, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    speaker = Script([ReasoningDelta("hm"), *calls("calculator", '{"expression": "2 + 2"}'), Finished(5, "tool_calls")],
                     says("4 ✓"))
    _, _, first = talk(speaker, "/system Be brief.", "/tools", "2 + 2?", f"/save {path}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "system", "content": "Be brief."} and len(saved["tools"]) == 3
    ids, mask = chat.encode_with_mask(train_tokenizer(["2 + 2"] * 9, 320),
                                      chat.render_parts(chat.normalise_messages(saved["messages"]), saved["tools"],
                                                        add_generation_prompt=False))
    assert any(mask) and len(ids) == len(mask), "a model can be tuned on what was saved"
    _, notes, second = talk(Script(says("more")), f"/load {path}", "go on")
    assert "4 messages read" in notes and second.tools and second.system == "Be brief."
    assert second.messages[:4] == chat.normalise_messages(first.messages)
    for content, complaint in (("{", "it is no JSON"), ("[" * 100_000, "it is no JSON"), ("[]", "messages are missing"),
                               ('{"messages": [{}]}', "messages[0].role")):
        path.write_text(content, encoding="utf-8")
        assert complaint in talk(Script(says("x")), f"/load {path}")[1]


def test_base_continues_and_back(talk) -> None:
    speaker = Script(says(" a time"), says("Hello."))
    out, notes, session = talk(speaker, "/base", "Once upon", "/retry", "/base", "hi")
    assert out == "Once upon a time\nOnce uponHello.\nHello.\n"
    assert "continued" in notes and "answered" in notes
    assert session.messages[0] == {"role": "user", "content": "hi"}


# --- what a model may not do ------------------------------------------------------------------------------------------


def test_a_model_cannot_drive_the_terminal(talk) -> None:
    evil = "\x1b[2J\x07\u009b1m\x00\x08\u202egnp\u2066\r"
    speaker = Script([ReasoningDelta(evil), *says(f"a\tb{evil}\n:heart: [red]c"),
                      *calls(f"calc{evil}", f'{{"x": "{evil}"}}')],
                     [TryAgain(f"no{evil}")])
    out, notes, _ = talk(speaker, "/tools", "go")
    assert out == "a\tb[2J1mgnp\n:heart: [red]c\n"
    for text in (out, notes):
        assert not {character for character in text if unicodedata.category(character) in ("Cc", "Cf")} - {"\t", "\n"}


def test_harmless_text_is_left_alone() -> None:
    text = "naïve – 月面基地 🌕 שלום العربية\n\tx = [bold]:smile:"
    assert harmless(text) == text
    every = "".join(map(chr, [*range(0x3000), *range(0xE000, 0x11000)]))
    assert set(every) - set(harmless(every)) == {
        character for character in every if character not in "\t\n" and
        (unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in
         ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI") or character in "\u061c\u200e\u200f")}


# --- a model on this machine ------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """What a terminal is given of a model's text: no control character but tabs and line ends."""
    return "".join(character for character in text if unicodedata.category(character) != "Cc" or character in "\t\n")


def continuation(run: Path, text: str, turn: int = 1, temperature: float = 0.8, tokens: int = 128) -> str:
    model, tokenizer = load(run), load_tokenizer_of(run)
    sampling = Sampling(max_tokens=tokens, temperature=temperature, top_p=0.95, seed=turn)
    return Engine(model, tokenizer, tokenizer.eos_ids).generate([text], sampling)[0]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`pipe(run, text)` -> (standard output, standard error) of `moonbase chat` with that on standard input."""

    def say(model: Path | str, text: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        terminal.chat(str(model))
        return capsys.readouterr()

    return say


def line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def test_a_base_model_continues_what_is_typed(pipe, base: Path) -> None:
    """Untouched settings: 128 tokens at temperature 0.8; each turn draws anew."""
    expected = [shown(continuation(base, "some words", turn)) for turn in (1, 2)]
    assert expected[0] != expected[1]
    assert pipe(base, "some words\nsome words\n")[0] == "".join(line(f"some words{text}") for text in expected)


def test_settings_and_lines_that_go_on(pipe, base: Path) -> None:
    found = pipe(base, "/temperature 0\n/tokens 5\nsome\\\nwords\n")[0]
    assert found == line(shown("some\nwords" + continuation(base, "some\nwords", temperature=0.0, tokens=5)))


def test_long_lines_and_colons_are_left_alone(pipe, base: Path) -> None:
    """No line breaks at the width of the terminal, no `:name:` turned into a picture, no markup read."""
    text = "x[:heart:] = [bold]" + "word " * 40 + "end"
    assert pipe(base, f"/tokens 1\n{text}\n")[0].startswith(text)


def test_it_ends(pipe, base: Path) -> None:
    assert pipe(base, "")[0] == pipe(base, "\n\n\n")[0] == ""
    for command in ("/quit", "/exit", "/q"):
        assert pipe(base, f"{command}\nnever read\n")[0] == ""
    assert "half a line" in pipe(base, "/tokens 1\nhalf a line\\")[0]


def test_a_prompt_too_long_is_one_line_and_the_talk_goes_on(pipe, base: Path) -> None:
    out, notes = pipe(base, "/tokens 2\n" + "z" * 400 + "\nsome\n")
    assert "the prompt has 400 tokens; the model's context is 256" in notes
    assert "\nsome" in out


def test_which_models_chat(base: Path, tuned: Path, tmp_path: Path) -> None:
    assert not LocalSpeaker(str(base)).chats and not LocalSpeaker(str(base / "checkpoints" / "step-000001")).chats
    speaker = LocalSpeaker(str(tuned))
    assert speaker.chats and speaker.style == "kimi-k2.5"
    assert LocalSpeaker(str(tuned / "checkpoints" / "step-000001")).style == "kimi-k2.5"
    # A folder that comes from elsewhere says nothing of its training; its vocabulary can chat.
    foreign = LocalSpeaker(str(make_run(tmp_path / "foreign", None)))
    assert foreign.chats and foreign.style == "kimi-k2"


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [False, True])
def test_a_reply_is_what_the_engine_and_the_parser_make_of_it(tuned: Path, thinking: bool | None, tools: bool) -> None:
    """Rendered, generated and parsed whole, by the rooms themselves."""
    from moonbase.engine.constraint import tool_constraint
    from moonbase.synth.tools import TOOLS

    speaker = LocalSpeaker(str(tuned))
    declared = [TOOLS["calculator"]] if tools else []
    messages = [{"role": "user", "content": "some words"}]
    wishes = Wishes(temperature=1.5, tokens=60, thinking=thinking)
    events = list(speaker.reply(messages, declared, wishes, 3))
    tokenizer, model = load_tokenizer_of(tuned), load(tuned)
    ids = chat.encode(tokenizer, chat.render_parts(messages, declared or None, "kimi-k2.5", thinking=thinking))
    prefix = chat.generation_prefix("kimi-k2.5", thinking)
    constraint = tool_constraint(tokenizer, tokenizer.vocab_size, declared, style="kimi-k2.5",
                                 choice="auto" if tools else "none", thinking_open=prefix == "<think>")
    (output,) = Engine(model, tokenizer, tokenizer.eos_ids).complete(
        [ids], Sampling(max_tokens=60, temperature=1.5, top_p=0.95, seed=3), constraint)
    reply = chat.parse(tokenizer.decode(output.ids), "kimi-k2.5", prefix=prefix)
    content = "".join(event.text for event in events if isinstance(event, ContentDelta | ToolCallAborted))
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    # A token that spells a marker letter by letter is text in the stream; random weights rarely do.
    assert (content, reasoning or None) == (reply.content, reply.reasoning_content)
    assert sum(isinstance(event, ToolCallEnd) for event in events) == len(reply.tool_calls)
    assert isinstance(events[-1], Finished) and events[-1].tokens == len(output.ids)


@pytest.mark.parametrize(("style", "thinking", "expected"), [
    ("kimi-k2", None, {"temperature": 0.6, "top_p": 1.0, "think": False}),
    ("kimi-k2-thinking", None, {"temperature": 1.0, "top_p": 1.0, "think": True}),
    ("kimi-k2-thinking", False, {"temperature": 1.0, "top_p": 1.0, "think": False}),
    ("kimi-k2.5", False, {"temperature": 0.6, "top_p": 0.95, "think": False}),
    ("kimi-k2.5", True, {"temperature": 1.0, "top_p": 0.95, "thinking_open": True}),
])  # fmt: skip
@pytest.mark.parametrize("tools", [False, True])
def test_a_model_here_is_asked_as_the_server_asks(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, style: str, thinking: bool | None, expected: dict, tools: bool
) -> None:
    """The publisher's sampling, no second reasoning after a closed one, and calls only where there are tools."""
    from moonbase.serve.backend import Backend, Wish
    from moonbase.serve.settings import Settings
    from moonbase.synth.tools import TOOLS
    from tests.serve.service_double import ScriptedService

    speaker, asked = LocalSpeaker(str(tuned)), []
    speaker.style, speaker.context = style, 4096
    monkeypatch.setattr(speaker.engine, "pieces", lambda *given: asked.append(given) or (piece for piece in ()))
    messages, declared = [{"role": "user", "content": "some words"}], [TOOLS["calculator"]] if tools else []
    list(speaker.reply(messages, declared, Wishes(thinking=thinking), 1))
    (ids, sampling, factory), = asked
    found = {name: getattr(factory if name.startswith("think") else sampling, name) for name in expected}
    assert found == expected and set(factory.tools) == ({"calculator"} if tools else set())
    backend = Backend(ScriptedService(), speaker.tokenizer, speaker.tokenizer.vocab_size, 512, Settings(style=style))
    backend.context_length = 4096
    (job,) = backend.prepare(Wish(messages, declared, thinking=thinking)).jobs
    assert job.prompt_ids == ids
    names = ("temperature", "top_p", "min_p", "top_k", "stop", "stop_ids", "repetition_penalty")
    assert [getattr(job.sampling, name) for name in names] == [getattr(sampling, name) for name in names]
    assert (job.constraint.think, job.constraint.thinking_open) == (factory.think, factory.thinking_open)


def test_a_model_without_a_tokenizer_and_presets(tmp_path: Path) -> None:
    model = tiny_model()
    save_weights(model, tmp_path / "bare", model.config)
    with pytest.raises(UserError, match="no tokenizer here"):
        terminal.chat(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="preset:pico: a preset has random weights and no tokenizer"):
        terminal.chat("preset:pico")


def test_through_the_command(base: Path) -> None:
    def run(model: str, typed: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "moonbase", "chat", model]
        return subprocess.run(command, input=typed, capture_output=True, cwd=ROOT)

    answer = run(str(base), b"/tokens 3\nsome words\n/quit\n")
    assert answer.returncode == 0, answer.stderr.decode()
    assert answer.stdout.startswith(b"some words") and b"Traceback" not in answer.stderr
    wrong = run("no/such/run", b"")
    assert wrong.returncode == 2
    assert b"no/such/run: no such folder" in wrong.stderr and b"Traceback" not in wrong.stderr


# --- an endpoint elsewhere --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(tuned: Path) -> Iterator[Any]:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from tests.serve.service_double import ScriptedService, serving

    tokenizer = load_tokenizer_of(tuned)
    with serving(ScriptedService(), tokenizer, style="kimi-k2.5", api_keys=("sesame",), context_length=8192) as running:
        running.tokenizer = tokenizer
        yield running


def test_an_endpoint_answers_as_a_model_here_does(endpoint, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.service_double import says as pieces

    monkeypatch.setenv("MOONBASE_API_KEY", "sesame")
    first = ('I compute.</think>Let me see.<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0'
             '<|tool_call_argument_begin|>{"expression": "48 * 17"}<|tool_call_end|><|tool_calls_section_end|>')
    scripts = [pieces(endpoint.tokenizer, first), pieces(endpoint.tokenizer, "</think>It is 816.")]
    endpoint.service.__init__(lambda number: scripts[number])
    speaker = RemoteSpeaker(endpoint.url)
    assert speaker.model == "moon" and speaker.name == f"moon at {endpoint.url}"
    out, notes, session = talk(speaker, "/tools", "/temperature 0.5", "/tokens 99", "/thinking on", "48 * 17?")
    assert out == "Let me see.\nIt is 816.\n" and 'calculator({"expression": "48 * 17"})' in notes
    assert session.messages[1]["reasoning_content"] == "I compute."
    sampling = endpoint.service.asked[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 99)
    said = endpoint.tokenizer.decode(endpoint.service.asked[1].prompt_ids)
    assert "## Return of functions.calculator:0\n816" in said and said.endswith("<think>")


def test_an_endpoint_continues_text(endpoint, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.service_double import says as pieces

    monkeypatch.setenv("MOONBASE_API_KEY", "sesame")
    endpoint.service.__init__(pieces(endpoint.tokenizer, " a time", finish="length"))
    out, notes, _ = talk(RemoteSpeaker(endpoint.url + "/v1/"), "/base", "Once upon")
    assert out == "Once upon a time\n" and "cut at the token limit" in notes
    assert endpoint.tokenizer.decode(endpoint.service.asked[0].prompt_ids) == "Once upon"


def test_what_goes_wrong_with_an_endpoint(endpoint, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOONBASE_API_KEY", raising=False)
    with pytest.raises(UserError, match="MOONBASE_API_KEY"):
        RemoteSpeaker(endpoint.url)
    monkeypatch.setenv("MOONBASE_API_KEY", "sesame")
    with pytest.raises(UserError, match="no model sun; there are moon"):
        RemoteSpeaker(endpoint.url + "#sun")
    for url in ("http://", "http://[::1", "http://127.0.0.1:99999999"):
        with pytest.raises((UserError, TryAgain)):
            RemoteSpeaker(url)
    with pytest.raises(TryAgain, match="cannot be reached"):
        RemoteSpeaker("http://127.0.0.1:9")
    with pytest.raises(UserError, match="nothing at"):
        RemoteSpeaker(endpoint.url + "/elsewhere")
    endpoint.service.__init__([RuntimeError("boom")])
    out, notes, session = talk(RemoteSpeaker(endpoint.url), "hello")
    assert out == "" and "server" in notes and session.messages == [{"role": "user", "content": "hello"}]


@pytest.fixture
def foreign() -> Iterator[Any]:
    """An endpoint of another make: `foreign(text)` is its URL, and every stream of it is that text."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    said = b""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(b'{"data": [{"id": "other"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(said)

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def say(text: str) -> str:
        nonlocal said
        said = text.encode()
        return f"http://127.0.0.1:{server.server_port}"

    yield say
    server.shutdown()
    thread.join()
    server.server_close()


def test_streams_of_another_make(foreign, talk) -> None:
    """Letters that Unicode takes for the end of a line, CRLF, no [DONE] and null where nothing is meant."""
    def chunk(content: str | None, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
        return "data: " + json.dumps({"choices": [choice]}, ensure_ascii=False) + "\r\n\r\n"

    usage = 'data: {"choices": null, "usage": null}\r\n\r\n'
    text = "one\u2028two\u2029three\x85four"
    whole = chunk(text) + chunk(None, "length") + usage
    _, notes, session = talk(RemoteSpeaker(foreign(whole)), "go")
    assert session.messages[-1]["content"] == text and "cut at the token limit" in notes
    _, notes, session = talk(RemoteSpeaker(foreign(chunk(text))), "go")
    assert "in the middle of the answer" in notes and session.messages == [{"role": "user", "content": "go"}]


# --- a real terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """`moonbase chat` behind a pseudo-terminal."""

    def __init__(self, model: str, state: Path) -> None:
        ours, theirs = pty.openpty()
        self.out = ours
        environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(state), "NO_COLOR": "",
                       "MOONBASE_API_KEY": "sesame", "OMP_NUM_THREADS": "1"}
        environment.pop("NO_COLOR")
        # A terminal of its own, so that Ctrl-C goes to the program alone.
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
             "import sys; from moonbase.cli import main; main(sys.argv[1:])", "chat", model],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
        os.close(theirs)
        self.seen, self._decode = "", codecs.getincrementaldecoder("utf-8")().decode

    def until(self, text: str, seconds: float = 300.0) -> str:
        """Wait for a text; what came up to its end."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.out], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                chunk = os.read(self.out, 65536)
            except OSError:  # the other end is gone
                chunk = b""
            assert chunk, f"it ended without {text!r}: {self.seen!r}"
            self.seen += self._decode(chunk)
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.out, text.encode())

    def end(self) -> int:
        try:
            return self.process.wait(120)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGKILL)
                self.process.wait()
            os.close(self.out)


def test_in_a_real_terminal(endpoint, tmp_path: Path) -> None:
    from tests.serve.service_double import says as pieces

    slow = "I think.</think>" + "word " * 400
    # It goes on until it is stopped.
    scripts = [[*pieces(endpoint.tokenizer, slow, wait=0.01)[:-1], 600.0], pieces(endpoint.tokenizer, "</think>done")]
    endpoint.service.__init__(lambda number: scripts[min(number, 1)])
    window = Terminal(endpoint.url, tmp_path)
    window.until("/help lists commands")
    window.until("› ")
    window.type("tell me\r")
    assert "\x1b[2mI think." in window.until("word word"), "reasoning is dim"
    window.type("\x03")
    window.until("(stopped)")
    window.until("› ")
    window.type("\x03")  # at the prompt it ends nothing
    window.until("Ctrl-D or /quit ends")
    window.until("› ")
    window.type("two \\\r")
    window.until("… ")
    window.type("lines\r")
    assert "done" in window.until("tokens/s")
    window.until("› ")
    window.type("/he\t\r")
    window.until("/thinking on|off|default")
    window.until("› ")
    window.type("\x1b[A\x1b[A\r")  # up, up: the line before
    window.until("done")
    window.until("› ")
    window.type("\x04")
    assert window.end() == 0
    asked = [endpoint.tokenizer.decode(asked.prompt_ids) for asked in endpoint.service.asked]
    assert "two \nlines" in asked[1] and asked[2].count("lines<|im_end|>") == 2
    history = tmp_path / "moonbase" / "chat_history"
    assert "tell me" in history.read_text(encoding="utf-8") and history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_in_the_middle_of_local_generation(tuned: Path, tmp_path: Path) -> None:
    """The engine is whole afterwards: the next reply comes."""
    window = Terminal(str(tuned), tmp_path)
    window.until("› ")
    window.type("/base\r")
    window.until("continued")
    window.type("/tokens 200\r")
    window.type("some\r")
    window.until("\x1b[1msome\x1b[0m")  # not what the terminal echoes: the reply has begun
    window.type("\x03")
    window.type("/tokens 3\r")
    window.type("words\r")
    window.until("3 tokens")
    window.type("/quit\r")
    assert window.end() == 0
