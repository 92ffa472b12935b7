"""Nothing half-written is ever left under its final name: killed writers, full disks, forbidden folders."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moonbase import files
from moonbase.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def start(code: str, *arguments: object, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """A Python process of its own that may be killed at any moment."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_and_replace(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "first, with ünïcödé\n")
    assert target.read_bytes() == "first, with ünïcödé\n".encode()
    files.write_bytes(target, b"second")
    assert target.read_bytes() == b"second"
    assert names(tmp_path) == ["a.txt"]


KILLED_BEFORE_RENAME = """
import os, sys, time
from moonbase import files
def stuck(descriptor):
    print("writing", flush=True)
    time.sleep(120)
os.fsync = stuck
files.write_bytes(sys.argv[1], b"n" * 100_000)
"""


def test_killed_before_the_rename_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    files.write_text(target, "old")
    writer = start(KILLED_BEFORE_RENAME, target)
    assert writer.stdout.readline() == "writing\n", writer.stderr.read()
    writer.kill()
    writer.communicate()
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["state.json"]


HAMMER = """
import sys
from moonbase import files
print("writing", flush=True)
while True:
    for letter in b"abcdef":
        files.write_bytes(sys.argv[1], bytes([letter]) * 300_000)
"""


def test_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    target, chance = tmp_path / "data.bin", random.Random(0)
    files.write_bytes(target, b"a" * 300_000)
    for _ in range(6):
        writer = start(HAMMER, target)
        assert writer.stdout.readline() == "writing\n", writer.stderr.read()
        time.sleep(chance.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        content = target.read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["data.bin"]


KILLED_IN_FOLDER = """
import sys, time
from moonbase import files
with files.write_folder(sys.argv[1]) as folder:
    (folder / "model-1.safetensors").write_bytes(b"n" * 1000)
    print("writing", flush=True)
    time.sleep(120)
"""


def test_killed_while_filling_a_folder(tmp_path: Path) -> None:
    writer = start(KILLED_IN_FOLDER, tmp_path / "step-1")
    assert writer.stdout.readline() == "writing\n", writer.stderr.read()
    writer.kill()
    writer.communicate()
    assert not (tmp_path / "step-1").exists()
    assert len(names(tmp_path)) == 1
    files.remove_partial(tmp_path)
    assert names(tmp_path) == []


KILLED_BETWEEN_RENAMES = """
import os, sys, time
from moonbase import files
rename, count = os.rename, 0
def stuck(source, target):
    global count
    count += 1
    if count == 2:
        print("renaming", flush=True)
        time.sleep(120)
    rename(source, target)
os.rename = stuck
with files.write_folder(sys.argv[1]) as folder:
    (folder / "version").write_text("new")
"""


def test_killed_while_replacing_a_folder_loses_neither(tmp_path: Path) -> None:
    target = tmp_path / "best-model"
    with files.write_folder(target) as folder:
        (folder / "version").write_text("old")
    writer = start(KILLED_BETWEEN_RENAMES, target)
    assert writer.stdout.readline() == "renaming\n", writer.stderr.read()
    writer.kill()
    writer.communicate()
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["best-model"]
    assert (target / "version").read_text() == "old"


def test_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-1"
    with files.write_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "old").write_text("old")
        assert not target.exists()
    with files.write_folder(target) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["sub"]
    assert names(target) == ["new"]
    assert names(target.parent) == ["step-1"]


def test_an_exception_leaves_no_trace(tmp_path: Path) -> None:
    with files.write_folder(tmp_path / "kept") as folder:
        (folder / "file").write_text("old")
    for error in (ValueError("mistake"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.write_folder(tmp_path / "kept") as folder:
            (folder / "file").write_text("new")
            raise error
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "old"


def test_interrupted_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == []


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, the always full disk, is absent")


@needs_full
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial file is led to /dev/full, so that the kernel itself reports a full disk."""
    files.write_text(tmp_path / "state.json", "old")

    def on_a_full_disk(path: Path) -> Path:
        partial = path.parent / f"{files.PARTIAL}{path.name}"
        partial.symlink_to("/dev/full")
        return partial

    monkeypatch.setattr(files, "partial_sibling", on_a_full_disk)
    with pytest.raises(UserError, match=r"state\.json: the disk is full\. Free some space") as caught:
        files.write_text(tmp_path / "state.json", "new" * 100_000)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state.json").read_text() == "old"
    assert names(tmp_path) == ["state.json"]


@needs_full
def test_full_disk_while_filling_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-1: the disk is full"), files.write_folder(tmp_path / "step-1") as folder:
        (folder / "weights").symlink_to("/dev/full")
        (folder / "weights").write_bytes(b"n" * 100_000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", [
    "run/.partial-exported-12-ab34/model-00001-of-00001.safetensors", "run/.partial-exported-12-ab34",
    "run/.partial-.partial-exported-5-cd-12-ab34/.partial-x.json-12-ef",
])
def test_nobody_is_told_the_name_under_which_things_are_written_aside(path: str) -> None:
    for number in (errno.ENOSPC, errno.EACCES, errno.EIO):
        message = str(files.explain_os_error(OSError(number, os.strerror(number), path), Path(path)))
        assert message.startswith("run/exported") and ".partial" not in message and "ab34" not in message


FORBIDDEN = """
import os, sys
from moonbase import files
from moonbase.errors import UserError
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write anywhere
def folder(path):
    with files.write_folder(path):
        pass
for attempt in (lambda: files.write_text("a.txt", "x"), lambda: files.make_folder("sub"), lambda: folder("step-1")):
    try:
        attempt()
    except UserError as error:
        print(error)
    else:
        print("written")
"""


def test_forbidden_folder(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    writer = start(FORBIDDEN, cwd=locked)
    said, complaint = writer.communicate(timeout=300)
    locked.chmod(0o755)
    if "seteuid" in complaint and "PermissionError" in complaint:
        pytest.skip("this process can neither be refused a folder nor become another user")
    lines = said.splitlines()
    assert len(lines) == 3, complaint
    for line, name in zip(lines, ("a.txt", "sub", "step-1"), strict=True):
        assert line.startswith(f"{name}: no permission to write here"), line
    assert names(locked) == []


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="a file with this name is in the way"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(UserError, match="a file with this name is in the way"), files.write_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="part of this path is a file"):
        files.write_text(tmp_path / "file" / "x", "text")
    with pytest.raises(UserError, match="part of this path is a file"):
        files.make_folder(tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "precious"
    assert names(tmp_path) == ["file"]


def test_a_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a: Is a directory"):
        files.write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]


def test_absent_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: no such folder"):
        files.write_text(tmp_path / "absent" / "a", "text")


def test_remove_partial_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    (tmp_path / f"{files.PARTIAL}a-1-2").write_text("x")
    (tmp_path / f"{files.PARTIAL}b-1-2").mkdir()
    (tmp_path / f"{files.PARTIAL}b-1-2" / "c").write_text("x")
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["kept"]
