"""Which files a source stands for."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from moonbase.data.sources import Skipped, installed_python_sources, list_files, sampling_order
from moonbase.errors import UserError


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}\n")


def names(source: str | Path, skipped: Skipped | None = None) -> list[str]:
    return [file.relative for file in list_files(str(source), skipped or Skipped())]


def test_sorted_and_by_type(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "a/z.md", "a/b.py", "c.rst", "d.jsonl.gz", "e.TXT.zst", "f.png", "g", "h.parquet.gz")
    skipped = Skipped()
    files = {file.relative: (file.kind, file.packing) for file in list_files(str(tmp_path), skipped)}
    assert list(files) == ["a/b.py", "a/z.md", "b.txt", "c.rst", "d.jsonl.gz", "e.TXT.zst"]
    assert files["d.jsonl.gz"] == ("lines", ".gz") and files["e.TXT.zst"] == ("text", ".zst")
    assert skipped.counts == {"other file type": 3}
    assert skipped.names["other file type"] == [str(tmp_path / name) for name in ("f.png", "g", "h.parquet.gz")]


def test_hidden_and_installed_folders_are_counted_not_entered(tmp_path: Path) -> None:
    fill(tmp_path, "a.py", ".git/b.py", "node_modules/c.py", "x/__pycache__/d.py", "lib/site-packages/e.py", ".h.py")
    skipped = Skipped()
    assert names(tmp_path, skipped) == ["a.py"]
    assert skipped.counts == {"hidden": 2, "folder of copies or installed code": 3}
    # Naming such a folder means it.
    assert names(tmp_path / "lib" / "site-packages") == ["e.py"]


def test_link_loops_end(tmp_path: Path) -> None:
    fill(tmp_path, "a/b/c.txt")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    skipped = Skipped()
    assert names(tmp_path, skipped) == ["a/b/c.txt"]
    assert skipped.counts == {"folder reached twice": 1, "unreadable": 2}


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped = Skipped()
    assert names(tmp_path, skipped) == ["a.txt"]
    assert skipped.counts == {"not a regular file": 1}
    with pytest.raises(UserError, match="neither a file nor a folder"):
        list_files(str(tmp_path / "pipe.txt"), Skipped())


def test_patterns(tmp_path: Path) -> None:
    fill(tmp_path, "a.py", "b.txt", "x/c.py", "x/y/d.py", "x/y/e1.md", "x/y/e2.md")
    assert names(f"{tmp_path}/**/*.py") == ["a.py", "x/c.py", "x/y/d.py"]
    assert names(f"{tmp_path}/*.py") == ["a.py"]
    assert names(f"{tmp_path}/x/*/e[1].md") == ["y/e1.md"]
    assert names(f"{tmp_path}/x/**/e?.md") == ["y/e1.md", "y/e2.md"]
    assert names(f"{tmp_path}/**/e[!1].md") == ["x/y/e2.md"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    fill(tmp_path, "data [v1]/a.txt")
    assert names(tmp_path / "data [v1]") == ["a.txt"]


def test_a_named_file_is_meant_whatever_its_suffix(tmp_path: Path) -> None:
    fill(tmp_path, "README", "notes.xyz.gz")
    assert [(file.kind, file.packing) for file in list_files(str(tmp_path / "README"), Skipped())] == [("text", "")]
    assert [(file.kind, file.packing) for file in list_files(str(tmp_path / "notes.xyz.gz"), Skipped())] == [
        ("text", ".gz")
    ]


def test_missing_sources_are_named(tmp_path: Path) -> None:
    for source in (tmp_path / "gone", f"{tmp_path}/gone/*.py"):
        with pytest.raises(UserError, match="gone"):
            list_files(str(source), Skipped())


def test_sampling_order_depends_on_names_and_seed_alone(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{letter}.txt" for letter in "abcdefghijklmnop"))
    files = list_files(str(tmp_path), Skipped())
    first = [file.relative for file in sampling_order(files, 0)]
    assert sorted(first) == [file.relative for file in files] != first
    assert first == [file.relative for file in sampling_order(files[::-1], 0)]
    assert first != [file.relative for file in sampling_order(files, 1)]


def test_installed_python_sources() -> None:
    """The standard library without what is installed inside it, and the installed packages."""
    sources = installed_python_sources()
    assert sources[0].path == os.path.realpath(sysconfig.get_paths()["stdlib"]) + "/**/*.py"
    listed = names(sources[0].path)
    assert "json/decoder.py" in listed
    assert not any("site-packages" in name or not name.endswith(".py") for name in listed)
    assert any("pydantic/main.py" in names(source.path) for source in sources[1:])


def test_summary_keeps_all_counts_and_some_names() -> None:
    skipped = Skipped(keep=2)
    for number in range(5):
        skipped.add("empty", f"file-{number}")
    skipped.add("binary", os.fsdecode(b"\xff.txt"))
    assert skipped.total == 6 and skipped.one_line() == "5 empty, 1 binary"
    assert skipped.to_json() == {
        "empty": {"count": 5, "names": ["file-0", "file-1"]},
        "binary": {"count": 1, "names": ["\ufffd.txt"]},
    }
