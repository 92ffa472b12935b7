"""Any toolset of ours as an MCP server, for whichever client speaks the Model Context Protocol.

    python -m moonbase.agents.tools.mcp_server --search docs --files work
    python -m moonbase.agents.tools.mcp_server my_tools:toolset --transport http --port 8000

Over stdio a client starts this program and owns it. Over streamable HTTP there is one address for all clients, each
with a session of its own. Whoever reaches it can call the tools, so anything but this machine's own addresses needs a
token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import importlib
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import moonbase
from moonbase.agents.tools.tool import ToolContext, Toolset
from moonbase.errors import UserError

PATH = "/mcp"
TOKEN_VARIABLE = "MOONBASE_MCP_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
INSTALL = "pip install 'moonbase[agents]'"
INTERRUPTED = 130
_CLOSING_SECONDS = 10.0


async def serve_tools(
    toolset: Toolset, name: str = "moonbase", transport: str = "stdio", *, host: str = "127.0.0.1", port: int = 8000,
    token: str | None = None, ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until the client leaves (`stdio`) or the process is told to end (`http`); the toolset is open meanwhile.

    `port`: 0 takes a free one; `ready` is told the address; `token`: what clients must send as bearer token. Raises
    UserError if the package is missing, the transport unknown, the address taken or open to others without a token.
    """
    if transport not in ("stdio", "http"):
        raise UserError(f"MCP server: the transport {transport!r} is not known: stdio or http")
    server = make_server(toolset, name)
    if transport == "http":
        await _serve_http(server, toolset, host, port, token, ready)
        return
    from mcp.server.stdio import stdio_server

    async with stdio_server() as (read, write), toolset:
        await server.run(read, write, server.create_initialization_options())


def make_server(toolset: Toolset, name: str) -> Any:
    """A `mcp.server.lowlevel.Server` that lists and calls the tools. Raises UserError if the package is missing."""
    try:
        from mcp.server.lowlevel.server import Server
        from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool
    except ImportError:
        raise UserError(f"an MCP server needs the package mcp, version 2 or newer: {INSTALL}") from None
    tools = [Tool(name=one.name, description=one.description, input_schema=one.parameters)
             for one in toolset.tools.values()]
    numbers = itertools.count(1)

    async def list_tools(context: Any, parameters: Any) -> Any:
        return ListToolsResult(tools=tools)

    async def call_tool(context: Any, parameters: Any) -> Any:
        number = next(numbers)
        agent = _agent_of(context.request, number)
        result = await toolset.call(parameters.name, json.dumps(parameters.arguments or {}),
                                    ToolContext(agent, number, f"{agent}#{number}"))
        # Half of a surrogate pair, which JSON of a model can hold, would end the connection.
        text = result.content.encode(errors="replace").decode()
        return CallToolResult(content=[TextContent(text=text)], is_error=result.error)

    return Server(name, version=moonbase.__version__, on_list_tools=list_tools, on_call_tool=call_tool)


def _agent_of(request: Any, number: int) -> str:
    """Who calls: what one client defines in `python` is no other's. `request`: the HTTP request; None over stdio, where
    there is one client."""
    if request is None:
        return "mcp"
    # The later protocol (2026-07-28) knows no sessions, and whoever speaks it cannot be told from others: a connection
    # may carry the calls of several clients, and those of one client come over several. So each call stands alone.
    return f"mcp {request.headers.get('mcp-session-id', f'call {number}')}"


def _prefer_sessions(server: Any) -> None:
    """Answer a client that asks which versions are spoken here with those that know sessions, so that it opens one."""
    from mcp_types import DiscoverResult, RequestParams
    from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

    async def discover(context: Any, parameters: Any) -> Any:
        return DiscoverResult(supported_versions=list(HANDSHAKE_PROTOCOL_VERSIONS),
                              capabilities=server.get_capabilities(protocol_version=context.protocol_version))

    server.add_request_handler("server/discover", RequestParams, discover)


