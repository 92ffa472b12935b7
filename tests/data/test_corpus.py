"""From real folders to shards: nothing lost, nothing leaked, nothing half-made."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moonbase.data import corpus as corpus_module
from moonbase.data.corpus import prepare_corpus
from moonbase.data.shards import Corpus, Split, token_dtype
from moonbase.data.tokenizer import Tokenizer, train_tokenizer
from moonbase.errors import UserError
from moonbase.recipe import DataConfig, Source


def texts(count: int, name: str = "text") -> list[str]:
    return [f"{name} {number}: " + "some words to read, " * (1 + number % 13) + "\n" for number in range(count)]


def fill(folder: Path, documents: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(document, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(50), 400)


def decoded(corpus: Corpus, split: Split) -> list[str]:
    found = []
    for document in range(split.num_documents):
        ids = split.read(document).tolist()
        assert ids[-1] == corpus.eos_id and corpus.eos_id not in ids[:-1]
        found.append(corpus.tokenizer.decode(ids[:-1]))
    return found


def test_every_document_once_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wanted = texts(300)
    config = DataConfig(sources=(Source(path=str(fill(tmp_path / "in", wanted))),), validation_fraction=0.2)
    corpus = prepare_corpus(config, tokenizer, 512, tmp_path / "out", 0)
    train, validation = decoded(corpus, corpus.train), decoded(corpus, corpus.validation)
    assert sorted(train + validation) == sorted(wanted)
    assert 30 < len(validation) < 90
    facts = json.loads((tmp_path / "out" / "corpus.json").read_text(encoding="utf-8"))
    assert facts["documents"] == 300 and facts["bytes"] == sum(map(len, wanted))
    assert facts["tokens"] == corpus.train.num_tokens + corpus.validation.num_tokens
    assert facts["validation"]["bytes"] == sum(map(len, validation)) == corpus.validation.num_bytes
    assert corpus.byte_lengths[np.concatenate([corpus.train.read(n) for n in range(len(train))])].sum() == sum(
        map(len, train)
    )


def test_every_kind_of_file_in_one_mix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What other programs wrote: a folder with all of them but one, and that one beside it."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    kinds = ("a.txt", "b.md", "c.py", "d.jsonl", "e.parquet", "f.txt.gz", "g.md.zst", "h.jsonl.gz", "i.jsonl.zst")
    expected = {kind: texts(3, kind) for kind in kinds}
    folder = tmp_path / "mix"
    folder.mkdir()
    for kind, documents in expected.items():
        if kind == "e.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / kind)
            continue
        lines = ".jsonl" in kind
        content = "".join(json.dumps({"text": text}) + "\n" if lines else text for text in documents).encode()
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(kind).suffix, bytes)
        (folder / kind).write_bytes(pack(content))
        if not lines:
            expected[kind] = ["".join(documents)]
    apart = (folder / "e.parquet").rename(tmp_path / "e.parquet")
    sources = (Source(path=str(folder)), Source(path=str(apart)))
    corpus = prepare_corpus(DataConfig(sources=sources, workers=2), tokenizer, 512, tmp_path / "corpus")
    found = decoded(corpus, corpus.train) + decoded(corpus, corpus.validation)
    assert sorted(found) == sorted(text for documents in expected.values() for text in documents)
    assert corpus.summary["skipped"] == {}


def test_sides_depend_on_content_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Other names, other neighbours, another order: a text held out once is held out always."""
    wanted = texts(200)
    first = prepare_corpus(DataConfig.model_validate(str(fill(tmp_path / "a", wanted))), tokenizer, 512, tmp_path / "x")
    fill(tmp_path / "b", texts(300, "other") + wanted[::-1])
    second = prepare_corpus(DataConfig.model_validate(str(tmp_path / "b")), tokenizer, 512, tmp_path / "y", seed=5)
    held_out = set(decoded(first, first.validation))
    assert held_out and held_out == set(decoded(second, second.validation)) & set(wanted)


def test_no_held_out_text_trains_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [text + f"word{number}x" * 20 for number, text in enumerate(texts(200))]
    config = DataConfig(sources=(Source(path=str(fill(tmp_path / "in", wanted))),), validation_fraction=0.1)
    seen: list[str] = []

    def listening(samples, vocab_size, progress=None, split_digits=False):
        seen.extend(samples)
        return train_tokenizer(seen, vocab_size, progress, split_digits)

    monkeypatch.setattr(corpus_module, "train_tokenizer", listening)
    corpus = prepare_corpus(config, None, 600, tmp_path / "out")
    assert sorted(seen) == sorted(decoded(corpus, corpus.train))
    assert corpus.tokenizer.vocab_size <= 600


