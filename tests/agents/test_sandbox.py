"""Commands that misbehave, in bubblewrap and as plain processes: each ends in time, and nothing of it is left.

Whether something is left is read from the process table of the machine, not asked of the sandbox. Bounded: memory hogs
stop at 300 MB, fork bombs at some hundred processes for a moment.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moonbase.agents.tools import sandbox as sandbox_module
from moonbase.agents.tools import sandbox_guard
from moonbase.agents.tools.sandbox import Capture, Sandbox, SandboxLimits, SandboxResult, find_bubblewrap, make_sandbox
from moonbase.errors import UserError

BUBBLEWRAP, WHY_NOT = find_bubblewrap()
LIMITS = SandboxLimits(wall_seconds=60.0, memory_bytes=300 << 20, processes=60, output_bytes=1 << 20, kept_bytes=4000,
                       disk_free_bytes=1 << 20)
needs_bubblewrap = pytest.mark.skipif(BUBBLEWRAP is None, reason=WHY_NOT)


@pytest.fixture(params=[pytest.param("bubblewrap", marks=needs_bubblewrap), "processes"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def run(folder: Path, kind: str, script: str, program: str = "bash", stdin: bytes = b"", **limits) -> SandboxResult:
    """A script of bash or of Python, and how it ended."""
    sandbox = Sandbox(folder, SandboxLimits(**{**vars(LIMITS), **limits}),
                      bubblewrap=BUBBLEWRAP if kind == "bubblewrap" else None)
    program = sys.executable if program == "python" else program
    return asyncio.run(sandbox.run([program, "-c", textwrap.dedent(script)], stdin=stdin))


def processes_with(mark: str) -> list[str]:
    """Command lines of the machine's living processes that hold a text."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line and place.parent.name != str(os.getpid()):
            found.append(line)
    return found


def a_mark() -> str:
    """Seconds to sleep that nobody else sleeps."""
    return f"300.{secrets.randbelow(10**12):012d}"


def test_status_and_output(kind: str, tmp_path: Path) -> None:
    assert run(tmp_path, kind, "echo one; echo two >&2; pwd > here; exit 3").text() == "one\ntwo\n[exit status 3]"
    assert (tmp_path / "here").is_file()
    assert run(tmp_path, kind, "true").text() == "[no output]"
    assert run(tmp_path, kind, "kill -SEGV $$").status == 128 + 11
    assert run(tmp_path, kind, "tr a-z A-Z", stdin=b"read " * 50_000).output.startswith("READ READ")
    assert run(tmp_path, kind, "import sys; print(sys.version_info[:2])", "python").output.strip() == str(
        sys.version_info[:2])


def test_a_program_that_does_not_exist(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, "", program="no-such-program")
    assert result.status not in (0, None) and "no-such-program" in result.output


@pytest.mark.parametrize("script", ["sleep 300", "while :; do :; done", "trap '' TERM INT HUP XCPU; sleep 300 & wait"])
def test_wall_seconds(script: str, kind: str, tmp_path: Path) -> None:
    began = time.monotonic()
    result = run(tmp_path, kind, script, wall_seconds=0.5)
    assert (result.limit, result.status) == ("wall_seconds", None)
    assert time.monotonic() - began < 60, "not when it ends by itself"
    assert result.text() == "[stopped: it took more than 0.5 seconds]"


@pytest.mark.parametrize("script", [
    "while True: pass",
    "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    # Each of them alone stays below.
    "import os\nwhile True:\n  if os.fork() == 0:\n    sum(range(1_000_000)); os._exit(0)\n  os.wait()",
])
def test_cpu_seconds(script: str, kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, script, "python", cpu_seconds=0.4)
    assert result.limit == "cpu_seconds"
    assert 0.4 <= result.cpu_seconds < 10


def test_one_process_gets_no_more_memory(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, "x = bytearray(400 << 20)", "python")
    assert (result.status, result.limit) == (1, None) and "MemoryError" in result.output


