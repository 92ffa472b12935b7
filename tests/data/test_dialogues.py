"""Dialogues on disk and in batches, against a renderer and a reading that are this file's own."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moonbase.data import Corpus, DialogueCorpus, PackedStream, Tokenizer, prepare_dialogues, train_tokenizer
from moonbase.data import stream as stream_module
from moonbase.data.dialogues import CUT
from moonbase.data.packing import IGNORED
from moonbase.data.stream import validation_batches
from moonbase.errors import UserError
from moonbase.recipe import DataConfig, Source

LENGTH = 128
Message = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([], 300)


def render_with(tokenizer: Tokenizer) -> Callable[..., tuple[list[int], list[bool]]]:
    """`role: content <|im_end|>` a turn; an assistant's content and end are learnt."""

    def render(messages: list[Message], tools: list[Message] | None) -> tuple[list[int], list[bool]]:
        ids, mask = [], []
        for number, message in enumerate(messages):
            if message.get("role") not in ("user", "assistant"):
                raise UserError(f"messages[{number}].role: expected user or assistant")
            head = tokenizer.encode(message["role"][0] + (f"[{len(tools)}]" if tools and not number else ""))
            body = [*tokenizer.encode(message["content"]), tokenizer.im_end_id]
            ids += head + body
            mask += [False] * len(head) + [message["role"] == "assistant"] * len(body)
        return ids, mask

    return render


def talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def some_dialogues(count: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    return [talk(*(f"{number}." + "".join(chance.choices("abc ", k=chance.randint(0, 9)))
                   for _ in range(2 * chance.randint(1, 3)))) for number in range(count)]


def write(path: Path, records: list[Any]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepare(path: Path, tokenizer: Tokenizer, folder: Path, length: int = LENGTH, **config: Any) -> DialogueCorpus:
    wanted = DataConfig(sources=(Source(path=str(path)),), **{"validation_fraction": 0.2, **config})
    return prepare_dialogues(wanted, tokenizer, render_with(tokenizer), "plain", 300, length, folder)


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> DialogueCorpus:
    folder = tmp_path_factory.mktemp("dialogues")
    return prepare(write(folder / "chats.jsonl", some_dialogues(150)), tokenizer, folder / "corpus")


def pieces(batch: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of every dialogue in a batch, padding left out."""
    found = []
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        for number in documents.unique():
            chosen = documents == number
            if (targets[chosen] != IGNORED).any():
                found.append((tuple(tokens[chosen].tolist()), tuple(targets[chosen].tolist())))
    return found


def expected(tokenizer: Tokenizer, dialogue: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids, mask = render_with(tokenizer)(dialogue["messages"], None)
    targets = [ids[i + 1] if mask[i + 1] else IGNORED for i in range(len(ids) - 1)] + [IGNORED]
    return tuple(ids), tuple(targets)


def test_every_dialogue_comes_once_an_epoch_and_only_replies_are_targets(
    corpus: DialogueCorpus, tokenizer: Tokenizer
) -> None:
    wanted = Counter(expected(tokenizer, dialogue) for dialogue in some_dialogues(150))
    held_out = Counter(piece for batch in validation_batches(corpus, LENGTH, 4) for piece in pieces(batch))
    trained: Counter = Counter()
    stream = PackedStream(corpus, "train", LENGTH, 1, seed=3)
    while sum(trained.values()) < corpus.train.num_documents:
        trained.update(pieces(next(stream)))
    assert trained + held_out == wanted and not trained & held_out
    assert 0 < sum(held_out.values()) == corpus.validation.num_documents < 75
    learnt = sum(target != IGNORED for piece in wanted for target in piece[1])
    assert corpus.facts["learnt_tokens"] == learnt and corpus.facts["documents"] == 150
    assert corpus.facts["kind"] == "dialogues" and corpus.facts["style"] == "plain"


def test_the_same_seed_gives_the_same_batches_and_a_position_continues_bit_for_bit(
    corpus: DialogueCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "BUFFER_TOKENS", 700)
    monkeypatch.setattr(stream_module, "_BUFFER_ROWS", 1)
    def batches(stream: PackedStream, count: int) -> list[list[torch.Tensor]]:
        return [[batch.tokens, batch.targets, batch.documents] for batch in islice(stream, count)]

    whole = batches(PackedStream(corpus, "train", LENGTH, 4, seed=1), 30)
    other = batches(PackedStream(corpus, "train", LENGTH, 4, seed=2), 30)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(whole, other, strict=True))
    for done in (1, 7, 19):
        stream = PackedStream(corpus, "train", LENGTH, 4, seed=1)
        batches(stream, done)
        again = PackedStream(corpus, "train", LENGTH, 4, seed=1)
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        for left, right in zip(batches(again, 30 - done), whole[done:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_dialogue_is_on_the_same_side_whatever_stands_beside_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dialogues = some_dialogues(60)
    sides = []
    for name, records in (("a", dialogues), ("b", [*some_dialogues(40, seed=9), *dialogues[::-1]])):
        corpus = prepare(write(tmp_path / f"{name}.jsonl", records), tokenizer, tmp_path / name)
        sides.append({piece for batch in validation_batches(corpus, LENGTH, 2) for piece in pieces(batch)})
    wanted = {expected(tokenizer, dialogue) for dialogue in dialogues}
    assert sides[0] == sides[1] & wanted


def test_what_is_no_dialogue_is_counted_with_file_and_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = some_dialogues(12)
    path = write(tmp_path / "chats.jsonl", [
        *good[:3], '{"messages": [', "", {"text": "no messages"}, {"messages": []}, {**good[3], "tools": "none"},
        {"messages": [{"role": "robot", "content": "x"}]}, talk("only a question"), good[0], *good[3:],
    ])
    skipped = prepare(path, tokenizer, tmp_path / "corpus").facts["skipped"]
    assert {reason: (entry["count"], entry["names"]) for reason, entry in skipped.items()} == {
        "broken line": (1, [f"{path}:4"]), "empty line": (1, [f"{path}:5"]),
        "no list in the field 'messages'": (2, [f"{path}:6", f"{path}:7"]),
        "no list in the field 'tools'": (1, [f"{path}:8"]),
        "not a dialogue": (1, [f"{path}:9: messages[0].role: expected user or assistant"]),
        "no reply of an assistant": (1, [f"{path}:10"]), "duplicate": (1, [f"{path}:11"]),
    }


def test_a_long_dialogue_is_cut_after_a_reply_or_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long, hopeless = talk("q", "short", "q", "x" * 150, "q", "y"), talk("q" * 150, "never reached")
    exact = talk("q", "a" * (LENGTH - 5))
    path = write(tmp_path / "chats.jsonl", [long, hopeless, exact, *some_dialogues(20)])
    corpus = prepare(path, tokenizer, tmp_path / "corpus")
    skipped = corpus.facts["skipped"]
    assert skipped[CUT]["names"] == [f"{path}:1"]
    assert skipped["no reply ends within sequence_length"]["names"] == [f"{path}:2"] and len(skipped) == 2
    found = {piece for batch in islice(PackedStream(corpus, "train", LENGTH, 4, seed=0), 30) for piece in pieces(batch)}
    found |= {piece for batch in validation_batches(corpus, LENGTH, 4) for piece in pieces(batch)}
    assert expected(tokenizer, talk("q", "short")) in found and expected(tokenizer, exact) in found
    assert len(expected(tokenizer, exact)[0]) == LENGTH


@pytest.mark.parametrize(("records", "complaint"), [
    ([], r"no usable dialogue in .*chats\.jsonl"),
    (["{", talk("?")], r"no usable dialogue in .*1 broken line \(.*chats\.jsonl:1\)"),
    ([talk("a", "b")], "only one usable dialogue"),
])
def test_nothing_usable_is_the_users_mistake(
    records: list[Any], complaint: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        prepare(write(tmp_path / "chats.jsonl", records), tokenizer, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_two_dialogues_are_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for seed in range(5):
        path = write(tmp_path / f"{seed}.jsonl", some_dialogues(2, seed))
        corpus = prepare(path, tokenizer, tmp_path / f"corpus{seed}", validation_fraction=0.02)
        assert (corpus.train.num_documents, corpus.validation.num_documents) == (1, 1)


def test_it_is_made_again_only_where_something_has_changed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, folder = write(tmp_path / "chats.jsonl", some_dialogues(30)), tmp_path / "corpus"
    first = prepare(path, tokenizer, folder)
    made = (folder / "corpus.json").stat().st_mtime_ns
    assert prepare(path, tokenizer, folder).facts["digest"] == first.facts["digest"]
    assert (folder / "corpus.json").stat().st_mtime_ns == made
    assert prepare(path, tokenizer, folder, length=LENGTH - 1).facts["digest"] != first.facts["digest"]
    write(path, some_dialogues(31))
    assert prepare(path, tokenizer, folder).facts["documents"] == 31


def test_a_folder_takes_its_jsonl_files_and_a_limit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    write(tmp_path / "chats" / "a.jsonl", some_dialogues(10))
    (tmp_path / "chats" / "notes.txt").write_text("no dialogue")
    corpus = prepare(tmp_path / "chats", tokenizer, tmp_path / "corpus", max_documents=6)
    assert corpus.facts["documents"] == 6 and corpus.facts["skipped"]["other file type"]["count"] == 1


def test_mistakes_are_named(tokenizer: Tokenizer, corpus: DialogueCorpus, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", some_dialogues(5))
    with pytest.raises(UserError, match="max_bytes is for plain text"):
        prepare(path, tokenizer, tmp_path / "corpus", max_bytes=10)
    with pytest.raises(UserError, match="hub:x: dialogues are read from JSONL files"):
        prepare(Path("hub:x"), tokenizer, tmp_path / "corpus")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        prepare(path, tokenizer, tmp_path / "other")
    made = prepare(path, tokenizer, tmp_path / "corpus")
    next(made.folder.glob("*.mask.bin")).write_bytes(b"")
    with pytest.raises(UserError, match="missing or cut short; prepare the dialogues again"):
        DialogueCorpus.open(made.folder)
    assert prepare(path, tokenizer, tmp_path / "corpus").facts["documents"] == 5, "it mends itself"


def test_masks_lie_beside_the_tokens(corpus: DialogueCorpus) -> None:
    for entry in corpus.facts["shards"]:
        mask = np.fromfile(corpus.folder / entry["file"].replace(".bin", ".mask.bin"), dtype=np.bool_)
        assert len(mask) == entry["tokens"]
    assert Corpus.open(corpus.folder).train.num_documents == corpus.train.num_documents