def test_result_is_the_same_bytes_with_any_number_of_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(fill(tmp_path / "in", texts(150)))
    for workers in (1, 3):
        prepare_corpus(DataConfig(sources=(Source(path=path),), workers=workers), None, 400, tmp_path / f"out{workers}")
    names = sorted(file.relative_to(tmp_path / "out1") for file in (tmp_path / "out1").rglob("*") if file.is_file())
    for name in names:
        if name.name != "corpus.json":
            assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes(), name


def test_finished_folder_is_reused_until_something_changes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = fill(tmp_path / "in", texts(50))
    config = DataConfig.model_validate(str(source))
    out = tmp_path / "out"

    def built(config: DataConfig = config, vocab_size: int = 512) -> int:
        prepare_corpus(config, tokenizer, vocab_size, out)
        return (out / "corpus.json").stat().st_ino

    first = built()
    assert built() == first
    assert built(config.model_copy(update={"workers": 1})) == first
    (source / "0000.txt").write_text("changed\n")
    second = built()
    assert second != first and built() == second
    third = built(vocab_size=513)
    assert third != second
    shard = next(out.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        Corpus.open(out)
    assert built(vocab_size=513) != third
    (out / "corpus.json").write_text("{")
    built()
    assert Corpus.open(out).train.num_documents


def test_interrupted_preparation_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(50))))

    def interrupt(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, tokenizer, 512, tmp_path / "out", 0, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(50))))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left, living = (tmp_path / f".partial-out-{int(pid)}-abc" for pid in (dead.stdout, os.getppid()))
    left.mkdir()
    living.mkdir()
    prepare_corpus(config, tokenizer, 512, tmp_path / "out")
    assert not left.exists() and living.exists()


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(5))))
    with pytest.raises(UserError, match="holds other files"):
        prepare_corpus(config, tokenizer, 512, tmp_path / "in")
    assert len(list((tmp_path / "in").iterdir())) == 5


def test_everything_left_out_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = fill(tmp_path / "in", texts(20))
    (source / "copy.txt").write_text(texts(20)[3])
    (source / "nul.txt").write_bytes(b"a\0b")
    (source / "latin.txt").write_bytes("long enough to be text, but café\n".encode("latin-1"))
    (source / "void.md").write_text("")
    (source / "x.jsonl").write_text('{"text": "good one"}\n{bad\n')
    corpus = prepare_corpus(DataConfig.model_validate(str(source)), tokenizer, 512, tmp_path / "out")
    skipped = {reason: entry["count"] for reason, entry in corpus.summary["skipped"].items()}
    assert skipped == {"duplicate": 1, "binary": 1, "not UTF-8": 1, "empty": 1, "broken line": 1}
    assert corpus.summary["skipped"]["broken line"]["names"] == [f"{source}/x.jsonl:2"]
    assert corpus.summary["documents"] == 21


