"""From files to documents, in bounded memory, with every refusal counted and named.

Long texts are handed out in parts that end at line ends, so that a file of any size streams.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from moonbase.data.sources import HUB, Skipped, SourceFile
from moonbase.errors import TryAgain, UserError

BLOCK_BYTES = 4 << 20
"""How much of a plain text file is read and judged at once."""
MAX_LINE_BYTES = 64 << 20
"""A record longer than this is refused rather than held in memory."""
BINARY_SHARE = 0.1
"""Share of bytes that are no UTF-8 above which a file counts as binary rather than wrongly encoded."""


_HUB_SECONDS = 10
"""How long the hub may take to answer at all."""

PART_LENGTH = 1 << 20
"""Characters in one part of a text that is kept together."""


@dataclass(frozen=True)
class Document:
    """A text, or one part of a long one."""

    content: bytes
    """UTF-8."""
    complete: bool
    """False where the text goes on in the next document."""
    follows: bool
    """Whether it must share the fate (trained on or held out) of the document before, being a part of the same text."""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8")


@dataclass(frozen=True)
class Reading:
    """How files become documents."""

    text_field: str = "text"
    """Which field of a record holds the text."""
    longest_whole: float = float("inf")
    """Texts of up to this many characters (files: bytes) stay on one side of the split."""
    part_length: int = PART_LENGTH
    """Longer ones are cut into parts of this many characters, each of which may be held out alone."""


def read_file(file: SourceFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """The documents of one file, in order."""
    readers = {"text": _read_text, "lines": _read_lines, "table": _read_table}
    try:
        if file.size == 0:
            skipped.add("empty", file.path)
            return
        yield from readers[file.kind](file, reading, skipped)
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        skipped.add("damaged archive", file.path)
    except OSError:
        skipped.add("unreadable", file.path)


def cut(text: str, length: int) -> Iterator[str]:
    """`text` in parts of at most `length` characters: at a blank line in the second half, else at a line end, else at a
    space, else anywhere."""
    start = 0
    while len(text) - start > length:
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + length // 2, start + length)
            if found >= 0:
                end = found + len(mark)
                break
        else:
            end = start + length
        yield text[start:end]
        start = end
    yield text[start:]


def _documents(
    text: str, reading: Reading, whole: bool, first: bool = True, complete: bool = True
) -> Iterator[Document]:
    """`whole`: the parts stay together; `first`, `complete`: whether the text begins and ends here."""
    parts = list(cut(text, PART_LENGTH if whole else reading.part_length))
    for index, part in enumerate(parts):
        follows = whole and not (first and index == 0)
        yield Document(part.encode("utf-8"), complete and index == len(parts) - 1, follows)


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[IO[bytes]]:
    if file.packing == ".gz":
        with gzip.open(file.path) as stream:
            yield stream  # type: ignore[misc]
    elif file.packing == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file.path}: .zst needs the package zstandard, which is missing here: "
                            "pip install zstandard") from None
        try:
            with open(file.path, "rb") as packed:
                yield io.BufferedReader(_ZstdStream(packed, zstandard.ZstdDecompressor()))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
    else:
        with open(file.path, "rb") as stream:
            yield stream


class _ZstdStream(io.RawIOBase):
    """Reads frame after frame; unlike the package's own reader it says so where the last one is cut short."""

    def __init__(self, packed: IO[bytes], decompressor: Any) -> None:
        self._packed, self._decompressor = packed, decompressor
        self._frame = decompressor.decompressobj()
        self._fed = False
        self._rest = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # Small pieces, because they may expand ten-thousandfold.
            piece = self._rest or self._packed.read(4096)
            if not piece:
                if self._fed:
                    raise EOFError("the last frame is cut short")
                return 0
            self._ready = self._frame.decompress(piece)
            self._rest, self._fed = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Blocks that end at a line end where there is one, and never inside a UTF-8 character."""
    rest = b""
    while block := stream.read(BLOCK_BYTES - len(rest)):
        block = rest + block
        end = block.rfind(b"\n") + 1
        if len(block) < BLOCK_BYTES:
            rest = block
            continue
        if not end:
            end = len(block)
            # A character has at most three continuation bytes, 10xxxxxx, after its first.
            for back in range(1, 4):
                if block[-back] >= 0xC0:
                    end -= back
                    break
                if block[-back] < 0x80:
                    break
        yield block[:end]
        rest = block[end:]
    if rest:
        yield rest


def _refusal(block: bytes) -> str | None:
    """Why these bytes are no text, None where they are."""
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8"
    if b"\0" in block:
        return "binary"
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        wrong = block.decode("utf-8", "replace").count("\ufffd")
        return "binary" if wrong > BINARY_SHARE * len(block) else "not UTF-8"
    return None


def _read_text(file: SourceFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    whole = file.text_bytes <= reading.longest_whole
    with _open(file) as stream:
        blocks = _blocks(stream)
        block: bytes | None = next(blocks, b"").removeprefix(codecs.BOM_UTF8)
        position, found, refused = 0, False, False
        while block is not None:
            following = next(blocks, None)
            refusal = _refusal(block)
            if refusal:
                skipped.add(refusal, f"{file.path} from byte {position}" if position else file.path)
                if position == 0 and refusal == "binary":
                    return
                refused = True
            elif block.strip():
                last = following is None
                yield from _documents(block.decode("utf-8"), reading, whole, first=not found, complete=last)
                found = True
            position += len(block)
            block = following
        if not found and not refused:
            skipped.add("empty", file.path)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines; None for one that is too long to hold."""
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)
            yield None
        else:
            yield line


