"""The tools read_file, write_file, edit_file and list_files, within one work folder.

A path is walked one component at a time, each opened relative to the one before and never through a link (openat with
O_NOFOLLOW). So nothing outside is reached, even if somebody puts a link in the way while a call runs.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from moonbase.agents.tools.sandbox_jail import FOLDER
from moonbase.agents.tools.tool import ToolResult, Toolset, tool
from moonbase.errors import UserError

FILE_BYTES = 8 << 20
"""Of a file that is read or written whole."""
SHOWN_CHARACTERS = 30_000
LISTED = 1000
_DEEPEST = 64
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link; links are not followed"),
          (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
          (stat.S_ISBLK, "a device"))


class FileError(Exception):
    """Why a file cannot be had, for the model."""


class Folder:
    """Files below one folder, and nothing else."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises UserError if it is no folder."""
        self.path = Path(folder).resolve()
        if not self.path.is_dir():
            raise UserError(f"files: the work folder {folder} does not exist: create it first")
        self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._changing = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_root"):
            os.close(self._root)

    def read(self, path: str) -> str:
        """A text file whole. Raises FileError."""
        with self._parent(path) as (parent, name):
            content = _read_bytes(parent, name, path)
        if b"\0" in content:
            raise FileError(f"{path} is a binary file of {len(content):,} bytes")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise FileError(f"{path} is no UTF-8 text (byte {error.start:,} of {len(content):,}): a binary file, or "
                            "text in another encoding") from None

    def write(self, path: str, content: str) -> bool:
        """Create or replace a file, and the folders that it lies in; a reader sees the old or the new one, whole.

        True if it existed. Raises FileError.
        """
        with self._changing:
            return self._write(path, content)

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace a text that occurs exactly once. Raises FileError."""
        if not old:
            raise FileError("the text to replace is empty; write_file replaces whole files")
        with self._changing:
            text = self.read(path)
            count = text.count(old)
            if count != 1:
                raise FileError(f"the text to replace occurs {count} times in {path}, it must occur once: "
                                + ("give more of its surroundings" if count else "copy it exactly, spaces too"))
            self._write(path, text.replace(old, new))

    def list(self, path: str, pattern: str) -> tuple[list[str], bool]:
        """(a line for every file and folder below one, whether there are more). Raises FileError."""
        components = _components(path)
        lines: list[str] = []
        with contextlib.ExitStack() as stack:
            descriptor = self._walk(stack, components, path, make=False)
            complete = _list_below(descriptor, "/".join(components), pattern, lines, 0)
        return lines, not complete

    def _write(self, path: str, content: str) -> bool:
        try:
            encoded = content.encode()
        except UnicodeEncodeError:
            raise FileError("the content holds half of a surrogate pair, which no text has") from None
        if len(encoded) > FILE_BYTES:
            raise FileError(f"the content has {len(encoded):,} bytes; a file takes {FILE_BYTES:,} here")
        with self._parent(path, make=True) as (parent, name):
            before = _kind(parent, name, path, missing_is_fine=True)
            temporary = f".{secrets.token_hex(8)}.writing"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666,
                                 dir_fd=parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(encoded)
                    if before is not None:
                        os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & 0o777)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=parent)
                raise
        return before is not None

    @contextlib.contextmanager
    def _parent(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """(an open folder, a name in it)."""
        *folders, name = _components(path) or [""]
        if not name:
            raise FileError(f"{path!r} is a folder")
        with contextlib.ExitStack() as stack:
            try:
                yield self._walk(stack, folders, path, make), name
            except OSError as error:
                raise FileError(f"{path}: {error.strerror}") from None

    def _walk(self, stack: contextlib.ExitStack, folders: list[str], path: str, make: bool) -> int:
        descriptor = self._root
        for name in folders:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=descriptor)
                descriptor = os.open(name, _DIRECTORY, dir_fd=descriptor)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise FileError(f"{path}: there is no folder {name!r}") from None
                if error.errno in (errno.ENOTDIR, errno.ELOOP):
                    raise FileError(f"{path}: {name!r} is no folder (links are not followed)") from None
                raise FileError(f"{path}: {error.strerror}") from None
            stack.callback(os.close, descriptor)
        return descriptor


def _components(path: str) -> list[str]:
    """A relative path in parts; the sandbox's name for the work folder may stand in front. Raises FileError."""
    if path == FOLDER or path.startswith(FOLDER + "/"):
        path = path.removeprefix(FOLDER).lstrip("/")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise FileError(f"{path!r} holds half of a surrogate pair, which no path has") from None
    if "\0" in path:
        raise FileError(f"{path!r} holds a NUL, which no path can")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts:
        raise FileError(f"{path}: only paths below the work folder, relative to it and without '..', are allowed")
    if len(parts) > _DEEPEST:
        raise FileError(f"the path has {len(parts)} parts; {_DEEPEST} are allowed")
    return parts