def test_no_usable_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "nul.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match=r"no usable document in .*in; left out: 1 binary"):
        prepare_corpus(DataConfig.model_validate(str(source)), tokenizer, 512, tmp_path / "out")
    (source / "one.txt").write_text("just one\n")
    with pytest.raises(UserError, match="only one usable document"):
        prepare_corpus(DataConfig.model_validate(str(source)), tokenizer, 512, tmp_path / "out")
    with pytest.raises(UserError, match=r"data\.sources"):
        prepare_corpus(DataConfig(), tokenizer, 512, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_files_are_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run as somebody without rights, because the superuser may read everything."""
    folder = tmp_path_factory.mktemp("rights")
    fill(folder / "in", texts(3))
    fill(folder / "in" / "closed", texts(3, "closed"))
    (folder / "in" / "0001.txt").chmod(0)
    (folder / "in" / "closed").chmod(0)
    program = """
import os, sys
from moonbase.data.readers import Reading, read_file
from moonbase.data.sources import Skipped, list_files
if os.geteuid() == 0:
    os.chdir(sys.argv[1])
    os.setuid(65534)
skipped = Skipped()
count = sum(len(list(read_file(file, Reading(), skipped))) for file in list_files("in", skipped))
print(count, dict(skipped.counts))
"""
    try:
        folder.chmod(0o755)
        run = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2] if os.geteuid() == 0 else folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    finally:
        (folder / "in" / "closed").chmod(0o755)
    assert run.stdout.strip() == "2 {'unreadable folder': 1, 'unreadable': 1}", run.stderr


@pytest.mark.parametrize("count", [2, 3])
def test_few_documents_still_give_both_sides(tmp_path: Path, tokenizer: Tokenizer, count: int) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(count))))
    corpus = prepare_corpus(config, tokenizer, 512, tmp_path / "out")
    assert corpus.validation.num_documents == 1 and corpus.train.num_documents == count - 1
    everything = DataConfig(sources=config.sources, validation_fraction=0.49999)
    corpus = prepare_corpus(everything, tokenizer, 512, tmp_path / "out")
    assert corpus.validation.num_documents and corpus.train.num_documents


def test_one_long_file_is_cut_and_parted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"line {number} of one long file\n" for number in range(8000))
    (tmp_path / "long.txt").write_text(text)
    corpus = prepare_corpus(DataConfig.model_validate(str(tmp_path / "long.txt")), tokenizer, 512, tmp_path / "out")
    assert corpus.train.num_bytes + corpus.validation.num_bytes == len(text)
    assert 0.005 < corpus.validation.num_bytes / len(text) < 0.06
    ends = sum(
        split.read(document)[-1] == corpus.eos_id
        for split in (corpus.train, corpus.validation)
        for document in range(split.num_documents)
    )
    assert ends == 1


def test_parts_of_a_text_stay_on_one_side(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a text that streams in parts is held out whole, unless it is larger than all that is to be held out."""
    monkeypatch.setattr("moonbase.data.readers.PART_LENGTH", 50)
    wanted = [" ".join(f"{number}.{word}" for word in range(40)) for number in range(400)]
    config = DataConfig(sources=(Source(path=str(fill(tmp_path / "in", wanted))),), validation_fraction=0.1)
    corpus = prepare_corpus(config, tokenizer, 512, tmp_path / "out")
    assert corpus.train.num_documents > 1000
    found = {}
    for name in ("train", "validation"):
        split = corpus.split(name)
        pieces = [corpus.tokenizer.decode(split.read(document)) for document in range(split.num_documents)]
        found[name] = "".join(pieces).split("[EOS]")
        assert found[name].pop() == ""
    assert sorted(found["train"] + found["validation"]) == sorted(wanted) and len(found["validation"]) > 10


def test_budget_takes_a_fair_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for letter in "abcdefghij":
        fill(tmp_path / "in" / letter, texts(20, letter))
    total = sum(file.stat().st_size for file in (tmp_path / "in").rglob("*.txt"))
    config = DataConfig(sources=(Source(path=str(tmp_path / "in")),), max_bytes=total // 4)
    found = {}
    for seed in (0, 1):
        corpus = prepare_corpus(config, tokenizer, 512, tmp_path / f"out{seed}", seed)
        found[seed] = decoded(corpus, corpus.train)
        assert total / 4 <= corpus.summary["bytes"] < total / 4 + 500
        assert len({text[0] for text in found[seed]}) > 7
    assert found[0] != found[1]
    few = prepare_corpus(DataConfig(sources=config.sources, max_documents=12), tokenizer, 512, tmp_path / "few")
    assert few.summary["documents"] == 12


def test_budget_is_shared_between_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    large, small = fill(tmp_path / "large", texts(300, "l")), fill(tmp_path / "small", texts(100, "s"))
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (large, small)]
    by_size = DataConfig(sources=(Source(path=str(large)), Source(path=str(small))), max_bytes=sum(sizes) // 2)
    corpus = prepare_corpus(by_size, tokenizer, 512, tmp_path / "out")
    for source, size in zip(corpus.sources, sizes, strict=True):
        assert source["bytes"] == pytest.approx(size / 2, abs=400)
    weighted = DataConfig(
        sources=(Source(path=str(large), weight=1), Source(path=str(small), weight=3)), max_bytes=sizes[1] // 2
    )
    corpus = prepare_corpus(weighted, tokenizer, 512, tmp_path / "weighted")
    assert corpus.sources[1]["bytes"] == pytest.approx(3 * corpus.sources[0]["bytes"], rel=0.2)


def test_tokenizer_must_fit_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(5))))
    small = tokenizer.vocab_size - 1
    with pytest.raises(UserError, match=f"vocab_size={small}"):
        prepare_corpus(config, tokenizer, small, tmp_path / "out")
    tokenizer.save(tmp_path / "tokenizer")
    named = DataConfig(sources=config.sources, tokenizer=str(tmp_path / "tokenizer"))
    assert prepare_corpus(named, None, 512, tmp_path / "out").tokenizer.digest == tokenizer.digest


