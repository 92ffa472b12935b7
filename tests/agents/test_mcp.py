"""MCP in both directions against the official library, and against servers that die, hang and lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp.client.client", reason="needs the package mcp, version 2 or newer")

from moonbase.agents.tools.mcp_client import mcp_tools
from moonbase.agents.tools.mcp_config import read_config
from moonbase.agents.tools.mcp_server import make_server, serve_tools
from moonbase.agents.tools.mcp_translation import tool_names, usable_schema
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset, tool
from moonbase.errors import UserError
from tests.ports import free_port

HERE = Path(__file__).parent
OFFICIAL = {"command": sys.executable, "args": [str(HERE / "mcp_official_server.py")]}
CONTEXT = ToolContext("main", 1, "main#1.0")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits two seconds for a server to end by itself."""
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 0.5)


def raw(behaviour: str, **more: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": ["-S", str(HERE / "mcp_raw_server.py"), behaviour], **more}


def run(work: Awaitable[Any], seconds: float = 240) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, seconds)

    return asyncio.run(bounded())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)


async def ended(process: int) -> None:
    """Wait until it has ended and this loop had many an occasion to notice."""
    await until(lambda: not lives(process))
    for _ in range(20):
        await asyncio.sleep(0.01)


async def call(tools: Toolset, name: str, seconds: float | None = 60, **arguments: Any) -> ToolResult:
    return await tools.call(name, json.dumps(arguments), ToolContext("main", 1, "main#1.0", seconds))


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children() -> set[int]:
    mine = {os.getpid()}
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) in mine and fields[0] != "Z":
                found.add(int(path.parent.name))
    return found


def test_tools_of_an_official_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "a-very-secret-key")

    async def conversation() -> None:
        environment = {"KEY": "${MY_KEY}", "D": "${NONE:-other}"}
        tools = await mcp_tools({"mcpServers": {"off": OFFICIAL | {"env": environment}}})
        assert set(tools.names) >= {"off__add", "off__fail", "off__picture"}
        add = tools.tools["off__add"]
        assert add.description == "Add two numbers." and add.parameters["required"] == ["first"]
        assert add.parameters["properties"]["second"]["default"] == 10
        async with tools:
            answers = await asyncio.gather(*(call(tools, "off__add", first=number, second=1) for number in range(20)))
            assert [answer.content for answer in answers] == [str(number + 1) for number in range(20)]
            assert (await call(tools, "off__add", first="x")).error
            failed = await call(tools, "off__fail", secret="a-very-secret-key")
            assert failed.error and "no luck with ***" in failed.content
            assert (await call(tools, "off__picture")).content.splitlines() == [
                "a text", "[image, image/png, 9 bytes: not shown]",
                "[resource notes <file:///notes.txt>: what was said]", "[resource <file:///a.txt>]", "inside",
                "[resource <file:///b.pdf>, application/pdf, 3 bytes: not shown]", "the end"]
            assert (await call(tools, "off__environment", variable="KEY")).content == "a-very-secret-key"
            assert (await call(tools, "off__environment", variable="D")).content == "other"
            assert (await call(tools, "off__environment", variable="MY_KEY")).content == "not set"

            late = await call(tools, "off__sleep", 0.3, duration=60)
            assert late.error and "did not answer within 0.3 seconds" in late.content
            assert (await call(tools, "off__history")).content == "cancelled"

            numbers = [int(number) for number in (await call(tools, "off__processes")).content.split()]
            assert all(map(lives, numbers))
            dead = await call(tools, "off__die")
            assert dead.error and "ended during the call (last words of a server)" in dead.content
            assert (await call(tools, "off__add", first=1)).content == "11"
            again = [int(number) for number in (await call(tools, "off__processes")).content.split()]
            assert again[0] != numbers[0]
        # With what the servers had started and left behind.
        assert not any(map(lives, [*numbers, *again]))
        assert (await call(tools, "off__add", first=1)).error

    run(conversation())
    assert not children()


def test_a_server_that_dies_is_started_once_more() -> None:
    async def conversation() -> None:
        async with await mcp_tools({"mcpServers": {"d": raw("dies_in_calls"), "a": raw("dies_after_calls")}}) as tools:
            first, second, third = [await call(tools, "d__echo") for _ in range(3)]
            assert "ended during the call" in first.content and "is started again" in first.content
            assert "ended during the call" in second.content and "is not started again" in second.content
            assert third.error and "do without it" in third.content
            numbers = set()
            for _ in range(3):  # it answered each time, so each time it may start again; nobody notices
                answer = await call(tools, "a__echo")
                assert not answer.error, answer
                numbers.add(answer.content)
                await ended(int(answer.content.split()[-1]))
            assert len(numbers) == 3

    run(conversation())
    assert not children()


