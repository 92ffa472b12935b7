"""A streamed data set and a folder in one mix, each with a weight: from the recipe to the shares of the batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moonbase.data import PackedStream, prepare_corpus, train_tokenizer
from moonbase.recipe import load_recipe

NUM_TOKENS = 200_000


def stories(count: int, word: str) -> list[str]:
    return [f"{word} {number}: " + f"{word} and some more, " * (10 + number % 13) for number in range(count)]


@pytest.mark.parametrize(("streamed", "local", "wanted"), [(3.0, 1.0, 0.75), (1.0, 4.0, 0.2)])
def test_each_source_has_its_share_of_the_tokens(
    tmp_path: Path, streamed: float, local: float, wanted: float
) -> None:
    """Counted from the text of the batches; the folder is five times as large, and sizes must not matter.

    A data set on disk goes through the same library and code as one from the network."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"body": text}) for text in stories(200, "rain")]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(stories(1000, "snow")):
        (tmp_path / "folder" / f"{number}.txt").write_text(text, encoding="utf-8")
    recipe_file = tmp_path / "mix.yaml"
    recipe_file.write_text(
        "model: pico\ndata:\n  sources:\n"
        f"    - {{path: 'hub:{tmp_path / 'set'}', weight: {streamed}, text_field: body}}\n"
        f"    - {{path: '{tmp_path / 'folder'}', weight: {local}}}\n", encoding="utf-8")
    recipe = load_recipe(str(recipe_file), [])
    corpus = prepare_corpus(recipe.data, train_tokenizer(stories(9, "rain") + stories(9, "snow"), 400), 512,
                            tmp_path / "corpus")
    assert [source["documents"] for source in corpus.summary["sources"]] == [200, 1000]

    stream, tokens = PackedStream(corpus, "train", 512, 4, seed=0), {"rain": 0, "snow": 0}
    while sum(tokens.values()) < NUM_TOKENS:
        batch = next(stream)
        for row, documents in zip(batch.tokens, batch.documents, strict=True):
            for document in documents.unique():
                ids = row[documents == document].tolist()
                text = corpus.tokenizer.decode(ids)
                # The few pieces that name neither are padding and ends of documents.
                for word in tokens:
                    tokens[word] += len(ids) if word in text else 0
    assert tokens["rain"] / sum(tokens.values()) == pytest.approx(wanted, abs=0.02)
