"""The verb itself on a disk that is full or may not be written to, whoever runs it: one line, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moonbase.cli import main
from tests.train.tiny import checkpoints, content, metrics


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int | str | None, str]]:
    """`verb("train", ...)` -> exit code and the last line of standard error; there is never a traceback."""

    def call(*words: object) -> tuple[int | str | None, str]:
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return left.value.code, (err.splitlines() or [""])[-1]

    return call


class FullDisk:
    """Flushing to the disk fails from some call on. Many file systems tell of a full disk only then."""

    def __init__(self, patch: pytest.MonkeyPatch, good: int) -> None:
        self.left, self.fsync = good, os.fsync
        patch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)


@pytest.mark.parametrize("good", [0, 3, 12, 20, 30, 45])
def test_a_full_disk_at_any_flush(good: int, verb: Callable, recipe_file: Callable[..., Path], whole: Path,
                                  tmp_path: Path) -> None:
    """While the corpus, the facts or a checkpoint is written. With room again the run comes to what it would have."""
    file, folder = recipe_file(checkpoint__every_steps=3, checkpoint__keep_last=9), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        full = FullDisk(patch, good)
        code, said = verb("train", file, "--out", folder)
    assert full.left < 0 and code == 2
    assert said.startswith(f"moonbase: error: {folder}") and "the disk is full. Free some space" in said
    assert not list(folder.rglob(".partial*"))
    saved = checkpoints(folder) if (folder / "checkpoints").is_dir() else []
    assert all(content(folder / "checkpoints" / name) == content(whole / "checkpoints" / name) for name in saved)
    assert verb("train", folder, "--resume")[0] == 0 if saved else verb("train", file, "--out", folder)[0] == 0
    assert metrics(folder) == metrics(whole) and checkpoints(folder) == checkpoints(whole)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """`read_only(folder)` -> a copy that may not be written to, by root neither."""
    place = tmp_path / "read-only"
    place.mkdir()
    mounted = False

    def make(folder: Path) -> Path:
        nonlocal mounted
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
            if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("root may write everywhere, and cannot mount a tmpfs here")
            mounted = True
        shutil.copytree(folder, place / "run")
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        else:
            for path in (place / "run" / ".lock", place / "run" / "checkpoints", place / "run", place):
                path.chmod(0o555)
        return place

    yield make
    if mounted:
        subprocess.run(["umount", str(place)], capture_output=True, check=False)
    else:
        for path in (place, place / "run", place / "run" / "checkpoints"):
            if path.exists():
                path.chmod(0o755)


def test_a_read_only_folder(read_only: Callable[[Path], Path], verb: Callable, recipe_file: Callable[..., Path],
                            whole: Path) -> None:
    place = read_only(whole)
    for words in (("train", recipe_file(), "--out", place / "new"), ("train", place / "run", "--resume"),
                  ("quickstart", "--out", place / "new")):
        code, said = verb(*words)
        assert code == 2 and said.startswith(f"moonbase: error: {place}"), (words, said)
        assert "no permission to write here. Choose a folder that you may write to" in said, (words, said)
    assert checkpoints(place / "run") == checkpoints(whole)
