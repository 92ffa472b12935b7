"""Prompts of public sets, read from the user's own copy: the package holds none of a set that is hazardous.

A source names the file, its SHA-256 as published in the suite, and the columns. Another digest is refused: what is
measured is what the suite says. Nothing here prints, logs or keeps a text: messages hold file names, line numbers, ids
and digests.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moonbase.errors import UserError

_PIECE = 1 << 20
LARGEST = 1 << 30
"""Bytes of a file after decompression; more is no set of prompts."""


@dataclass(frozen=True)
class Source:
    """Where a set is and how it is read."""

    file: str
    """Path inside the data folder; .csv, .jsonl or .json, each also as .gz."""
    sha256: str | None = None
    """Of the file's bytes, as published. None: none is published, and the user has to put in that of his copy."""
    id: str = "id"
    prompt: str = "prompt"
    group: str | None = None
    """Column that says which group an item is in."""
    cluster: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    """Columns and the values, or lists of values, that they must have."""
    root: str | None = None
    """Of a .json file that is one object: the field with the list of rows."""
    homepage: str = ""
    """Where to get the set."""


@dataclass(frozen=True)
class Item:
    """One prompt. Its text must not be logged: see `__repr__`."""

    id: str
    prompt: str
    group: str | None = None
    cluster: str = ""

    def __repr__(self) -> str:
        return f"Item(id={self.id!r}, group={self.group!r})"


def source_of(params: dict[str, Any], where: str) -> Source:
    """From a suite's `params`. Raises UserError that names the field."""
    known = {name: value for name, value in params.items() if name in Source.__dataclass_fields__}
    if "file" not in known:
        raise UserError(f"{where}: params need `file`, the set's path inside the data folder")
    return Source(**known)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError."""
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                total.update(piece)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return total.hexdigest()


def find_copy(source: Source, data: Path | None) -> Path:
    """The user's copy, its digest checked. Raises UserError: absent, or another file than the suite means."""
    get = f" Get it from {source.homepage}." if source.homepage else ""
    if data is None:
        raise UserError(f"{source.file}: name the folder that holds your copy of it with --data.{get}")
    path = data / source.file
    if not path.is_file():
        raise UserError(f"{path}: no such file: put your own copy there.{get}")
    found = file_digest(path)
    if source.sha256 is None:
        raise UserError(f"{path}: the suite publishes no digest for it. If this copy is the right one, copy the "
                        f"suite's YAML and add `sha256: {found}` to the params.")
    if found != source.sha256.lower():
        raise UserError(f"{path}: its SHA-256 is {found}, the suite means {source.sha256}: another version of the set, "
                        f"or a changed file.{get}")
    return path


def read_source(source: Source, data: Path | None) -> Iterator[Item]:
    """The items of a source whose columns are as `where` asks, in the file's order.

    Raises UserError at a copy that is absent or other than published, at a missing column (line numbers, no text), and
    at an id that comes twice.
    """
    path = find_copy(source, data)
    seen: set[str] = set()
    for number, row in enumerate(read_rows(path, source.root), 1):
        try:
            item = Item(str(row[source.id]), str(row[source.prompt]),
                        str(row[source.group]) if source.group else None,
                        str(row[source.cluster]) if source.cluster else "")
            wanted = all(row[column] in (value if isinstance(value, list) else [value])
                         for column, value in source.where.items())
        except KeyError as error:
            raise UserError(f"{path}, row {number}: no column {error}: check the suite's params") from None
        if item.id in seen:
            raise UserError(f"{path}, row {number}: the id {item.id!r} comes twice")
        seen.add(item.id)
        if wanted:
            yield item


def read_rows(path: Path, root: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a .csv, .jsonl or .json file (a list of objects), each also as .gz. Raises UserError, never with text.

    `root`: the field of a .json file that holds the list, where the file is one object.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    try:
        with (gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST >> 20} MiB")
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    if kind == "csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    if kind not in ("jsonl", "json"):
        raise UserError(f"{path}: a set is a .csv, .jsonl or .json file, each also as .gz")
    try:
        whole = kind == "json" and (root is not None or text.lstrip().startswith("["))
        rows = json.loads(text) if whole else (json.loads(line) for line in text.split("\n") if line.strip())
        for row in rows if root is None else rows[root]:
            if not isinstance(row, dict):
                raise ValueError
            yield row
    except (ValueError, KeyError, TypeError):
        # Not the error's own words: they may quote the file.
        raise UserError(f"{path}: not JSON objects, one a line or in a list"
                        f"{f' under {root!r}' if root else ''}") from None