def test_wide_vocabulary_is_stored_wide(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(20))))
    narrow = prepare_corpus(config, tokenizer, 65_536, tmp_path / "narrow")
    wide = prepare_corpus(config, tokenizer, 65_537, tmp_path / "wide")
    assert narrow.train.read(0).dtype == np.uint16 and wide.train.read(0).dtype == np.uint32
    assert (narrow.train.read(0) == wide.train.read(0)).all()
    assert token_dtype(163_840) == np.uint32


def test_many_shards_read_as_one(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(100))))
    whole = prepare_corpus(config, tokenizer, 512, tmp_path / "whole")
    monkeypatch.setattr("moonbase.data.shards.SHARD_TOKENS", 300)
    parted = prepare_corpus(config, tokenizer, 512, tmp_path / "parted")
    assert len(parted.facts["shards"]) > 5
    assert parted.train.num_documents == whole.train.num_documents
    documents = np.random.default_rng(0).permutation(whole.train.num_documents)
    assert (parted.train.lengths(documents) == whole.train.lengths(documents)).all()
    for document in range(whole.train.num_documents):
        assert (parted.train.read(document) == whole.train.read(document)).all()
    assert parted.train.ranges() == {0: (0, whole.train.num_documents)}


def test_validation_text_is_the_held_out_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(sources=(Source(path=str(fill(tmp_path / "in", texts(200)))),), validation_fraction=0.3)
    corpus = prepare_corpus(config, tokenizer, 512, tmp_path / "out")
    held_out = decoded(corpus, corpus.validation)
    text = corpus.validation_text()
    assert text.decode() == "".join(held_out[document] for document in corpus.validation_order())
    part = corpus.validation_text(2000)
    assert text.startswith(part) and 1000 < len(part) <= 2000
    assert len(corpus.validation_text(1)) == len(held_out[corpus.validation_order()[0]])


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 0}', '{"format": 1}', "[" * 100_000,
                                     '{"format": 1, "vocab_size": 512, "shards": [1]}'])
def test_open_names_what_is_wrong(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(UserError, match=r"corpus\.json"):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x93NUMPY\x01\x00 cut short", "other", "short", "words"])
def test_offsets_that_do_not_fit_are_found(junk: bytes | str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepare_corpus(DataConfig.model_validate(str(fill(tmp_path / "in", texts(20)))), tokenizer, 512, tmp_path / "out")
    path = next((tmp_path / "out").glob("train*.offsets.npy"))
    offsets = np.load(path)
    if isinstance(junk, bytes):
        path.write_bytes(junk)
    else:
        np.save(path, {"other": offsets + 1, "short": offsets[:-1], "words": offsets.astype(str)}[junk])
    with pytest.raises(UserError, match=rf"{path.name}: missing, cut short or damaged"):
        Corpus.open(tmp_path / "out")


def test_corpus_can_be_moved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig.model_validate(str(fill(tmp_path / "in", texts(20))))
    prepare_corpus(config, tokenizer, 512, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert Corpus.open(tmp_path / "moved").tokenizer.digest == tokenizer.digest


def test_a_vocabulary_may_learn_from_texts_that_are_not_trained_on(tmp_path: Path) -> None:
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(json.dumps({"text": f"zyzzyva {number} quixotic"}) + "\n" for number in range(99)))
    folder = fill(tmp_path / "in", texts(60))
    plain = DataConfig(sources=(Source(path=str(folder)),), validation_fraction=0.2)
    wider = plain.model_copy(update={"vocabulary_sources": (Source(path=str(extra)),)})
    first = prepare_corpus(plain, None, 400, tmp_path / "x")
    second = prepare_corpus(wider, None, 400, tmp_path / "y")
    assert len(second.tokenizer.encode(" zyzzyva")) < len(first.tokenizer.encode(" zyzzyva"))
    assert sorted(decoded(second, second.train)) == sorted(decoded(first, first.train))
    assert sorted(decoded(second, second.validation)) == sorted(decoded(first, first.validation))
    assert second.facts["documents"] == 60 and first.facts["digest"] != second.facts["digest"]
