"""Memory beside the number of samples: what is kept of each, and what is kept in place of Python's sets."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moonbase.evals import columns
from moonbase.evals.proof import chain, hashes
from moonbase.evals.proof.levels import Sources
from moonbase.evals.proof.settled import Settled
from moonbase.evals.proof.survey import Survey
from moonbase.evals.records import ModelCall, Record, digest
from moonbase.evals.suite import Suite
from moonbase.evals.table import Table

SUITE = {"schema": "moonbase.suite/1", "name": "s", "title": "S", "metric": "accuracy",
         "tasks": [{"name": "t", "source": "builtin:choices"}]}
RECORD = Record(suite="s", task="t", item="", model="m", condition={"language": "en"}, input_digest="",
                target_digest=digest("B"), output_digest=digest(""), scores={"accuracy": 1.0},
                details={"extracted": "B"}, call=ModelCall(decoding={"temperature": 0.0}))
SIZES = 500, 2_000


def asked_once(count: int) -> Iterator[Record]:
    """Every sample is of another item."""
    for number in range(count):
        yield RECORD.model_copy(update={"item": f"item-{number:06}", "input_digest": digest(str(number))})


def read(count: int, place: Path) -> Any:
    path = place / f"{count}.jsonl"
    if not path.exists():
        with path.open("w") as file:
            line = json.dumps(RECORD.canonical() | {"output": "word " * 50})
            for number in range(count):
                file.write(line.replace('"item": ""', f'"item": "item-{number:06}"').replace(
                    '"input_digest": ""', f'"input_digest": "{digest(str(number))}"') + "\n")
        return None
    return Table.read(path)


def surveyed(count: int, place: Path) -> Any:
    survey, settled = Survey(Sources({"suite": SUITE})), Settled(Suite.model_validate(SUITE))
    for record in asked_once(count):
        survey.add(record)
        assert settled.check(record) == []
    return survey, settled


def linked(count: int, place: Path) -> Any:
    tree = chain.MerkleTree(follow=7)
    for number in range(count):
        tree.append(number.to_bytes(32, "big"))
    return tree.path()


@pytest.mark.parametrize(("work", "most"), [(read, 150), (surveyed, 90), (linked, 1)])
def test_a_sample_of_an_item_of_its_own_costs_few_bytes(
    work: Callable[[int, Path], Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its highest, from one size to the other. In Python's own strings and sets: 440, 640 and 70 bytes."""
    monkeypatch.setattr(columns, "FEW", 32)
    monkeypatch.setattr(hashes, "FEW", 32)
    peaks = []
    work(10, tmp_path)
    for count in SIZES:
        if work is read:
            read(count, tmp_path)
        tracemalloc.start()
        kept = work(count, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    assert (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0]) < most


@pytest.mark.parametrize("seed", range(40))
def test_many_words_are_those_of_a_list(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of every length, halves of signs, zeros at the end; digests with and without a salt."""
    monkeypatch.setattr(columns, "FEW", seed % 4)
    draw = random.Random(seed)
    odd = ["", "a", "ab\0", "ab", "\ud83d", "\u00e9", "\u6f22\u5b57", "\U0001f600", "sha256:" + "A" * 64]
    kinds = (lambda: draw.choice(odd), lambda: str(draw.randrange(10**6)), lambda: digest(str(draw.random()))), \
        (lambda: f"{draw.randrange(999):03}",), (lambda: digest(str(draw.random())), lambda: digest("x", bytes(
            [draw.randrange(256)])))
    kind, digests = kinds[seed % 3], seed % 3 == 2
    pool = [draw.choice(kind)() for _ in range(60)] + [None]
    column, rows = columns.WordColumn(digests), []
    for row in range(0, 400, 2):
        rows += [draw.choice(pool), None]
        column.put(row, rows[-2])
        column = column.copy() if draw.random() < 0.02 else column
    words, codes = column.done(len(rows))
    expected = sorted({word for word in rows if word is not None})
    assert words == expected and list(words) == expected and len(words) == len(expected) and words[-1] == expected[-1]
    assert [None if code < 0 else words[code] for code in codes.tolist()] == rows
    assert [columns.place_of(words, word) for word in expected] == list(range(len(expected)))
    assert columns.place_of(words, "nowhere") is None
    part = words.part(np.arange(0, len(words), 3)) if isinstance(words, columns.Words) else words[::3]
    assert list(part) == expected[::3] and columns.place_of(part, expected[3]) == 1


def test_tables_of_many_items_are_joined_and_searched_as_tables_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    records = list(asked_once(40))
    halves = records[:25], [one.model_copy(update={"cluster": "c"}) for one in records[15:]]

    def joined() -> Table:
        return Table.joined([Table.of(half) for half in halves], ["a", "b"])

    few = joined()
    monkeypatch.setattr(columns, "FEW", 3)
    many = joined()
    assert isinstance(many.words["item"], columns.Words) and isinstance(few.words["item"], list)
    for name in ("item", "cluster", "input_digest"):
        assert list(many.words[name]) == few.words[name] and many.codes[name].tolist() == few.codes[name].tolist()
        assert list(many.present(name, np.arange(20, 40))) == few.present(name, np.arange(20, 40))
    for select in ({"item": "item-000020"}, {"item": "item-000020|item-000003|x"}, {"cluster": "c|item-000000"},
                   {"input_digest": digest("4")}, {"item": ""}, {"item": "x"}):
        assert many.rows(select).tolist() == few.rows(select).tolist()
    assert many.describe(30) == few.describe(30)


def test_sets_and_firsts_are_those_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "FEW", 7)
    draw, seen, first = random.Random(0), set(), {}
    distinct, firsts = hashes.Distinct(2), hashes.Firsts()
    for _ in range(3000):
        value = bytes([draw.randrange(256), draw.choice((0, 1, 255))])
        seen.add(value)
        distinct.add(value)
        key, said = draw.randrange(-400, 400) << 50, draw.randrange(2)
        assert firsts.agrees(key, said) == (first.setdefault(key, said) == said)
    assert len(distinct) == len(seen) and distinct.tobytes() == b"".join(sorted(seen))


def test_a_path_is_told_while_leaves_go_by() -> None:
    """The definition of RFC 6962, of all leaves at once."""
    def root(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return hashlib.sha256(b"\0" + leaves[0]).digest()
        middle = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\1" + root(leaves[:middle]) + root(leaves[middle:])).digest()

    def path(leaves: list[bytes], index: int) -> list[bytes]:
        if len(leaves) == 1:
            return []
        middle = 1 << (len(leaves) - 1).bit_length() - 1
        if index < middle:
            return [*path(leaves[:middle], index), root(leaves[middle:])]
        return [*path(leaves[middle:], index - middle), root(leaves[:middle])]

    for size in range(1, 21):
        leaves = [bytes([number]) for number in range(size)]
        for index in range(size):
            assert chain.inclusion_path(leaves, index) == path(leaves, index)