def test_a_server_that_lies() -> None:
    async def conversation() -> None:
        config = {"mcpServers": {"lying": raw("lying", env={"KEY": "hidden-value-1"})}}
        async with await mcp_tools(config, timeout=60) as tools:
            assert len(tools.names) == len(set(tools.names)) == 11
            assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in tools.names)
            for name in ("not_valid", "far", "lost"):
                assert tools.tools[f"lying__{name}"].parameters == {"type": "object"}
                assert (await call(tools, f"lying__{name}", a=1)).content.startswith(name)
            assert (await call(tools, "lying__near", a="x")).error
            assert (await call(tools, "lying__near", a=1)).content.startswith("near of")
            wrong = await call(tools, "lying__wrong_shape")
            assert wrong.error and "answered wrongly: ValidationError" in wrong.content
            assert (await call(tools, "lying__promise")).error
            refused = await call(tools, "lying__protocol_error")
            assert refused.error and "refused by ***" in refused.content
            flooded = await call(tools, "lying__flood")
            assert flooded.error and "ended during the call" in flooded.content
            assert not (await call(tools, "lying__echo")).error

    run(conversation())
    assert not children()


def test_a_server_that_hangs() -> None:
    """It does not even read: more than a pipe holds is on its way when the time is over."""
    async def conversation() -> None:
        async with await mcp_tools({"mcpServers": {"stuck": raw("stuck")}}) as tools:
            started = time.monotonic()
            answers = await asyncio.gather(*(call(tools, "stuck__echo", 0.5, text="x" * 300_000) for _ in range(3)))
            assert time.monotonic() - started < 60
            assert all("did not answer within 0.5 seconds" in answer.content for answer in answers)

    run(conversation())
    assert not children()


def test_a_server_of_the_later_protocol_alone() -> None:
    async def conversation() -> None:
        async with await mcp_tools({"mcpServers": {"later": raw("modern")}}) as tools:
            assert (await call(tools, "later__echo")).content.startswith("echo of")

    run(conversation())


@pytest.mark.parametrize(("entry", "said"), [
    (raw("exits", env={"K": "hidden-value-1"}), "ended before it had answered: cannot open the database with ***"),
    ({"command": "no-such-command-anywhere"}, "(command no-such-command-anywhere): there is no such command"),
    (raw("silent"), "did not answer within 1 seconds"),
    (raw("endless"), "goes on listing after 100 pages"),
    ({"command": "echo", "args": ["no message"]}, "1 lines of its standard output are no messages"),
    ({"url": "http://127.0.0.1:9/mcp?key=hidden-value-1"}, "(http://127.0.0.1:9): ConnectError: All connection"),
])
def test_a_server_that_does_not_start_is_named_in_one_line(entry: dict[str, Any], said: str) -> None:
    async def attempt() -> None:
        if "within 1 seconds" in said:
            await mcp_tools({"mcpServers": {"broken": entry}}, start_seconds=1)
        await mcp_tools({"mcpServers": {"fine": raw("fine"), "broken": entry}}, start_seconds=60)

    with pytest.raises(UserError) as caught:
        run(attempt())
    message = str(caught.value)
    assert message.startswith("MCP server 'broken' did not start") and said in message
    assert "\n" not in message and "hidden-value" not in message
    assert not children()


