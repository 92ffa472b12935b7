"""Folders made to harm whoever checks them: one line each, no traceback, no memory, nothing outside is touched."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonbase.errors import UserError
from moonbase.evals.proof import canonical as canonical_module
from moonbase.evals.proof import chain, folder, logs, seal, signing, verify
from moonbase.evals.proof.canonical import BundleError, canonical, parse
from moonbase.evals.proof.levels import Sources
from moonbase.evals.proof.survey import Survey
from moonbase.evals.proof.tables import Known, check_csv, check_page
from moonbase.evals.records import Record
from tests.evals import proof_samples as samples


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile")
    signing.generate_key(place / "key")
    samples.write_evaluation(place / "run", items=2)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    return place


@pytest.fixture
def bundle(home: Path, tmp_path: Path) -> Path:
    return samples.copy_of(home / "bundle", tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)


def lines(bundle: Path) -> list[str]:
    """What is failed; whatever the bundle, every line is one short printable line."""
    found = [str(finding) for finding in verify.verify(bundle)]
    assert all(line.isprintable() and len(line) < 500 for line in found), found
    return [line for line in found if line.startswith("failed")]


def link_out(bundle: Path) -> None:
    (bundle / "secret").symlink_to("/etc/passwd")


def link_records(bundle: Path) -> None:
    os.rename(bundle / "records.jsonl", bundle.parent / "elsewhere")
    (bundle / "records.jsonl").symlink_to(bundle.parent / "elsewhere")


def link_folder(bundle: Path) -> None:
    (bundle / "logs").symlink_to(bundle.parent, target_is_directory=True)


def many_files(bundle: Path) -> None:
    (bundle / "logs").mkdir()
    for number in range(60):
        (bundle / "logs" / f"{number}").touch()


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link to a file": (link_out, "failed: folder: secret: a link; a bundle holds plain files only"),
    "a link in place of a file": (link_records, "failed: folder: records.jsonl: a link"),
    "a link to a folder": (link_folder, "failed: folder: logs: a link"),
    "a pipe": (lambda bundle: os.mkfifo(bundle / "pipe"), "failed: folder: pipe: neither a file nor a folder"),
    "a name with a bell": (lambda bundle: (bundle / "a\x1b[31m\nb").touch(), "not a name for a file of a bundle"),
    "a name with a backslash": (lambda bundle: (bundle / "..\\x").touch(), "not a name for a file of a bundle"),
    "a giant": (lambda bundle: os.truncate(bundle / "records.jsonl", 2**40), "more than a bundle may hold"),
    "too many": (many_files, "failed: folder: more than 50 files"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_folder_that_is_no_plain_folder_is_read_no_further(
    what: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "MOST_FILES", 50)
    spoil, words = UNREADABLE[what]
    spoil(bundle)
    found = lines(bundle)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize("name", ["../key", "/etc/passwd", "a/../../key", "", "a//b", "a\x00b", "C:\\x", "logs/", "."])
def test_a_signed_name_that_leads_outside_is_only_a_missing_file(name: str, home: Path, bundle: Path) -> None:
    signer = signing.load_key(home / "key")
    old, _ = signing.open_envelope((bundle / "statement.dsse.json").read_bytes(), signing.BUNDLE_PREDICATE, None)
    old["subject"].append({"name": name, "digest": {"sha256": "0" * 64}, "annotations": {"size": 1}})
    (bundle / "statement.dsse.json").write_bytes(signing.sign(old, signer))
    assert any("was signed and is missing" in line for line in lines(bundle))
    with pytest.raises(BundleError):
        folder.open_file(bundle, name)


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
CONTENTS = {
    "nothing": b"", "bytes that are no text": b"\xff\xfe\x00" * 100, "a list": b"[]\n", "null": b"null\n",
    "a number": b"1e308\n", "a gigantic number": b'{"suite":' + b"9" * 100_000 + b"}\n", "deep": DEEP + b"\n",
    "a key twice": b'{"suite":{},"suite":{}}\n', "NaN": b'{"suite":NaN}\n',
    "half a character": b'{"suite":"\\ud800"}\n',
    "wrong kinds": b'{"suite":5,"models":{},"seed":[],"figures":7,"schema":3,"predicate":1,"record":[]}\n',
    "odd kinds": b'{"suite":{"tasks":[5,{"params":5,"name":[]}],"hypotheses":{}},"figures":[{"id":[]},{"id":{}}]}\n',
    "a line without end": b'{"digest":"x","previous":"y","record":{}}', "zeros": b"\x00" * 100_000,
    "a record": b'{"digest":"x","parts":{},"previous":"y","record":{}}\n',
    "a record of wrong kinds": b'{"digest":"sha256:zz","parts":[],"previous":"y","record":{"call":[],"scores":3}}\n',
}
NAMES = ["suite.json", "records.jsonl", "manifest.json", "results.json", "results.csv", "report.html",
         "statement.dsse.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", CONTENTS)
def test_any_content_gets_a_line_and_no_traceback(name: str, what: str, home: Path, bundle: Path) -> None:
    (bundle / name).write_bytes(CONTENTS[what])
    found = lines(bundle)
    assert found and not any("Error:" in line for line in found), found
    if name not in ("statement.dsse.json", "records.jsonl"):
        samples.sign_again(bundle, home / "key")
        found = lines(bundle)
        assert found or name == "report.html", found


@given(st.sampled_from(NAMES), st.binary(max_size=200), st.randoms(use_true_random=False))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_anywhere_get_a_line(bundle: Path, name: str, junk: bytes, where: random.Random) -> None:
    whole = (bundle / name).read_bytes()
    start = where.randrange(len(whole))
    spoilt = whole[:start] + junk + whole[start + where.randrange(50):]
    (bundle / name).write_bytes(spoilt)
    try:
        assert bool(lines(bundle)) == (spoilt != whole)
    finally:
        (bundle / name).write_bytes(whole)


def test_a_line_of_endless_length_does_not_fill_the_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LONGEST_LINE", 2**20)
    with (bundle / "records.jsonl").open("ab") as file:
        file.truncate(2**31)  # a hole: two gigabytes of zeros that take no space
    tracemalloc.start()
    with pytest.raises(BundleError, match="too long"):
        list(folder.read_lines(bundle, "records.jsonl"))
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


def test_a_document_of_endless_length_is_not_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "LARGEST_DOCUMENT", 2**16)
    os.truncate(bundle / "manifest.json", 2**31)
    with pytest.raises(BundleError, match="larger than"):
        folder.read_document(bundle, "manifest.json")


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    def peak(repeats: int) -> int:
        place = tmp_path / str(repeats)
        place.mkdir()
        record = next(samples.records(1)).model_copy(update={"output": "x" * 5000, "details": {}}).canonical()
        head = "first"
        with (place / "records.jsonl").open("wb") as file:
            for number in range(repeats):
                line, head = chain.link(head, record | {"sample": number})
                file.write(line + b"\n")
        tracemalloc.start()
        survey, tree = Survey(Sources({})), chain.MerkleTree()
        for link in chain.read_links(place, "records.jsonl", "first"):
            assert link.problem is None
            survey.add(Record.model_validate(link.record))
            tree.append(chain.leaf_of(link.digest))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    few, many = peak(50), peak(450)
    # 400 samples more, of more than 5000 characters each; a sample may keep its nine bytes, with room to grow.
    assert many - few < 400 * 40


def test_a_setting_that_would_compute_for_a_year_is_refused(home: Path, bundle: Path) -> None:
    plan = json.loads((bundle / "suite.json").read_bytes())
    plan["suite"]["hypotheses"] = [{"id": "h", "statement": "s", "figure": {
        "id": "f", "function": "mean", "params": {"draws": 10**15}}}]
    samples.write_canonical(bundle / "suite.json", plan)
    assert any("suite.json: a setting of" in line for line in lines(bundle))


def bomb(path: Path, members: int, zeros: int, named: str = "samples/{}_epoch_1.json") -> None:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as log:
        for number in range(members):
            log.writestr(named.format(number), b"\0" * zeros)


@pytest.mark.parametrize(("members", "zeros", "words"), [
    (1, 3 * 2**20, "unpacks to more than"), (20, 2**19, "more than 500 times its size"),
    (101, 100, "unpacks to more than"),
])
def test_a_log_that_unpacks_without_end_is_not_unpacked(
    home: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, members: int, zeros: int, words: str
) -> None:
    pytest.importorskip("inspect_ai")
    monkeypatch.setattr(logs, "LARGEST_MEMBER", 2**20)
    monkeypatch.setattr(logs, "MOST_MEMBERS", 100)
    bomb(bundle / "logs" / "bomb.eval", members, zeros)
    samples.sign_again(bundle, home / "key")
    assert [line for line in lines(bundle) if words in line]


def test_logs_of_any_content_get_a_line(home: Path, bundle: Path) -> None:
    pytest.importorskip("inspect_ai")
    contents = {"nothing": b"", "no zip": b"PK\x03\x04" + b"x" * 100, "no header": None}
    for what, content in contents.items():
        path = bundle / "logs" / "one.eval"
        bomb(path, 1, 10) if content is None else (path.parent.mkdir(exist_ok=True), path.write_bytes(content))
        samples.sign_again(bundle, home / "key")
        assert any("failed: logs: " in line for line in lines(bundle)), what
    with zipfile.ZipFile(bundle / "logs" / "one.eval", "w") as log:
        log.writestr("header.json", DEEP)
    samples.sign_again(bundle, home / "key")
    assert any("failed: logs: " in line for line in lines(bundle))


def test_a_line_of_empty_lists_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical_module, "MOST_VALUES", 2**16)
    data = b"[" + b"[]," * 2**18 + b"[]]"
    tracemalloc.start()
    with pytest.raises(BundleError, match="more than 65536 values"):
        parse(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_signed_file_of_ten_gigabytes_of_nothing_is_told_by_its_size(bundle: Path) -> None:
    """A hole in a file takes no room on the disk; it is not read, for its size is not the signed one."""
    os.truncate(bundle / "report.html", 10 * 2**30)
    began = time.monotonic()
    found = lines(bundle)
    assert any("report.html has 10737418240 bytes" in line for line in found)
    assert any("report.html: larger than" in line for line in found)
    assert time.monotonic() - began < 60
    for number in range(7):
        (bundle / f"more{number}").touch()
        os.truncate(bundle / f"more{number}", 10 * 2**30)
    assert "more than a bundle may hold" in lines(bundle)[0]


def test_more_figures_than_anyone_reads_are_not_computed(home: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch,
                                                         ) -> None:
    for limit, words in ((19, "too many tasks, models or hypotheses"), (20, "too many conditions")):
        monkeypatch.setattr(verify, "MOST_FIGURES", limit)
        assert any(words in line for line in lines(bundle)), limit


def test_words_of_a_page_cannot_do_anything(home: Path, tmp_path: Path) -> None:
    """Texts that look like a page's own are shown as words; a page that could do something is refused."""
    odd = '<script>alert(1)</script><img src=x onerror="1">'

    def rename(record: Record) -> Record:
        return record.model_copy(update={"condition": record.condition | {"online": odd}, "group": odd})

    run = samples.write_evaluation(tmp_path / "run", items=1, change=rename, title=odd, about=odd)
    out = seal.seal(run, home / "key")
    assert all("filed under" in line for line in lines(out))
    page = (out / "report.html").read_bytes()
    assert b"<script" not in page and b"<img" not in page and b"&lt;script" in page
    known = Known({"a": {"value": 0.5, "text": "50%"}})
    cell = b'<data class="figure" data-id="a" value="0.5">50%</data>'
    assert check_page(cell + b'<p title="a online=1, don\'t" class="once">online = 1, onto = 2</p>', known) == (1, [])
    for more in (b"<script>", b"<IFRAME src=x>", b'<p onclick="x()">', b"<svg/onload=x>", b'<a href="javascript:x">',
                 b'<a href= JavaScript:x>', b'<meta http-equiv="refresh" content="0">', b"<base href=x>",
                 b"<p title='\"' onclick=x>", b"<form action=x>", b"<link rel=stylesheet href=http://x>"):
        assert "could change what a reader sees" in check_page(cell + more, known)[1][0], more


