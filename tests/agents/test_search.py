"""`search` and `open` over documents: against BM25 written out, and against whatever a folder or a query may hold."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("bm25s", reason="needs the package bm25s")

from moonbase.agents.tools.search import (
    PAGE_CHARACTERS,
    QUERY_CHARACTERS,
    Library,
    load_library,
    search_tools,
    snippet,
)
from moonbase.agents.tools.search_documents import Document, as_document, read_source, strip_markup
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset
from moonbase.agents.words import words
from moonbase.data.sources import Skipped
from moonbase.errors import UserError
from tests.growth import grows_with_size

SPECIES = ["heron", "stork", "crane", "owl", "wren", "lark", "swift", "gull", "tern", "rail"]


def call(tools: Toolset, name: str, **arguments) -> ToolResult:
    return asyncio.run(tools.call(name, json.dumps(arguments), ToolContext("main", 1, "main#1.0")))


def silent(line: str) -> None: ...


def test_ranking_is_bm25() -> None:
    """Robertson and Zaragoza 2009, eq. 3.15, as Lucene has it: without the factor (k1 + 1), which changes no order."""
    dice = random.Random(2)
    texts = [" ".join(dice.choices(SPECIES, weights=range(1, 11), k=dice.randrange(3, 60))) for _ in range(200)]
    library = Library(Document(f"d{number}", "", text) for number, text in enumerate(texts))
    counts = [Counter([f"d{number}", *text.split()]) for number, text in enumerate(texts)]
    mean = sum(map(Counter.total, counts)) / len(counts)

    def score(count: Counter[str], query: list[str]) -> float:
        total = 0.0
        for word in query:
            having = sum(word in other for other in counts)
            idf = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            total += idf * count[word] / (count[word] + 1.2 * (1 - 0.75 + 0.75 * count.total() / mean))
        return total

    for _ in range(30):
        query = dice.sample(SPECIES, dice.randrange(1, 4))
        expected = [score(count, query) for count in counts]
        hits = library.search(" ".join(query), 20)
        best = sorted((value for value in expected if value > 0), reverse=True)[:20]
        assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-4)
        assert [expected[int(hit.id[1:])] for hit in hits] == pytest.approx(best, rel=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "sub/deep").mkdir(parents=True)
    (root / "herons.md").write_text("# On herons\n\nThe grey heron stands in the reeds. " + "Filler text. " * 200
                                    + "At dusk the heron catches a silver eel.")
    (root / "sub/owl.txt").write_bytes("The owl café opens at night.\r\nNaïve owls sleep.".encode("utf-8-sig"))
    (root / "sub/page.html").write_text(
        "<html><head><title>Cranes &amp; storks</title><style>p {color: zinnober}</style></head><body><script>var "
        "hiddenword = 1</script><h1>Cranes</h1><p>The <b>crane</b> dances.</p><ul><li>one<li>two</ul></body></html>")
    (root / "sub/deep/code.py").write_text("def count_wrens(garden):\n    return len(garden.wrens)\n")
    (root / "more.jsonl").write_text(
        '{"id": "lark-1", "title": "Larks", "text": "The lark rises."}\n\n{"text": "A tern without a name."}\nbroken\n'
        '"just a gull"\n{"id": "lark-1", "text": "The other lark."}\n{"no": "text"}\n[1]\n')
    (root / "wide.txt").write_text("the bittern booms", encoding="utf-16")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0\1")
    (root / "latin.txt").write_bytes("a caf\xe9 of owls".encode("latin-1"))
    (root / "empty.txt").write_bytes(b" \n")
    (root / ".hidden").write_text("hidden heron")
    (root / ".git").mkdir()
    (root / ".git/config").write_text("heron")
    (tmp_path / "secret.txt").write_text("the secret heron")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


def test_a_folder(folder: Path) -> None:
    said: list[str] = []
    tools = search_tools(folder, report=said.append)
    assert len(said) == 1 and said[0].startswith("search: 9 documents; left out: ")
    for reason in ("1 binary", "1 neither UTF-8 nor UTF-16", "1 empty", "1 a link", "1 no file", "1 broken line",
                   "2 without text"):
        assert reason in said[0]
    found = call(tools, "search", query="heron eel").content
    assert found.startswith("1. On herons <herons.md>\n   … ") and "catches a silver eel" in found
    assert "secret" not in call(tools, "search", query="secret heron hidden").content
    assert "1. sub/owl.txt <sub/owl.txt>" in call(tools, "search", query="CAFE NAIVE").content
    assert call(tools, "open", id="sub/owl.txt").content == "The owl café opens at night.\nNaïve owls sleep."
    assert "1. Cranes & storks <sub/page.html>" in call(tools, "search", query="crane dances").content
    assert call(tools, "open", id="sub/page.html").content == "Cranes\n\nThe crane dances.\n\none\ntwo"
    assert call(tools, "search", query="zinnober hiddenword").content.startswith("No results")
    assert "<sub/deep/code.py>" in call(tools, "search", query="wrens in the garden").content
    assert call(tools, "open", id="wide.txt").content == "the bittern booms"
    assert call(tools, "search", query="larks").content.startswith("1. Larks <lark-1>")
    assert call(tools, "open", id="lark-1#2").content == "The other lark."
    assert call(tools, "open", id="more.jsonl:3").content == "A tern without a name."
    assert call(tools, "open", id="more.jsonl:5").content == "just a gull"


@pytest.mark.parametrize("name", ["../secret.txt", "link.txt", "out/secret.txt", "/etc/passwd", "sub/../../secret.txt",
                                  "", "\0", "\ud800", "x" * 100_000, ".hidden", "pipe", "docs/../../secret.txt"])
def test_no_way_out(name: str, folder: Path) -> None:
    answer = call(search_tools(folder, report=silent), "open", id=name)
    assert answer.error and "secret heron" not in answer.content and len(answer.content) < 1000


def test_names_are_taken_as_models_write_them(folder: Path) -> None:
    tools = search_tools(folder, report=silent)
    for name in ("./sub/owl.txt", "<sub/owl.txt>", " sub/owl.txt\n", "sub/owl.txt#L3"):
        assert "owl café" in call(tools, "open", id=name).content
    assert "Did you mean <sub/owl.txt>?" in call(tools, "open", id="owl.txt").content


def test_a_long_document_comes_in_pages() -> None:
    dice = random.Random(3)
    text = "".join(f"line {number} {'x' * dice.randrange(200)}\n" for number in range(2000))
    tools = search_tools([{"id": "long", "text": text}])
    whole, page = "", 1
    while True:
        answer = call(tools, "open", id="long", page=page)
        content, _, note = answer.content.rpartition("\n[… page ")
        assert len(content) <= PAGE_CHARACTERS
        whole += content
        if "go on" not in note:
            break
        page = int(re.search(r"page=(\d+)", note)[1])
    assert whole == text
    assert f"has {page} page(s)" in call(tools, "open", id="long", page=page + 1).content
    assert call(tools, "open", id="long", page=0).error and call(tools, "open", id="long", page=-1).error


@pytest.mark.parametrize(("text", "query"), [
    ("北京大学是中国的一所大学。", "北京"), ("北京大学是中国的一所大学。", "大"),
    ("北京大学是中国的一所大学。", "中国大学"),
    ("東京タワーは高いです", "タワー"), ("서울대학교에서 공부했다", "대학교"), ("ประเทศไทยสวยงาม", "ไทย"),
    ("हिन्दी भाषा सीखना", "हिन्दी"), ("Москва — столица", "МОСКВА"), ("مرحبا بالعالم", "مرحبا"),
    ("Ἀθῆναι", "αθηναι"), ("Zürich straße", "ZURICH STRASSE"), ("GPT4模型的参数", "模型"), ("𠀀𠀁古字", "𠀁"),
    ("שָׁלוֹם", "שלום"),
])
def test_other_scripts_are_found(text: str, query: str) -> None:
    others = ["the heron stands", "上海的天气", "ラーメンが好き", "부산 바다", "ภาษาอื่น", "नमस्ते", "Петербург", "كتاب"]
    library = Library(Document(str(number), "", one) for number, one in enumerate([*others, text]))
    assert library.search(query)[0].id == str(len(others))


@pytest.mark.parametrize("query", [
    "", " ", "?!*()[]", "\0", "\ud800", "the", "the of and", "heron " * 200_000, "大" * 1_000_000, "x" * 1_000_000,
    "\u0301" * 5000, "🦉🦉", "(((", "İ" * 9000, " ".join(map(str, range(100_000))),
])
def test_hostile_queries(query: str) -> None:
    tools = search_tools(["the heron and the owl", "of the crane", "大学"])
    started = time.process_time()
    answer = call(tools, "search", query=query)
    assert time.process_time() - started < 10
    assert not answer.error and len(answer.content) < 2000
    if query.startswith(("the", "heron")):
        assert "heron" in answer.content


def test_numbers_of_results() -> None:
    tools = search_tools([f"heron number {number}" for number in range(100)])
    for asked, given in ((1, 1), (10, 10), (50, 50), (1000, 50), (0, 1), (-5, 1)):
        assert call(tools, "search", query="heron", k=asked).content.count("\n   ") == given
    hits = Library([Document(str(number), "", "heron") for number in range(60)]).search("heron", 60)
    assert [hit.id for hit in hits] == [str(number) for number in range(50)]  # of equals the earlier


def test_a_snippet_shows_the_words() -> None:
    dice = random.Random(4)
    for _ in range(200):
        filler = [dice.choice(["lorem", "ipsum", "dolor"]) for _ in range(dice.randrange(400))]
        place = dice.randrange(len(filler) + 1)
        text = " ".join([*filler[:place], "the", "Silver", "eel", *filler[place:]])
        piece = snippet(text, "eel silver absent")
        assert "Silver eel" in piece and len(piece) < 250 and "\n" not in piece
    assert snippet("短文。" * 200 + "北京大学在这里。" + "短文。" * 200, "北京大学").count("北京大学") == 1
    assert snippet("İİİ heron", "heron") == "İİİ heron"
    assert snippet("", "x") == ""
    assert snippet("scatter " * 100 + "a cat sat", "cat").endswith("a cat sat")


def test_documents_of_a_program() -> None:
    class Page:
        def __init__(self, id: int, title: str, text: str) -> None:
            self.id, self.title, self.text = id, title, text

    class World:
        pages = (Page(0, "Zero", "the heron"), Page(1, "One", "the owl"))

    library = load_library(World())
    assert [(one.id, one.title) for one in library.documents] == [("0", "Zero"), ("1", "One")]
    assert library.search("owl")[0].id == "1"
    assert load_library([("a", "first heron"), "second"]).find("a").text == "first heron"
    assert as_document({"url": "u", "content": "c", "name": "n"}, "1") == Document("u", "n", "c")
    assert as_document({"text": 3}, "1") is None and as_document(5, "1") is None
    generated = load_library(Document(f"g{number}", "", "heron") for number in range(5))
    assert len(generated.documents) == 5


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one heron")
    (tmp_path / "to.txt").symlink_to(path)
    assert [one.id for one in load_library(path).documents] == ["notes.txt"]
    assert [one.text for one in load_library(tmp_path / "to.txt").documents] == ["one heron"]  # it was named


@pytest.mark.parametrize(("source", "said"), [
    ("no/such/folder", "search: no/such/folder: No such file"), ("/dev/null", "neither a file nor a folder"),
    ([], "search: no documents"), ([5, {"a": 1}], "left out: 2 without text"), ("a\0b", "null byte"),
])
def test_nothing_to_search(source: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_library(source)


def test_an_empty_folder_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    with pytest.raises(UserError, match=rf"no documents in {tmp_path} \(left out: 1 binary\)"):
        load_library(tmp_path)


def test_words_are_split_the_same_way_in_texts_and_queries() -> None:
    assert words("snake_case CamelCase x1 3.14 don't") == ["snake", "case", "camelcase", "x1", "3", "14", "don", "t"]
    assert words("GPT4模型2") == ["gpt4", "模", "型", "模型", "2"]
    assert words("é") == words("e\u0301") == words("E")
    assert len(words("大" * QUERY_CHARACTERS)) == 2 * QUERY_CHARACTERS - 1


def test_markup_that_is_broken() -> None:
    assert strip_markup("a < b <p>c</p") [1].startswith("a < b")
    assert strip_markup("<title>t</title><p>x<p>y</div></div>") == ("t", "x\ny")
    assert strip_markup("<pre>a\n  b</pre>")[1] == "a\nb"
    assert "deep" in strip_markup("<div>" * 20_000 + "deep")[1]
    assert strip_markup("&eacute;&#233;&lt;")[1] == "éé<"
    assert strip_markup("<p>1 < 2</p> x <!-- c --> d <!-- open <p>no</p>")[1] == "1 < 2\nx  d"


@pytest.mark.parametrize("piece", ["<", "<a ", "<a href='", "<!--", "</a ", "<!", "<?", "<![CDATA["])
@pytest.mark.parametrize("end", ["", ">", "'>"])
def test_tags_that_never_end_take_no_time(piece: str, end: str) -> None:
    """The parser of the standard library looks for the end of each to the end of the file: hours for a megabyte."""
    assert grows_with_size(lambda size: strip_markup(piece * size + end), 30_000)


def test_a_large_folder_shows_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2100):
        (tmp_path / f"{number}.txt").write_text(f"document {number} of many")
    library = load_library(tmp_path)
    assert library.search("1234")[0].id == "1234.txt"
    assert "indexing" in capsys.readouterr().err
    assert list(tmp_path.glob("**/*")) == list(tmp_path.glob("*.txt"))  # nothing is left beside the documents
    load_library(["one"])
    assert capsys.readouterr().err == ""


def test_speed() -> None:
    """10,000 short documents: built in seconds, searched in milliseconds, or so many times slower on a slow machine."""
    dice = random.Random(5)
    vocabulary = ["".join(dice.choices("abcdefghijklmnop", k=6)) for _ in range(5000)]
    started = time.process_time()
    library = Library(Document(str(number), "", " ".join(dice.choices(vocabulary, k=60))) for number in range(10_000))
    built = time.process_time() - started
    started = time.process_time()
    for _ in range(50):
        library.search(" ".join(dice.choices(vocabulary, k=3)))
    searched = (time.process_time() - started) / 50
    assert built < 30 and searched < built / 10


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=re.escape("pip install 'moonbase[agents]'")):
        search_tools(["a text"])


def test_a_file_that_changes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and reading a file becomes a link that leads out."""
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a.txt", "b.txt"):
        (root / name).write_text("heron")
    reading = read_source(root, skipped := Skipped())
    assert next(reading).id == "a.txt"
    (root / "b.txt").unlink()
    (root / "b.txt").symlink_to(tmp_path / "secret")
    assert list(reading) == [] and skipped.one_line() == "1 unreadable"
