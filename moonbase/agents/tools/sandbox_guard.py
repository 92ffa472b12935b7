"""Runs one command, watches everything that it starts, and leaves nothing of it behind.

`sandbox.py` starts this file as a process of its own; it imports nothing of moonbase. Every process of the command
stays a descendant of this one, whatever it does: inside bubblewrap because of the process namespace, without it because
orphans come to their "child subreaper" (prctl(2)). A byte on the control pipe begins the CPU account anew; its end,
which the end of the parent brings too, ends everything.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

TICK = 0.04
"""Seconds between two looks at the tree. What a fork bomb or a memory hog does within one of them goes unseen."""

PAGE = resource.getpagesize()
CLOCK = os.sysconf("SC_CLK_TCK")
CLONE_NEWNS = 0x20000
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 36, 38, 24
libc = ctypes.CDLL(None, use_errno=True)


def threads(pid: int) -> list[str]:
    """Of one process; none if it is gone."""
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def children(pid: int, its_threads: list[str]) -> list[int]:
    """Every child, of whichever thread."""
    found = []
    for thread in its_threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        except OSError:
            continue
    return found


def descendants(most: int = 1 << 30) -> dict[int, int]:
    """Processes below this one, as pid → its number of threads: all, or some if there are more threads than `most`."""
    found: dict[int, int] = {}
    todo, count = children(os.getpid(), threads(os.getpid())), 0
    while todo and count <= most:
        pid = todo.pop()
        if pid not in found:
            its_threads = threads(pid)
            found[pid] = len(its_threads)
            count += len(its_threads)
            todo += children(pid, its_threads)
    return found


def kill(pid: int) -> None:
    """With its whole process group: the kernel does that at once, while a group forks it would outrun a walk."""
    try:
        group = os.getpgid(pid)
        if group == os.getpgrp():
            os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # It ended by itself meanwhile, which is what was wanted; `end_all` looks again until none is left.


def look(pids: dict[int, int]) -> tuple[float, int]:
    """CPU seconds of the living and of the children they have waited for, and bytes resident (shared ones many times).
    """
    ticks = pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
        pages += int(fields[21])
    return ticks / CLOCK, pages * PAGE


def proportional(pids: dict[int, int], resident: int) -> int:
    """Bytes resident, shared ones counted once between them; `resident` where the kernel does not tell."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                total += next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:")), 0)
        except PermissionError:
            return resident
        except OSError:
            continue
    return total


def reap(command: int | None) -> int | None:
    """Take dead children, but not for ever; the command's exit status as a shell has it, if it was among them."""
    status = None
    for _ in range(500):
        try:
            pid, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid == command:
            code = os.waitstatus_to_exitcode(code)
            status = 128 - code if code < 0 else code
    return status


def end_all(seconds: float = 30.0) -> int:
    """Kill every descendant until there is none. How many would not die: none, but for those that wait on a dead disk.
    """
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    end = time.monotonic() + seconds
    while True:
        # Top first: those below come here, or end with the first of their namespace.
        todo, met = children(os.getpid(), threads(os.getpid())), set()
        while todo:
            pid = todo.pop()
            if pid not in met:
                met.add(pid)
                below = children(pid, threads(pid))
                kill(pid)
                todo += below
        reap(None)
        left = len(descendants(100))
        if left == 0 or time.monotonic() > end:
            return left
        select.select([], [], [], 0.001)


def readable(content: bytes) -> int:
    """A descriptor that a command inherits and reads some bytes from (fewer than a pipe holds)."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    os.set_inheritable(reading, True)
    return reading


def hold_devices() -> None:
    """Make the machine's device nodes read-only for this process and what it starts.

    Root's commands in bubblewrap own them, though they have no powers, and could take them from everybody (chmod).
    """
    def must(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"cannot protect /dev: {os.strerror(ctypes.get_errno())}")

    must(libc.unshare(CLONE_NEWNS))
    must(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    for name in (b"full", b"null", b"random", b"tty", b"urandom", b"zero"):
        place = b"/dev/" + name
        must(libc.mount(place, place, None, MS_BIND, None))
        must(libc.mount(None, place, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID, None))


def in_bubblewrap(spec: dict, command: list[str]) -> tuple[list[str], int | None, int | None]:
    """bubblewrap's command line with what it reads from descriptors; (it, where it tells of itself, what it waits for).
    """
    if os.geteuid() == 0:
        hold_devices()
    extra = []
    for place, text in spec["files"].items():
        extra += ["--ro-bind-data", str(readable(text.encode())), place]
    if spec["filter"]:
        extra += ["--seccomp", str(readable(bytes.fromhex(spec["filter"])))]
    if not spec["bind_processes"]:
        return [command[0], *extra, *command[1:]], None, None
    (info, info_writing), (block_reading, block) = os.pipe(), os.pipe()
    for descriptor in (info_writing, block_reading):
        os.set_inheritable(descriptor, True)
    extra += ["--info-fd", str(info_writing), "--block-fd", str(block_reading)]
    return [command[0], *extra, *command[1:]], info, block


def bind_processes(info: int, block: int, processes: int) -> None:
    """Set the limit of processes inside of the namespace, where it counts those of the sandbox alone, and let it go."""
    try:
        with open(info, "rb") as file:  # written in pieces; it ends when bubblewrap closes it
            told = json.loads(file.read() or b"{}")
        if "child-pid" in told:
            # One is bubblewrap's own, the first of the namespace.
            resource.prlimit(told["child-pid"], resource.RLIMIT_NPROC, (processes + 1, processes + 1))
        os.write(block, b"x")
    except (OSError, ValueError):
        return  # bubblewrap has ended already, and has said why.


def threads_of_user() -> int:
    """Of all processes of this user."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                count += len(threads(int(name)))
        except OSError:
            continue
    return count


