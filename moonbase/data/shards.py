"""A corpus on disk: token shards that are mapped into memory, and `corpus.json`, which says what they are.

A shard holds documents of one source and one split, end to end: `train-000-00000.bin` (uint16, or uint32 for
vocabularies above 65536) and beside it `.offsets.npy`, int64 [num_documents + 1], where each document begins.
"""

from __future__ import annotations

import json
from array import array
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from moonbase.data.shuffle import Permutation
from moonbase.data.tokenizer import Tokenizer, load_tokenizer
from moonbase.errors import UserError

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 1 << 27
"""A shard is closed once it holds this many tokens."""

_VALIDATION_ORDER = 20
"""Seed of the fixed order in which held-out documents are scored, so that any first part of them is a fair sample."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ShardWriter:
    """Appends documents of one split and source to numbered shards."""

    def __init__(self, folder: Path, split: str, source: int, dtype: np.dtype) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder, self._split, self._source, self._dtype = folder, split, source, dtype
        self._file: IO[bytes] | None = None
        self._offsets = array("q", [0])
        self._bytes = 0

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """One document, with its end-of-document id where it is complete."""
        if self._file is None:
            self._file = open(self._folder / self._name, "wb")
        self._file.write(ids.astype(self._dtype).tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._bytes += num_bytes
        if self._offsets[-1] >= SHARD_TOKENS:
            self.close()

    @property
    def _name(self) -> str:
        return f"{self._split}-{self._source:03}-{len(self.entries):05}.bin"

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        self._file.close()
        np.save(self._folder / self._name.replace(".bin", ".offsets.npy"), np.array(self._offsets, dtype=np.int64))
        self.entries.append({
            "split": self._split,
            "source": self._source,
            "file": self._name,
            "documents": len(self._offsets) - 1,
            "tokens": self._offsets[-1],
            "bytes": self._bytes,
        })
        self._file, self._offsets, self._bytes = None, array("q", [0]), 0


class Split:
    """The documents of one split, numbered through all shards; nothing is read before it is asked for."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]], dtype: np.dtype) -> None:
        self._tokens = [np.memmap(folder / entry["file"], dtype=dtype, mode="r") for entry in entries]
        self._offsets = [
            np.load(folder / entry["file"].replace(".bin", ".offsets.npy"), mmap_mode="r") for entry in entries
        ]
        self._sources = [entry["source"] for entry in entries]
        self._starts = np.cumsum([0, *(entry["documents"] for entry in entries)])
        self.num_documents = int(self._starts[-1])
        self.num_tokens = sum(entry["tokens"] for entry in entries)
        self.num_bytes = sum(entry["bytes"] for entry in entries)

    def ranges(self) -> dict[int, tuple[int, int]]:
        """Source -> first and one past the last of its documents (a source's shards lie together)."""
        ranges: dict[int, tuple[int, int]] = {}
        for source, start, end in zip(self._sources, self._starts[:-1], self._starts[1:], strict=True):
            first = ranges.get(source, (int(start), 0))[0]
            ranges[source] = (first, int(end))
        return ranges

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64."""
        shards = np.searchsorted(self._starts, documents, side="right") - 1
        lengths = np.empty(len(documents), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            local = documents[chosen] - self._starts[shard]
            lengths[chosen] = self._offsets[shard][local + 1] - self._offsets[shard][local]
        return lengths

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens start .. start+length-1 of a document (fewer at its end), as stored."""
        shard, begin, end = self._place(document)
        begin += start
        return self._tokens[shard][begin : end if length is None else min(end, begin + length)]

    def targets(self, document: int, start: int, ids: np.ndarray) -> np.ndarray:
        """What each of `ids`, a document's tokens from `start` on, is asked for: the next of them, one fewer. Where a
        token is not to be learnt, a subclass says IGNORED."""
        return ids[1:]

    def _place(self, document: int) -> tuple[int, int, int]:
        """(shard, first token in it, one past the last)."""
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        local, offsets = document - int(self._starts[shard]), self._offsets[shard]
        return shard, int(offsets[local]), int(offsets[local + 1])


