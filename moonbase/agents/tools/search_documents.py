"""Documents for `search` and `open`: from a folder, a file, a JSONL of documents, or whatever a program has.

Of a folder every regular file is read that holds text, HTML without its markup; hidden ones, links and installed code
are not entered. What is left out is counted under a reason.
"""

from __future__ import annotations

import codecs
import html.parser
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.data.sources import LINES_SUFFIXES, SKIPPED_FOLDERS, Skipped
from moonbase.errors import UserError

FILE_BYTES = 32 << 20
"""A larger file of text is left out; a JSONL may have any size, and lines of this one."""
LARGE_BYTES = 50 << 20
"""Of a source; from so many on, progress is shown."""
LARGE_FILES = 2000
"""The same in files."""
TITLE_CHARACTERS = 200
TEXT_FIELDS, TITLE_FIELDS, ID_FIELDS = ("text", "content", "contents", "body"), ("title", "name"), ("id", "_id", "url")
Progress = Callable[[str, int, int | None], None]
_MARKUP_SUFFIXES = frozenset((".html", ".htm", ".xhtml"))
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the name by which `open` finds it."""

    id: str
    title: str
    text: str


def read_source(source: Any, skipped: Skipped, progress: Progress | None = None) -> Iterator[Document]:
    """The documents of a source, in order.

    A source is the path of a folder, of a file, or of a JSONL with a document a line ({"id", "title", "text"} or a
    text); or an iterable of Documents, of such objects, of (id, text) pairs or of texts; or a thing with `pages`.
    Raises UserError if there is nothing.
    """
    if not isinstance(source, (str, os.PathLike)):
        for number, value in enumerate(getattr(source, "pages", source), 1):
            document = as_document(value, str(number))
            if document is None:
                skipped.add("without text", f"document {number}")
            else:
                yield document
        return
    path = Path(source).expanduser()
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"search: {source}: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        files = sorted(_walk(path, skipped), key=lambda found: found[1])
    elif stat.S_ISREG(status.st_mode):
        files = [(path.resolve(), path.name, status.st_size)]
    else:
        raise UserError(f"search: {source} is neither a file nor a folder")
    total, done = sum(size for _, _, size in files), 0
    large = progress is not None and (len(files) >= LARGE_FILES or total >= LARGE_BYTES)
    for file, name, size in files:
        for document, position in _read(file, name, size, skipped):
            yield document
            if large:
                progress("reading MB", (done + position) >> 20, max(total >> 20, 1))
        done += size


def as_document(value: Any, number: str) -> Document | None:
    """What a program or a line of JSON holds as a document; None without text. `number` is the id of one without."""
    if isinstance(value, Document):
        return value
    if isinstance(value, str):
        return Document(number, title_of(value, number), value)
    if isinstance(value, (tuple, list)):
        return (Document(str(value[0]), title_of(value[1], str(value[0])), value[1])
                if len(value) == 2 and isinstance(value[1], str) else None)

    def field(names: Iterable[str], kinds: type | tuple[type, ...]) -> Any:
        values = (value.get(name) if isinstance(value, Mapping) else getattr(value, name, None) for name in names)
        return next((one for one in values if isinstance(one, kinds) and one != ""), None)

    text = field(TEXT_FIELDS, str)
    if text is None:
        return None
    name = field(ID_FIELDS, (str, int))
    name = number if name is None else str(name)
    return Document(name, " ".join((field(TITLE_FIELDS, str) or title_of(text, name)).split())[:TITLE_CHARACTERS], text)


def title_of(text: str, name: str) -> str:
    """The heading with which a text begins (Markdown, or a line with nothing below), else its name."""
    lines = text[: 4 * TITLE_CHARACTERS].lstrip().split("\n", 2)
    first = lines[0].strip()
    if first.startswith("#") and not first.startswith("#!") and name.lower().endswith((".md", ".markdown")):
        first = first.lstrip("#").strip()
    elif len(lines) < 2 or lines[1].strip():
        first = ""
    return first if 0 < len(first) <= TITLE_CHARACTERS else name


def _walk(root: Path, skipped: Skipped) -> Iterator[tuple[Path, str, int]]:
    """(file, path below the root, bytes). Links are not followed: they may lead out."""
    def unreadable(error: OSError) -> None:
        skipped.add("unreadable", error.filename)

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError:
                skipped.add("unreadable", path)
                continue
            if stat.S_ISREG(status.st_mode):
                relative = os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")
                yield path, relative, status.st_size
            else:
                skipped.add("a link" if stat.S_ISLNK(status.st_mode) else "no file", path)


def _read(path: Path, name: str, size: int, skipped: Skipped) -> Iterator[tuple[Document, int]]:
    """(document, bytes read so far) of a file."""
    try:
        # It may be something else by now: not through a link, and without waiting for a pipe's other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                skipped.add("no file", path)
            elif path.suffix.lower() in LINES_SUFFIXES:
                yield from _read_lines(file, path, name, skipped)
            elif size > FILE_BYTES:
                skipped.add(f"larger than {FILE_BYTES >> 20} MiB", path)
            else:
                text = _decode(file.read(FILE_BYTES), path, skipped)
                if text is not None:
                    yield _document_of_file(text, path, name), size
    except OSError:
        skipped.add("unreadable", path)


def _document_of_file(text: str, path: Path, name: str) -> Document:
    if path.suffix.lower() not in _MARKUP_SUFFIXES:
        return Document(name, title_of(text, name), text)
    title, text = strip_markup(text)
    return Document(name, title or title_of(text, name), text)


def _read_lines(file: Any, path: Path, name: str, skipped: Skipped) -> Iterator[tuple[Document, int]]:
    number = 0
    while line := file.readline(FILE_BYTES):
        number += 1
        place = f"{path}:{number}"
        if len(line) == FILE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(FILE_BYTES)
            skipped.add(f"line longer than {FILE_BYTES >> 20} MiB", place)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                skipped.add("binary", path)
                return
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            skipped.add("broken line", place)
            continue
        document = as_document(value, f"{name}:{number}") if isinstance(value, (dict, str)) else None
        if document is None:
            skipped.add("without text", place)
        else:
            yield document, file.tell()


def _decode(content: bytes, path: Path, skipped: Skipped) -> str | None:
    """A file's text; None, and counted, if it holds none."""
    encoding = "utf-8"
    for mark, named in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], named
            break
    if not content.strip():
        skipped.add("empty", path)
        return None
    if encoding == "utf-8" and b"\0" in content:
        skipped.add("binary", path)
        return None
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError:
        skipped.add("neither UTF-8 nor UTF-16", path)
        return None