def become(spec: dict, command: list[str]) -> None:
    """Turn this process into the command."""
    try:
        os.setsid()
        # Ties are for the guard: it must get its turn among two hundred busy children, and memory is taken from them.
        os.nice(5)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        if not spec["bubblewrap"]:
            # Not even root may raise a limit then, and no setuid program leaves the guard's reach.
            for capability in range(64):
                libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            os.chdir(spec["folder"])
            if os.geteuid() != 0:
                # Of all that the user runs, so this only keeps a fork bomb small until the guard sees it.
                spec["rlimits"]["RLIMIT_NPROC"] = threads_of_user() + 2 * spec["processes"]
        for name, value in spec["rlimits"].items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.execvp(command[0], command)
    except FileNotFoundError:
        os.write(2, f"{command[0]}: command not found\n".encode(errors="surrogateescape"))
    except BaseException as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode(errors="surrogateescape"))
    finally:
        os._exit(127)


class Watch:
    """The limits of a whole tree."""

    def __init__(self, spec: dict) -> None:
        self.spec = spec
        self.cpu = self.cpu_before = 0.0
        self.memory = self.processes = 0
        disk = os.statvfs(spec["folder"])
        self.least_blocks = min(spec["disk_free_bytes"] // disk.f_frsize, disk.f_bavail // 2)
        self.least_files = min(10_000, disk.f_favail // 2)

    def exceeded(self) -> str | None:
        """The name of a limit that is passed now."""
        spec = self.spec
        pids = descendants(spec["processes"] + 10)
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu, resident = look(pids)
        self.cpu = max(self.cpu, cpu + waited.ru_utime + waited.ru_stime)
        processes = sum(pids.values()) - (2 if spec["bubblewrap"] else 0)
        self.processes = max(self.processes, processes)
        if processes > spec["processes"]:
            return "processes"
        if resident > spec["memory_bytes"]:
            resident = proportional(pids, resident)
        self.memory = max(self.memory, resident)
        if resident > spec["memory_bytes"]:
            return "memory_bytes"
        if self.cpu - self.cpu_before > spec["cpu_seconds"]:
            return "cpu_seconds"
        disk = os.statvfs(spec["folder"])
        if disk.f_bavail < self.least_blocks or disk.f_favail < self.least_files:
            return "disk_free_bytes"
        return None


def watch(spec: dict, command: int, wake: int) -> dict:
    """Until the command ends or must end."""
    watching, control = Watch(spec), spec["control"]
    status = limit = None
    while status is None and limit is None:
        ready, _, _ = select.select([control, wake], [], [], TICK)
        if wake in ready:
            os.read(wake, 4096)
            status = reap(command)
        if control in ready:
            if not os.read(control, 64):
                break
            watching.cpu_before = watching.cpu
        if status is None:
            limit = watching.exceeded()
    left = end_all()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"status": status, "limit": limit, "left": left, "processes": watching.processes,
            "cpu_seconds": max(watching.cpu, usage.ru_utime + usage.ru_stime),
            "memory_bytes": max(watching.memory, usage.ru_maxrss * 1024 if not spec["bubblewrap"] else 0)}


def main() -> None:
    spec, command = json.loads(sys.argv[1]), sys.argv[2:]
    for descriptor in (spec["control"], spec["report"]):
        os.set_inheritable(descriptor, False)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    info = block = None
    if spec["bubblewrap"]:
        command, info, block = in_bubblewrap(spec, command)
    pid = os.fork()
    if pid == 0:
        become(spec, command)
    # From here on the command alone writes the output, so that the output ends with it.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in (spec["control"], spec["report"], wake, woken, info, block, nothing):
            try:
                os.close(descriptor)
            except OSError:
                continue
    if info is not None:
        bind_processes(info, block, spec["processes"])
    report = watch(spec, pid, wake)
    os.write(spec["report"], json.dumps(report).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