@pytest.mark.parametrize(("config", "said"), [
    ({}, 'expected {"mcpServers"'),
    ({"mcpServers": {"a": {}}}, "MCP server 'a' (mcpServers): give it either a command or a url"),
    ({"mcpServers": {"a": {"command": "x", "url": "http://x"}}}, "either a command or a url"),
    ({"mcpServers": {"a": {"command": "x", "type": "http"}}}, "the transport 'http' is not supported"),
    ({"mcpServers": {"a": {"url": "http://x", "type": "sse"}}}, "the transport 'sse' is not supported"),
    ({"mcpServers": {"a": {"url": "ftp://x"}}}, "url must be an address"),
    ({"mcpServers": {"a": {"url": "http://x", "headers": {"A": "\u00fc"}}}}, "headers: a header takes ASCII alone"),
    ({"mcpServers": {"a": {"command": "x", "args": "y"}}}, "args must be a list of texts"),
    ({"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}, "env must be an object of texts"),
    ({"mcpServers": {"a": {"command": "x", "args": ["${NOT_SET_ANYWHERE}"]}}}, "variable NOT_SET_ANYWHERE is not set"),
    ({"mcpServers": {"a": {"command": "x", "cwd": "/no/such"}}}, "cwd: the folder /no/such does not exist"),
    ("no/such/file.json", "no/such/file.json: No such file"),
])
def test_a_wrong_configuration(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_config(config)


def test_a_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "sesame-open")
    path = tmp_path / "mcp.json"
    path.write_text('\ufeff{"mcpServers": {"a": {"type": "streamable-http", "url": "https://me:password@host:81/x?key=abcdefg",'
                    ' "headers": {"Authorization": "Bearer ${TOKEN}"}}, "b": {"disabled": true}}}', encoding="utf-8")
    (server,) = read_config(path)
    assert server.headers == {"Authorization": "Bearer sesame-open"} and server.place == "https://host:81"
    assert server.hide("sesame-open password abcdefg 81") == "*** *** *** 81"
    path.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_config(path)


def test_servers_start_side_by_side_and_cancelling_ends_them(tmp_path: Path) -> None:
    async def conversation() -> None:
        config = {"mcpServers": {f"s{number}": raw("meets", env={"PLACE": str(tmp_path)}) for number in range(4)}}
        async with await mcp_tools(config) as tools:
            assert len(tools.names) == 4
        starting = asyncio.create_task(mcp_tools({"mcpServers": {"fine": raw("fine"), "silent": raw("silent")}}))
        await until(lambda: len(children()) == 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not children()

        async def use() -> None:
            async with await mcp_tools({"mcpServers": {"off": OFFICIAL}}) as tools:
                waiting.set()
                await call(tools, "off__sleep", duration=60)

        waiting = asyncio.Event()
        using = asyncio.create_task(use())
        await waiting.wait()
        await asyncio.sleep(0.1)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert not children()
        await mcp_tools({"mcpServers": {"forgotten": raw("fine")}})  # the end of the loop is the end of it

    run(conversation())
    assert not children()


def test_names_are_fit_for_the_api_and_differ() -> None:
    dice = random.Random(1)
    pairs = list({("".join(dice.choices("a_-.é/", k=dice.randrange(1, 90))),
                   "".join(dice.choices("a_ b", k=dice.randrange(1, 9)))) for _ in range(2000)})
    names = tool_names(pairs)
    assert len(set(names)) == len(pairs) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert names == tool_names(pairs)
    assert tool_names([("a", "b__c"), ("a__b", "c")])[0] == "a__b__c"


def test_references_of_a_schema() -> None:
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}},
                                             "$ref": {"type": "string"}}}
    assert usable_schema(tree) == (tree, "")
    for reference in ("#anchor", "other.json", "#/properties/none", "file:///etc/passwd"):
        assert usable_schema({"properties": {"a": {"$ref": reference}}})[0] == {"type": "object"}


@contextlib.asynccontextmanager
async def over_http(app: Any, port: int) -> AsyncIterator[int]:
    """The port at which an application answers."""
    import uvicorn

    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        server.install_signal_handlers = lambda: None
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await task


def test_an_official_server_over_http() -> None:
    from mcp.server.mcpserver import MCPServer

    seen: list[str | None] = []

    def make() -> Any:
        server = MCPServer("remote")

        @server.tool()
        def double(number: int) -> int:
            """Twice the number."""
            return 2 * number

        inner = server.streamable_http_app()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(dict(scope.get("headers") or ()).get(b"authorization", b"").decode())
            await inner(scope, receive, send)

        return app

    async def conversation() -> None:
        port = free_port()
        async with over_http(make(), port):
            entry = {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"Authorization": "Bearer of-a-secret"}}
            tools = await mcp_tools({"mcpServers": {"remote": entry}}, start_seconds=60)
            assert (await call(tools, "remote__double", number=21)).content == "42"
            assert "Bearer of-a-secret" in seen
        async with tools:
            assert (await call(tools, "remote__double", number=21)).error  # it is gone
            assert (await call(tools, "remote__double", number=21)).error
            async with over_http(make(), port):
                answers = [await call(tools, "remote__double", number=4) for _ in range(2)]
                assert answers[-1].content == "8", answers

    run(conversation())


# Our server, the official client.


