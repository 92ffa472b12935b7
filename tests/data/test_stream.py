"""Batches against brute force: every token, every target, every boundary, and exact continuation."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from moonbase.data import stream as stream_module
from moonbase.data.corpus import prepare_corpus
from moonbase.data.packing import IGNORED
from moonbase.data.shards import Corpus
from moonbase.data.stream import Batch, PackedStream, validation_batches
from moonbase.data.tokenizer import train_tokenizer
from moonbase.errors import UserError
from moonbase.recipe import DataConfig, Source


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources; every document has a number in it, so no two are alike."""
    folder = tmp_path_factory.mktemp("stream")
    chance = random.Random(0)
    for source in ("first", "second"):
        lines = [
            json.dumps({"text": f"{source} {number} " + " ".join(chance.choices("abcdefgh", k=chance.randint(1, 90)))})
            for number in range(120)
        ]
        (folder / f"{source}.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        sources=(Source(path=str(folder / "first.jsonl")), Source(path=str(folder / "second.jsonl"))),
        validation_fraction=0.2,
    )
    return prepare_corpus(config, train_tokenizer([], 300), 300, folder / "corpus")


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buffers an epoch, as in a large corpus."""
    monkeypatch.setattr(stream_module, "BUFFER_TOKENS", 1500)
    monkeypatch.setattr(stream_module, "_BUFFER_ROWS", 1)
    monkeypatch.setattr(stream_module, "_DRAW", 7)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "targets", "documents"))


def pieces(batches: list[Batch], corpus: Corpus) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of every piece; checks what must hold inside a row."""
    found = []
    for batch in batches:
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.documents.dtype == torch.int32
        for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
            assert (documents.diff() >= 0).all() and documents[0] == 0 and (documents.diff() <= 1).all()
            for number in documents.unique():
                chosen = documents == number
                piece, wanted = tokens[chosen].tolist(), targets[chosen].tolist()
                if set(piece) == {corpus.pad_id}:
                    assert set(wanted) == {IGNORED} and number == documents[-1]
                    continue
                assert wanted[:-1] == piece[1:]
                found.append((tuple(piece), tuple(wanted)))
    return found


def brute_force(corpus: Corpus, split: str, length: int) -> Counter:
    """Pieces as the words of the module describe them, straight from the documents."""
    counted: Counter = Counter()
    documents = corpus.split(split)
    for document in range(documents.num_documents):
        ids = [*documents.read(document).tolist(), IGNORED]
        for start in range(0, len(ids) - 1, length):
            end = min(start + length, len(ids) - 1)
            counted[tuple(ids[start:end]), tuple(ids[start + 1 : end + 1])] += 1
    return counted


@pytest.mark.parametrize("length", [2, 17, 64, 1000])
def test_one_epoch_has_every_piece_once(corpus: Corpus, small_buffers: None, length: int) -> None:
    stream = PackedStream(corpus, "train", length, 1, seed=3)
    batches = []
    while stream.epoch <= 1.0 and not (stream.epoch == 1.0 and stream._row == len(stream._rows)):
        batches.append(next(stream))
    assert Counter(pieces(batches, corpus)) == brute_force(corpus, "train", length)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("length", [17, 64])
