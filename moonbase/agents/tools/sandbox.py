"""Commands that a model wrote, run with limits.

Two ways. In bubblewrap (`sandbox_jail.py`) a command sees a small read-only system, its work folder and nothing else;
that is a boundary as good as the kernel's namespaces. Without it the same limits hold but the command is a process like
any other of the user's: no boundary, and so to be allowed explicitly.

Either way a guard (`sandbox_guard.py`), a small process of its own per command, watches the whole tree and ends it.
What binds at once, by the kernel: memory, CPU seconds and open files of each process, bytes of a file; in bubblewrap,
if the user is not root and Linux is 5.14 or newer, the number of processes. What the guard sees at its next look, 25
times a second: memory, CPU seconds and processes of the whole tree, and a disk that fills; until then a tree may have
more. Wall seconds and the bytes of the output are watched here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from moonbase.agents.tools import sandbox_jail
from moonbase.errors import UserError

_log = logging.getLogger(__name__)
GUARD = Path(__file__).with_name("sandbox_guard.py")
MARK = "MOONBASE_SANDBOX"
QUEUE_SECONDS = 86_400.0
"""What a tool may take with its wait for a turn: its own time is limited by itself."""


@dataclass(frozen=True)
class SandboxLimits:
    """Of one command and all that it starts."""

    wall_seconds: float = 60.0
    cpu_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    """Of the whole tree; one process alone gets no more from the kernel (RLIMIT_DATA) and can tell by the error. In
    bubblewrap /tmp is memory too, as much again at most."""
    processes: int = 256
    """Threads count as well."""
    open_files: int = 256
    """Of one process."""
    file_bytes: int = 256 << 20
    """Of one file."""
    output_bytes: int = 8 << 20
    """More output ends the command."""
    kept_bytes: int = 31_000
    """Of the output: three quarters from its beginning, the rest from its end."""
    disk_free_bytes: int = 1 << 30
    """A command ends when the disk of its work folder has less left (half of it, where it had little to begin with)."""


def _size(count: float) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


@dataclass(frozen=True)
class SandboxResult:
    """How a command ended."""

    status: int | None
    """As a shell has it: 128 + n for signal n. None if it was ended from here."""
    output: str
    """What it wrote to both of its outputs; the middle is left out where that was much."""
    limit: str | None
    """The field of SandboxLimits that ended it; "guard" if it killed its guard."""
    limits: SandboxLimits
    output_bytes: int
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    """The most seen."""
    processes: int = 0

    def text(self) -> str:
        """The output and, if it did not end well, how it ended."""
        limits = self.limits
        reasons = {
            "wall_seconds": f"it took more than {limits.wall_seconds:g} seconds",
            "cpu_seconds": f"it used more than {limits.cpu_seconds:g} CPU seconds",
            "memory_bytes": f"it used more than {_size(limits.memory_bytes)} of memory",
            "processes": f"it had more than {limits.processes} processes and threads",
            "file_bytes": f"it wrote a file of more than {_size(limits.file_bytes)}",
            "output_bytes": f"it wrote more than {_size(limits.output_bytes)} of output",
            "disk_free_bytes": f"the disk has less than {_size(limits.disk_free_bytes)} left",
            "guard": "it interfered with its sandbox",
        }
        ended = None
        if self.limit is not None:
            ended = f"[stopped: {reasons[self.limit]}]"
        elif self.status is None:
            ended = "[stopped]"
        elif self.status != 0:
            ended = f"[exit status {self.status}{_signal_name(self.status)}]"
        parts = [self.output.rstrip("\n"), ended]
        return "\n".join(part for part in parts if part) or "[no output]"


def _signal_name(status: int) -> str:
    try:
        return f": {signal.Signals(status - 128).name}" if status > 128 else ""
    except ValueError:
        return ""


class Capture:
    """The beginning and the end of a stream of bytes."""

    def __init__(self, kept_bytes: int) -> None:
        self._head_bytes, self._tail_bytes = kept_bytes - kept_bytes // 4, kept_bytes // 4
        self._head, self._tail, self.total = bytearray(), bytearray(), 0

    def add(self, content: bytes) -> None:
        """Keep it, or as much of it as there is room for."""
        self.total += len(content)
        room = self._head_bytes - len(self._head)
        self._head += content[:room]
        self._tail += content[room:]
        # Not at once, or every small piece would move the whole tail.
        if len(self._tail) > 2 * self._tail_bytes + 4096:
            del self._tail[: len(self._tail) - self._tail_bytes]

    def take(self) -> str:
        """What is kept, as text (what is not UTF-8 is shown as �), and begin anew."""
        left_out = self.total - len(self._head) - min(len(self._tail), self._tail_bytes)
        head, tail = bytes(self._head), bytes(self._tail[-self._tail_bytes :])
        self._head.clear()
        self._tail.clear()
        self.total = 0
        if left_out <= 0:
            return (head + tail).decode(errors="replace")
        # A character cut in two by leaving out is no bad byte.
        return (f"{_whole(head).decode(errors='replace')}\n[… {left_out:,} bytes left out …]\n"
                f"{tail.lstrip(bytes(range(0x80, 0xC0))).decode(errors='replace')}")


def _whole(text: bytes) -> bytes:
    """Without the first bytes of a character whose rest is missing."""
    for back in range(1, min(4, len(text) + 1)):
        byte = text[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return text[:-back] if length > back else text
        if byte < 0x80:
            break
    return text


class Running:
    """A command under its guard, seen from an event loop."""

    def __init__(self, sandbox: Sandbox, process: subprocess.Popen[bytes], control: int, report: int, output: int,
                 mark: str, limits: SandboxLimits, channel: socket.socket | None) -> None:
        self._sandbox, self._process, self._control, self._mark = sandbox, process, control, mark
        self._report, self._output, self._told = report, output, b""
        self.limits, self.channel, self.limit = limits, channel, None
        self.capture, self.written = Capture(limits.kept_bytes), 0
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        sandbox.running.add(self)
        for descriptor, read in ((report, self._read_report), (output, self.read_output)):
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, read)

    def stop(self, limit: str | None = None) -> None:
        """Have all of it killed; `limit`: why."""
        if self.limit is None and not self.ended.done():
            self.limit = limit
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def begin_account(self) -> None:
        """Count CPU seconds and output anew from here."""
        self.written = 0
        if self._control >= 0:
            try:
                os.write(self._control, b"x")
            except BrokenPipeError:
                pass  # The guard has ended, and all with it: `ended` tells, with the report or the lack of one.

    def read_output(self) -> None:
        """Take what there is, at most a mebibyte."""
        for _ in range(16):
            if self._output < 0:
                return
            try:
                content = os.read(self._output, 65_536)
            except BlockingIOError:
                return
            if not content:
                self._output = self._done_with(self._output)
                return
            self.written += len(content)
            self.capture.add(content)
            if self.written > self.limits.output_bytes and self.limit is None:
                self.stop("output_bytes")
                # The rest of the pipe is read when nobody writes any more.
                self._loop.remove_reader(self._output)
                return

    async def wait(self) -> None:
        """Until everything is gone."""
        await asyncio.wait([self.ended])

    async def close(self) -> None:
        """End it, and wait until everything is gone."""
        self.stop()
        if self.channel is not None:
            self.channel.close()
        await self.wait()

    def result(self) -> SandboxResult:
        """After the end."""
        report = self.ended.result()
        status, limit = report.get("status"), self.limit or report.get("limit")
        if limit is None and not report:
            limit = "guard"
        limit = limit or {128 + signal.SIGXCPU: "cpu_seconds", 128 + signal.SIGXFSZ: "file_bytes"}.get(status)
        return SandboxResult(
            None if limit else status, self.capture.take(), limit, self.limits, self.written,
            report.get("cpu_seconds", 0.0), report.get("memory_bytes", 0), report.get("processes", 0))

    def _read_report(self) -> None:
        content = os.read(self._report, 4096)
        self._told += content
        if content:
            return
        if not self._told:
            # The guard is gone without a word: without bubblewrap a command can do that.
            kill_marked(self._mark)
        self._report = self._done_with(self._report)
        if self._output >= 0:
            self._loop.add_reader(self._output, self.read_output)
            # The end of the output follows at once, unless something outlived its guard.
            self._loop.call_later(1.0, self._give_up)

    def _give_up(self) -> None:
        if self._output >= 0:
            self._output = self._done_with(self._output)

    def _done_with(self, descriptor: int) -> int:
        """Close it; with the last of them all is over."""
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        if {self._report, self._output} <= {-1, descriptor}:
            self._process.wait()
            self.stop()
            report = json.loads(self._told or b"{}")
            if report.get("left"):
                _log.warning("%d processes of a sandbox would not die", report["left"])
            self._sandbox.running.discard(self)
            if not self.ended.done():
                self.ended.set_result(report)
        return -1


def _sealed(content: bytes) -> IO[bytes]:
    """A file to read that nobody can change. Of a file on a disk the command could make as much as it likes, past every
    limit of its own places, through /proc/self/fd/0."""
    file = os.fdopen(os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(content)
    file.seek(0)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return file


def kill_marked(mark: str) -> None:
    """Kill every process that carries a mark in its environment, until none is found."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(100):
        found = False
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                with open(f"/proc/{entry.name}/environ", "rb") as file:
                    if wanted not in file.read().split(b"\0"):
                        continue
                os.kill(int(entry.name), signal.SIGKILL)
                found = True
            except OSError:
                continue
        if not found:
            return


