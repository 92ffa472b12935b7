"""What every corpus goes through, plain text or dialogues: is it there already, which side is whose, what is noted.

The two kinds differ in what a document is and how it becomes tokens (`corpus`, `dialogues`); the folder that comes of
it is described and recognised alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moonbase.data.shards import FORMAT, SPLITS, Corpus, token_dtype
from moonbase.data.sources import Skipped, SourceFile
from moonbase.data.tokenizer import Tokenizer
from moonbase.errors import UserError
from moonbase.recipe import DataConfig

HASHES = 1 << 64
"""How many numbers there are that decide a document's side; those below a threshold are held out."""

Listings = Sequence[Sequence[SourceFile] | None]
"""Files of each source; None for a streamed data set."""

Kind = TypeVar("Kind", bound=Corpus)


class Resplit(Exception):
    """All documents fell on one side; the threshold that moves one of them over."""

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold


def check_both_sides(smallest: int, largest: int, threshold: int) -> None:
    """Raise Resplit where one side is empty; `smallest` and `largest`: of the numbers that decided, two at least."""
    assert smallest < largest
    if smallest >= threshold:
        raise Resplit(smallest + 1)
    if largest < threshold:
        raise Resplit(largest)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError where a model of `vocab_size` cannot learn from this tokenizer's ids."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} entries")
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end-of-document token (eos_token in tokenizer_config.json)")


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The fields that decide what a corpus holds."""
    return config.model_dump(mode="json", exclude={"workers", "tokenizer"})


def digest_of(facts: Sequence[Any], listings: Listings) -> str:
    """A hash of everything that a corpus depends on: `facts`, and the files with their sizes and times."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for listing in listings:
        for file in listing or ():
            name = os.fsencode(file.relative)
            digest.update(b"%d %d %d " % (len(name), file.size, file.modified_ns) + name)
    return digest.hexdigest()


def open_unchanged(kind: type[Kind], folder: Path, digest: str) -> Kind | None:
    """The corpus in `folder` where there is one of this digest; None where it is to be made. Raises UserError where
    the folder holds something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / "corpus.json").is_file():
        raise UserError(f"{folder}: holds other files; choose another folder for the corpus")
    try:
        corpus = kind.open(folder)
    except UserError:
        return None  # unfinished or of an older format
    return corpus if corpus.facts["digest"] == digest else None


def corpus_facts(
    config: DataConfig, listings: Listings, tokenizer: Tokenizer, vocab_size: int, digest: str,
    shards: list[dict[str, Any]], skipped: Skipped,
) -> dict[str, Any]:
    """The content of corpus.json."""
    sources = [
        {**source.model_dump(mode="json"), "files": None if listing is None else len(listing),
         **_counts(entry for entry in shards if entry["source"] == index)}
        for index, (source, listing) in enumerate(zip(config.sources, listings, strict=True))
    ]
    return {
        "format": FORMAT,
        "digest": digest,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "tokenizer": {"digest": tokenizer.digest, "vocab_size": tokenizer.vocab_size},
        "settings": config.model_dump(mode="json"),
        "sources": sources,
        **_counts(shards),
        **{split: _counts(entry for entry in shards if entry["split"] == split) for split in SPLITS},
        "skipped": skipped.to_json(),
        "shards": shards,
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """corpus.json, the last file of a corpus."""
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _counts(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    sums = dict.fromkeys(("documents", "bytes", "tokens"), 0)
    for entry in entries:
        for name in sums:
            sums[name] += entry[name]
    return sums | {"bytes_per_token": round(sums["bytes"] / max(sums["tokens"], 1), 4)}
