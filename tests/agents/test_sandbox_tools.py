"""The tools `python` and `shell`, called as a model calls them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from moonbase.agents.tools.python import python_tools
from moonbase.agents.tools.sandbox import Sandbox, SandboxLimits, find_bubblewrap
from moonbase.agents.tools.shell import shell_tools
from moonbase.agents.tools.tool import ToolContext, ToolResult

BUBBLEWRAP, WHY_NOT = find_bubblewrap()
LIMITS = SandboxLimits(wall_seconds=60.0, cpu_seconds=30.0, memory_bytes=300 << 20, processes=60, output_bytes=1 << 20,
                       disk_free_bytes=1 << 20)
Say = Callable[..., Awaitable[ToolResult]]


@pytest.fixture(params=[
    pytest.param("bubblewrap", marks=pytest.mark.skipif(BUBBLEWRAP is None, reason=WHY_NOT)),
    pytest.param("processes", marks=[pytest.mark.slow] if BUBBLEWRAP else [])])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path, LIMITS, bubblewrap=BUBBLEWRAP if request.param == "bubblewrap" else None)


NEW = "[Nothing from before is defined: this is a new interpreter.]\n"


def talk(box: Sandbox, conversation: Callable[[Say], Awaitable[None]], most: int = 32) -> None:
    """Hold a conversation with the tools, which are closed afterwards with all that they started.

    What every first answer begins with is taken off: `test_a_first_call_is_told_that_nothing_is_defined` looks at it.
    """
    async def whole() -> None:
        async with python_tools(box, most) + shell_tools(box) as tools:
            async def say(code: str, agent: str = "main", name: str = "python", left: float | None = None):
                arguments = json.dumps({"command" if name == "shell" else "code": code})
                result = await tools.call(name, arguments, ToolContext(agent, 1, "call", left))
                return dataclasses.replace(result, content=result.content.removeprefix(NEW))

            await conversation(say)
        assert not box.running

    asyncio.run(asyncio.wait_for(whole(), 240))


def test_state_stays_and_the_last_value_shows(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        assert (await say("import math\nx = 20\ndef double(y):\n    return 2 * y")).content == "[no output]"
        assert (await say("print('a'); double(x) + 2")).content == "a\n42"
        assert (await say("_ + 1")).content == "43"
        assert (await say("None")).content == "[no output]"
        assert (await say("__name__, 'ä€😀\\ud800'")).content == "('__main__', 'ä€😀\\ud800')"
        assert (await say("import os; os.system('echo from a child'); print('after')")).content == "from a child\nafter"
        assert (await say("open('made', 'w').write('here')")).content == "4"
        assert (box.folder / "made").read_text() == "here"
        (box.folder / "mine.py").write_text("value = 7")
        assert (await say("import mine; mine.value")).content == "7"

    talk(box, conversation)


def test_a_first_call_is_told_that_nothing_is_defined(box: Sandbox) -> None:
    """After a resume the tool is a new one and its agent is not: what it defined before is gone, and it hears so."""
    async def life(code: str, agent: str = "main") -> list[str]:
        async with python_tools(box) as tools:
            return [(await tools.call("python", json.dumps({"code": one}), ToolContext(agent, 7, "call"))).content
                    for one in (code, "x")]

    assert asyncio.run(life("x = 1")) == [f"{NEW}[no output]", "1"]
    again = asyncio.run(life("x"))
    assert again[0].startswith(NEW) and again[0].endswith("NameError: name 'x' is not defined")
    assert not again[1].startswith(NEW)


def test_outputs_that_the_code_closed_and_a_channel_that_it_wrote_on(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        closed = await say("import sys; sys.stdout.close()")
        assert closed.error and closed.content.startswith("[the output is lost: ValueError: ")
        assert not (await say("sys.stdout = sys.__stdout__ = open(1, 'w', closefd=False); print('back')")).error
        forged = await say("import os, socket\nfor number in range(3, 64):\n  try: socket.socket(fileno=number).send("
                           "b'{\"number\": 99, \"error\": false}\\n')\n  except OSError: pass")
        assert forged.error and "begins a new one" in forged.content
        assert (await say("40 + 2")).content == "42"

    talk(box, conversation)


def test_what_goes_wrong_in_code_is_shown_and_state_stays(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        await say("x = 1")
        wrong = await say("def f():\n    return 1 / 0\nf()")
        assert wrong.error and wrong.content.splitlines()[0] == "Traceback (most recent call last):"
        assert wrong.content.splitlines()[-1] == "ZeroDivisionError: division by zero"
        assert "return 1 / 0" in wrong.content and "execute" not in wrong.content
        assert "SyntaxError" in (await say("x = = 2")).content
        assert (await say("input()")).content.splitlines()[-1].startswith("EOFError")
        assert (await say("raise SystemExit(3)")).content == "SystemExit: 3"
        assert "RecursionError" in (await say("def g(): g()\ng()")).content
        assert "MemoryError" in (await say("y = bytearray(400 << 20)")).content
        assert (await say("class Odd:\n  def __repr__(self): raise ValueError('odd')\nOdd()")).error
        assert (await say("\ud800")).error
        assert (await say("x")).content == "1"

    talk(box, conversation)


@pytest.mark.parametrize(("code", "said"), [
    ("import time; print('begun'); time.sleep(60)", "begun\n[stopped: it took more than 4 seconds]"),
    pytest.param("while True: pass", "[stopped: it took more than 0.5 seconds]", marks=pytest.mark.slow),
    ("import os; print('begun'); os._exit(7)", "begun\n[exit status 7]"),
    ("while True: print('x' * 1000)", "[stopped: it wrote more than 1 MiB of output]"),
    pytest.param("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "[exit status 137: SIGKILL]",
                 marks=pytest.mark.slow),
    ("import ctypes; ctypes.string_at(0)", "[exit status 139: SIGSEGV]"),
    ("import os\nfor number in range(3, 99):\n  try: os.close(number)\n  except OSError: pass", "[exit status"),
])
def test_the_end_of_an_interpreter_is_said_and_another_begins(code: str, said: str, box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        await say("x = 1")
        seconds = re.search(r"took more than ([\d.]+)", said)
        ended = await say(code, left=float(seconds[1]) if seconds else 60)
        if "took" in said:
            # The toolset has the same limit for the whole call and may be first to say so.
            assert ended.error and (said in ended.content or "did not answer within" in ended.content)
        else:
            assert ended.error and said in ended.content and "begins a new one" in ended.content
        after = await say("'x' in dir()")
        assert after.content.splitlines()[-1] == "False" and not after.error

    talk(box, conversation)


def test_a_time_limit_of_its_own(box: Sandbox) -> None:
    box.limits = SandboxLimits(wall_seconds=4)  # for an interpreter to begin and speak on any machine

    async def conversation(say: Say) -> None:
        await say("x = 1")
        ended = await say("import time; print('begun'); time.sleep(60)")
        assert ended.content.startswith("begun\n[stopped: it took more than 4 seconds]\n[The interpreter has ended")
        assert (await say("'x' in dir()")).content == "False"

    talk(box, conversation)


def test_cpu_seconds_are_counted_by_call(box: Sandbox) -> None:
    box.limits = SandboxLimits(wall_seconds=60.0, cpu_seconds=1.5)

    async def conversation(say: Say) -> None:
        for _ in range(4):
            assert not (await say("import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass")
                        ).error
        assert "more than 1.5 CPU seconds" in (await say("while True: pass")).content

    talk(box, conversation)


def test_death_between_calls_is_said(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        await say("import os, threading, time\ndef end():\n  while not os.path.exists('end'): time.sleep(0.01)\n"
                  "  os._exit(5)\nthreading.Thread(target=end).start()")
        (interpreter,) = box.running
        (box.folder / "end").touch()
        await interpreter.wait()
        after = await say("1 + 1")
        assert after.content.startswith("[Nothing from before is defined: ") and "[exit status 5]" in after.content
        assert after.content.endswith("\n2")
        assert (await say("1 + 1")).content == "2"

    talk(box, conversation)


def test_cancelled_calls_leave_nothing(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        task = asyncio.create_task(say("import time; open('begun', 'w'); time.sleep(60)"))
        while not (box.folder / "begun").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not box.running
        assert "cancelled" in (await say("1")).content

    talk(box, conversation)


def test_a_fork_that_comes_back(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        found = await say("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('parent' if pid else 'child')")
        assert sorted(found.content.split()) == ["child", "parent"]
        assert (await say("2")).content == "2"
        found = await say("import multiprocessing\nwith multiprocessing.get_context('fork').Pool(2) as pool:\n"
                          "    print(pool.map(abs, [-1, -2]))")
        assert found.content == "[1, 2]"

    talk(box, conversation)


def test_agents_do_not_share_and_do_not_wait_for_each_other(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        agents = [f"main/1.{number}" for number in range(8)]
        meet = "import os, time\nopen('here{}', 'w').close()\nwhile len(os.listdir()) < 8: time.sleep(0.05)\nx = {!r}"
        met = await asyncio.gather(*(say(meet.format(number, agent), agent) for number, agent in enumerate(agents)))
        assert not any(result.error for result in met)
        found = await asyncio.gather(*(say("x", agent) for agent in agents))
        assert [result.content for result in found] == [repr(agent) for agent in agents]
        # Two calls of one agent, one after the other.
        found = await asyncio.gather(*(say("n = globals().get('n', 0) + 1; time.sleep(0.05); n", agents[0])
                                       for _ in range(4)))
        assert [result.content for result in found] == ["1", "2", "3", "4"]

    talk(box, conversation)


def test_more_agents_than_interpreters(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        agents = [str(number) for number in range(6)]
        found = await asyncio.gather(*(say(f"import time; time.sleep(0.1); x = {agent}; x", agent) for agent in agents))
        assert [result.content for result in found] == agents
        assert len(box.running) == 2
        await say("x = 5", "5")
        lost = await say("'x' in dir()", "0")
        assert "make room" in lost.content and lost.content.endswith("False")
        # The one used last is still there.
        assert (await say("x", "5")).content == "5"

    talk(box, conversation, most=2)


def test_shell(box: Sandbox) -> None:
    async def conversation(say: Say) -> None:
        assert (await say("echo hier > f; cat f; pwd >/dev/null", name="shell")).content == "hier"
        wrong = await say("ls nothing-here", name="shell")
        assert wrong.error and "nothing-here" in wrong.content and "[exit status 2]" in wrong.content
        assert (await say("true", name="shell")).content == "[no output]"
        assert "command line takes 131,071" in (await say("#" + "ä" * 70_000, name="shell")).content
        assert (await say(f"echo {'€' * 40_000} | wc -c", name="shell")).content == "120001"
        assert "NUL" in (await say("echo \0", name="shell")).content
        assert "surrogate" in (await say("echo \ud800", name="shell")).content
        assert (await say("cat", name="shell")).content == "[no output]"
        long = await say("seq 100000", name="shell")
        assert long.content.startswith("1\n2\n3\n") and long.content.endswith("\n99999\n100000")
        assert long.content.count("left out") == 1

    talk(box, conversation)


def test_descriptors(box: Sandbox) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def conversation(say: Say) -> None:
        for code in ("1", "import os; os._exit(1)", "2"):
            await say(code)

    talk(box, conversation)
    assert len(os.listdir("/proc/self/fd")) == before
