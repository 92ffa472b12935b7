"""What a command in bubblewrap sees and may ask of the kernel.

It sees /usr and the Python in use, read-only; a /tmp of its own; its work folder; processes of its own; no network. A
filter (seccomp) refuses system calls that would give it memory that nobody counts, a namespace of its own, a way out
that namespaces do not close (sockets to a virtual machine's host), or files that lend their owner's powers (setuid).
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import sys
from pathlib import Path

FOLDER = "/agent"
"""Where the work folder appears inside."""

UID = 1000
FILES = {
    "/etc/passwd": f"agent:x:{UID}:{UID}:agent:/tmp:/bin/sh\n",
    "/etc/group": f"agent:x:{UID}:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
SHARED_MEMORY_BYTES = 64 << 20


def small_environment(home: str, temporary: str) -> dict[str, str]:
    """All that a command gets to know; nothing of the caller's own environment, so no keys."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "HOME": home, "TMPDIR": temporary, "USER": "agent", "LOGNAME": "agent", "LANG": "C.UTF-8", "TERM": "dumb",
        # A numerical library would start a thread for every core, and threads count.
        "OMP_NUM_THREADS": "2",
    }


def python_folders() -> list[str]:
    """The folders that the running Python lives in, a virtual environment's included, less what /usr holds."""
    folders = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    program = Path(os.path.realpath(sys.executable)).parent
    if program.name == "bin":
        folders.add(str(program.parent))
    folders |= {os.path.realpath(folder) for folder in folders}
    home = Path.home()
    return sorted(folder for folder in folders
                  if not Path(folder).is_relative_to("/usr") and not home.is_relative_to(folder))


def bubblewrap_arguments(bubblewrap: str, folder: str, temporary_bytes: int) -> list[str]:
    """The command line up to the command. `folder`: the work folder outside."""
    line = [bubblewrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
            "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
            "--uid", str(UID), "--gid", str(UID), "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        place = Path("/", name)
        if place.is_symlink():
            line += ["--symlink", os.readlink(place), str(place)]
        elif place.is_dir():
            line += ["--ro-bind", str(place), str(place)]
    for place in ("/nix/store", "/gnu/store", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf",
                  "/etc/ld.so.conf.d", "/etc/localtime", "/etc/fonts", "/etc/mime.types"):
        line += ["--ro-bind-try", place, place]
    line += ["--proc", "/proc", "--dev", "/dev", "--size", str(SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm",
             "--size", str(temporary_bytes), "--tmpfs", "/tmp"]
    for place in python_folders():
        line += ["--ro-bind", place, place]
    # The file systems that hold the mounts live in memory too: nothing is written there, past the sizes above.
    line += ["--bind", folder, FOLDER, "--chdir", FOLDER]
    return [*line, "--remount-ro", "/dev", "--remount-ro", "/proc", "--remount-ro", "/"]


# System calls by number: (x86_64, aarch64), from the kernel's tables (asm/unistd_64.h, asm-generic/unistd.h).
_REFUSED = {
    # Memory that belongs to no process and is in no file system of the sandbox.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    # Namespaces and mounts of its own, with file systems of its own.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # Large parts of the kernel that no such command needs, with a long record of holes.
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Their flags lie in memory, where a filter cannot look; the C library falls back to clone and openat.
    "clone3": (435, 435), "openat2": (437, 437),
}
_MODES = {"chmod": ((90, None), 1), "fchmod": ((91, 52), 1), "fchmodat": ((268, 53), 2), "fchmodat2": ((452, 452), 2),
          "open": ((2, None), 2), "creat": ((85, None), 1), "openat": ((257, 56), 3), "mknod": ((133, None), 1),
          "mknodat": ((259, 33), 2)}
"""System calls that give a file its mode, and which argument that is."""
_SET_ID = 0o6000
"""S_ISUID and S_ISGID. A file in the work folder belongs to whoever runs the sandbox: with such a bit it would lend
that one's powers to every user of the machine, outside."""
_CLONE, _SOCKET = (56, 220), (41, 198)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (linux/sched.h)."""
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that a network namespace holds in."""


def system_call_filter() -> bytes:
    """A classic BPF program for seccomp (struct sock_filter); empty for a machine whose numbers are not known here."""
    column, architecture = _MACHINES.get(platform.machine(), (None, 0))
    if column is None or sys.maxsize < 2**32:
        return b""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    number, machine, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    program = [
        (load, 0, 0, machine), (equal, 1, 0, architecture), (give, 0, 0, kill),
        (load, 0, 0, number),
        # x86's second table of numbers, for which those below would not hold.
        (at_least, 0, 1, 0x40000000), (give, 0, 0, refuse | errno.ENOSYS),
    ]
    for numbers in _REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.ENOSYS)]
    held = [(_CLONE, 0, _CLONE_NEW_NAMESPACES), *((numbers, place, _SET_ID) for numbers, place in _MODES.values())]
    for numbers, place, bits in held:
        if numbers[column] is not None:
            # The lower half of the argument: both machines put it first.
            program += [(equal, 0, 4, numbers[column]), (load, 0, 0, first_argument + 8 * place),
                        (any_bit, 0, 1, bits), (give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, 2 + len(_FAMILIES), _SOCKET[column]), (load, 0, 0, first_argument)]
    program += [(equal, len(_FAMILIES) - place, 0, family) for place, family in enumerate(_FAMILIES)]
    program += [(give, 0, 0, refuse | errno.EAFNOSUPPORT), (give, 0, 0, allow)]
    return b"".join(struct.pack("<HBBI", *line) for line in program)