def test_validation_scores_every_token_once(
    corpus: Corpus, small_buffers: None, length: int, world_size: int
) -> None:
    ranks = [list(validation_batches(corpus, length, 4, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    filled = [batch for batches in ranks for batch in batches]
    assert {batch.tokens.shape for batch in filled} == {(4 // world_size, length)}
    assert Counter(pieces(filled, corpus)) == brute_force(corpus, "validation", length)
    scored = sum(int((batch.targets != IGNORED).sum()) for batch in filled)
    assert scored == corpus.validation.num_tokens - corpus.validation.num_documents


def test_validation_part_is_the_text_of_the_same_part(corpus: Corpus) -> None:
    """What is scored and what another compressor gets are the same bytes, less each document's first token."""
    batches = list(validation_batches(corpus, 32, 2, max_bytes=1500))
    text = corpus.validation_text(1500)
    scored = sum(int(corpus.byte_lengths[batch.targets[batch.targets != IGNORED].numpy()].sum()) for batch in batches)
    firsts = [int(corpus.validation.read(int(document))[0]) for document in corpus.validation_order(1500)]
    assert scored + int(corpus.byte_lengths[firsts].sum()) == len(text)


def test_resumes_at_every_cut(corpus: Corpus, small_buffers: None) -> None:
    """Over buffers and epochs: a new stream that loads the state goes on with the very same batches."""
    stream = PackedStream(corpus, "train", 40, 3, seed=1)
    states, batches = [], []
    while stream.epoch < 2.5:
        states.append(json.dumps(stream.state_dict()))
        batches.append(next(stream))
    assert len({json.loads(state)["buffer"] for state in states}) > 10
    for cut, state in enumerate(states):
        resumed = PackedStream(corpus, "train", 40, 3, seed=1)
        resumed.load_state_dict(json.loads(state))
        for batch in batches[cut : cut + 8]:
            assert equal(next(resumed), batch)
        assert len(state) < 500


def test_resumes_with_weights(corpus: Corpus, small_buffers: None) -> None:
    weighted = with_weights(corpus, 1, 3)
    stream = PackedStream(weighted, "train", 40, 3, seed=1)
    for _ in range(200):
        state = json.loads(json.dumps(stream.state_dict()))
        batch = next(stream)
        resumed = PackedStream(weighted, "train", 40, 3, seed=1)
        resumed.load_state_dict(state)
        assert equal(next(resumed), batch)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_rows_do_not_depend_on_the_number_of_processes(
    corpus: Corpus, small_buffers: None, world_size: int
) -> None:
    alone = PackedStream(corpus, "train", 40, 6, seed=1)
    ranks = [PackedStream(corpus, "train", 40, 6, 1, rank, world_size) for rank in range(world_size)]
    for step in range(60):
        if step == 30:
            # Another number of processes takes over in the middle.
            state = alone.state_dict()
            assert all(rank.state_dict() == state for rank in ranks)
            alone = PackedStream(corpus, "train", 40, 6, seed=1)
            alone.load_state_dict(ranks[-1].state_dict())
        whole, parts = next(alone), [next(rank) for rank in ranks]
        for name in ("tokens", "targets", "documents"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_order_follows_the_seed_and_the_epoch(corpus: Corpus, small_buffers: None) -> None:
    def rows(seed: int, shuffle: bool = True) -> list[Batch]:
        return list(islice(PackedStream(corpus, "train", 40, 3, seed, shuffle=shuffle), 40))

    first, again, other = rows(1), rows(1), rows(2)
    assert all(map(equal, first, again))
    assert not any(map(equal, first, other))
    plain = rows(1, shuffle=False)
    assert all(map(equal, plain, rows(2, shuffle=False)))


def with_weights(corpus: Corpus, first: float, second: float) -> Corpus:
    sources = [{**corpus.sources[0], "weight": first}, {**corpus.sources[1], "weight": second}]
    return Corpus(corpus.folder, {**corpus.facts, "sources": sources})


def test_weights_are_shares_of_the_tokens(corpus: Corpus, small_buffers: None) -> None:
    """Equal weights give each source its size's share; others are kept to within one document."""
    train = corpus.train
    owner = {}
    for source, (first, last) in train.ranges().items():
        for document in range(first, last):
            owner[tuple(train.read(document).tolist())] = source
    for weights, wanted in (((1, 3), 0.25), ((5, 1), 5 / 6)):
        stream = PackedStream(with_weights(corpus, *weights), "train", 1000, 1, seed=0)
        tokens = [0, 0]
        for _ in range(60):
            for piece, _ in pieces([next(stream)], corpus):
                tokens[owner[piece]] += len(piece)
        assert tokens[0] / sum(tokens) == pytest.approx(wanted, abs=0.02)


def test_whole_rows_come_first_and_nothing_is_lost() -> None:
    documents = torch.tensor([[0, 1, 1], [4, 4, 4], [0, 0, 1], [0, 0, 0]], dtype=torch.int32)
    tokens = torch.arange(12).view(4, 3)
    batch = Batch(tokens, tokens + 1, documents).whole_rows_first()
    assert batch.documents.tolist() == [[4, 4, 4], [0, 0, 0], [0, 1, 1], [0, 0, 1]]
    assert batch.tokens[:, 0].tolist() == [3, 9, 0, 6] and torch.equal(batch.targets, batch.tokens + 1)


def test_wrong_state_is_named(corpus: Corpus) -> None:
    state = PackedStream(corpus, "train", 40, 3, seed=1).state_dict()
    for stream, name in (
        (PackedStream(corpus, "train", 41, 3, seed=1), "sequence_length"),
        (PackedStream(corpus, "train", 40, 3, seed=2), "seed"),
        (PackedStream(corpus, "validation", 40, 3, seed=1), "tokens"),
    ):
        with pytest.raises(UserError, match=f"cannot resume the data stream: {name}"):
            stream.load_state_dict(state)
    with pytest.raises(UserError, match="batch_size=3 must be a multiple"):
        PackedStream(corpus, "train", 40, 3, 1, rank=0, world_size=2)


def test_rows_are_full(corpus: Corpus) -> None:
    stream = PackedStream(corpus, "train", 64, 8, seed=0)
    assert stream.fill_efficiency > 0.97
    documents = np.concatenate([next(stream).documents.numpy() for _ in range(5)])
    assert documents.max() > 0


def test_real_prose_end_to_end(shared_data: Path, tmp_path: Path) -> None:
    """A megabyte of Shakespeare in one packed file: split, learned, packed, scored."""
    path = shared_data / "tinyshakespeare" / "input.txt.gz"
    if not path.is_file():
        pytest.skip(f"real text is absent: {path}")
    corpus = prepare_corpus(DataConfig.model_validate(str(path)), None, 1024, tmp_path / "corpus")
    assert corpus.train.num_bytes + corpus.validation.num_bytes == 1_115_394
    assert 0.005 < corpus.validation.num_bytes / 1_115_394 < 0.05
    assert corpus.summary["bytes_per_token"] > 2
    batch = next(PackedStream(corpus, "train", 256, 4, seed=0))
    assert batch.tokens.shape == (4, 256)
    scored = sum(int((batch.targets != IGNORED).sum()) for batch in validation_batches(corpus, 256, 4))
    assert scored == corpus.validation.num_tokens - corpus.validation.num_documents