class _Stripper(html.parser.HTMLParser):
    """Collects the text that a reader would see."""

    HIDDEN = frozenset(("script", "style", "template", "noscript", "svg"))
    BLOCKS = frozenset(("p div section article header footer main nav aside li ul ol dl dt dd table tr h1 h2 h3 h4 h5 "
                        "h6 pre blockquote br hr form figure figcaption title option").split())

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.title: list[str] = []
        self._hidden: list[str] = []
        self._in_title = self._in_pre = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden.append(tag)
        self._in_title |= tag == "title" and not self._hidden
        self._in_pre |= tag == "pre"
        self._space(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._space(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        if tag == "title":
            self._in_title = False
        if tag == "pre":
            self._in_pre = False
        self._space(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._hidden:
            self.pieces.append(data if self._in_pre else " ".join(f"|{data}|".split())[1:-1])

    def _space(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append("\t")


def _finished(text: str) -> str:
    """Without comments and tags that never end: Python's parser looks through all the rest for the end of each."""
    comment = text.find("<!--", text.rfind("-->") + 1)
    if comment >= 0:
        text = text[:comment]
    end = text.rfind(">") + 1
    return text[:end] + text[end:].replace("<", "&lt;")


def strip_markup(text: str) -> tuple[str, str]:
    """(title, text) of a page of HTML."""
    stripper = _Stripper()
    stripper.feed(_finished(text))
    stripper.close()
    lines = [line.strip() for line in "".join(stripper.pieces).split("\n")]
    kept = [line for number, line in enumerate(lines) if line or (number and lines[number - 1])]
    return " ".join("".join(stripper.title).split())[:TITLE_CHARACTERS], "\n".join(kept).strip()
