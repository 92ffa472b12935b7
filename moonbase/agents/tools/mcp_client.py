"""Tools of MCP servers (Model Context Protocol, modelcontextprotocol.io) as tools of ours.

The connection to a server, from the start of its program to the end, lives in one task of its own: what is opened there
must be closed by the same task. Calls come from whichever task an agent runs in. A server that ends is started once
more, and again after every call that it answered; the call in which it ended is not repeated, because nobody knows what
it has done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from moonbase.agents.tools.mcp_config import Config, ServerConfig, read_config
from moonbase.agents.tools.mcp_translation import content_text, tool_names, usable_schema
from moonbase.agents.tools.sandbox import MARK, kill_marked
from moonbase.agents.tools.tool import Tool, ToolContext, ToolResult, Toolset
from moonbase.errors import UserError

START_SECONDS = 120.0
MOST_TOOLS = 1000
MOST_PAGES = 100
MOST_GARBAGE = 1000
"""Lines on a server's standard output that are no messages, before it is given up."""
LAST_WORDS_BYTES = 4096
INSTALL = "pip install 'moonbase[agents]'"


async def mcp_tools(config: Config, *, start_seconds: float = START_SECONDS, timeout: float = 120.0) -> Toolset:
    """Start the servers of a configuration (see `mcp_config`), all at once, and return their tools as `server__tool`.

    `start_seconds`: for each server to start and list its tools; `timeout`: for a call. The servers run until the
    toolset is closed (`async with`), at the latest until the event loop ends. Raises UserError, with nothing left
    running, if the configuration is wrong or a server does not start.
    """
    configs = read_config(config)
    _require_mcp()
    servers = Servers([Server(one, start_seconds) for one in configs])
    try:
        failures = [failure for server in servers.servers if (failure := await server.started())]
        if failures:
            raise UserError("; ".join(failures))
        return Toolset(servers.tools(), timeout=timeout, resources=[servers])
    except BaseException:
        await servers.close()
        raise


def _require_mcp() -> None:
    try:
        import mcp.client.client  # noqa: F401
    except ImportError:
        raise UserError(f"MCP servers need the package mcp, version 2 or newer: {INSTALL}") from None
    # It logs every strange line that a server writes, with a traceback. Who wants that configures logging.
    for name in ("mcp", "client"):
        if not logging.getLogger(name).handlers:
            logging.getLogger(name).addHandler(logging.NullHandler())