@pytest.mark.parametrize("script", [
    # Shared memory, which the kernel's limit of a process does not count, a little at a time.
    "import mmap, time\nx = mmap.mmap(-1, 260 << 20)\nfor _ in range(65): x.write(bytes(4 << 20)); time.sleep(0.005)\n"
    "time.sleep(50)",
    # Each of them alone stays below.
    "import os, time\nfor _ in range(4):\n  if os.fork() == 0:\n    x = b'x' * (50 << 20); time.sleep(50); os._exit(0)"
    "\ntime.sleep(50)",
])
def test_memory_of_the_tree(script: str, kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, script, "python", memory_bytes=150 << 20)
    assert result.limit == "memory_bytes" and result.memory_bytes > 150 << 20


def test_shared_pages_count_once(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, """
        import os, time
        x = b"x" * (60 << 20)
        for _ in range(6):
            if os.fork() == 0:
                time.sleep(0.4); os._exit(0)
        time.sleep(0.5)
        """, "python", memory_bytes=150 << 20)
    assert result.status == 0


@pytest.mark.parametrize("script", [
    # Doubles eight times, not for ever: the machine must live through a sandbox that fails.
    "bomb() { [ $1 = 0 ] || { bomb $(($1 - 1)) & bomb $(($1 - 1)) & } ; sleep 50; }; bomb 8",
    "bomb() { [ $1 = 0 ] || { bomb $(($1 - 1)) & bomb $(($1 - 1)) & } ; }; bomb 9; sleep 50",
    "for i in $(seq 200); do sleep 50 & done; wait",
    "for i in $(seq 200); do setsid sleep 50 & done; wait",
])
def test_a_fork_bomb(script: str, kind: str, tmp_path: Path) -> None:
    mark = a_mark()
    result = run(tmp_path, kind, f"# {mark}\n{script}", processes=40)
    # Either the guard ended it, or the kernel refused it more.
    assert result.limit == "processes" or "fork" in result.output
    assert processes_with(mark) == []


def test_threads_are_counted(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, """
        import os, threading, time
        try:
            for _ in range(100): threading.Thread(target=time.sleep, args=(50,)).start()
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(1)  # does not wait for those that run
        """, "python", processes=40)
    assert result.limit == "processes" or "can't start new thread" in result.output


@pytest.mark.parametrize("script", [
    "sleep {0} & echo ok",
    "setsid sleep {0} & echo ok",
    "(setsid sh -c '(sleep {0} &) ; sleep {0}' &) ; nohup sleep {0} >/dev/null 2>&1 & sleep 0.2; echo ok",
    "env -i setsid sh -c 'trap \"\" TERM HUP; exec sleep {0}' >/dev/null 2>&1 & sleep 0.1; echo ok",
])
def test_nothing_in_the_background_is_left(script: str, kind: str, tmp_path: Path) -> None:
    mark, began = a_mark(), time.monotonic()
    assert run(tmp_path, kind, script.format(mark)).output == "ok\n"
    assert time.monotonic() - began < 60, "it does not wait for what is left"
    assert processes_with(mark) == []


