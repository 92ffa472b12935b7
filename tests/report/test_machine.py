from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from moonbase.report import git_commit, machine, machine_facts, package_versions


def test_machine_facts_fit_into_json():
    facts = machine_facts()
    assert list(facts) == ["cpu", "cores", "memory_bytes", "gpu", "os"]
    assert json.loads(json.dumps(facts)) == facts
    assert isinstance(facts["cpu"], str) and facts["cpu"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert facts["memory_bytes"] > 1 << 20


def test_free_memory_heeds_a_containers_limit(monkeypatch):
    total = machine_facts()["memory_bytes"]
    assert 0 < machine.free_memory_bytes() <= total
    files = {"/proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    2000 kB\n"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.free_memory_bytes() == 2000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "900000\n"}
    assert machine.free_memory_bytes() == 2000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "1000000\n"
    assert machine.free_memory_bytes() == 100_000
    files["/sys/fs/cgroup/memory.stat"] = "anon 7\ninactive_file 300000\n"
    assert machine.free_memory_bytes() == 400_000


def test_package_versions():
    versions = package_versions()
    assert versions["python"] == sys.version.split()[0]
    assert versions["torch"] == metadata.version("torch") and versions["numpy"] == metadata.version("numpy")
    assert "moonbase" in versions


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with one commit and a folder `package`; (package folder, run git)."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setattr(machine, "_SECONDS", 60.0)  # a run does not wait so long for git, a test does
    root = tmp_path / "checkout"
    (root / "package").mkdir(parents=True)
    (root / "package" / "code.py").write_text("x = 1\n")

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=A", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(root), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return root / "package", git


def test_commit_equals_what_git_says(checkout):
    package, git = checkout
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit
    git("pack-refs", "--all")
    assert git_commit(package) == commit
    git("checkout", "-q", "--detach")
    assert git_commit(package) == commit
    (package / "new.py").write_text("untracked files are not part of the commit\n")
    assert git_commit(package) == commit
    (package / "code.py").write_text("x = 2\n")
    assert git_commit(package) == f"{commit}-dirty"


def test_commit_in_a_worktree(checkout, tmp_path):
    _, git = checkout
    git("worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    assert git_commit(tmp_path / "tree" / "package") == git("rev-parse", "HEAD")


def test_no_commit_without_a_checkout_of_its_own(checkout, tmp_path):
    package, _ = checkout
    inside = package / "venv" / "site-packages" / "moonbase"
    inside.mkdir(parents=True)
    assert git_commit(inside) is None
    broken = tmp_path / "broken"
    (broken / ".git").mkdir(parents=True)
    (broken / ".git" / "HEAD").write_text("ref: refs/heads/none\n")
    assert git_commit(broken / "package") is None


def test_a_git_that_hangs_is_given_up_on(checkout, tmp_path, monkeypatch):
    package, git = checkout
    commit = git("rev-parse", "HEAD")
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("moonbase.report.machine._SECONDS", 0.2)
    assert git_commit(package) == commit
