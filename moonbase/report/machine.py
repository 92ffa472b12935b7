"""Facts about this computer and this installation that a run records, so that a stranger can judge and repeat it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "pydantic", "pyyaml", "tokenizers", "tiktoken",
            "jinja2", "matplotlib", "rich", "typer", "datasets", "pyarrow", "zstandard", "tensorboard")
_SECONDS = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


def machine_facts() -> dict[str, Any]:
    """`cpu` (str), `cores` and `memory_bytes` (that this process may use), `gpu` (str or None), `os` (str)."""
    return {"cpu": _cpu_name(), "cores": _cores(), "memory_bytes": _memory_bytes(), "gpu": _gpu_name(),
            "os": _os_name()}


def package_versions() -> dict[str, str]:
    """Versions of Python, of moonbase, and of the installed packages that it builds on."""
    import moonbase

    versions = {"python": platform.python_version(), "moonbase": moonbase.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(package_folder: Path | None = None) -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` appended where its tracked files were changed.

    None for a package installed from an archive. Only a `.git` directly beside the package counts: an environment
    inside somebody's own repository must not lend us that repository's commit. The hash is read from the files, so git
    need not be installed; git is asked about changes only, and given up on after a few seconds.
    """
    root = (package_folder or Path(__file__).resolve().parents[1]).parent
    commit = _head_commit(root / ".git")
    if commit is None:
        return None
    changes = _output("git", "-C", str(root), "-c", "core.fsmonitor=false", "status", "--porcelain",
                      "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def _head_commit(git: Path) -> str | None:
    try:
        if git.is_file():
            # A worktree or submodule: the file says where its own folder is.
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head if _COMMIT.fullmatch(head) else None
        name = head.removeprefix("ref:").strip()
        common = git
        if (git / "commondir").is_file():
            common = (git / (git / "commondir").read_text(encoding="utf-8").strip()).resolve()
        for folder in (git, common):
            if (folder / name).is_file():
                commit = (folder / name).read_text(encoding="utf-8").strip()
                return commit if _COMMIT.fullmatch(commit) else None
        for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
            commit, _, packed_name = line.partition(" ")
            if packed_name == name and _COMMIT.fullmatch(commit):
                return commit
    except (OSError, UnicodeDecodeError):
        pass
    return None


def _output(*command: str) -> str | None:
    """What a program prints, or None where it is absent, fails or takes too long."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=_SECONDS, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()


def _cpu_name() -> str:
    name = None
    if sys.platform == "linux":
        fields: dict[str, str] = {}
        for line in _read("/proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        name = fields.get("model name") or fields.get("Model") or fields.get("Hardware")
    elif sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    """Cores of this process: its affinity, and a container's quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_bytes() -> int | None:
    """Memory of this process: the machine's, or a container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def free_memory_bytes() -> int | None:
    """Memory that this process can still take, on Linux; elsewhere all that it may ever have, None where unknown.

    A container's limit counts where it is tighter. Cached files count as free: they give way.
    """
    free = _memory_bytes()
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if available and free is not None:
        free = min(free, int(available[1]) * 1024)
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and free is not None:
        cached = re.search(r"^inactive_file (\d+)", _read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        free = min(free, max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    return free


def _gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ", ".join(name if number == 1 else f"{number} × {name}" for name, number in counts.items())


def _os_name() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{distribution} ({kernel})" if distribution else kernel


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