def test_programs_in_a_bundle_are_not_run(home: Path, bundle: Path, tmp_path: Path) -> None:
    (bundle / "suite.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    (bundle / "conftest.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    samples.sign_again(bundle, home / "key")
    assert lines(bundle) == []
    assert not (tmp_path / "ran").exists()


def test_pages_and_tables_of_any_bytes_are_answered_quickly() -> None:
    known = Known({"a": {"value": 0.5, "text": "50%"}})
    for page in (b"<data " * 200_000, b'<data class="figure" data-id="' + b"a" * 1_000_000, b"<!--" * 100_000,
                 b'<data class="figure" data-id="a" value="' + b"9" * 100_000 + b'">50%</data>',
                 b'<data class="figure" data-id="&#x0;&bogus;" value="nan">50%</data>'):
        _, problems = check_page(page, known)
        assert problems or not page.startswith(b"<data")
    for table in (b"id,value,text\n" + b'"' * 100_001, b"id,value,text\n" + b"a" * 2**21, b"id,id,value,text\n",
                  b"id,value,text\na,0.5,50%\na,0.5,50%\n", b"id,value,text\na,inf,50%\n", b"\x00"):
        assert check_csv(table, known)[1]
    assert check_csv(b"id,value,text\na,0.5,50%\n", known) == (1, [])
    assert check_page(b'<data class="figure" data-id="a" value="0.5">50%</data>', known) == (1, [])


def test_what_is_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify.verify(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    found = lines(tmp_path / "empty")
    assert "failed: signature: statement.dsse.json is missing: the bundle is not signed" in found
    with pytest.raises(UserError, match="ed25519:HEX"):
        verify.verify(tmp_path / "empty", "ed25519:xyz")


def test_an_envelope_is_read_in_one_spelling_only(home: Path) -> None:
    data = (home / "bundle" / "statement.dsse.json").read_bytes()
    value = json.loads(data)
    for other in (json.dumps(value).encode(), data + b"\n", canonical(value | {"more": 1}),
                  canonical(value | {"payloadType": "text/plain"}),
                  canonical(value | {"payload": "!" + value["payload"]}),
                  canonical(value | {"payload": value["payload"].replace("=", "") + "=="}),
                  canonical(value | {"signatures": value["signatures"] * 2}),
                  canonical(value | {"signatures": [value["signatures"][0] | {"keyid": "0" * 64}]})):
        if other != data:
            with pytest.raises(BundleError):
                signing.open_envelope(other, signing.BUNDLE_PREDICATE, None)
    with pytest.raises(BundleError, match="the statement is about"):
        signing.open_envelope(data, signing.CHALLENGE_PREDICATE, None)
