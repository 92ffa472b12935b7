"""`moonbase swarm` and `moonbase trace` as a user meets them, against a scripted endpoint in a process of its own."""

from __future__ import annotations

import itertools
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moonbase import cli
from moonbase.agents.episodes import read_episodes
from moonbase.agents.session import read_settings
from moonbase.agents.worlds.grading import score
from moonbase.agents.worlds.wideworld import make_tasks, make_world
from moonbase.agents.worlds.world import Task

ROOT = Path(__file__).resolve().parents[1]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WORLD = "world:1:2000"


def environment(**extra: str) -> dict[str, str]:
    keys = ("MOONBASE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MOONSHOT_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in keys}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"} | extra


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moonbase", *map(str, arguments)]


def moonbase(*arguments: object, cwd: Path, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(**extra), capture_output=True, text=True,
                          timeout=300, input=stdin)


@contextmanager
def endpoint(policy: str, *arguments: str) -> Iterator[str]:
    """The URL of a scripted server."""
    process = subprocess.Popen([sys.executable, "-m", "tests.agents.scripted_server", policy, *arguments],
                               env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with endpoint("wide") as address:
        yield address


@pytest.fixture(scope="module")
def task() -> Task:
    return make_tasks(make_world(1, 2000, "test"), "wide", 1, 0, rows=12, columns=3)[0]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command inside this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    for name in ("MOONBASE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return left.value.code, out, err

    return call


# --- a session from beginning to end ----------------------------------------------------------------------------------


def test_an_answer_and_its_folder(url: str, task: Task, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--price", "0.6,3,0.1")
    assert code == 0, err
    assert score(task, out).exact
    (folder,) = (tmp_path / "runs" / "swarm").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["answer.md", "episode.jsonl", "events.jsonl",
                                                              "trace.html"]
    assert (folder / "answer.md").read_text(encoding="utf-8") == out
    (episode,) = read_episodes(folder / "episode.jsonl")
    assert episode.status == "finished" and len(episode.agents) == 13
    assert episode.spent.money == pytest.approx(episode.spent.steps * (100 * 0.6 + 10 * 3.0) / 1e6)
    assert "main finished" in err and err.count(" finished, ") == 13
    assert f"trace: {folder.relative_to(tmp_path)}/trace.html" in err
    assert not CONTROL.search(err)


def test_json_is_alone_on_standard_output(url: str, task: Task, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--session", tmp_path / "s", "--json")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert result["status"] == "finished" and score(task, result["text"]).exact
    (episode,) = read_episodes(tmp_path / "s")
    assert result["tokens"] == episode.spent.tokens == 110 * result["model_calls"]
    assert (result["subagents"], result["critical_steps"]) == (12, episode.critical.steps)
    code, again, err = run("swarm", "--resume", tmp_path / "s", "--print", "--output-format", "json")
    assert code == 0 and err == "", "a finished session calls nobody"
    assert json.loads(again) == result


def test_a_stream_of_events(url: str, task: Task, run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--session", tmp_path / "s", "--print",
                         "--output-format", "stream-json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    written = [json.loads(line) for line in (tmp_path / "s" / "events.jsonl").read_text("utf-8").splitlines()]
    assert lines[:-1] == written
    assert lines[-1]["type"] == "result" and score(task, lines[-1]["text"]).exact


def test_alone_with_the_task_from_standard_input(url: str, task: Task, tmp_path: Path) -> None:
    answer = moonbase("swarm", "-", "--model", url, "--tools", WORLD, "--single", "--session", "s", "--print",
                      cwd=tmp_path, stdin=task.prompt + "\n")
    assert answer.returncode == 0, answer.stderr
    assert score(task, answer.stdout).exact
    (episode,) = read_episodes(tmp_path / "s")
    assert len(episode.agents) == 1 and episode.tools == ["search", "open"]


def test_a_context_that_is_set_is_kept_to(url: str, task: Task, run: Callable[..., Any], tmp_path: Path) -> None:
    """The endpoint says 65,536 and would never refuse; the strategy acts at what the user says."""
    run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--single", "--context", "discard-75%", "--session",
        "s", "--steps", "25", "--context-tokens", "3000", "--max-tokens", "500", "--print")
    (episode,) = read_episodes(tmp_path / "s")
    (main,) = episode.agents
    shown = [[main.messages[place] for start, stop in call.sees for place in range(start, stop)]
             for call in main.calls if call.kind == "model"]
    characters = [sum(len(message["content"] or "") for message in messages) for messages in shown]
    assert max(characters) <= 4 * 3000 < sum(len(message["content"] or "") for message in main.messages)
    assert any(len(later) < len(earlier) for earlier, later in itertools.pairwise(shown))
    settings = read_settings(tmp_path / "s")
    assert (settings.context_tokens, settings.sub_context_tokens) == (3000, None)


def test_other_tools(url: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    (tmp_path / "notes, old").mkdir()
    (tmp_path / "notes, old" / "a.md").write_text("# Hello\n\nWorld.\n", encoding="utf-8")
    prompt = "Make a complete list of the members of the Ab Cd league.\n\nColumns: Name | Area\n\nRule."
    code, _, err = run("swarm", prompt, "--model", url, "--tools", "search:notes, old", "--tools",
                         f"files:{tmp_path}", "--session", "s", "--steps", "3", "--print")
    assert code == 0, err
    (episode,) = read_episodes(tmp_path / "s")
    assert set(episode.tools) > {"search", "open", "read_file", "write_file", "assign_tasks"}
    assert '"search:' + str(tmp_path / "notes, old") in (tmp_path / "s" / "events.jsonl").read_text("utf-8")


def test_a_limit_ends_it_with_code_1(url: str, task: Task, run: Callable[..., Any]) -> None:
    code, out, err = run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--session", "s", "--tokens", "5000")
    assert code == 1 and "over_budget (the budget of tokens is used up" in err
    assert "to go on with a higher limit: moonbase swarm --resume s" in err
    assert not Path("s/answer.md").exists() and Path("s/trace.html").exists()
    code, out, err = run("swarm", "--resume", "s", "--tokens", "10000000")
    # What sub-agents reported stands, that they had been stopped too; the orchestrator answers with what there is.
    assert code == 0 and score(task, out).item_precision == 1.0 and 0 < score(task, out).item_recall < 1


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_again_and_again(task: Task, tmp_path: Path) -> None:
    """However often it is killed: the right answer, and nothing but what was in flight is asked twice."""
    log, draw, kills = tmp_path / "log", random.Random(5), 0
    with endpoint("wide", "--seconds", "0.08", "--log", str(log)) as address:
        arguments: tuple[object, ...] = ("swarm", task.prompt, "--model", address, "--tools", WORLD, "--session",
                                         tmp_path / "s", "--concurrency", "4", "--print")
        while True:
            process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True)
            events, before = tmp_path / "s" / "events.jsonl", _size(tmp_path / "s" / "events.jsonl")
            until = time.monotonic() + 300
            while _size(events) == before and process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.3))
            if kills == 5 or process.poll() is not None:
                out, err = process.communicate(timeout=300)
                break
            process.kill()
            process.communicate()
            kills += 1
            arguments = ("swarm", "--resume", tmp_path / "s", "--print")
    assert process.returncode == 0, err
    assert kills >= 2 and score(task, out).exact
    asked = Counter(log.read_text("utf-8").split())
    # Twelve helpers that see the same would be one line; they do not, their tasks differ.
    assert sum(asked.values()) - len(asked) <= 4 * kills
    (episode,) = read_episodes(tmp_path / "s")
    assert len(episode.agents) == 13 and all(agent.status == "finished" for agent in episode.agents)
    calls = [call for agent in episode.agents for call in agent.calls if call.kind == "model"]
    assert len({call.id for call in calls}) == len(calls) == len(asked)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_ctrl_c_says_how_to_go_on_and_two_at_once_do_not(url: str, task: Task, tmp_path: Path) -> None:
    # Nine calls in, it hangs: however long the others take to start, it is at work when they do.
    with endpoint("wide", "--seconds", "300", "--free", "9") as address:
        process = subprocess.Popen(
            command("swarm", task.prompt, "--model", address, "--tools", WORLD, "--session", "s"), cwd=tmp_path,
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 300
        while _size(tmp_path / "s" / "events.jsonl") < 5000 and time.monotonic() < until:
            time.sleep(0.02)
        second = moonbase("swarm", "--resume", "s", cwd=tmp_path)
        assert second.returncode == 2
        assert second.stderr == "moonbase: error: s: another process is working on this session\n"
        third = moonbase("swarm", "x", "--model", address, "--session", "s", cwd=tmp_path)
        assert third.returncode == 2 and "a session is here already" in third.stderr
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 130 and out == ""
        assert err.endswith("to go on: moonbase swarm --resume s\nmoonbase: interrupted\n") and "Traceback" not in err
        (episode,) = read_episodes(tmp_path / "s" / "episode.jsonl")
        assert episode.status == "cancelled" or episode.agents[0].status == "cancelled"
        assert (tmp_path / "s" / "trace.html").exists() and not (tmp_path / "s" / "answer.md").exists()
        answer = moonbase("swarm", "--resume", "s", "--model", url, cwd=tmp_path)
    assert answer.returncode == 0 and score(task, answer.stdout).exact


def test_a_reader_that_leaves_ends_the_work(task: Task, tmp_path: Path) -> None:
    with endpoint("wide", "--seconds", "0.2") as address:
        process = subprocess.Popen(
            command("swarm", task.prompt, "--model", address, "--tools", WORLD, "--session", "s", "--print",
                    "--output-format", "stream-json"),
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert json.loads(process.stdout.readline())["type"] == "episode_started"
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert process.stderr.read() == ""
        process.stderr.close()
        answer = moonbase("swarm", "--resume", "s", "--print", cwd=tmp_path)
    assert answer.returncode == 0 and score(task, answer.stdout).exact


# --- models that misbehave --------------------------------------------------------------------------------------------


def test_a_hostile_model(tmp_path: Path) -> None:
    with endpoint("hostile") as address:
        answer = moonbase("swarm", "Do it", "--model", address, "--session", "s", cwd=tmp_path)
    assert answer.returncode == 0 and "Traceback" not in answer.stderr
    assert answer.stdout.startswith("The end.")
    assert not CONTROL.search(answer.stderr)
    (episode,) = read_episodes(tmp_path / "s")
    assert len(episode.agents) == 1 and episode.status == "finished"
    errors = [call.error for call in episode.agents[0].calls if call.kind == "tool"]
    assert len(errors) >= 4 and sum(errors) == len(errors) - 1, "all but one of the calls were nonsense"
    page = (tmp_path / "s" / "trace.html").read_text("utf-8")
    assert "<script>alert(1)" not in page and "\x1b" not in page


def test_an_endpoint_that_is_down_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    with endpoint("down") as address:
        answer = moonbase("swarm", "Do it", "--model", address, "--session", "s", "--seconds", "1.5", cwd=tmp_path)
    *_, last = (tmp_path / "s" / "events.jsonl").read_text("utf-8").splitlines()
    assert json.loads(last)["time"] < 10, "seconds since the episode began"
    assert answer.returncode == 1 and "over_budget (the budget of seconds is used up" in answer.stderr
    assert "to go on with a higher limit: moonbase swarm --resume s" in answer.stderr and answer.stdout == ""


def test_on_a_terminal(url: str, task: Task, tmp_path: Path) -> None:
    """Drawn while it runs, gone afterwards; the answer stays."""
    with endpoint("wide", "--seconds", "0.4") as address:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            command("swarm", task.prompt, "--model", address, "--tools", WORLD, "--session", "s"), cwd=tmp_path,
            env=environment(TERM="xterm-256color", LINES="20"), stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        os.close(ours)
    assert process.wait(timeout=120) == 0
    text = seen.decode(errors="replace")
    assert "critical steps" in text and "helper" in text and "waits for" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    after = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", text[text.index("\x1b[?25h") :])
    assert "| Name |" in after and "finished, " in after and score(task, after).exact


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "--model is missing"),
        (["--model", "URL"], "the task is missing"),
        (["  ", "--model", "URL"], "the task is empty"),
        (["x", "--model", "URL", "--tools", "serch:x"], "no such tool (did you mean 'search'?)"),
        (["x", "--model", "URL", "--tools", "python,shel"], "--tools shel: there is no such tool"),
        (["x", "--model", "URL", "--tools", "search:no-such"], "no-such does not exist"),
        (["x", "--model", "URL", "--tools", "search"], "write search:FOLDER"),
        (["x", "--model", "URL", "--tools", "python:x"], "python takes nothing behind a colon"),
        (["x", "--model", "URL", "--tools", "world:x"], "world:SEED"),
        (["x", "--model", "URL", "--tools", "world:1:5"], "at least 2000 pages"),
        (["x", "--model", "URL", "--tools", "world:1:2000,world:2:2000"], "two tools are named search"),
        (["x", "--model", "URL", "--tools", "mcp:bad.json"], "bad.json is no JSON"),
        (["x", "--model", "URL", "--tools", "mcp:dead.json"], "MCP"),
        (["x", "--model", "URL", "--context", "forget"], "--context forget: one of keep-all"),
        (["x", "--model", "URL", "--context-tokens", "0"], "--context-tokens"),
        (["x", "--model", "URL", "--sub-context-tokens", "9"], "--sub-context-tokens needs --sub-model"),
        (["x", "--model", "URL", "--money", "1"], "--money needs --price"),
        (["x", "--model", "URL", "--price", "cheap"], "--price cheap: write IN,OUT"),
        (["x", "--model", "URL", "--price", "-1,2"], "--price -1,2: write IN,OUT"),
        (["x", "--model", "URL", "--steps", "0"], "--steps"),
        (["x", "--model", "URL", "--output-format", "xml"], "xml"),
        (["x", "--model", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["x", "--model", "openai:gpt"], "set the environment variable OPENAI_API_KEY"),
        (["x", "--model", "no-such-folder"], "no-such-folder"),
        (["x", "--model", "URL", "--session", "file"], "file"),
        (["--resume", "nowhere"], "no session to resume here"),
        (["--resume", "empty"], "the session was ended before it began"),
        (["--resume", "other"], "names no settings"),
        (["--resume", "garbage"], "line 1 is no event"),
        (["y", "--resume", "other"], "TASK: a resumed session keeps its own"),
        (["--resume", "other", "--tools", "python", "--seed", "1"], "--tools, --seed: a resumed session keeps"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, url: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    dead = {"mcpServers": {"dead": {"command": "false"}}}
    (tmp_path / "dead.json").write_text(json.dumps(dead), encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    event = {"type": "episode_started", "agent": "main", "time": 0}
    for name, text in (("empty", ""), ("other", f"{json.dumps(event)}\n"), ("garbage", "x\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text(text, encoding="utf-8")
    code, out, err = run("swarm", *(url if argument == "URL" else argument for argument in arguments), "--print")
    assert (code, out) == (2, ""), err
    assert err.startswith("moonbase: error: ") and err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "runs" / "swarm").exists() or not list((tmp_path / "runs" / "swarm").iterdir())


def test_a_session_killed_before_its_first_event_may_begin_again(
    url: str, task: Task, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "events.jsonl").write_text("", encoding="utf-8")
    code, out, _ = run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--session", "s", "--print")
    assert code == 0 and score(task, out).exact


@pytest.mark.parametrize(("words", "expected"), [
    ("moonbase swarm x --tools py", ["python"]),
    ("moonbase swarm x --tools python,sh", ["python,shell"]),
    ("moonbase swarm x --context dis", ["discard-75%", "discard-all"]),
    ("moonbase swarm x --output-format s", ["stream-json"]),
])  # fmt: skip
def test_completion(words: str, expected: list[str], tmp_path: Path) -> None:
    extra = {"_MOONBASE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert sorted(moonbase(cwd=tmp_path, **extra).stdout.split()) == expected


# --- trace ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(tmp_path: Path, url: str, task: Task, run: Callable[..., Any]) -> Path:
    assert run("swarm", task.prompt, "--model", url, "--tools", WORLD, "--session", "s", "--print")[0] == 0
    (tmp_path / "s" / "trace.html").unlink()
    return tmp_path / "s"


def test_a_page_of_a_session_its_events_or_its_trace(session: Path, run: Callable[..., Any]) -> None:
    pages = []
    for source, page in ((session, session / "trace.html"), (session / "events.jsonl", session / "trace.html"),
                         (session / "episode.jsonl", session / "episode.html")):
        assert run("trace", source) == (0, f"{page}\n", "")
        pages.append(page.read_bytes())
        page.unlink()
    assert len(set(pages)) == 1
    code, out, _ = run("trace", session, "--out", session / "other.html", "--json")
    assert code == 0 and json.loads(out) == {"page": str(session / "other.html"), "bytes": len(pages[0]),
                                             "episodes": 1, "agents": 13}


def test_a_page_of_a_session_that_was_cut_off_anywhere(session: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    content = (session / "events.jsonl").read_bytes()
    draw = random.Random(1)
    first = content.index(b"\n") + 1
    for cut in [first, first + 1, *(draw.randrange(first, len(content)) for _ in range(12))]:
        (tmp_path / "cut.jsonl").write_bytes(content[:cut])
        assert run("trace", "cut.jsonl")[0] == 0
        assert Path("cut.html").stat().st_size > 10_000


@pytest.mark.parametrize(("arguments", "said"), [
    (["no-such"], "no-such: No such file"),
    (["."], "no session here (events.jsonl is missing)"),
    (["bad.jsonl"], "bad.jsonl: line 1"),
    (["empty.jsonl"], "no episode in it"),
    (["bad.jsonl", "--out", "bad.jsonl"], "this is the trace itself"),
])  # fmt: skip
def test_a_mistake_with_a_trace_is_one_line(
    arguments: list[str], said: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    code, out, err = run("trace", *arguments)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
