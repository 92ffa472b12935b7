from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from moonbase.data import Corpus, Skipped
from moonbase.data.preparation import Resplit, check_both_sides, digest_of, open_unchanged
from moonbase.data.sources import list_files
from moonbase.errors import UserError


def test_the_threshold_of_a_resplit_leaves_nobody_without_a_side() -> None:
    for sides in itertools.combinations(range(6), 3):
        for threshold in range(8):
            held_out = [side for side in sides if side < threshold]
            try:
                check_both_sides(min(sides), max(sides), threshold)
                assert 0 < len(held_out) < 3
            except Resplit as resplit:
                assert len(held_out) in (0, 3)
                assert 0 < sum(side < resplit.threshold for side in sides) < 3


def test_a_digest_knows_the_files_and_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    digests = []
    for text, facts in (("one", [1]), ("one", [2]), ("three", [1]), ("four!", [1])):
        path.write_text(text)
        os.utime(path, ns=(0, 7 if text == "four!" else 5))
        digests.append(digest_of(facts, [list_files(str(path), Skipped()), None]))
    assert len(set(digests)) == 4
    path.write_text("one")
    os.utime(path, ns=(0, 5))
    assert digest_of([1], [list_files(str(path), Skipped()), None]) == digests[0]


def test_only_an_empty_or_broken_folder_is_filled(tmp_path: Path) -> None:
    assert open_unchanged(Corpus, tmp_path / "absent", "0") is None
    assert open_unchanged(Corpus, tmp_path, "0") is None
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        open_unchanged(Corpus, tmp_path, "0")
    (tmp_path / "corpus.json").write_text("{")
    assert open_unchanged(Corpus, tmp_path, "0") is None
