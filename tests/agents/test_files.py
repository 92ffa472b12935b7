"""The file tools against what the file system itself says, and against somebody who wants out."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import socket
import threading
from pathlib import Path

import pytest

from moonbase.agents.tools.files import FILE_BYTES, Folder, file_tools
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset
from moonbase.errors import UserError

CONTEXT = ToolContext("main", 1, "main#1.0")
SECRET = "what nobody is to read"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def call(tools: Toolset, name: str, **arguments) -> ToolResult:
    async def within() -> ToolResult:
        return await asyncio.wait_for(tools.call(name, json.dumps(arguments), CONTEXT), 60)

    return asyncio.run(within())


def test_write_read_edit_list(work: Path) -> None:
    tools = file_tools(work)
    assert call(tools, "write_file", path="a/b/täst.txt", content="eins\r\nzwei €\n").content == "Created a/b/täst.txt."
    assert (work / "a/b/täst.txt").read_bytes() == "eins\r\nzwei €\n".encode()
    assert call(tools, "read_file", path="./a//b/täst.txt").content == "eins\r\nzwei €\n"
    assert call(tools, "read_file", path="/agent/a/b/täst.txt").content == "eins\r\nzwei €\n"
    assert not call(tools, "edit_file", path="a/b/täst.txt", old="zwei", new="drei").error
    assert (work / "a/b/täst.txt").read_bytes() == "eins\r\ndrei €\n".encode()
    assert call(tools, "write_file", path="a/b/täst.txt", content="").content == "Replaced a/b/täst.txt."
    assert call(tools, "read_file", path="a/b/täst.txt").content == "[the file is empty]"
    (work / "z.py").write_text("12345")
    assert call(tools, "list_files").content == "a/\na/b/\na/b/täst.txt  0 bytes\nz.py  5 bytes"
    assert call(tools, "list_files", pattern="*.py").content == "z.py  5 bytes"
    assert call(tools, "list_files", path="a").content == "a/b/\na/b/täst.txt  0 bytes"
    assert call(tools, "list_files", path="a/b", pattern="*.py").content == "[nothing]"


def test_an_edit_must_be_clear(work: Path) -> None:
    tools = file_tools(work)
    (work / "a").write_text("one two two")
    assert "occurs 2 times" in call(tools, "edit_file", path="a", old="two", new="x").content
    assert "occurs 0 times" in call(tools, "edit_file", path="a", old="three", new="x").content
    assert "empty" in call(tools, "edit_file", path="a", old="", new="x").content
    assert call(tools, "edit_file", path="none", old="a", new="x").content == "Error: none does not exist."
    assert (work / "a").read_text() == "one two two"


def test_a_long_file_comes_in_parts(work: Path) -> None:
    lines = [f"line {number} \u2028 \x0c {'x' * random.Random(number).randrange(100)}\n" for number in range(3000)]
    (work / "long").write_text("".join(lines))
    tools, whole, first = file_tools(work), "", 1
    while True:
        content, _, note = call(tools, "read_file", path="long", first_line=first).content.partition("[… lines ")
        whole += content
        if not note:
            break
        following = int(note.partition("first_line=")[2].split()[0])
        assert content == "".join(lines[first - 1 : following - 1])
        first = following
    assert whole == "".join(lines)
    assert call(tools, "read_file", path="long", first_line=3001).error


@pytest.mark.parametrize("path", [
    "../outside/secret", "a/../../outside/secret", "/etc/passwd", "//etc/passwd", "..", "/", "/agent/../outside/secret",
    "/agentx", "link", "link/secret", "folder/link", "folder/up/outside/secret", "loop", "loop/x", "a\0b", "\ud800",
    "x" * 300, "/".join("x" * 100), "secret/x", "", ".", "/agent",
])
def test_no_way_out(path: str, work: Path, outside: Path) -> None:
    (work / "folder").mkdir()
    (work / "a").mkdir()
    (work / "link").symlink_to(outside)
    (work / "folder/link").symlink_to(outside / "secret")
    (work / "folder/up").symlink_to("../..")
    (work / "loop").symlink_to("loop")
    (work / "secret").write_text("a file, no folder")
    tools = file_tools(work)
    for name, more in (("read_file", {}), ("write_file", {"content": "x"}), ("edit_file", {"old": "what", "new": "x"})):
        result = call(tools, name, path=path, **more)
        assert result.error and result.content.startswith("Error") and SECRET not in result.content
        assert "Traceback" not in result.content and "\n" not in result.content
    if path not in ("", ".", "/agent"):
        result = call(tools, "list_files", path=path)
        assert result.error and SECRET not in result.content
    assert "secret" not in call(tools, "list_files", path="folder").content
    assert os.listdir(outside) == ["secret"] and (outside / "secret").read_text() == SECRET
    assert sorted(os.listdir(work)) == ["a", "folder", "link", "loop", "secret"]


def test_a_link_put_in_the_way_meanwhile(work: Path, outside: Path) -> None:
    """One thread swaps a folder and a file for links to the outside as fast as it can; the others never get through."""
    (outside / "file").write_text(SECRET)
    exchange = ctypes.CDLL(None).renameat2
    (work / "real").mkdir()
    (work / "real/file").write_text("fine")
    (work / "real/plain").write_text("fine")
    (work / "out").symlink_to(outside)
    (work / "real/out").symlink_to(outside / "secret")
    stop, failures = threading.Event(), []

    def swap() -> None:
        while not stop.is_set():
            for one, other in ((work / "real", work / "out"), (work / "real/plain", work / "real/out")):
                for _ in range(2):
                    exchange(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE)

    swapping = threading.Thread(target=swap)
    swapping.start()
    folder, seen = Folder(work), set()
    try:
        for number in range(3000):
            path = ("real/file", "real/plain", "real/new")[number % 3]
            try:
                if number % 3 == 2:
                    folder.write(path, "mine")
                elif folder.read(path) == SECRET:
                    failures.append(path)
                seen.add("through")
            except Exception as error:
                seen.add(type(error).__name__)
    finally:
        stop.set()
        swapping.join()
    assert failures == [] and seen == {"through", "FileError"}
    assert sorted(os.listdir(outside)) == ["file", "secret"]
    assert (outside / "secret").read_text() == (outside / "file").read_text() == SECRET


def test_what_is_no_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(work / "pipe")
    (work / "folder").mkdir()
    (work / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(work)  # its path has room for a hundred bytes
        server.bind("socket")
    tools = file_tools(work)
    expected = {"pipe": "named pipe", "folder": "folder", "zero": "symbolic link", "socket": "socket"}
    if os.geteuid() == 0:
        os.mknod(work / "device", 0o600 | 0o020000, os.makedev(1, 5))
        expected["device"] = "device"
    for path, word in expected.items():
        for name, more in (("read_file", {}), ("write_file", {"content": "x"}), ("edit_file", dict(old="a", new="b"))):
            result = call(tools, name, path=path, **more)
            assert result.error and word in result.content, (name, path, result.content)
    listing = call(tools, "list_files").content
    assert "pipe  (a named pipe)" in listing and "zero  (a symbolic link; links are not followed)" in listing


def test_what_is_no_text(work: Path) -> None:
    (work / "binary").write_bytes(b"\x89PNG\0\1\2")
    (work / "latin").write_bytes("schön".encode("latin-1"))
    tools = file_tools(work)
    assert call(tools, "read_file", path="binary").content == "Error: binary is a binary file of 7 bytes."
    assert "no UTF-8" in call(tools, "read_file", path="latin").content
    assert "surrogate" in call(tools, "write_file", path="x", content="\ud800").content
    name = os.fsencode(work) + b"/bad\xff"
    Path(os.fsdecode(name)).write_text("x")
    assert "bad\\xff  1 bytes" in call(tools, "list_files").content


def test_sizes(work: Path) -> None:
    with open(work / "sparse", "wb") as file:
        file.truncate(1 << 40)
    tools = file_tools(work)
    assert "1,099,511,627,776 bytes" in call(tools, "read_file", path="sparse").content
    assert "a file takes" in call(tools, "write_file", path="x", content="x" * (FILE_BYTES + 1)).content
    assert os.listdir(work) == ["sparse"]
    for number in range(1200):
        (work / f"file{number:04}").touch()
    lines = call(tools, "list_files").content.splitlines()
    assert len(lines) == 1001 and "there are more" in lines[-1]
    assert lines[:-1] == [f"file{number:04}  0 bytes" for number in range(1000)]


def test_a_write_is_whole_or_not_at_all(work: Path) -> None:
    path, texts = work / "file", ("a" * 300_000, "b" * 300_000)
    path.write_text(texts[0])
    path.chmod(0o754)
    (work / "other").hardlink_to(path)
    folder, stop, torn = Folder(work), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if path.read_text() not in texts:
                torn.append(1)

    reading = threading.Thread(target=read)
    reading.start()
    for number in range(200):
        folder.write("file", texts[number % 2])
    stop.set()
    reading.join()
    assert not torn and path.stat().st_mode & 0o777 == 0o754
    # A second name of the old file keeps the old content: nothing is written through it.
    assert (work / "other").read_text() == texts[0]
    assert sorted(os.listdir(work)) == ["file", "other"]


def test_edits_at_once_lose_nothing(work: Path) -> None:
    (work / "file").write_text("".join(f"<{number}>" for number in range(100)))
    tools = file_tools(work)

    async def edit() -> None:
        await asyncio.gather(*(tools.call("edit_file", json.dumps(
            {"path": "file", "old": f"<{number}>", "new": f"({number})"}), CONTEXT) for number in range(100)))

    asyncio.run(edit())
    assert (work / "file").read_text() == "".join(f"({number})" for number in range(100))


def test_no_descriptor_is_left(work: Path) -> None:
    tools = file_tools(work)
    before = os.listdir("/proc/self/fd")
    for path in ("a/b/c", "a/b", "../x", "a/b/c/d", "none/x"):
        for name, more in (("read_file", {}), ("write_file", {"content": "x"}), ("list_files", {})):
            call(tools, name, path=path, **more)
    assert os.listdir("/proc/self/fd") == before


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        file_tools(tmp_path / "none")