def test_a_daemon_by_the_book(kind: str, tmp_path: Path) -> None:
    mark = a_mark()
    result = run(tmp_path, kind, f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(64):
                    try: os.close(number)
                    except OSError: pass
                os.execlp("sleep", "sleep", "{mark}")
            os._exit(0)
        time.sleep(0.2)
        zombies = [os.fork() or os._exit(0) for _ in range(5)]
        """, "python")
    assert result.status == 0
    assert processes_with(mark) == []


def test_endless_output(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, "echo beginning; yes")
    assert result.limit == "output_bytes"
    assert 1 << 20 < result.output_bytes < 2 << 20
    assert result.output.startswith("beginning\ny\n") and result.output.endswith("y\ny\n")
    assert "bytes left out" in result.output and len(result.output) < 4100
    quiet = run(tmp_path, kind, "yes > /dev/null", wall_seconds=0.3)
    assert quiet.limit == "wall_seconds"


def test_files_and_their_size(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, "exec head -c 3000000 /dev/zero > large", file_bytes=1 << 20)
    assert result.limit == "file_bytes"
    assert (tmp_path / "large").stat().st_size == 1 << 20
    result = run(tmp_path, kind, "x = [open('/dev/null') for _ in range(50)]", "python", open_files=30)
    assert "Too many open files" in result.output


def test_limits_are_not_raised_from_inside(kind: str, tmp_path: Path) -> None:
    result = run(tmp_path, kind, "ulimit -n 5000; ulimit -d unlimited; ulimit -f unlimited; ulimit -t unlimited; "
                 "ulimit -n; ulimit -d", open_files=30)
    assert result.output.splitlines()[-2:] == ["30", str(300 << 10)]


@pytest.mark.parametrize(("free", "files_free", "limit"), [
    (101, 10_001, None), (99, 10_001, "disk_free_bytes"), (101, 9_999, "disk_free_bytes")])
def test_a_disk_that_fills(free: int, files_free: int, limit: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of an imaginary disk of 4 KiB blocks."""
    told = iter([(1000, 10**6), (free, files_free)])
    monkeypatch.setattr(sandbox_guard.os, "statvfs", lambda path: SimpleNamespace(
        f_frsize=4096, **dict(zip(("f_bavail", "f_favail"), next(told), strict=True))))
    spec = dict(folder="/", bubblewrap=False, processes=10**6, memory_bytes=10**15, cpu_seconds=10**9,
                disk_free_bytes=100 * 4096)
    assert sandbox_guard.Watch(spec).exceeded() == limit


def test_what_is_not_text(kind: str, tmp_path: Path) -> None:
    assert run(tmp_path, kind, r"printf 'a\xff\xfeb\x00c\xc3'").output == "a��b\0c�"
    command = "echo " + "ä€😀" * 10_000
    assert run(tmp_path, kind, command, kept_bytes=10**6).output == "ä€😀" * 10_000 + "\n"
    with pytest.raises(OSError):
        run(tmp_path, kind, "echo " + "x" * 200_000)
    with pytest.raises(ValueError):
        run(tmp_path, kind, "echo \0")


@pytest.mark.parametrize("seed", range(20))
def test_head_and_tail_against_the_whole(seed: int) -> None:
    import random

    chance = random.Random(seed)
    whole = "".join(chance.choice("aä€😀\n") for _ in range(chance.randrange(0, 9000)))
    capture, content = Capture(1000), whole.encode()
    while content:
        size = chance.randrange(1, 700)
        capture.add(content[:size])
        content = content[size:]
    head, gap, tail = capture.take().partition("\n[… ")
    assert "�" not in head + tail
    if len(whole.encode()) <= 1000:
        assert head == whole and not gap
        return
    tail = tail.partition(" …]\n")[2]
    assert whole.startswith(head) and whole.endswith(tail)
    assert 746 < len(head.encode()) <= 750 and 246 < len(tail.encode()) <= 250


def test_the_environment_stays_outside(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-secret")
    assert "sk-secret" not in run(tmp_path, kind, "env; export -p").output
    if kind == "bubblewrap":
        everything = run(tmp_path, kind, "cat /proc/*/environ | tr '\\0' '\\n'; cat /proc/*/comm").output
        assert "HOME=/tmp" in everything and "sk-secret" not in everything
        assert {*everything.splitlines()[-3:]} <= {"bwrap", "bash", "cat"}


def test_cancelling_ends_everything(kind: str, tmp_path: Path) -> None:
    mark = a_mark()

    async def cancel() -> None:
        sandbox = Sandbox(tmp_path, LIMITS, bubblewrap=BUBBLEWRAP if kind == "bubblewrap" else None)
        script = f"setsid sleep {mark} & touch started{mark}; sleep {mark}"
        task = asyncio.create_task(sandbox.run(["bash", "-c", script]))
        while not (tmp_path / f"started{mark}").exists():
            await asyncio.sleep(0.01)
        assert len(processes_with(f"sleep {mark}")) >= 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert processes_with(mark) == [] and not sandbox.running

    asyncio.run(asyncio.wait_for(cancel(), 120))


def test_the_end_of_the_caller_ends_everything(kind: str, tmp_path: Path) -> None:
    """Killed with SIGKILL, it had no chance to clean up."""
    mark = a_mark()
    code = f"""
import asyncio
from moonbase.agents.tools.sandbox import Sandbox
sandbox = Sandbox({str(tmp_path)!r}, bubblewrap={BUBBLEWRAP if kind == "bubblewrap" else None!r})
asyncio.run(sandbox.run(["bash", "-c", "setsid sleep {mark} & touch started; wait"]))
"""
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    try:
        wait_until((tmp_path / "started").exists)
    finally:
        caller.kill()
        caller.wait()
    wait_until(lambda: not processes_with(mark))


def wait_until(true) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_twenty_at_once(kind: str, tmp_path: Path) -> None:
    """Each waits for all the others."""
    async def many() -> list[SandboxResult]:
        async with Sandbox(tmp_path, LIMITS, bubblewrap=BUBBLEWRAP if kind == "bubblewrap" else None, most=20) as box:
            script = "echo $0 > file$0; until [ $(ls | wc -l) = 20 ]; do sleep 0.05; done; cat file$0"
            return await asyncio.gather(*(box.run(["bash", "-c", script, str(number)]) for number in range(20)))

    assert [result.output for result in asyncio.run(many())] == [f"{number}\n" for number in range(20)]


def test_more_than_allowed_wait_for_their_turn(tmp_path: Path) -> None:
    async def many() -> list[SandboxResult]:
        async with Sandbox(tmp_path, LIMITS, bubblewrap=None, most=2) as box:
            script = "mkdir running$0; ls | wc -l; sleep 0.1; rmdir running$0"
            return await asyncio.gather(*(box.run(["bash", "-c", script, str(number)]) for number in range(6)))

    results = asyncio.run(many())
    assert all(result.limit is None and result.output in ("1\n", "2\n") for result in results)


def test_no_descriptor_is_left(kind: str, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for script in ("true", "exec nothing", "sleep 9"):
        run(tmp_path, kind, script, wall_seconds=0.2)
    with pytest.raises(OSError):
        run(tmp_path, kind, "x" * 200_000)
    assert os.listdir("/proc/self/fd") == before


def test_a_killed_guard_is_noticed(tmp_path: Path) -> None:
    """Without a boundary a command can do that; its processes go all the same, unless they hide from the scan too."""
    mark = a_mark()
    result = run(tmp_path, "processes", f"setsid sleep {mark} & kill -9 $PPID; sleep {mark}")
    assert result.limit == "guard"
    assert processes_with(mark) == []


# What only bubblewrap keeps in.


@needs_bubblewrap
def test_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
        result = run(tmp_path, "bubblewrap", f"""
            import socket
            for family, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("192.0.2.1", 80)),
                                    (socket.AF_INET6, ("2001:db8::1", 80))):
                try: socket.socket(family).connect(address); print("connected")
                except OSError as error: print("refused")
            try: socket.socket(socket.AF_VSOCK)
            except OSError: print("refused")
            try: socket.getaddrinfo("example.org", 80)
            except OSError: print("refused")
            print([name for _, name in socket.if_nameindex() if name.startswith(("eth", "en", "wl"))])
            """, "python")
    assert result.output.splitlines() == ["refused"] * 5 + ["[]"]


@needs_bubblewrap
def test_no_socket_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one with a path, such as a container daemon's or an agent's of ssh, nor one with a name alone."""
    work, name = tmp_path / "work", f"\0moonbase-{secrets.token_hex(8)}"
    work.mkdir()
    monkeypatch.chdir(tmp_path)  # its path has room for a hundred bytes
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as nameless:
        server.bind("socket")
        nameless.bind(name)
        (work / "link").symlink_to(tmp_path / "socket")
        for one, address in ((server, "socket"), (nameless, name)):
            one.listen()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(address)  # from here it can be reached
        result = run(work, "bubblewrap", f"""
            import socket
            for address in ("link", "../socket", {str(tmp_path / "socket")!r}, {name!r}, "/run/docker.sock",
                            "/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0"):
                try: socket.socket(socket.AF_UNIX).connect(address); print("connected", address)
                except OSError as error: print("refused")
            """, "python")
    assert result.output.splitlines() == ["refused"] * 7


@needs_bubblewrap
def test_secrets_at_home_and_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through no path, no process and no open file."""
    home, work, word = tmp_path / "home", tmp_path / "home/project/work", f"secret-{secrets.token_hex(8)}"
    work.mkdir(parents=True)
    (home / ".netrc").write_text(word)
    (home / "project/.env").write_text(word)
    (work / "link").symlink_to(home / ".netrc")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SOME_API_KEY", word)
    with open(home / ".netrc") as held:
        os.set_inheritable(held.fileno(), True)
        script = f"""
            cat ~/.netrc {home}/.netrc {home}/project/.env ../.env link ../../.netrc
            for process in /proc/[0-9]* /proc/self; do
                cat $process/environ $process/cmdline; cat $process/root{home}/.netrc $process/cwd/../.env
                readlink $process/fd/[0-9]* | grep netrc
            done
            ls -a ~ {home}
            ls /proc | grep -c '^[0-9]'
            """
        result = run(work, "bubblewrap", f"({script}) 2>/dev/null", kept_bytes=10**6)
    # Its own command line names the file; nothing else does, and nothing says what is in it.
    assert word not in result.output and f"{home}/.netrc\n" not in result.output.replace(script, "")
    assert int(result.output.split()[-1]) < 10, "processes of its own alone"


@needs_bubblewrap
def test_no_file_that_lends_the_owners_powers(tmp_path: Path) -> None:
    """A setuid file left in the work folder would belong to whoever runs the sandbox, root perhaps."""
    result = run(tmp_path, "bubblewrap", """
        import ctypes, os, shutil
        shutil.copy("/bin/true", "copied")
        libc = ctypes.CDLL(None, use_errno=True)
        # fchmodat2 and openat2 have the same numbers on all machines.
        ways = (lambda: os.chmod("copied", 0o4755), lambda: os.chmod("copied", 0o2755), lambda: os.chmod(".", 0o2755),
                lambda: os.fchmod(os.open("copied", os.O_RDONLY), 0o6755), lambda: os.mknod("made", 0o104755),
                lambda: os.open("opened", os.O_CREAT | os.O_WRONLY, 0o4755), lambda: libc.creat(b"created", 0o4755),
                lambda: libc.syscall(452, -100, b"copied", 0o4755, 0),
                lambda: libc.syscall(437, -100, b"opened2", (ctypes.c_uint64 * 3)(os.O_CREAT | os.O_WRONLY, 0o4755, 0),
                                     24))
        for way in ways:
            try: print("refused" if way() == -1 else "done")
            except PermissionError: print("refused")
        os.chmod("copied", 0o751)
        print(oct(os.stat("copied").st_mode))
        """, "python")
    assert result.output.splitlines() == ["refused"] * 9 + ["0o100751"]
    assert not [path for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_mode & 0o6000]


def test_what_it_reads_cannot_be_written(kind: str, tmp_path: Path) -> None:
    for stdin in (b"", b"given"):
        result = run(tmp_path, kind, """
            import os, sys
            print(sys.stdin.read())
            for way in (lambda: os.write(0, b"x"), lambda: os.ftruncate(0, 1 << 20),
                        lambda: os.write(os.open("/proc/self/fd/0", os.O_RDWR), b"x" * 100)):
                try: way(); print("written")
                except OSError: print("refused")
            """, "python", stdin=stdin)
        assert result.output.splitlines() == [stdin.decode()] + ["refused"] * 3


@needs_bubblewrap
@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/ssh", str(Path.home() / ".bashrc"), "/home", "/var",
                                  "/sys", "/proc/kcore", "/proc/1/root/etc/shadow", "/run", "/boot", __file__])
def test_unreadable(path: str, tmp_path: Path) -> None:
    result = run(tmp_path, "bubblewrap", f"head -c 10 {path} || ls {path}")
    assert result.status != 0


@needs_bubblewrap
def test_nothing_outside_is_written(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    work = tmp_path / "work"
    work.mkdir()
    (work / "link").symlink_to(outside)
    script = f"""
        for place in / /usr /usr/bin /bin /lib /etc /dev /proc /proc/sys/kernel /sys {sys.prefix} {tmp_path} /var; do
            (echo x > $place/written-by-a-test) 2>/dev/null && echo "wrote in $place"
        done
        (echo x > link) 2>/dev/null && echo "wrote through the link"
        (echo x > /agent/../outside) 2>/dev/null && echo "wrote above"
        (echo h > /proc/sys/kernel/hostname) 2>/dev/null && echo "named the machine"
        chmod 000 /dev/null 2>/dev/null && echo "changed a device"
        mknod null c 1 3 2>/dev/null && echo "made a device"
        echo fine > mine && echo fine > /tmp/mine && echo fine > /dev/shm/mine && cat mine /tmp/mine
        """
    result = run(work, "bubblewrap", script)
    assert result.output == "fine\nfine\n"
    assert outside.read_text() == "untouched" and (work / "mine").read_text() == "fine\n"
    assert not Path("/tmp/mine").exists()
    # Where this Python itself lies there, the way to it is seen.
    way = Path(sys.prefix).parts[2:3] if Path(sys.prefix).is_relative_to("/tmp") else ()
    assert run(work, "bubblewrap", "ls -A /tmp").output.split() == list(way)


@needs_bubblewrap
def test_no_powers_and_no_namespaces(tmp_path: Path) -> None:
    result = run(tmp_path, "bubblewrap", """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(*(int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")), int(status["NoNewPrivs"]))
        print(os.getuid() != 0, libc.unshare(0x10000000), libc.setns(0, 0), libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0))
        # clone(2) with a user namespace: number 56 on x86-64, 220 on aarch64
        print(libc.syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0))
        print(libc.memfd_create(b"x", 0), libc.shmget(0, 4096, 0o1600))
        print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit())[:2], os.uname().nodename)
        """, "python")
    assert result.output.splitlines() == [
        "0 0 0 0 1", "True -1 -1 -1", "-1", "-1 -1", "[1, 2] sandbox"]


@needs_bubblewrap
def test_temporary_files_are_memory_and_bounded(tmp_path: Path) -> None:
    result = run(tmp_path, "bubblewrap", "head -c 100M /dev/zero > /tmp/a; head -c 100M /dev/zero > /dev/shm/a; "
                 "du -cm /tmp/a /dev/shm/a | tail -1", memory_bytes=60 << 20)
    assert result.output.count("No space left") == 2
    assert int(result.output.split()[-2]) <= 60 + 64


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() == 0, reason="root is not bound by the kernel's limit of processes")
def test_the_kernel_refuses_a_process_too_many(tmp_path: Path) -> None:
    result = run(tmp_path, "bubblewrap", "for i in $(seq 60); do sleep 1 & done; echo made", processes=20)
    assert result.limit is None and "fork" in result.output


# Which of the two.


def test_without_bubblewrap_it_must_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    find_bubblewrap.cache_clear()
    try:
        with pytest.raises(UserError, match=r"apt install bubblewrap.*--allow-unsafe") as raised:
            make_sandbox(tmp_path)
        assert "\n" not in str(raised.value)
        assert not make_sandbox(tmp_path, allow_unsafe=True).boundary
        assert "No security boundary" in caplog.text
    finally:
        find_bubblewrap.cache_clear()


def test_a_bubblewrap_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    find_bubblewrap.cache_clear()
    try:
        with pytest.raises(UserError, match=r"No permissions to create new namespace.*user namespaces"):
            make_sandbox(tmp_path)
    finally:
        find_bubblewrap.cache_clear()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        make_sandbox(tmp_path / "none", allow_unsafe=True)