class Servers:
    """The servers of one toolset: its resource."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers

    def tools(self) -> list[Tool]:
        """Of all servers; call it when they have started."""
        offers = [(server, offer) for server in self.servers for offer in server.session.offers]
        names = tool_names((server.config.name, offer.name) for server, offer in offers)
        return [server.tool(name, offer) for name, (server, offer) in zip(names, offers, strict=True)]

    async def close(self) -> None:
        """End them all. Cancelled, it ends them first."""
        for server in self.servers:
            server.end()
        await _wait_for([task for server in self.servers for session in server.sessions
                         for task in (session.task, *session.calls)])

    async def __aenter__(self) -> Servers:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _wait_for(tasks: list[asyncio.Task[Any]]) -> None:
    """Until all are done, whatever happens to the caller meanwhile. Each must end by itself soon."""
    cancelled = None
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class Server:
    """One server: the session of now, and those that are still ending."""

    def __init__(self, config: ServerConfig, start_seconds: float) -> None:
        self.config, self.start_seconds = config, start_seconds
        self.session = Session(config, start_seconds)
        self.sessions = [self.session]
        self.may_restart, self.ended = True, False

    async def started(self) -> str | None:
        """Wait until it has started; what went wrong, if so."""
        await self.session.settled.wait()
        return self.session.failure

    def end(self) -> None:
        """Let every session end; their tasks tell when they have."""
        self.ended = True
        for session in self.sessions:
            session.end()

    def tool(self, name: str, offer: Any) -> Tool:
        """`offer`: as the server lists it."""
        schema, note = usable_schema(offer.input_schema)
        description = offer.description or getattr(offer, "title", None) or ""

        async def call(arguments: dict[str, Any], context: ToolContext) -> ToolResult:
            return await self.call(offer.name, arguments)

        return Tool(name, f"{description}\n{note}".strip(), schema, call)

    async def call(self, tool: str, arguments: dict[str, Any]) -> ToolResult:
        """Answer a call; whatever goes wrong is in the result."""
        if self.session.lost and not self._restart():
            return self._error(f"is gone{self.session.last_words()} and not started again: do without it.")
        session = self.session
        await session.settled.wait()
        if session.failure:
            return ToolResult(f"Error: {session.failure}", error=True)
        try:
            result = await session.call(tool, arguments)
        except Exception as error:
            error = first_error(error)
            if not (session.lost or _is_loss(error)):
                return self._error(f"refused the call or answered wrongly: {_words_of(error)}")
            session.end()
            again = "" if self.session is not session or self._restart() else "not "
            return self._error(f"ended during the call{session.last_words()}. The call may have had its effect. "
                               f"The server is {again}started again.")
        self.may_restart = True
        text = content_text(result)
        return ToolResult(self.config.hide(text) if result.is_error else text, error=bool(result.is_error))

    def _restart(self) -> bool:
        # To ask at an address again costs nothing; a program that ends in every call is not worth its start.
        if self.ended or not (self.may_restart or self.config.url):
            return False
        self.may_restart = False
        self.session.end()
        self.session = Session(self.config, self.start_seconds)
        self.sessions = [*(session for session in self.sessions if not session.task.done()), self.session]
        return True

    def _error(self, what: str) -> ToolResult:
        return ToolResult(self.config.hide(f"Error: the MCP server {self.config.name} {what}"), error=True)


class Session:
    """One life of a server, in one task. `settled` is set when it has started or failed to."""

    def __init__(self, config: ServerConfig, start_seconds: float) -> None:
        import anyio

        self.config, self.start_seconds = config, start_seconds
        self.settled = asyncio.Event()
        self.failure: str | None = None
        self.client: Any = None
        self.offers: list[Any] = []
        self.calls: set[asyncio.Task[Any]] = set()
        self.lost = self._ending = False
        self._garbage, self._status, self._standard_error = 0, "", None
        self._scope = anyio.CancelScope(deadline=anyio.current_time() + start_seconds)
        self.task = asyncio.create_task(self._live(), name=f"MCP server {config.name}")

    def end(self) -> None:
        """Let it end, and what it started with it: politely, then by force, within some seconds."""
        self.lost = self._ending = True
        self._scope.cancel()

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The server's result. Cancelled, it tells the server so, without waiting until that is through."""
        call = asyncio.create_task(self.client.call_tool(tool, arguments))
        self.calls.add(call)
        call.add_done_callback(self.calls.discard)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            call.cancel()
            raise

    def last_words(self) -> str:
        """` (the last line that it wrote to its standard error)`, if any."""
        line = self._standard_error.last_line() if self._standard_error else ""
        return f" ({line})" if line else ""

    async def _live(self) -> None:
        trouble = "ended before it had answered"
        try:
            with self._scope:
                await self._converse_in_any_version()
            if self._scope.cancelled_caught and not self._ending:
                trouble = f"did not answer within {self.start_seconds:g} seconds"
        except Exception as error:
            error = first_error(error)
            if not _is_loss(error):
                trouble = _words_of(error)
        finally:
            self.lost = True
            if not self.settled.is_set():
                self.failure = self.config.hide(self._failure(trouble))
                self.settled.set()

    def _failure(self, trouble: str) -> str:
        said = self._standard_error.last_line() if self._standard_error else self._status
        garbage = f"; {self._garbage} lines of its standard output are no messages" if self._garbage else ""
        return (f"MCP server {self.config.name!r} did not start ({self.config.place}): {trouble}"
                f"{f': {said}' if said else ''}{garbage}")

    async def _converse_in_any_version(self) -> None:
        from mcp.shared.exceptions import MCPError

        try:
            # Today's servers know the handshake. One that knows the later protocol alone refuses, and is asked in that.
            await self._converse("legacy")
        except Exception as error:
            refusal = first_error(error)
            if self.settled.is_set() or not isinstance(refusal, MCPError) or _is_loss(refusal):
                raise
            try:
                await self._converse("auto")
            except Exception as later:
                raise (refusal if _is_loss(first_error(later)) else later) from None

    async def _converse(self, mode: str) -> None:
        """From the start to the end."""
        from mcp.client.client import Client

        gone = asyncio.Event()
        async with Client(self._transport(gone), mode=mode, cache=None) as client:
            self.offers = await _list(client)
            self.client = client
            self._scope.deadline = float("inf")
            self.settled.set()
            await gone.wait()
            self.lost = True

    @contextlib.asynccontextmanager
    async def _transport(self, gone: asyncio.Event) -> AsyncIterator[tuple[Any, Any]]:
        config = self.config
        if config.command is not None:
            from mcp.client.stdio import StdioServerParameters, stdio_client

            mark = secrets.token_hex(8)
            parameters = StdioServerParameters(command=config.command, args=list(config.args), cwd=config.cwd,
                                               env={**(config.env or {}), MARK: mark}, encoding_error_handler="replace")
            with contextlib.ExitStack() as stack:
                # What the server has started and left behind.
                stack.callback(kill_marked, mark)
                self._standard_error = stack.enter_context(contextlib.closing(StandardError()))
                async with stdio_client(parameters, errlog=self._standard_error.file) as (read, write):
                    yield _Watched(read, gone, self.note_garbage), write
        else:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            # As long as a call may take: the toolset has its own, shorter limit.
            timeout = httpx2.Timeout(self.start_seconds, read=None)
            async with (
                httpx2.AsyncClient(headers=dict(config.headers or {}), timeout=timeout,
                                   event_hooks={"response": [self._note_status]}) as http,
                streamable_http_client(config.url, http_client=http) as (read, write),
            ):
                yield _Watched(read, gone, self.note_garbage), write

    async def _note_status(self, response: Any) -> None:
        self._status = f"HTTP {response.status_code} {response.reason_phrase}" if response.status_code >= 400 else ""

    def note_garbage(self) -> bool:
        """Of a line that is no message. False if that was one too many."""
        self._garbage += 1
        return self._garbage < MOST_GARBAGE


