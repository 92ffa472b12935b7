"""The tool `python`: each agent has an interpreter of its own in the sandbox, which keeps its state between calls."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonbase.agents.tools.sandbox import QUEUE_SECONDS, Running, Sandbox
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset, tool

_log = logging.getLogger(__name__)
INTERPRETER = Path(__file__).with_name("python_interpreter.py")


@dataclass
class _Session:
    """An agent's interpreter."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    running: Running | None = None
    calls: int = 0
    lost: str = "this is a new interpreter"
    """Why nothing is defined, where the agent was not told yet. Even the first call is told: what is done again after a
    resume, or in a server that was started again, is a first call here and a later one for its agent."""

    async def end(self, why: str = "") -> None:
        """Without an interpreter from now on."""
        running, self.running, self.lost = self.running, None, why
        if running is not None:
            await running.close()


class PythonSessions:
    """The interpreters of all agents. `most`: alive at a time. Beyond, the one unused for longest is ended, and where
    all are busy a call waits."""

    def __init__(self, sandbox: Sandbox, most: int = 32) -> None:
        self.sandbox, self.most = sandbox, most
        self._sessions: dict[str, _Session] = {}
        self._freed = asyncio.Event()

    async def execute(self, agent: str, code: str, seconds: float | None = None) -> ToolResult:
        """Run code in an agent's interpreter. Its own calls wait for one another, those of others do not.

        Time-out, a passed limit, a crash or cancellation ends the interpreter: this answer or the next one says so.
        """
        session = self._sessions.setdefault(agent, _Session())
        try:
            async with session.lock:
                # Kept in the order of use.
                self._sessions[agent] = self._sessions.pop(agent, session)
                running = await self._interpreter(session)
                lost, session.lost = session.lost, ""
                try:
                    result = await self._call(session, running, code, seconds)
                except asyncio.CancelledError:
                    await session.end("the last call was cancelled")
                    raise
        finally:
            self._freed.set()
        if lost:
            result = ToolResult(f"[Nothing from before is defined: {lost}.]\n{result.content}", result.error)
        return result

    async def close(self) -> None:
        """End every interpreter."""
        sessions, self._sessions = list(self._sessions.values()), {}
        await asyncio.gather(*(session.end() for session in sessions))

    async def __aenter__(self) -> PythonSessions:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _interpreter(self, session: _Session) -> Running:
        """The session's own; a new one if it has none or it has died."""
        if session.running is not None:
            if not session.running.ended.done() and session.running.limit is None:
                return session.running
            await session.running.wait()
            died = session.running.result().text().splitlines()[-1]
            await session.end(f"the interpreter ended after the last call {died}")
        while True:
            alive = [one for one in self._sessions.values() if one.running is not None]
            if len(alive) < self.most:
                break
            idle = next((one for one in alive if not one.lock.locked()), None)
            if idle is not None:
                await idle.end("the interpreter was ended to make room for those of other agents")
            else:
                self._freed.clear()
                await self._freed.wait()
        session.running = self.sandbox.start(
            [sys.executable, "-I", "-u", "-c", INTERPRETER.read_text(encoding="utf-8")], channel=True,
            each_process=False)
        return session.running

    async def _call(self, session: _Session, running: Running, code: str, seconds: float | None) -> ToolResult:
        session.calls += 1
        wall_seconds = min(seconds or float("inf"), self.sandbox.limits.wall_seconds)
        running.limits = dataclasses.replace(running.limits, wall_seconds=wall_seconds)
        # What threads of earlier calls wrote comes with this one's output, but is not on its account.
        running.read_output()
        running.begin_account()
        exchange = asyncio.create_task(_exchange(running, session.calls, code))
        try:
            async with asyncio.timeout(wall_seconds):
                await asyncio.wait([exchange, running.ended], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            running.stop("wall_seconds")
        finally:
            exchange.cancel()
            # Before anybody closes the channel under it.
            await asyncio.wait([exchange])
        # Whatever was written before the answer is in the pipe by now.
        running.read_output()
        if running.limit is None and not exchange.cancelled() and (answer := exchange.result()) is not None:
            lines = [running.capture.take().rstrip("\n"), str(answer.get("trouble", ""))[:500]]
            return ToolResult("\n".join(line for line in lines if line) or "[no output]", bool(answer["error"]))
        # Not ended from here at once: how it ended by itself is to be known.
        await asyncio.wait([running.ended], timeout=10.0)
        await session.end()
        end = "[The interpreter has ended: the next call begins a new one, with nothing defined.]"
        return ToolResult(f"{running.result().text()}\n{end}", error=True)


async def _exchange(running: Running, number: int, code: str) -> dict[str, Any] | None:
    """Send code and wait for its end: the interpreter's answer. None if it is gone or answers nonsense."""
    loop, channel, answers = asyncio.get_running_loop(), running.channel, b""
    try:
        await loop.sock_sendall(channel, json.dumps({"number": number, "code": code}).encode() + b"\n")
        while b"\n" not in answers and len(answers) < 4096:
            content = await loop.sock_recv(channel, 4096)
            if not content:
                return None
            answers += content
        answer = json.loads(answers.partition(b"\n")[0])
        if answer["number"] == number:
            return answer
        trouble = f"an answer to call {answer['number']}"
    except OSError as error:
        trouble = str(error)  # it has ended, or the code closed the channel
    except (ValueError, TypeError, KeyError):
        trouble = f"{answers[:100]!r}, which the code must have written"
    _log.info("call %d of an interpreter ends it: on its channel came %s", number, trouble)
    running.stop()
    return None


def python_tools(sandbox: Sandbox, most: int = 32) -> Toolset:
    """The tool `python`, whose interpreters live as long as the toolset is open."""
    sessions = PythonSessions(sandbox, most)

    @tool(timeout=QUEUE_SECONDS)
    async def python(code: str, context: ToolContext) -> ToolResult:
        """Run Python code. Variables, imports and functions stay defined for your next calls, as in a notebook; what is
        printed and the value of a last expression are shown. Files are read and written relative to the work folder.
        There is no network.

        Args:
            code: The code; any number of lines.
        """
        return await sessions.execute(context.agent, code, context.seconds_left)

    return Toolset([python], resources=[sessions, sandbox])
