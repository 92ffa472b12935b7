"""Every kind of good and bad input."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonbase.data import readers
from moonbase.data.readers import Document, Reading, cut, read_file, read_hub
from moonbase.data.sources import Skipped, list_files
from moonbase.errors import UserError


def read(path: Path, reading: Reading = Reading()) -> tuple[list[str], dict[str, list[str]]]:
    documents, skipped = collect(path, reading)
    return [document.text for document in documents], skipped


def collect(path: Path, reading: Reading) -> tuple[list[Document], dict[str, list[str]]]:
    skipped = Skipped()
    [file] = list_files(str(path), skipped)
    documents = list(read_file(file, reading, skipped))
    return documents, {reason: [Path(name).name for name in names] for reason, names in skipped.names.items()}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_plain_text_comes_unchanged(tmp_path: Path) -> None:
    content = "naïve\r\n\tcafé 你好\n\n"
    assert read(write(tmp_path / "a.txt", content.encode())) == ([content], {})
    assert read(write(tmp_path / "b.md", b"\xef\xbb\xbf" + content.encode())) == ([content], {})
    assert read(write(tmp_path / "c.py.gz", gzip.compress(content.encode()))) == ([content], {})


def test_zst(tmp_path: Path) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor()
    frames = compressor.compress(b"one\n") + compressor.compress(b"two\n")
    assert read(write(tmp_path / "a.txt.zst", frames)) == (["one\ntwo\n"], {})
    lines = compressor.compress(b'{"text": "one"}\n{"text": "two"}\n')
    assert read(write(tmp_path / "a.jsonl.zst", lines)) == (["one", "two"], {})


# mtime: test processes must collect the same tests, whatever the second.
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\t\n", "empty"),
        ("bom.txt", b"\xef\xbb\xbf", "empty"),
        ("nul.txt", b"text\0text", "binary"),
        ("image.txt", bytes(range(128, 256)) * 4, "binary"),
        ("latin.txt", "a long enough line in Latin-1: café\n".encode("latin-1"), "not UTF-8"),
        ("utf16.txt", "text".encode("utf-16"), "not UTF-8"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "damaged archive"),
        ("lie.txt.gz", b"no gzip at all", "damaged archive"),
        ("lie.txt.zst", b"no zstd at all", "damaged archive"),
        ("lie.parquet", b"no parquet at all", "damaged table"),
        ("empty.jsonl", b"", "empty"),
        ("nul.jsonl", b"\0\0\0\n", "binary"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "empty"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "empty"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    assert read(write(tmp_path / name, content)) == ([], {reason: [name]})


def test_cut_zst_is_damaged(tmp_path: Path) -> None:
    import zstandard

    packed = zstandard.ZstdCompressor().compress("".join(f"line {number}\n" for number in range(9999)).encode())
    _, skipped = read(write(tmp_path / "a.txt.zst", packed[: len(packed) // 2]))
    assert skipped == {"damaged archive": ["a.txt.zst"]}


def test_broken_lines_are_named_by_number(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}',
        b"{broken",
        b"",
        b'{"text": ""}',
        b'{"text": 5}',
        b'{"body": "other"}',
        b'{"text": "\\ud800"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "nul \\u0000"}',
        b"[" * 100_000,
        b'"a bare string"',
        b'{"text": "last"}',
    ]
    texts, skipped = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    assert texts == ["one", "a bare string", "last"]
    assert skipped == {
        "broken line": ["a.jsonl:2", "a.jsonl:10"],
        "empty line": ["a.jsonl:3"],
        "empty": ["a.jsonl:4"],
        "no text in the field 'text'": ["a.jsonl:5", "a.jsonl:6"],
        "half a surrogate pair": ["a.jsonl:7"],
        "not UTF-8": ["a.jsonl:8"],
        "binary": ["a.jsonl:9"],
    }


def test_too_long_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    lines = [json.dumps({"text": text}) for text in ("short", "x" * 500, "y" * 100, "end")]
    texts, skipped = read(write(tmp_path / "a.ndjson", "\n".join(lines).encode()))
    assert texts == ["short", "end"]
    assert list(skipped.values()) == [["a.ndjson:2", "a.ndjson:3"]]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    texts = ["one", None, "", "two"] + [f"text {number}" for number in range(1000)]
    table = pyarrow.table({"text": texts, "body": ["b"] * len(texts)})
    parquet.write_table(table, tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet")
    assert found == [text for text in texts if text]
    assert skipped == {"no text in the field 'text'": ["a.parquet: row 2"], "empty": ["a.parquet: row 3"]}
    assert read(tmp_path / "a.parquet", Reading("body"))[0] == ["b"] * len(texts)
    assert read(tmp_path / "a.parquet", Reading("none")) == ([], {"no text in the field 'none'": ["a.parquet"]})


@pytest.mark.parametrize(("package", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{name}: .* needs the package {package}, .*: pip install {package}$"):
        read(write(tmp_path / name, b"x"))


def test_texts_are_read_without_the_packages_of_other_files(tmp_path: Path) -> None:
    """In a process of its own, from the first import on: a machine that has neither package trains on its texts."""
    write(tmp_path / "a.txt", b"one\n")
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "two"}\n'))
    code = ("import sys\nsys.modules['pyarrow'] = sys.modules['zstandard'] = None\n"
            "from moonbase.data import Skipped, prepare_corpus\nfrom moonbase.recipe import DataConfig, Source\n"
            f"data = DataConfig(sources=(Source(path={str(tmp_path)!r}),), workers=1)\n"
            f"corpus = prepare_corpus(data, None, 512, {str(tmp_path / 'corpus')!r}, 0)\n"
            "print(corpus.summary['documents'], corpus.summary['skipped'])")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert answer.stdout == "2 {}\n", answer.stderr


@given(st.text(alphabet="ab \n", max_size=80), st.integers(2, 12))
def test_cutting_loses_nothing(text: str, length: int) -> None:
    parts = list(cut(text, length))
    assert "".join(parts) == text
    assert all(0 < len(part) <= length for part in parts) or text == ""


def test_cuts_stand_at_blank_lines_and_line_ends() -> None:
    assert list(cut("aaa\n\nbbb\nccc", 8)) == ["aaa\n\n", "bbb\nccc"]
    assert list(cut("aaaa\nbb cc", 8)) == ["aaaa\n", "bb cc"]


@pytest.mark.parametrize("unit", ["line of text\n", "你好", "a", "\U0001f600", "é\n"])
def test_huge_files_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """Blocks never split a character, and only the last document is complete."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    content = unit * 301
    path = write(tmp_path / "a.txt", content.encode())
    documents, skipped = collect(path, Reading())
    assert "".join(document.text for document in documents) == content and not skipped
    assert len(documents) > 3
    assert [document.complete for document in documents] == [False] * (len(documents) - 1) + [True]
    assert [document.follows for document in documents] == [False] + [True] * (len(documents) - 1)
    apart, _ = collect(path, Reading(longest_whole=10, part_length=10))
    assert "".join(document.text for document in apart) == content
    assert not any(document.follows for document in apart) and len(apart) > len(documents)