def _read_lines(file: SourceFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    for name, record in _records(file, skipped):
        yield from _record(record, reading, name, skipped)


def read_records(file: SourceFile, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """(file:line, JSON value) of every line that holds one, in order."""
    try:
        yield from _records(file, skipped)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        skipped.add("damaged archive", file.path)
    except OSError:
        skipped.add("unreadable", file.path)


def _records(file: SourceFile, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    number = 0
    with _open(file) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            name = f"{file.path}:{number}"
            if line is None:
                skipped.add(f"record longer than {MAX_LINE_BYTES >> 20} MiB", name)
            elif not line.strip():
                skipped.add("empty line", name)
            elif number == 1 and b"\0" in line:
                skipped.add("binary", file.path)
                return
            else:
                try:
                    record = json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                except UnicodeDecodeError:
                    skipped.add("not UTF-8", name)
                except (ValueError, RecursionError):
                    skipped.add("broken line", name)
                else:
                    yield name, record
    if number == 0:
        skipped.add("empty", file.path)


def _record(record: Any, reading: Reading, name: str, skipped: Skipped) -> Iterator[Document]:
    text_field = reading.text_field
    text = record.get(text_field) if isinstance(record, dict) else record if isinstance(record, str) else None
    if not isinstance(text, str):
        skipped.add(f"no text in the field {text_field!r}", name)
    elif not text or text.isspace():
        skipped.add("empty", name)
    elif "\0" in text:
        skipped.add("binary", name)
    else:
        try:
            yield from _documents(text, reading, whole=len(text) <= reading.longest_whole)
        except UnicodeEncodeError:
            skipped.add("half a surrogate pair", name)


def _read_table(file: SourceFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file.path}: .parquet needs the package pyarrow, which is missing here: "
                        "pip install pyarrow") from None
    text_field = reading.text_field
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            if text_field not in table.schema_arrow.names:
                skipped.add(f"no text in the field {text_field!r}", file.path)
                return
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield from _record({text_field: text}, reading, f"{file.path}: row {row}", skipped)
            if row == 0:
                skipped.add("empty", file.path)
    except (pyarrow.ArrowException, UnicodeDecodeError):
        skipped.add("damaged table", file.path)


def _reach_the_hub(name: str) -> None:
    """Raises UserError where there is no way to it: the library itself would try for half a minute, line by line."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # of the HTTP client that the installed version uses
        raise UserError(f"{name}: cannot be streamed: {constants.ENDPOINT} does not answer ({error}). "
                        "Check the network and HF_HUB_OFFLINE.") from None


def read_hub(name: str, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Documents of a streamed data set, `hub:NAME` or `hub:NAME:CONFIGURATION`, split train.

    Raises UserError where the extra is missing or the data set is not there, TryAgain where the stream breaks.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: streaming data sets needs the extra hub: pip install 'moonbase[hub]'") from None
    identifier, _, configuration = name.removeprefix(HUB).partition(":")
    if not os.path.exists(identifier):
        _reach_the_hub(name)
    try:
        stream = datasets.load_dataset(identifier, configuration or None, split="train", streaming=True)
        rows = iter(stream)
        first = next(rows, None)
    except Exception as error:  # many kinds: no network, no such name, no such configuration, gated
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: cannot be streamed ({reason}). Check the name and the network.") from None
    number = 0
    while first is not None:
        yield from _record(first, reading, f"{name}: row {number}", skipped)
        number += 1
        try:
            first = next(rows, None)
        except Exception as error:
            raise TryAgain(f"{name}: the stream broke at row {number}: {error}") from None
