"""The chat loop as a user meets it: text on standard input, answers on standard output."""

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from moonbase import terminal
from moonbase.checkpoint import save_weights
from moonbase.data.tokenizer import train_tokenizer
from moonbase.engine import Engine, Sampling
from moonbase.errors import UserError
from moonbase.loading import load, load_tokenizer_of
from tests.model.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = train_tokenizer(["some words to merge, some more words"] * 9, 320)
    model = tiny_model(vocab_size=320, eos_token_id=tokenizer.eos_id)
    save_weights(model, folder / "checkpoints" / "step-000001", model.config)
    tokenizer.save(folder / "checkpoints" / "step-000001")
    return folder


@pytest.fixture
def talk(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`talk(text)` -> what is printed after the greeting."""

    def say(text: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        terminal.chat(str(saved))
        out = capsys.readouterr().out
        return out[out.index("(end a line with") :].partition(")")[2].lstrip()

    return say


def continuation(saved: Path, text: str, turn: int = 1, temperature: float = 0.8, tokens: int = 128) -> str:
    model, tokenizer = load(saved), load_tokenizer_of(saved)
    sampling = Sampling(max_tokens=tokens, temperature=temperature, top_p=0.95, seed=turn)
    return Engine(model, tokenizer, tokenizer.eos_ids).generate([text], sampling)[0]


def shown(text: str) -> str:
    """What a terminal is given of a model's text: no control character but tabs and line ends."""
    return "".join(character for character in text if unicodedata.category(character) != "Cc" or character in "\t\n")


def test_it_continues_what_is_typed(talk, saved: Path) -> None:
    """Untouched settings: 128 tokens at temperature 0.8; each turn draws anew."""
    expected = [continuation(saved, "some words", turn) for turn in (1, 2)]
    assert expected[0] != expected[1]
    assert talk("some words\nsome words\n") == shown("".join(f"some words{text}\n" for text in expected))


def test_settings_and_lines_that_go_on(talk, saved: Path) -> None:
    found = talk("/temperature 0\n/tokens 5\nsome\\\nwords\n")
    assert found == shown("some\nwords" + continuation(saved, "some\nwords", temperature=0.0, tokens=5) + "\n")


def test_long_lines_and_colons_are_left_alone(talk) -> None:
    """No line breaks at the width of the terminal, no `:name:` turned into a picture, no markup read."""
    text = "x[:heart:] = [bold]" + "word " * 40 + "end"
    assert talk(f"/tokens 1\n{text}\n").startswith(text)


@pytest.mark.parametrize(
    "command", ["/tokens 0", "/tokens many", "/tokens", "/tokens inf", "/tokens nan", "/temperature -1",
                "/temperature nan", "/temperature inf", "/temperature"],
)
def test_bad_values_are_answered_and_change_nothing(talk, saved: Path, command: str) -> None:
    found = talk(f"/tokens 6\n{command}\nsome\n")
    name = command.split()[0]
    complaint, _, rest = found.partition("\n")
    assert complaint.startswith(f"{name} wants a number, for example {name} ")
    assert rest == shown("some" + continuation(saved, "some", tokens=6) + "\n")


def test_a_model_cannot_drive_the_terminal(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "stream", lambda *_: iter(["a\tb", "\x1b[2J", "\x07\u009b1m", "\n:heart: [red]c"]))
    assert talk("go\n") == "goa\tb[2J1m\n:heart: [red]c\n"


def test_unknown_commands_show_the_known_ones(talk) -> None:
    for command in ("/help", "/", "/nonsense 3"):
        assert "/temperature X" in talk(command + "\n")


def test_it_ends(talk) -> None:
    assert talk("") == ""
    assert talk("\n\n\n") == ""
    for command in ("/quit", "/exit", "/q"):
        assert talk(f"{command}\nnever read\n") == ""
    assert "half a line" in talk("/tokens 1\nhalf a line\\")


def test_a_prompt_too_long_is_one_line_and_the_talk_goes_on(talk, saved: Path) -> None:
    found = talk("/tokens 2\n" + "z" * 400 + "\nsome\n")
    assert "the prompt has 400 tokens; the model's context is 256" in found
    assert "\nsome" in found


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = tiny_model()
    save_weights(model, tmp_path / "bare", model.config)
    with pytest.raises(UserError, match="no tokenizer here"):
        terminal.chat(str(tmp_path / "bare"))


def test_through_the_command(saved: Path) -> None:
    def chat(model: str, typed: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "moonbase", "chat", model]
        return subprocess.run(command, input=typed, capture_output=True, cwd=ROOT)

    answer = chat(str(saved), b"/tokens 3\nsome words\n/quit\n")
    assert answer.returncode == 0, answer.stderr.decode()
    assert b"some words" in answer.stdout and b"Traceback" not in answer.stderr
    wrong = chat("no/such/run", b"")
    assert wrong.returncode == 2
    assert b"no/such/run: no such folder" in wrong.stderr and b"Traceback" not in wrong.stderr
