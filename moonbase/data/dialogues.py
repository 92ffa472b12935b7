"""Chat dialogues for supervised fine-tuning: from JSONL of OpenAI messages to a corpus whose loss is on the replies.

A line is `{"messages": [...], "tools": [...]}`, tools optional. Rows are packed, shuffled and resumed by the same code
as plain text (`packing`, `stream`); this corpus only says, token by token, which ones are learnt. How a dialogue
becomes tokens is not known here: a renderer is handed in from above. Which dialogues are held out is decided by a hash
of their content, so a dialogue is on the same side wherever it stands.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from moonbase import files
from moonbase.data import preparation
from moonbase.data.packing import IGNORED
from moonbase.data.readers import read_records
from moonbase.data.shards import FORMAT, SPLITS, Corpus, ShardWriter, Split, token_dtype
from moonbase.data.sources import HUB, Skipped, SourceFile, list_files
from moonbase.data.tokenizer import Progress, Tokenizer
from moonbase.errors import UserError
from moonbase.recipe import DataConfig

Renderer = Callable[[list[dict[str, Any]], "list[dict[str, Any]] | None"], tuple[list[int], list[bool]]]
"""(messages, tools) -> (ids, which of them an assistant wrote), of equal length. Raises UserError for what is no
dialogue, naming the field."""

CUT = "dialogue longer than sequence_length: used up to the last reply that fits"
"""Counted among what was left out, though only the end of these was."""
_REPORT_EVERY = 256


class _Dialogue(NamedTuple):
    source: int
    side: int
    """The number that decides which side it is on."""
    num_bytes: int
    ids: np.ndarray
    mask: np.ndarray


class MaskedSplit(Split):
    """A split that knows of every token whether an assistant wrote it."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]], dtype: np.dtype) -> None:
        super().__init__(folder, entries, dtype)
        self._masks = [np.memmap(folder / _mask_name(entry["file"]), dtype=np.bool_, mode="r") for entry in entries]

    def targets(self, document: int, start: int, ids: np.ndarray) -> np.ndarray:
        shard, begin, _ = self._place(document)
        learnt = self._masks[shard][begin + start + 1 : begin + start + len(ids)]
        return np.where(learnt, ids[1:].astype(np.int64), IGNORED)


class DialogueCorpus(Corpus):
    """A finished corpus of dialogues. Made by `prepare_dialogues`, or opened with `DialogueCorpus.open`."""

    def _split(self, name: str) -> Split:
        entries = [entry for entry in self.facts["shards"] if entry["split"] == name]
        return MaskedSplit(self.folder, entries, token_dtype(self.vocab_size))

    @classmethod
    def open(cls, folder: str | Path) -> DialogueCorpus:
        """Open a prepared corpus. Raises UserError where it is missing, holds plain text or is not whole."""
        corpus = super().open(folder)
        for entry in corpus.facts["shards"]:
            mask = corpus.folder / _mask_name(entry["file"])
            if not mask.is_file() or mask.stat().st_size != entry["tokens"]:
                raise UserError(f"{mask}: missing or cut short; prepare the dialogues again")
        return corpus


def prepare_dialogues(
    config: DataConfig,
    tokenizer: Tokenizer,
    render: Renderer,
    style: str,
    vocab_size: int,
    sequence_length: int,
    folder: str | Path,
    progress: Progress | None = None,
) -> DialogueCorpus:
    """Make the corpus of the dialogues in `config.sources`, or open it where it is there and nothing has changed.

    A line that is no dialogue, one without a reply to learn and one that stands twice are left out and counted under
    their reason, with file and line number. A dialogue longer than `sequence_length` is cut after the last reply that
    fits, and left out where not even the first one does. `style` names what `render` renders. The folder appears whole
    or not at all. Raises UserError for a source that is not there or holds no usable dialogue.
    """
    folder = Path(folder)
    _check(config, tokenizer, vocab_size)
    listed = Skipped()
    listings = [_list(source.path, listed) for source in config.sources]
    digest = _digest(config, listings, tokenizer, style, vocab_size, sequence_length)
    if (corpus := preparation.open_unchanged(DialogueCorpus, folder, digest)) is not None:
        return corpus
    threshold = int(config.validation_fraction * preparation.HASHES)
    while True:
        skipped = copy.deepcopy(listed)
        dialogues = _dialogues(config, listings, render, sequence_length, skipped, progress)
        try:
            with files.write_folder(folder) as aside:
                shards, learnt = _write(aside, config, dialogues, threshold, token_dtype(vocab_size), skipped)
                tokenizer.save(aside / "tokenizer")
                facts = preparation.corpus_facts(config, listings, tokenizer, vocab_size, digest, shards, skipped)
                facts |= {"kind": "dialogues", "style": style, "sequence_length": sequence_length,
                          "learnt_tokens": learnt}
                preparation.write_facts(aside, facts)
            return DialogueCorpus.open(folder)
        except preparation.Resplit as resplit:
            threshold = resplit.threshold