def _kind(parent: int, name: str, path: str, missing_is_fine: bool = False) -> os.stat_result | None:
    """The status of a regular file, None if there is nothing. Raises FileError for anything else."""
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        if missing_is_fine:
            return None
        raise FileError(f"{path} does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is {next((word for test, word in _KINDS if test(status.st_mode)), 'no file')}")
    return status


def _read_bytes(parent: int, name: str, path: str) -> bytes:
    _kind(parent, name, path)
    # Something else may stand there by now: without waiting for a pipe's other end, without following, and asked again.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=parent), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} is no regular file")
        content = file.read(FILE_BYTES + 1)
    if len(content) > FILE_BYTES:
        raise FileError(f"{path} has {max(status.st_size, len(content)):,} bytes; {FILE_BYTES:,} can be read at once. "
                        "Take a part of it with other tools (head, sed)")
    return content


def _list_below(descriptor: int, prefix: str, pattern: str, lines: list[str], depth: int) -> bool:
    """Add lines; False if not all of them."""
    names, complete = [], True
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if len(names) >= 10 * LISTED:
                complete = False
                break
            names.append(entry.name)
    for name in sorted(names):
        if len(lines) >= LISTED:
            return False
        place = f"{prefix}/{name}" if prefix else name
        shown = place.encode(errors="surrogateescape").decode(errors="backslashreplace")
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            continue  # Gone since.
        folder = stat.S_ISDIR(status.st_mode)
        if fnmatch.fnmatchcase(place, pattern) or fnmatch.fnmatchcase(name, pattern):
            if folder:
                lines.append(f"{shown}/")
            elif stat.S_ISREG(status.st_mode):
                lines.append(f"{shown}  {status.st_size:,} bytes")
            else:
                lines.append(f"{shown}  ({next(word for test, word in _KINDS if test(status.st_mode))})")
        if folder and depth < _DEEPEST:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=descriptor)
            except OSError:
                continue
            try:
                complete &= _list_below(below, place, pattern, lines, depth + 1)
            finally:
                os.close(below)
    return complete


def file_tools(folder: str | os.PathLike[str]) -> Toolset:
    """read_file, write_file, edit_file, list_files. Raises UserError if the folder does not exist."""
    files = Folder(folder)

    @tool
    def read_file(path: str, first_line: int = 1) -> ToolResult:
        """Read a text file of the work folder.

        Args:
            path: Relative to the work folder.
            first_line: Where to begin; 1 is the beginning. Long files are read in parts.
        """
        return _answer(lambda: _part(files.read(path), max(first_line, 1), path))

    @tool
    def write_file(path: str, content: str) -> ToolResult:
        """Create or replace a text file in the work folder; its folder is created too.

        Args:
            path: Relative to the work folder.
            content: All of the file.
        """
        return _answer(lambda: f"{'Replaced' if files.write(path, content) else 'Created'} {path}.")

    @tool
    def edit_file(path: str, old: str, new: str) -> ToolResult:
        """Replace one piece of a text file in the work folder.

        Args:
            path: Relative to the work folder.
            old: The text to replace, exactly as it is in the file; it must occur there once.
            new: What takes its place.
        """
        def edit() -> str:
            files.edit(path, old, new)
            return f"Edited {path}."

        return _answer(edit)

    @tool
    def list_files(path: str = ".", pattern: str = "*") -> ToolResult:
        """List the files and folders below a folder, at any depth, with their sizes.

        Args:
            path: The folder, relative to the work folder.
            pattern: Which ones, such as *.py.
        """
        def listing() -> str:
            lines, more = files.list(path, pattern)
            end = ["[… there are more; list a folder below or give a pattern …]"] if more else []
            return "\n".join(lines + end) or "[nothing]"

        return _answer(listing)

    return Toolset([read_file, write_file, edit_file, list_files])


def _answer(work: Callable[[], str]) -> ToolResult:
    try:
        return ToolResult(work())
    except FileError as error:
        return ToolResult(f"Error: {error}.", error=True)
    except OSError as error:
        return ToolResult(f"Error: {error.strerror}.", error=True)


def _part(text: str, first_line: int, path: str) -> str:
    """The lines from one on, as many as fit."""
    lines = list(io.StringIO(text, newline="\n"))  # ends of lines alone; splitlines knows ten more
    if not lines:
        return "[the file is empty]"
    if first_line > len(lines):
        raise FileError(f"{path} has only {len(lines):,} lines")
    shown, length = [], 0
    for line in lines[first_line - 1 :]:
        if shown and length + len(line) > SHOWN_CHARACTERS:
            break
        shown.append(line)
        length += len(line)
    last = first_line - 1 + len(shown)
    if last == len(lines):
        return "".join(shown)
    return f"{''.join(shown)}[… lines {first_line} to {last} of {len(lines)}; go on with first_line={last + 1} …]"