def _check_shard(path: Path, entry: dict[str, Any], width: int) -> None:
    """Raises UserError where the tokens or the offsets of a shard are not what its entry says."""
    if not path.is_file() or path.stat().st_size != entry["tokens"] * width:
        raise UserError(f"{path}: missing or cut short; prepare the corpus again")
    offsets = path.with_name(path.name.replace(".bin", ".offsets.npy"))
    try:
        starts = np.load(offsets, mmap_mode="r")
        expected = (entry["documents"] + 1, 0, entry["tokens"])
        whole = starts.dtype == np.int64 and (len(starts), starts[0], starts[-1]) == expected
    except (OSError, EOFError, ValueError, TypeError, AttributeError, IndexError):  # numpy's ways to refuse junk
        whole = False
    if not whole:
        raise UserError(f"{offsets}: missing, cut short or damaged; prepare the corpus again")


class Corpus:
    """A finished corpus folder. Made by `prepare_corpus`, or opened with `Corpus.open`."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        """The content of corpus.json."""
        self.vocab_size: int = facts["vocab_size"]
        self.eos_id: int = facts["eos_id"]
        self.pad_id: int = facts["pad_id"]
        self.sources: list[dict[str, Any]] = facts["sources"]

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a prepared corpus. Raises UserError where it is missing, of another format or not whole."""
        folder = Path(folder)
        path = folder / "corpus.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no prepared corpus here (corpus.json is missing)") from None
        except RecursionError:
            raise UserError(f"{path}: not readable: nested too deeply") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise UserError(f"{path}: not a corpus of format {FORMAT}; prepare it again")
        try:
            width = token_dtype(facts["vocab_size"]).itemsize
            for entry in facts["shards"]:
                _check_shard(folder / entry["file"], entry, width)
            return cls(folder, facts)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not the description of a corpus; prepare it again") from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer")

    @cached_property
    def train(self) -> Split:
        return self._split("train")

    @cached_property
    def validation(self) -> Split:
        return self._split("validation")

    def split(self, name: str) -> Split:
        """`train` or `validation`."""
        assert name in SPLITS, name
        return getattr(self, name)

    def _split(self, name: str) -> Split:
        entries = [entry for entry in self.facts["shards"] if entry["split"] == name]
        return Split(self.folder, entries, token_dtype(self.vocab_size))

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text behind each id, int32 [vocab_size]; 0 for special and unused ids.

        With it: bits per byte = sum of the loss in nats over all scored targets / ln 2 / byte_lengths[targets].sum().
        """
        return self.tokenizer.byte_lengths(self.vocab_size)

    def validation_order(self, max_bytes: int | None = None) -> np.ndarray:
        """Held-out documents in their fixed order of scoring, int64; with `max_bytes` the longest first part of at most
        that many bytes of text, and at least one document."""
        order = Permutation(self.validation.num_documents, _VALIDATION_ORDER).take(0, self.validation.num_documents)
        if max_bytes is None:
            return order
        total = 0
        for count, document in enumerate(order):
            total += int(self.byte_lengths[self.validation.read(int(document))].sum())
            if total > max_bytes:
                return order[: max(count, 1)]
        return order

    def validation_text(self, max_bytes: int | None = None) -> bytes:
        """The held-out text itself, in the order of `validation_order`: what another compressor is to be given."""
        parts = []
        for document in self.validation_order(max_bytes):
            ids = self.validation.read(int(document))
            parts.append(self.tokenizer.decode_bytes(ids[self.byte_lengths[ids] > 0].tolist()))
        return b"".join(parts)

    @property
    def summary(self) -> dict[str, Any]:
        """The facts for a report: counts and what was left out, without the list of shards."""
        return {name: value for name, value in self.facts.items() if name != "shards"}