class _Watched:
    """A stream of messages that tells of garbage and of its end."""

    def __init__(self, stream: Any, gone: asyncio.Event, note_garbage: Callable[[], bool]) -> None:
        self._stream, self._gone, self._note_garbage = stream, gone, note_garbage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            item = await self._stream.__anext__()
            if not isinstance(item, Exception) or self._note_garbage():
                return item
        except StopAsyncIteration:
            pass  # The end of the stream, which is told below like that of a stream of garbage.
        self._gone.set()
        raise StopAsyncIteration

    async def __aenter__(self) -> _Watched:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._stream.__aexit__(*error)


class StandardError:
    """The end of what a program writes to its standard error, which is `file`; the rest is read and forgotten."""

    def __init__(self) -> None:
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        self.file = os.fdopen(writing, "w")
        self._kept = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._reading, self._read)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._kept = (self._kept + os.read(self._reading, 1 << 16))[-LAST_WORDS_BYTES:]

    def last_line(self) -> str:
        """What stands in the last line that is not empty."""
        if not self.file.closed:
            self._read()
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]

    def close(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._reading)
        self._read()
        self.file.close()
        os.close(self._reading)


async def _list(client: Any) -> list[Any]:
    """What the server offers, each name once. Raises UserError if it is too much, MCPError."""
    from mcp.shared.exceptions import MCPError
    from mcp_types import METHOD_NOT_FOUND

    offers: dict[str, Any] = {}
    cursor = None
    for _ in range(MOST_PAGES):
        try:
            page = await client.list_tools(cursor=cursor)
        except MCPError as error:
            if error.code != METHOD_NOT_FOUND:
                raise
            return []  # it has resources or prompts, and no tools
        for offer in page.tools:
            offers.setdefault(offer.name, offer)
        cursor = page.next_cursor
        if len(offers) > MOST_TOOLS:
            break
        if not cursor:
            return list(offers.values())
    raise UserError(f"lists more than {MOST_TOOLS} tools, or goes on listing after {MOST_PAGES} pages")


def first_error(error: BaseException) -> BaseException:
    """The first error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _is_loss(error: BaseException) -> bool:
    """Whether there is nobody at the other end any more, or nobody who knows us."""
    from mcp.shared.exceptions import MCPError
    from mcp_types import CONNECTION_CLOSED, INVALID_REQUEST

    if not isinstance(error, MCPError):
        return False
    # Servers use the number of CONNECTION_CLOSED for errors of their own; the words are the library's.
    return (error.code == CONNECTION_CLOSED and error.message.startswith(("Connection closed", "SSE stream"))) or (
        error.code == INVALID_REQUEST and error.message == "Session terminated")


def _words_of(error: BaseException) -> str:
    """One line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such command"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    first = next(iter(str(error).strip().splitlines()), "")
    known = isinstance(error, UserError) or type(error).__name__ == "MCPError"
    return (first if known and first else f"{type(error).__name__}{f': {first}' if first else ''}")[:500]
