"""Reading a folder that a stranger made: only regular files inside it, no link is followed, no size is trusted."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import BundleError, clean, parse

MOST_FILES = 10_000
LARGEST_FILE = 64 * 2**30
"""Bytes of a file, and of all of them together: so much can be read in minutes."""
LARGEST_DOCUMENT = 64 * 2**20
"""Bytes of a file that is read whole: manifest, results, a report."""
LONGEST_LINE = 16 * 2**20
"""Bytes of one record with its output."""
_PIECE = 2**20


def walk(bundle: Path) -> dict[str, int]:
    """Name (with /) and bytes of every file. Raises BundleError at a link, a device or too many of them."""
    if not bundle.is_dir():
        raise UserError(f"{bundle}: no such folder; a bundle is the folder that `seal` wrote")
    sizes: dict[str, int] = {}
    waiting = [""]
    folders = 0
    while waiting:
        folder = waiting.pop()
        folders += 1
        try:
            with os.scandir(bundle / folder) as entries:
                for entry in entries:
                    _note(entry, folder, sizes, waiting)
                    if len(sizes) + len(waiting) + folders > MOST_FILES:
                        raise BundleError(f"more than {MOST_FILES} files")
        except OSError as error:
            raise BundleError(f"{clean(folder) or 'the folder'}: {error.strerror}") from None
    if sum(sizes.values()) > LARGEST_FILE:
        raise BundleError(f"its files have {sum(sizes.values())} bytes, more than a bundle may hold")
    return dict(sorted(sizes.items()))


def _note(entry: os.DirEntry[str], folder: str, sizes: dict[str, int], waiting: list[str]) -> None:
    name = f"{folder}/{entry.name}" if folder else entry.name
    facts = entry.stat(follow_symlinks=False)
    if not safe_name(name):
        raise BundleError(f"{clean(name)!r}: not a name for a file of a bundle")
    if stat.S_ISDIR(facts.st_mode):
        waiting.append(name)
    elif not stat.S_ISREG(facts.st_mode):
        kind = "a link" if stat.S_ISLNK(facts.st_mode) else "neither a file nor a folder"
        raise BundleError(f"{name}: {kind}; a bundle holds plain files only")
    elif facts.st_size > LARGEST_FILE:
        raise BundleError(f"{name}: {facts.st_size} bytes is more than a bundle may hold")
    else:
        sizes[name] = facts.st_size


def safe_name(name: str) -> bool:
    """A relative path inside the bundle that means the same everywhere."""
    parts = name.split("/")
    return (0 < len(name) <= 1000 and name.isprintable() and "\\" not in name and ":" not in name
            and all(part not in ("", ".", "..") for part in parts))


def open_file(bundle: Path, name: str) -> BinaryIO:
    """Open a file that `walk` found; refuses one that became a link or a device since."""
    if not safe_name(name):
        raise BundleError(f"{clean(name)!r}: not a name for a file of a bundle")
    try:
        descriptor = os.open(bundle / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise BundleError(f"{name}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{name}: not a plain file")
    return os.fdopen(descriptor, "rb")


def read_document(bundle: Path, name: str) -> bytes:
    """A file whole, where it is not too large for that."""
    with open_file(bundle, name) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if len(data) > LARGEST_DOCUMENT:
        raise BundleError(f"{name}: larger than {LARGEST_DOCUMENT} bytes")
    return data


def read_json(bundle: Path, name: str) -> dict[str, Any]:
    """A JSON object, strictly read."""
    try:
        value = parse(read_document(bundle, name))
    except BundleError as error:
        raise BundleError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{name}: not a JSON object")
    return value


def read_lines(bundle: Path, name: str) -> Iterator[bytes]:
    """Lines without their end; the last one must have an end too. Raises BundleError at one that is too long."""
    with open_file(bundle, name) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if not line.endswith(b"\n"):
                problem = "too long" if len(line) > LONGEST_LINE else "cut off"
                raise BundleError(f"{name}, line {number}: {problem}")
            yield line[:-1]


def file_digest(bundle: Path, name: str) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    total = hashlib.sha256()
    with open_file(bundle, name) as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()