def _check(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    if not config.sources:
        raise UserError("data.sources: nothing to read; name a JSONL file of dialogues, for example data=chats.jsonl")
    if config.max_bytes is not None:
        raise UserError("data.max_bytes is for plain text; dialogues are limited with data.max_documents")
    preparation.check_tokenizer(tokenizer, vocab_size)
    if tokenizer.im_end_id is None:
        raise UserError("the tokenizer has no chat tokens such as <|im_end|>; this model cannot be taught dialogues")


def _list(source: str, skipped: Skipped) -> list[SourceFile]:
    """The JSONL files of a source; a file that was named is meant, whatever its suffix."""
    if source.startswith(HUB):
        raise UserError(f"{source}: dialogues are read from JSONL files; save the data set as one")
    found = list_files(source, skipped)
    if not os.path.isfile(Path(source).expanduser()):
        for file in found:
            if file.kind != "lines":
                skipped.add("other file type", file.path)
        return [file for file in found if file.kind == "lines"]
    return found


def _digest(config: DataConfig, listings: list[list[SourceFile]], tokenizer: Tokenizer, style: str, vocab_size: int,
            sequence_length: int) -> str:
    """A hash of everything that the corpus depends on."""
    facts = [FORMAT, "dialogues", preparation.settings_of(config), tokenizer.digest, style, vocab_size, sequence_length]
    return preparation.digest_of(facts, listings)


def _dialogues(config: DataConfig, listings: list[list[SourceFile]], render: Renderer, sequence_length: int,
               skipped: Skipped, progress: Progress | None) -> Iterator[_Dialogue]:
    """Every usable dialogue once, in the order of files and lines."""
    seen: set[bytes] = set()
    count, limit = 0, config.max_documents or float("inf")
    for source, listing in enumerate(listings):
        for file in listing:
            for name, record in read_records(file, skipped):
                if count >= limit:
                    return
                key = _key(record)
                if key in seen:
                    skipped.add("duplicate", name)
                    continue
                seen.add(key)
                made = _tokens(record, render, sequence_length, name, skipped)
                if made is None:
                    continue
                count += 1
                if progress and count % _REPORT_EVERY == 0:
                    progress("tokenising dialogues", count, None)
                num_bytes = len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
                yield _Dialogue(source, int.from_bytes(key[:8], "little"), num_bytes, *made)
    if progress:
        progress("tokenising dialogues", count, count)


def _key(record: Any) -> bytes:
    content = record if not isinstance(record, dict) else [record.get("messages"), record.get("tools") or None]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def _tokens(record: Any, render: Renderer, sequence_length: int, name: str,
            skipped: Skipped) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids, mask) of one record, cut to `sequence_length`; None, and the reason counted, where it cannot be used."""
    messages = record.get("messages") if isinstance(record, dict) else None
    tools = record.get("tools") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        skipped.add("no list in the field 'messages'", name)
        return None
    if tools is not None and not isinstance(tools, list):
        skipped.add("no list in the field 'tools'", name)
        return None
    try:
        ids, learnt = render(messages, tools or None)
    except UserError as error:
        skipped.add("not a dialogue", f"{name}: {error}")
        return None
    assert len(ids) == len(learnt), "a renderer marks every id"
    mask = np.array(learnt, dtype=np.bool_)
    if not mask[1:].any():
        skipped.add("no reply of an assistant", name)
        return None
    if len(ids) > sequence_length:
        # Where a reply ends: the last token of a run that an assistant wrote.
        ends = np.flatnonzero(mask[:sequence_length] & ~np.append(mask[1:], False)[:sequence_length]) + 1
        if not len(ends):
            skipped.add("no reply ends within sequence_length", name)
            return None
        skipped.add(CUT, name)
        ids, mask = ids[: ends[-1]], mask[: ends[-1]]
    return np.array(ids, dtype=np.uint32), mask


def _write(folder: Path, config: DataConfig, dialogues: Iterator[_Dialogue], threshold: int, dtype: np.dtype,
           skipped: Skipped) -> tuple[list[dict[str, Any]], int]:
    """Write the shards. Returns their entries and the number of tokens to learn. Raises UserError where there are not
    two dialogues, Resplit where all fell on one side."""
    writers = {(split, source): _MaskedWriter(folder, split, source, dtype)
               for split in SPLITS for source in range(len(config.sources))}
    smallest, largest, learnt = preparation.HASHES, -1, 0
    for dialogue in dialogues:
        split = "validation" if dialogue.side < threshold else "train"
        writers[split, dialogue.source].add_masked(dialogue.ids, dialogue.mask, dialogue.num_bytes)
        smallest, largest = min(smallest, dialogue.side), max(largest, dialogue.side)
        learnt += int(dialogue.mask[1:].sum())
    for writer in writers.values():
        writer.close()
    if smallest >= largest:
        paths = ", ".join(source.path for source in config.sources)
        found = "no usable dialogue" if largest < 0 else "only one usable dialogue"
        wanted = "" if largest < 0 else "; two are needed, one to train on and one to hold out"
        raise UserError(f"{found} in {paths}{wanted} (left out: {_first_refusals(skipped)})")
    preparation.check_both_sides(smallest, largest, threshold)
    return [entry for writer in writers.values() for entry in writer.entries], learnt


class _MaskedWriter(ShardWriter):
    """Shards with a file of bools beside each."""

    def __init__(self, folder: Path, split: str, source: int, dtype: np.dtype) -> None:
        super().__init__(folder, split, source, dtype)
        self._mask_file: IO[bytes] | None = None

    def add_masked(self, ids: np.ndarray, mask: np.ndarray, num_bytes: int) -> None:
        if self._mask_file is None:
            self._mask_file = open(self._folder / _mask_name(self._name), "wb")
        self._mask_file.write(mask.tobytes())
        self.add(ids, num_bytes)

    def close(self) -> None:
        if self._mask_file is not None:
            self._mask_file.close()
            self._mask_file = None
        super().close()


def _mask_name(shard: str) -> str:
    return shard.removesuffix(".bin") + ".mask.bin"


def _first_refusals(skipped: Skipped) -> str:
    """`2 broken line (chats.jsonl:3), ...`: each reason with its first place."""
    parts = [f"{entry['count']} {reason} ({skipped.names[reason][0]})" for reason, entry in skipped.to_json().items()]
    return ", ".join(parts) or "nothing"