def stdio_parameters(*arguments: str) -> Any:
    from mcp.client.stdio import StdioServerParameters

    return StdioServerParameters(command=sys.executable, args=["-m", "moonbase.agents.tools.mcp_server", *arguments],
                                 cwd=HERE.parent.parent, env={"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"})


def our_tools() -> Toolset:
    """What the tests serve."""
    @tool
    def shout(text: str, times: int = 1) -> str:
        """Say it louder.

        Args:
            text: What to say.
        """
        print("this must not reach the wire")
        os.system("echo nor must this; cat")
        return text.upper() * times

    @tool
    def broken() -> str:
        """Fail."""
        raise ValueError("no luck")

    @tool
    async def wait(seconds: float) -> str:
        """Take time."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            stopped.append(1)
            raise
        return "waited"

    @tool
    def count_stopped() -> int:
        """How many calls were cancelled."""
        return len(stopped)

    @tool
    def half() -> str:
        """Half of a surrogate pair."""
        return "a\ud800b"

    stopped: list[int] = []
    return Toolset([shout, broken, wait, count_stopped, half])


async def examine(client: Any) -> None:
    """All of our server that an official client can see."""
    from mcp.shared.exceptions import MCPError

    listed = {one.name: one for one in (await client.list_tools()).tools}
    schema = listed["shout"].input_schema
    assert listed["shout"].description == "Say it louder." and schema["required"] == ["text"]
    assert schema["properties"]["text"]["description"] == "What to say."
    answer = await client.call_tool("shout", {"text": "hé", "times": 2})
    assert answer.content[0].text == "HÉHÉ" and not answer.is_error
    for name, arguments, said in (("shout", {"text": 1}, "$.text"), ("shout", {}, "'text' is a required property"),
                                  ("broken", {}, "ValueError: no luck"), ("shoud", {}, "Did you mean shout?")):
        answer = await client.call_tool(name, arguments)
        assert answer.is_error and said in answer.content[0].text
    assert (await client.call_tool("half", {})).content[0].text == "a?b"

    async def progress(done: float, total: float | None, message: str | None) -> None: ...

    for seconds in (0.2, 2, 20):  # where the machine stands still, the call may not have begun by then
        with pytest.raises(MCPError, match="timed out"):
            await client.call_tool("wait", {"seconds": 600}, read_timeout_seconds=seconds)
        waited = await client.call_tool("wait", {"seconds": 0.01}, progress_callback=progress)
        assert waited.content[0].text == "waited"
        if (stopped := (await client.call_tool("count_stopped", {})).content[0].text) != "0":
            break
    assert stopped == "1"
    answers = await asyncio.gather(*(client.call_tool("wait", {"seconds": 0.2}) for _ in range(10)))
    assert all(answer.content[0].text == "waited" for answer in answers)


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_the_official_client_with_our_server(mode: str) -> None:
    from mcp.client.client import Client

    async def conversation() -> None:
        async with Client(stdio_parameters("test_mcp:our_tools"), mode=mode) as client:
            await examine(client)

    run(conversation())
    assert not children()


def test_the_official_client_with_our_server_over_http() -> None:
    import httpx2
    from mcp.client.client import Client
    from mcp.client.streamable_http import streamable_http_client

    async def conversation() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve_tools(
            our_tools(), "ours", "http", port=0, token="open sesame", ready=address.set_result))
        url = await address
        async with httpx2.AsyncClient(headers={"Authorization": "Bearer open sesame"}, timeout=60) as http:
            async with Client(streamable_http_client(url, http_client=http)) as client:
                await examine(client)
        async with httpx2.AsyncClient(timeout=60) as http:
            assert (await http.post(url, json={})).status_code == 401
            assert (await http.post(url, json={}, headers={"Authorization": b"Bearer \xfc"})).status_code == 401
        with pytest.raises(UserError, match="HTTP 401 Unauthorized"):
            await mcp_tools({"mcpServers": {"ours": {"url": url}}})
        config = {"mcpServers": {"ours": {"url": url, "headers": {"Authorization": "Bearer open sesame"}}}}
        async with await mcp_tools(config) as tools:
            assert (await call(tools, "ours__shout", text="a")).content == "A"
        with pytest.raises(UserError, match="cannot listen on 127"):
            await serve_tools(our_tools(), transport="http", port=int(url.split(":")[2].split("/")[0]))
        serving.cancel()
        await asyncio.wait([serving])

    run(conversation())


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_clients_at_once_over_http_are_agents_of_their_own(mode: str) -> None:
    """What belongs to an agent, such as its Python interpreter, is not shared between two clients at work at once."""
    from mcp.client.client import Client

    async def conversation() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve_tools(memory(), "ours", "http", port=0, ready=address.set_result))
        async with Client(await address, mode=mode) as one, Client(await address, mode=mode) as other:
            async def add(client: Any, word: str) -> list[str]:
                return json.loads((await client.call_tool("remember", {"word": word})).content[0].text)

            for number in range(3):
                # Side by side, so that a client has several connections.
                await asyncio.gather(*(add(client, f"{name}{number}{place}") for place in range(4)
                                       for client, name in ((one, "a"), (other, "b"))))
            found = [await add(one, "end"), await add(other, "end")]
            assert [{word[0] for word in words[:-1]} for words in found] == [{"a"}, {"b"}]
            assert [len(words) for words in found] == [13, 13]
        serving.cancel()
        await asyncio.wait([serving])

    run(conversation())


def test_without_sessions_every_call_stands_alone() -> None:
    """A client that insists on the protocol without sessions gets its answers, and nothing that belongs to another."""
    from mcp.client.client import Client
    from mcp_types.version import LATEST_MODERN_VERSION

    async def conversation() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve_tools(memory(), "ours", "http", port=0, ready=address.set_result))
        async with (Client(await address, mode=LATEST_MODERN_VERSION) as one,
                    Client(await address, mode=LATEST_MODERN_VERSION) as other, Client(await address) as third):
            for client, word in ((one, "a"), (other, "b"), (third, "c"), (one, "d")):
                answer = await client.call_tool("remember", {"word": word})
                assert json.loads(answer.content[0].text) == [word]
        serving.cancel()
        await asyncio.wait([serving])

    run(conversation())


def memory() -> Toolset:
    """A tool that keeps words for each agent."""
    words: dict[str, list[str]] = {}

    @tool(inline=True)
    def remember(word: str, context: ToolContext) -> list[str]:
        """All words of this agent."""
        own = words.setdefault(context.agent, [])
        own.append(word)
        return own

    return Toolset([remember])


def test_what_our_server_refuses() -> None:
    with pytest.raises(UserError, match="MOONBASE_MCP_TOKEN"):
        run(serve_tools(our_tools(), transport="http", host="0.0.0.0"))
    with pytest.raises(UserError, match="stdio or http"):
        run(serve_tools(our_tools(), transport="carrier pigeon"))


def test_our_server_on_our_client_until_it_is_told_to_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The heron stands in the reeds.")

    async def conversation() -> None:
        parameters = stdio_parameters("--search", str(tmp_path), "--files", str(tmp_path))
        entry = {"command": parameters.command, "args": parameters.args, "cwd": str(parameters.cwd)}
        async with await mcp_tools({"mcpServers": {"m": entry}}) as tools:
            assert tools.names == ["m__search", "m__open", "m__read_file", "m__write_file", "m__edit_file",
                                   "m__list_files"]
            assert "a.txt" in (await call(tools, "m__search", query="herons heron")).content
            assert (await call(tools, "m__open", id="a.txt")).content == "The heron stands in the reeds."
            assert (await call(tools, "m__read_file", path="../x")).error
            (process,) = children()
            os.kill(process, signal.SIGTERM)
            await ended(process)  # a call before that is noticed would have to be an error
            assert not (await call(tools, "m__open", id="a.txt")).error

    run(conversation())
    assert not children()


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "MCP server: no tools: name a toolset"),
    (["no_such_module:x"], "MCP server: no_such_module:x: No module named 'no_such_module'; expected module:name"),
    (["json:dumps_"], "MCP server: json:dumps_: module 'json' has no attribute 'dumps_'"),
    (["sys:path"], "MCP server: sys:path is a list, not a Toolset"),
    (["--search", "no/such/folder"], "search: no/such/folder: No such file or directory"),
])
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from moonbase.agents.tools.mcp_server import main

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp.client.client", None)
    monkeypatch.setitem(sys.modules, "mcp.server.lowlevel.server", None)
    attempts: list[Callable[[], Any]] = [
        lambda: run(mcp_tools({"mcpServers": {}})), lambda: make_server(Toolset(), "x")]
    for attempt in attempts:
        with pytest.raises(UserError, match=re.escape("pip install 'moonbase[agents]'")):
            attempt()
