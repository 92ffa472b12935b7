"""From sources to a corpus: read, drop duplicates, hold some out, learn a vocabulary, tokenise, write shards.

Which documents are held out is decided by a hash of their content, so a text is on the same side wherever it stands,
and neither training nor the tokenizer ever sees a held-out one. Only a text larger than the whole held-out share is cut
and its parts decided one by one. Files are visited in the order of a hash of their names: a budget, or the first
part of anything, is then a fair sample instead of the letter A.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moonbase import files
from moonbase.data import preparation
from moonbase.data.readers import PART_LENGTH, Document, Reading, read_file, read_hub
from moonbase.data.shards import FORMAT, SPLITS, Corpus, ShardWriter, token_dtype
from moonbase.data.shuffle import combine
from moonbase.data.sources import HUB, Skipped, SourceFile, list_files, sampling_order
from moonbase.data.tokenizer import Progress, Tokenizer, load_tokenizer, train_tokenizer
from moonbase.errors import UserError
from moonbase.recipe import DataConfig

TOKENIZER_SAMPLE_BYTES = 8 << 20
"""Training text that a new vocabulary is learned from."""
_SAMPLE_SCAN_BYTES = 64 << 20
"""How far to read for that sample."""
_TASK_BYTES = 256 << 10
"""Text handed to a worker at once, and the step of the progress."""


@dataclass
class _Plan:
    """What to read, and how much of each source."""

    config: DataConfig
    listings: list[list[SourceFile] | None]
    """Files of each source in visiting order; None for a streamed data set."""
    shares: list[float]
    """Part of a budget that falls to each source."""
    readings: list[Reading]
    total: int | None
    """Bytes expected, None if unknown."""


def prepare_corpus(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    folder: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Corpus:
    """Make the corpus of `config` in `folder`, or open it where it is already there and nothing has changed.

    `tokenizer` wins over `config.tokenizer`; where neither is given, a vocabulary of `vocab_size` is learned from the
    training documents. `vocab_size` is the model's and must hold the tokenizer's. `seed` chooses the files that a
    budget (`max_bytes`, `max_documents`) takes; without a budget it changes nothing. The folder appears whole or not at
    all. Raises UserError for a source that is not there, for no usable document, and for a folder that holds something
    else.
    """
    folder = Path(folder)
    if not config.sources:
        raise UserError("data.sources: nothing to read; name a folder or a file, for example data=FOLDER")
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is not None:
        preparation.check_tokenizer(tokenizer, vocab_size)
    listed = Skipped()
    plan = _plan(config, listed, seed)
    digest = _digest(plan, tokenizer, vocab_size, seed)
    if (corpus := preparation.open_unchanged(Corpus, folder, digest)) is not None:
        return corpus
    threshold = int(config.validation_fraction * preparation.HASHES)
    while True:
        try:
            return _build(plan, copy.deepcopy(listed), tokenizer, vocab_size, folder, digest, threshold, progress)
        except preparation.Resplit as resplit:
            threshold = resplit.threshold


def _plan(config: DataConfig, skipped: Skipped, seed: int) -> _Plan:
    budgeted = config.max_bytes is not None or config.max_documents is not None
    listings: list[list[SourceFile] | None] = []
    sizes: list[int | None] = []
    for source in config.sources:
        if source.path.startswith(HUB):
            listings.append(None)
            sizes.append(None)
        else:
            listing = list_files(source.path, skipped)
            listings.append(sampling_order(listing, seed if budgeted else 0))
            sizes.append(sum(file.text_bytes for file in listing))
    known = sum(size for size in sizes if size is not None)
    streamed = None in sizes
    total = config.max_bytes if streamed else min(known, config.max_bytes or known)
    held_out = (total or 1 << 40) * config.validation_fraction
    # About eight held-out parts even where a few long files are all there is.
    part_length = int(min(max(held_out / 8, 2 << 10), PART_LENGTH))
    return _Plan(
        config=config,
        listings=listings,
        shares=_shares(config, sizes),
        readings=[Reading(source.text_field, held_out, part_length) for source in config.sources],
        total=total,
    )


def _shares(config: DataConfig, sizes: list[int | None]) -> list[float]:
    """How a budget is parted: by size where all weights are equal and sizes are known, else by weight."""
    weights = [source.weight for source in config.sources]
    if len(set(weights)) == 1 and None not in sizes and any(sizes):
        weights = [float(size or 0) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def _digest(plan: _Plan, tokenizer: Tokenizer | None, vocab_size: int, seed: int) -> str:
    """A hash of everything that the corpus depends on: files with sizes and times, settings, tokenizer."""
    budgeted = plan.config.max_bytes is not None or plan.config.max_documents is not None
    facts = [FORMAT, preparation.settings_of(plan.config), tokenizer.digest if tokenizer else None, vocab_size,
             seed if budgeted else None]
    return preparation.digest_of(facts, plan.listings)


def _documents(
    plan: _Plan, skipped: Skipped, progress: Progress | None, what: str, limit: float = float("inf")
) -> Iterator[tuple[int, Document, int]]:
    """(source, document, number that decides its side), each content once; about `limit` bytes over all sources."""
    seen: set[bytes] = set()
    done = reported = 0
    limit = min(limit, plan.config.max_bytes or limit)
    max_documents = plan.config.max_documents or float("inf")
    total = plan.total if plan.total is None else int(min(plan.total, limit))
    for index, (source, listing) in enumerate(zip(plan.config.sources, plan.listings, strict=True)):
        share = plan.shares[index]
        taken = count = side = 0
        for document in _read_source(source.path, listing, plan.readings[index], skipped):
            key = hashlib.blake2b(document.content, digest_size=16).digest()
            if not document.follows:
                side = int.from_bytes(key[:8], "little")
            if key in seen:
                skipped.add("duplicate", f"{source.path}: {document.content[:40].decode('utf-8', 'ignore')!r}")
                continue
            seen.add(key)
            yield index, document, side
            count += 1
            taken += len(document.content)
            done += len(document.content)
            if progress and done >= reported + _TASK_BYTES:
                reported = done
                progress(what, done if total is None else min(done, total), total)
            if taken >= limit * share or count >= max_documents * share:
                break
    if progress:
        progress(what, done, done)


def _read_source(
    path: str, listing: list[SourceFile] | None, reading: Reading, skipped: Skipped
) -> Iterator[Document]:
    if listing is None:
        yield from read_hub(path, reading, skipped)
    for file in listing or ():
        yield from read_file(file, reading, skipped)


def _tokenizer_sample(plan: _Plan, threshold: int, progress: Progress | None) -> Iterator[str]:
    """Training documents, each kept or not by its hash, about TOKENIZER_SAMPLE_BYTES of them."""
    expected = min(plan.total or _SAMPLE_SCAN_BYTES, _SAMPLE_SCAN_BYTES)
    kept = min(1.0, TOKENIZER_SAMPLE_BYTES / max(expected, 1)) * preparation.HASHES
    documents = _documents(plan, Skipped(), progress, "reading a sample for the tokenizer", _SAMPLE_SCAN_BYTES)
    for _, document, side in documents:
        if side >= threshold and combine(side) < kept:
            yield document.text
    if progress:
        progress("training the tokenizer", 0, 1)


def _vocabulary_texts(config: DataConfig) -> Iterator[str]:
    """The further texts that a vocabulary is learned from, up to TOKENIZER_SAMPLE_BYTES of each source."""
    for source in config.vocabulary_sources:
        size = 0
        for file in list_files(source.path, Skipped()):
            for document in read_file(file, Reading(source.text_field), Skipped()):
                size += len(document.content)
                if size > TOKENIZER_SAMPLE_BYTES:
                    break
                yield document.text


def _tokenised(
    documents: Iterator[tuple[int, Document, int]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[int, Document, int, np.ndarray]]:
    """Documents with their ids, in order. Threads suffice: encoding happens outside the interpreter lock."""

    def encode(batch: list[tuple[int, Document, int]]) -> list[np.ndarray]:
        return [tokenizer.encode_array(document.text) for _, document, _ in batch]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[tuple[int, Document, int]], Any]] = deque()
        batch: list[tuple[int, Document, int]] = []
        size = 0
        for item in documents:
            batch.append(item)
            size += len(item[1].content)
            if size >= _TASK_BYTES:
                waiting.append((batch, pool.submit(encode, batch)))
                batch, size = [], 0
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                for entry, ids in zip(done, future.result(), strict=True):
                    yield *entry, ids
        waiting.append((batch, pool.submit(encode, batch)))
        for done, future in waiting:
            for entry, ids in zip(done, future.result(), strict=True):
                yield *entry, ids


def _build(
    plan: _Plan,
    skipped: Skipped,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    folder: Path,
    digest: str,
    threshold: int,
    progress: Progress | None,
) -> Corpus:
    config = plan.config
    if tokenizer is None:
        texts = itertools.chain(_tokenizer_sample(plan, threshold, progress), _vocabulary_texts(config))
        tokenizer = train_tokenizer(texts, vocab_size, progress, config.split_digits)
    dtype = token_dtype(vocab_size)
    _remove_leftovers(folder)
    with files.write_folder(folder) as aside:
        writers = {
            (split, source): ShardWriter(aside, split, source, dtype)
            for split in SPLITS
            for source in range(len(config.sources))
        }
        end = np.array([tokenizer.eos_id], dtype=np.uint32)
        sides: list[int] = []
        workers = config.workers or os.cpu_count() or 1
        documents = _documents(plan, skipped, progress, "tokenising")
        for source, document, side, ids in _tokenised(documents, tokenizer, workers):
            split = "validation" if side < threshold else "train"
            writers[split, source].add(np.concatenate([ids, end]) if document.complete else ids, len(document.content))
            sides = [min(*sides, side), max(*sides, side)] if sides else [side, side]
        _check_split(plan, sides, threshold, skipped)
        for writer in writers.values():
            writer.close()
        tokenizer.save(aside / "tokenizer")
        shards = [entry for writer in writers.values() for entry in writer.entries]
        facts = preparation.corpus_facts(config, plan.listings, tokenizer, vocab_size, digest, shards, skipped)
        preparation.write_facts(aside, facts)
    return Corpus.open(folder)


def _check_split(plan: _Plan, sides: list[int], threshold: int, skipped: Skipped) -> None:
    """Both splits need a document. `sides`: smallest and largest deciding number, empty where there is no document."""
    paths = ", ".join(source.path for source in plan.config.sources)
    if not sides:
        raise UserError(f"no usable document in {paths}; left out: {skipped.one_line()}")
    smallest, largest = sides
    if smallest == largest:
        raise UserError(f"only one usable document in {paths}; two are needed, one to train on and one to hold out "
                        f"(left out: {skipped.one_line()})")
    preparation.check_both_sides(smallest, largest, threshold)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of this folder; a living one may still be writing its own."""
    for leftover in folder.parent.glob(f"{files.PARTIAL}{folder.name}-*-*"):
        process = leftover.name.removeprefix(f"{files.PARTIAL}{folder.name}-").split("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(leftover, ignore_errors=True)
        except (ValueError, OSError):
            continue
