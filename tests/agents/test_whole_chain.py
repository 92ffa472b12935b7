"""The way of a new user, servers and swarm in processes of their own: `moonbase serve` with a tiny checkpoint,
`moonbase swarm` against it with an MCP server and the sandbox, killed with SIGKILL, resumed, its trace as a page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp.client.client", reason="needs the package mcp, version 2 or newer")

from moonbase import cli
from moonbase.agents.episodes import read_episodes
from tests.agents import caller_model
from tests.agents.chain_endpoint import ITEMS

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("MOONBASE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MOONSHOT_API_KEY")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in KEYS} | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `moonbase serve`."""
    folder = caller_model.save(tmp_path_factory.mktemp("models") / "caller")
    process = subprocess.Popen(
        [sys.executable, "-m", "moonbase", "serve", str(folder), "--port", "0", "--style", "kimi-k2.5", "--grace", "0",
         "--cache-tokens", "65536"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    wait_until(lambda: process.poll() is not None or any("http://" in line for line in lines))
    assert process.poll() is None, lines
    yield re.search(r"http://[^\s]+", "".join(lines))[0]
    process.terminate()
    assert process.wait(timeout=120) == 0, lines


@pytest.fixture(scope="module")
def scripted() -> Iterator[str]:
    """The URL of an endpoint whose agents know what they do."""
    process = subprocess.Popen([sys.executable, "-m", "tests.agents.chain_endpoint", "--seconds", "0.25"],
                               env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.kill()
    process.wait()


def wait_until(true: Any, seconds: float = 300, pause: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(pause)


class Chain:
    """A session in a folder that no other process knows of, so that whatever names it belongs to it."""

    def __init__(self, folder: Path, url: str, *options: str) -> None:
        self.folder, self.session, self.notes = folder, folder / "session", folder / "notes"
        self.notes.touch()
        server = {"command": sys.executable,
                  "args": ["-m", "moonbase.agents.tools.mcp_server", "tests.agents.chain_tools:toolset"],
                  "env": {"PYTHONPATH": str(ROOT), "NOTES": str(self.notes), "SECONDS": "0.05"}}
        (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"ours": server}}), encoding="utf-8")
        self.begin = ("swarm", "Note what you see.", "--model", url, "--tools", "mcp:mcp.json,python", "--session",
                      str(self.session), "--allow-unsafe-sandbox", "--print", *options)
        self.resume = ("swarm", "--resume", str(self.session), "--print")

    def start(self, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "moonbase", *arguments], env=ENVIRONMENT, cwd=self.folder,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def lines(self) -> list[bytes]:
        """Whole lines alone: a kill may cut the last one."""
        path = self.session / "events.jsonl"
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

    def events(self) -> Events:
        return [json.loads(line) for line in self.lines()]

    def kill_at(self, arguments: tuple[str, ...], events: int) -> Events:
        """Work until there are so many events, then SIGKILL; the events that are there. Nothing lives on."""
        process = self.start(arguments)
        wait_until(lambda: len(self.lines()) >= events or process.poll() is not None)
        process.kill()
        process.communicate()
        wait_until(lambda: not self.left(), pause=0.2)
        return self.events()

    def finish(self) -> tuple[int, str, str]:
        """Resume to the end: exit code, standard output, standard error."""
        process = self.start(self.resume)
        out, err = process.communicate(timeout=300)
        wait_until(lambda: not self.left(), pause=0.2)
        return process.returncode, out, err

    def left(self) -> list[str]:
        """Processes of this machine that name the folder in their command line or their environment."""
        found, name = [], bytes(self.folder)
        for place in Path("/proc").glob("[0-9]*"):
            if place.name == str(os.getpid()):
                continue
            try:
                said = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
            except OSError:
                continue
            if name in said:
                found.append(f"{place.name} {said[:200]!r}")
        return found


class Page(HTMLParser):
    """Reads a page; elements must end in the order in which they began."""

    VOID = ("meta", "link", "br", "hr", "input", "img", "col")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.data: dict[str, Any] = {}
        self._name: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self._name = values.get("id") if values.get("type") == "application/json" else None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._name = None

    def handle_data(self, data: str) -> None:
        if self._name is not None:
            self.data[self._name] = json.loads(data)


def check_whole(before: Events, chain: Chain) -> Events:
    """What holds of every resumed session: nothing that was written is changed, no step is there twice, each call has
    its reply and its results, and trace and page tell the same."""
    events = chain.events()
    assert events[: len(before)] == before
    calls = Counter(event["call"] for event in events if event["type"] == "tool_call"
                    or (event["type"] == "model_call" and event["error"] is None))
    assert set(calls.values()) == {1}
    asked = {f"{event['call']}.{number}" for event in events if event["type"] == "model_call" and not event["error"]
             and event["tools"] for number, _ in enumerate(event["completion"].get("tool_calls") or ())}
    assert asked == {event["call"] for event in events if event["type"] == "tool_call"}
    ended = [event for event in events if event["type"] == "episode_finished"]
    assert len(ended) == 1 and events[-1] == ended[0]
    with pytest.raises(SystemExit) as left:
        cli.main(["trace", str(chain.session), "--out", str(chain.folder / "page.html")])
    assert left.value.code == 0
    (episode,) = read_episodes(chain.session / "episode.jsonl")
    page = Page((chain.folder / "page.html").read_text(encoding="utf-8"))
    assert len(page.data["episodes"]) == 1
    shown = [call["id"] for agent in page.data["episode-0"]["agents"] for call in agent["calls"]]
    assert sorted(shown) == sorted(call.id for agent in episode.agents for call in agent.calls) == sorted(calls)
    return events


@pytest.mark.parametrize("kill", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_tiny_checkpoint_killed_and_resumed(served: str, kill: int, tmp_path: Path) -> None:
    """It says nothing sensible, and everything around it works."""
    chain = Chain(tmp_path, served, "--steps", "5", "--max-tokens", "40")
    before = chain.kill_at(chain.begin, kill)
    assert len(before) >= kill
    code, out, err = chain.finish()
    assert "Traceback" not in err
    events = check_whole(before, chain)
    assert events[-1]["status"] in ("finished", "failed", "stuck"), "a tiny model can end in no other way"
    finished = events[-1]["status"] == "finished"
    assert code == (0 if finished else 1) and (chain.session / "answer.md").exists() == finished, err
    called = [event for event in events if event["type"] == "tool_call"]
    assert any(event["name"].startswith("ours__") for event in called), "no call over MCP was seen"
    noted = [json.loads(event["arguments"])["text"] for event in called
             if event["name"] == "ours__note" and not event["error"]]
    written = Counter(json.loads(line) for line in chain.notes.read_text(encoding="utf-8").splitlines())
    assert not Counter(noted) - written, "a finished call was not made"
    assert (written - Counter(noted)).total() <= _in_flight(before), "a call was made again that was not in flight"
    assert out == (chain.session / "answer.md").read_text(encoding="utf-8") if finished else "to go on: " in err


def _in_flight(events: Events) -> int:
    """Calls of `note` that were asked for and have no result."""
    done = {event["call"] for event in events if event["type"] == "tool_call"}
    return sum(call["function"]["name"] == "ours__note" and f"{event['call']}.{number}" not in done
               for event in events if event["type"] == "model_call" and not event["error"]
               for number, call in enumerate(event["completion"].get("tool_calls") or ()))


@pytest.mark.slow
@pytest.mark.parametrize("kill", [6, 14])
def test_helpers_killed_and_resumed_lose_their_variables_and_hear_it(
    scripted: str, kill: int, tmp_path: Path
) -> None:
    chain = Chain(tmp_path, scripted)
    before = chain.kill_at(chain.begin, kill)
    assert len(before) >= kill and before[-1]["type"] != "episode_finished"
    code, out, err = chain.finish()
    assert code == 0, err
    assert out == "".join(f"{item}: noted '{item}'\n" for item in ITEMS)
    events = check_whole(before, chain)
    written = Counter(json.loads(line) for line in chain.notes.read_text(encoding="utf-8").splitlines())
    assert set(written) == set(ITEMS) and written.total() <= len(ITEMS) + _in_flight(before)
    for number, _ in enumerate(ITEMS):
        agent = f"main/2.0.{number}"
        first, *later = [(place, event) for place, event in enumerate(events)
                         if event["type"] == "tool_call" and (event["agent"], event["name"]) == (agent, "python")]
        told = [event["result"].startswith("[Nothing from before is defined: this is a new interpreter.]")
                for _, event in (first, *later)]
        # Told with the first call, and once more with the first one after the resume, if there is any.
        resumed = first[0] < len(before)
        after = [said for said, (place, _) in zip(told, (first, *later), strict=True) if place >= len(before)]
        assert told[0] and after[:1] == [True] * bool(after) and not any(after[1:])
        assert sum(told) == 1 + (resumed and bool(after))
