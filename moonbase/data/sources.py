"""Which files a source stands for, and the account of everything that was left out.

A source is a folder, a file, a pattern (`src/**/*.py`) or `hub:NAME`. Nothing is left out silently: every file or
record that is not used is counted under a reason, and the first names under each reason are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moonbase.errors import UserError
from moonbase.recipe import Source

HUB = "hub:"

TEXT_SUFFIXES = frozenset((".txt", ".md", ".py", ".rst"))
LINES_SUFFIXES = frozenset((".jsonl", ".ndjson", ".jsonlines", ".json-lines"))
TABLE_SUFFIXES = frozenset((".parquet",))
PACKED_SUFFIXES = frozenset((".gz", ".zst"))

SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "site-packages", "dist-packages"))
"""Folders that are not entered (nor are hidden ones): copies and installed code, unless the source itself is one."""


@dataclass
class Skipped:
    """What was left out and why."""

    keep: int = 20
    """How many names to keep under each reason."""
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str | Path) -> None:
        """Count one file or record under `reason`."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < self.keep:
            # A file name may hold bytes that are no UTF-8; the summary is written as UTF-8.
            names.append(os.fsencode(name).decode("utf-8", "replace"))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_json(self) -> dict[str, dict[str, object]]:
        """Reason -> {"count", "names"}, the most frequent reason first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return {reason: {"count": count, "names": self.names[reason]} for reason, count in ordered}

    def one_line(self) -> str:
        """For messages: `3 binary, 1 empty`."""
        return ", ".join(f"{entry['count']} {reason}" for reason, entry in self.to_json().items()) or "nothing"


@dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    path: Path
    relative: str
    """Path inside the source, with forward slashes: the same on every machine."""
    size: int
    modified_ns: int
    kind: str
    """text, lines or table."""
    packing: str
    """The suffix of the compression, or nothing."""

    @property
    def text_bytes(self) -> int:
        """Bytes of text inside, roughly: packed text is about four times as large as its file."""
        return self.size * (4 if self.packing else 1)


def file_kind(name: str) -> tuple[str, str] | None:
    """(kind, packing) by the file's name, None where it is not a type that is read."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED_SUFFIXES else ""
    last = suffixes[-1] if suffixes else ""
    if last in TEXT_SUFFIXES:
        return "text", packing
    if last in LINES_SUFFIXES:
        return "lines", packing
    if last in TABLE_SUFFIXES and not packing:
        return "table", packing
    return None


def list_files(source: str, skipped: Skipped) -> list[SourceFile]:
    """The readable files of a source, sorted by their path inside it. Raises UserError where nothing is there."""
    path = Path(source).expanduser()
    pattern = None
    if not os.path.lexists(path) and any(mark in source for mark in "*?["):
        path, pattern = _split_pattern(path)
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"data source {source}: {error.strerror or error}") from None
    if stat.S_ISREG(status.st_mode):
        # A file that was named is meant, whatever its suffix.
        packing = path.suffix.lower() if path.suffix.lower() in PACKED_SUFFIXES else ""
        kind, packing = file_kind(path.name) or ("text", packing)
        return [SourceFile(path, path.name, status.st_size, status.st_mtime_ns, kind, packing)]
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"data source {source}: neither a file nor a folder")
    found = []
    for file, relative in _walk(path, skipped):
        if pattern and not pattern.fullmatch(relative):
            continue
        kind = file_kind(relative)
        if kind is None:
            skipped.add("other file type", file)
            continue
        try:
            status = file.stat()
        except OSError:
            skipped.add("unreadable", file)
            continue
        if not stat.S_ISREG(status.st_mode):
            skipped.add("not a regular file", file)
            continue
        found.append(SourceFile(file, relative, status.st_size, status.st_mtime_ns, *kind))
    return sorted(found, key=lambda file: file.relative)


def _split_pattern(path: Path) -> tuple[Path, re.Pattern[str]]:
    """The folder before the first wildcard, and an expression for paths below it."""
    parts = path.parts
    first = next(index for index, part in enumerate(parts) if any(mark in part for mark in "*?["))
    expression = ""
    for index, part in enumerate(parts[first:], start=first):
        last = index == len(parts) - 1
        if part == "**":
            expression += ".*" if last else "(?:[^/]+/)*"
        else:
            expression += _WILDCARD.sub(_wildcard_expression, part) + ("" if last else "/")
    return Path(*parts[:first]), re.compile(expression, re.DOTALL)


_WILDCARD = re.compile(r"(\*+)|(\?)|\[(!?)([^\]]+)\]|(.)", re.DOTALL)


def _wildcard_expression(match: re.Match[str]) -> str:
    star, question, negation, characters, other = match.groups()
    if star:
        return "[^/]*"
    if question:
        return "[^/]"
    if characters:
        return f"[{'^/' if negation else ''}{characters}]".replace("\\", "\\\\")
    return re.escape(other)


def _walk(root: Path, skipped: Skipped) -> Iterator[tuple[Path, str]]:
    """Every file below `root` with its path inside. Follows links, but enters no folder twice."""
    entered: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                skipped.add("folder reached twice", folder)
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            skipped.add("unreadable folder", folder)
            continue
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:
                skipped.add("unreadable", entry.path)
                continue
            if entry.name.startswith("."):
                skipped.add("hidden", entry.path)
            elif not is_folder:
                yield Path(entry.path), prefix + entry.name
            elif entry.name in SKIPPED_FOLDERS:
                skipped.add("folder of copies or installed code", entry.path)
            else:
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))


def sampling_order(files: list[SourceFile], seed: int) -> list[SourceFile]:
    """The files in the order of a hash of their names, so that any first part of them is a fair sample of all."""
    key = seed.to_bytes(8, "little", signed=True)
    return sorted(files, key=lambda file: hashlib.blake2b(os.fsencode(file.relative), key=key).digest())


def installed_python_sources() -> list[Source]:
    """Real text that every machine has: the Python standard library and the installed packages, .py files only."""
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["purelib"], paths["platlib"]]
    unique = dict.fromkeys(os.path.realpath(folder) for folder in folders if folder and os.path.isdir(folder))
    return [Source(path=f"{folder}/**/*.py") for folder in unique]