async def _serve_http(
    server: Any, toolset: Toolset, host: str, port: int, token: str | None, ready: Callable[[str], None] | None
) -> None:
    import uvicorn

    if host not in LOOPBACK and not token:
        raise UserError(f"MCP server: others than this machine reach {host}, and could call the tools: set "
                        f"{TOKEN_VARIABLE} to a secret that clients must send as bearer token")
    _prefer_sessions(server)
    app = server.streamable_http_app(streamable_http_path=PATH, host=host)
    if token:
        app = _with_token(app, token)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"MCP server: cannot listen on {host} port {port}: {error.strerror}") from None
    shown = f"[{host}]" if ":" in host else host
    with listening:
        async with toolset:
            if ready is not None:
                ready(f"http://{shown}:{listening.getsockname()[1]}{PATH}")
            settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
            await uvicorn.Server(settings).serve(sockets=[listening])


def _with_token(app: Any, token: str) -> Any:
    """The application for those alone who know the token."""
    wanted = f"Bearer {token}".encode()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, wanted):
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b"a bearer token is needed\n"})

    return guarded


def _collect(arguments: argparse.Namespace) -> Toolset:
    """The toolset that the command line asks for. Raises UserError."""
    toolset = Toolset()
    for place in arguments.toolset:
        toolset += _load(place)
    if arguments.search:
        from moonbase.agents.tools.search import search_tools

        toolset += search_tools(arguments.search)
    if arguments.files:
        from moonbase.agents.tools.files import file_tools

        toolset += file_tools(arguments.files)
    if arguments.sandbox:
        from moonbase.agents.tools.python import python_tools
        from moonbase.agents.tools.sandbox import make_sandbox
        from moonbase.agents.tools.shell import shell_tools

        sandbox = make_sandbox(arguments.sandbox, allow_unsafe=arguments.allow_unsafe)
        toolset = toolset + python_tools(sandbox) + shell_tools(sandbox)
    if not toolset.tools:
        raise UserError("MCP server: no tools: name a toolset (module:name) or give --search, --files or --sandbox")
    return toolset


def _load(place: str) -> Toolset:
    """`module:name`: a Toolset, a Tool, or a function that returns one. Raises UserError."""
    module, _, name = place.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"MCP server: {place}: {error}; expected module:name") from None
    finally:
        sys.path.remove("")
    from moonbase.agents.tools.tool import Tool

    if callable(found) and not isinstance(found, (Tool, Toolset)):
        found = found()
    if isinstance(found, Tool):
        found = Toolset([found])
    if not isinstance(found, Toolset):
        raise UserError(f"MCP server: {place} is a {type(found).__name__}, not a Toolset")
    return found


class _Open:
    """A resource that tells whether the toolset that it is the first of is open."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.closed.set()

    async def __aenter__(self) -> None:
        self.closed.clear()

    async def __aexit__(self, *error: Any) -> None:
        self.closed.set()


async def _serve_until_told(toolset: Toolset, name: str) -> None:
    """Over stdio, until the client leaves or the process is told to end; the latter ends it here."""
    loop, told, state = asyncio.get_running_loop(), asyncio.Event(), _Open()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    task = asyncio.create_task(serve_tools(Toolset(resources=[state]) + toolset, name))
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.closed.wait(), _CLOSING_SECONDS)
        # A thread still waits for the client's next line, which nothing can interrupt.
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    await task


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moonbase.agents.tools.mcp_server", description=(
        "Serve tools to any client that speaks the Model Context Protocol."))
    parser.add_argument("toolset", nargs="*", help="module:name of a Toolset, a Tool, or a function that returns one")
    parser.add_argument("--search", metavar="PATH", help="search and open over a folder, a file or a JSONL")
    parser.add_argument("--files", metavar="FOLDER", help="read, write, edit and list files of this folder alone")
    parser.add_argument("--sandbox", metavar="FOLDER", help="python and shell in a sandbox that sees this folder")
    parser.add_argument("--allow-unsafe", action="store_true",
                        help="run commands without bubblewrap too: limits, but no security boundary")
    parser.add_argument("--transport", choices=("stdio", "http"), default="stdio")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", default="moonbase", help="what clients see")
    options = parser.parse_args(arguments)
    try:
        toolset = _collect(options)
        if options.transport == "stdio":
            asyncio.run(_serve_until_told(toolset, options.name))
            return 0
        asyncio.run(serve_tools(
            toolset, options.name, "http", host=options.host, port=options.port,
            token=os.environ.get(TOKEN_VARIABLE) or None,
            ready=lambda address: print(f"MCP server at {address}", file=sys.stderr, flush=True)))
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
