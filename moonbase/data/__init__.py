"""Corpora, tokenizer, packing, stream: from files to batches.

    sources = installed_python_sources()
    corpus = prepare_corpus(DataConfig(sources=sources, max_bytes=20_000_000), None, 4096, Path("corpus"), seed=0)
    stream = PackedStream(corpus, "train", sequence_length=512, batch_size=8, seed=0)
    batch = next(stream)                      # tokens, targets, documents: [8, 512]
    stream.load_state_dict(saved)             # continues bit for bit

`sources` lists files, `readers` turns them into documents, `corpus` makes `shards` of plain text and `dialogues` those
of chats, `packing` and `stream` make batches. Nothing here needs torch before the first batch.
"""

from __future__ import annotations

from moonbase.data.corpus import prepare_corpus
from moonbase.data.dialogues import DialogueCorpus, prepare_dialogues
from moonbase.data.shards import Corpus
from moonbase.data.sources import Skipped, installed_python_sources
from moonbase.data.stream import Batch, PackedStream, validation_batches
from moonbase.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "DialogueCorpus",
    "PackedStream",
    "Skipped",
    "Tokenizer",
    "installed_python_sources",
    "load_tokenizer",
    "prepare_corpus",
    "prepare_dialogues",
    "train_tokenizer",
    "validation_batches",
]