class Sandbox:
    """A work folder, and commands in it. `async with` it, or call `close`, lest commands outlive the loop.

    `bubblewrap`: the program's path, None for plain processes. Use `make_sandbox`, which finds out. `most`: commands at
    a time; more wait for their turn, and their time begins with it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], limits: SandboxLimits | None = None, *, bubblewrap: str | None,
        most: int = 16,
    ) -> None:
        self.folder = Path(folder).resolve()
        if not self.folder.is_dir():
            raise UserError(f"sandbox: the work folder {folder} does not exist: create it first")
        self.limits, self.bubblewrap, self.most = limits or SandboxLimits(), bubblewrap, most
        self.running: set[Running] = set()
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @property
    def boundary(self) -> bool:
        """Whether it keeps a command from what it is not to see."""
        return self.bubblewrap is not None

    @property
    def place(self) -> str:
        """The work folder as a command sees it."""
        return sandbox_jail.FOLDER if self.boundary else str(self.folder)

    async def run(self, command: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None) -> SandboxResult:
        """Run a program with arguments until it ends; what it left running is killed then.

        `seconds`: wall seconds, if less than the limit. Raises ValueError or OSError for a command that no process can
        have (a NUL, an argument over 128 KiB). Cancelled, it ends everything first.
        """
        limits = self.limits
        if seconds is not None:
            limits = dataclasses.replace(limits, wall_seconds=min(seconds, limits.wall_seconds))
        async with self._turn():
            running = self.start(command, stdin=stdin, limits=limits)
            try:
                async with asyncio.timeout(limits.wall_seconds):
                    await running.wait()
            except TimeoutError:
                running.stop("wall_seconds")
            finally:
                await running.close()
        return running.result()

    def start(
        self, command: Sequence[str], *, stdin: bytes = b"", limits: SandboxLimits | None = None, channel: bool = False,
        each_process: bool = True,
    ) -> Running:
        """Start a program and come back. `channel`: a socket to it, whose number is its last argument.

        `each_process`: hold each process to the CPU seconds by itself; not for one that lives through many accounts.
        """
        limits = limits or self.limits
        control_reading, control = os.pipe()
        report, report_writing = os.pipe()
        output, output_writing = os.pipe()
        theirs = [control_reading, report_writing, output_writing]
        ours, other = socket.socketpair() if channel else (None, None)
        mark, keep = secrets.token_hex(8), [control_reading, report_writing]
        line = list(command)
        if other is not None:
            keep.append(other.fileno())
            line.append(str(other.fileno()))
        if self.bubblewrap is not None:
            line = [*sandbox_jail.bubblewrap_arguments(self.bubblewrap, str(self.folder), limits.memory_bytes), *line]
        home = "/tmp" if self.boundary else str(self.folder)
        environment = sandbox_jail.small_environment(home, "/tmp") | {MARK: mark}
        spec = self._spec(limits, control_reading, report_writing, each_process)
        try:
            with _sealed(stdin) as file:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(GUARD), json.dumps(spec), *line], env=environment,
                    pass_fds=keep, stdin=file, stdout=output_writing, stderr=subprocess.STDOUT, start_new_session=True)
        except BaseException:
            for descriptor in (control, report, output):
                os.close(descriptor)
            if ours is not None:
                ours.close()
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
            if other is not None:
                other.close()
        if ours is not None:
            ours.setblocking(False)
        return Running(self, process, control, report, output, mark, limits, ours)

    async def close(self) -> None:
        """End every command."""
        await asyncio.gather(*(running.close() for running in list(self.running)))

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _turn(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, asyncio.Semaphore(self.most)
        return self._turns[1]

    def _spec(self, limits: SandboxLimits, control: int, report: int, each_process: bool) -> dict[str, Any]:
        """What the guard must know."""
        rlimits = {
            # Not RLIMIT_AS: runtimes reserve far more addresses than they ever use.
            "RLIMIT_DATA": limits.memory_bytes, "RLIMIT_FSIZE": limits.file_bytes, "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_CORE": 0,
        }
        if each_process:
            rlimits["RLIMIT_CPU"] = int(limits.cpu_seconds) + 1
        release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
        return {
            "control": control, "report": report, "folder": str(self.folder), "bubblewrap": self.boundary,
            "files": sandbox_jail.FILES, "filter": sandbox_jail.system_call_filter().hex(), "rlimits": rlimits,
            # Before 5.14 the kernel counted the user's other processes with the sandbox's; root it does not bind.
            "bind_processes": self.boundary and os.geteuid() != 0 and release >= (5, 14),
            "processes": limits.processes, "memory_bytes": limits.memory_bytes, "cpu_seconds": limits.cpu_seconds,
            "disk_free_bytes": limits.disk_free_bytes,
        }


def make_sandbox(
    folder: str | os.PathLike[str], limits: SandboxLimits | None = None, *, allow_unsafe: bool = False, most: int = 16
) -> Sandbox:
    """A sandbox in bubblewrap; where that does not work, plain processes under the same limits if `allow_unsafe`, which
    it says on the log. Raises UserError otherwise."""
    if not sys.platform.startswith("linux"):
        raise UserError("sandbox: commands are run on Linux only: leave the python and shell tools out here")
    bubblewrap, trouble = find_bubblewrap()
    if bubblewrap is None:
        if not allow_unsafe:
            raise UserError(f"sandbox: {trouble}, or pass --allow-unsafe (allow_unsafe=True) to run what the model "
                            "writes with limits but no security boundary")
        _log.warning("No security boundary: commands of the model run as %s with limits, but may read, change and send "
                     "whatever this user can (%s).", os.environ.get("USER") or f"user {os.getuid()}", trouble)
    return Sandbox(folder, limits, bubblewrap=bubblewrap, most=most)


def _may_mount() -> bool:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1)


@functools.cache
def find_bubblewrap() -> tuple[str | None, str]:
    """(the program's path, "") if it works here; (None, why not and how to mend it)."""
    program = shutil.which("bwrap")
    if program is None:
        return None, "bubblewrap is not installed: install it (apt install bubblewrap, dnf install bubblewrap)"
    if os.geteuid() == 0 and not _may_mount():
        return None, "bubblewrap needs CAP_SYS_ADMIN if root runs it: run moonbase as another user"
    line = sandbox_jail.bubblewrap_arguments(program, "/usr", 1 << 20)
    try:
        done = subprocess.run([*line, "true"], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        done, said = None, str(error)
    if done is not None and done.returncode == 0:
        return program, ""
    return None, (f"bubblewrap does not work here ({said}): allow user namespaces (in a container: --privileged, or a "
                  "seccomp and AppArmor profile with them), use version 0.8 or newer")