def test_a_bad_block_in_a_huge_file_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    good = b"line\n" * 20
    texts, skipped = read(write(tmp_path / "a.txt", good + b"\0" * 99 + b"\n" + good))
    assert "".join(texts) == (good * 2).decode()
    assert skipped == {"binary": ["a.txt from byte 100"]}


def test_long_records_are_cut_by_the_same_rule(tmp_path: Path) -> None:
    text = "word " * 100
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}).encode())
    documents, _ = collect(path, Reading(longest_whole=100, part_length=60))
    assert "".join(document.text for document in documents) == text
    assert len(documents) > 5 and not any(document.follows for document in documents)
    assert [document.complete for document in documents].count(True) == 1 and documents[-1].complete


def test_streamed_data_set(tmp_path: Path) -> None:
    """A data set folder on disk goes through the same library and code as one from the network."""
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    skipped = Skipped()
    documents = list(read_hub(f"hub:{tmp_path}", Reading(), skipped))
    assert [document.text for document in documents] == ["one", "two"]
    assert skipped.counts == {"empty": 1}
    with pytest.raises(UserError, match=r"hub:.*cannot be streamed"):
        list(read_hub(f"hub:{tmp_path}/nothing-here", Reading(), Skipped()))


def test_without_a_network_one_line_comes_at_once(tmp_path: Path) -> None:
    """In a process of its own: the library reads the address once. No port is ever 0, so nobody answers."""
    pytest.importorskip("datasets")
    code = ("from moonbase.data import Skipped\nfrom moonbase.data.readers import Reading, read_hub\n"
            "from moonbase.errors import UserError\n"
            "try:\n    list(read_hub('hub:some/name', Reading(), Skipped()))\n"
            "except UserError as error:\n    print(error)")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:0", "HF_HOME": str(tmp_path)}
    environment |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    for offline, words in (("0", "http://127.0.0.1:0 does not answer"), ("1", "HF_HUB_OFFLINE")):
        answer = subprocess.run([sys.executable, "-c", code], env=environment | {"HF_HUB_OFFLINE": offline},
                                capture_output=True, text=True, timeout=300)
        assert answer.stdout.startswith("hub:some/name: cannot be streamed") and answer.stdout.count("\n") == 1
        assert words in answer.stdout and answer.stderr == ""


def test_streaming_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"moonbase\[hub\]"):
        list(read_hub("hub:some/name", Reading(), Skipped()))
