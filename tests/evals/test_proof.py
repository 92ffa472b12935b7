"""A bundle as it comes from sealing is accepted; every kind of change to it is caught and named.

Two kinds of forger are tried. One has no key: whatever he touches, a digest or the signature tells. The other is the
publisher, who signs his own forgery: then what the records give must contradict him.
"""

from __future__ import annotations

import csv
import json
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moonbase.errors import UserError
from moonbase.evals.proof import manifest, seal, signing, verify
from moonbase.evals.proof.canonical import BundleError, canonical
from moonbase.evals.records import Record, digest, read_records, write_records
from tests.evals import proof_samples as samples


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`key`, `other` (keys), `run` (an evaluation), `bundle` (of it), `second` (a bundle of another)."""
    place = tmp_path_factory.mktemp("proof")
    for name in ("key", "other"):
        signing.generate_key(place / name)
    samples.write_evaluation(place / "run")
    seal.seal(place / "run", place / "key", out=place / "bundle")
    samples.write_evaluation(place / "run2", items=5)
    seal.seal(place / "run2", place / "key", out=place / "second")
    return place


@pytest.fixture
def bundle(home: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return samples.copy_of(home / "bundle", tmp_path / "bundle")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without writing the reports again, which takes a second and has a test of its own."""
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)


def failed(bundle: Path, key: Path | str | None = None) -> list[str]:
    found = [str(finding) for finding in verify.failures(verify.verify(bundle, key))]
    assert all("\n" not in line and len(line) < 500 for line in found)
    return found


def test_a_sealed_bundle_is_accepted(home: Path) -> None:
    findings = verify.verify(home / "bundle", home / "key.pub")
    assert verify.failures(findings) == []
    checked = {finding.check for finding in findings if finding.status == "ok"}
    assert checked == {"signature", "files", "records", "manifest", "figures", "tables"}
    words = "\n".join(map(str, findings))
    # 2 models x 2 languages x 6 items, each made again from the seed and graded again.
    assert "24 in an unbroken chain; scored again: 24, items made again from the seed: 24" in words
    assert "(L3)" in words and "the same to the byte" in words


def test_the_evaluation_folder_is_left_as_it_was(home: Path) -> None:
    assert {path.name for path in (home / "run").iterdir()} == {"suite.json", "records.jsonl"}
    assert "digest" not in json.loads((home / "run" / "records.jsonl").read_text("utf-8").splitlines()[0])


def test_sealed_records_are_the_records(home: Path) -> None:
    plain = [record.canonical() for record in read_records(home / "run" / "records.jsonl")]
    sealed = [record.canonical() for record in read_records(home / "bundle" / "records.jsonl")]
    for record in plain:
        record["details"]["seed"] = str(2**60)  # beyond what every reader of JSON reads exactly
    assert sealed == plain


def test_sealing_twice_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    again = seal.seal(home / "run", home / "key", out=tmp_path / "again")
    ours = {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert ours == {path.relative_to(home / "bundle"): path.read_bytes()
                    for path in (home / "bundle").rglob("*") if path.is_file()}


def test_a_bundle_can_be_sealed_again(home: Path, tmp_path: Path) -> None:
    again = seal.seal(home / "bundle", home / "other", out=tmp_path / "again")
    assert (again / "records.jsonl").read_bytes() == (home / "bundle" / "records.jsonl").read_bytes()


def test_without_a_key_to_compare_with_the_reader_is_told(home: Path, quick: None) -> None:
    findings = verify.verify(home / "bundle")
    assert not verify.failures(findings)
    assert any(finding.status == "note" and "no key was given" in finding.message for finding in findings)


# A forger without the key

LINE = "records.jsonl"


def spoil_lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        path = bundle / LINE
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    return spoil


def spoil_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda bundle: samples.edit(bundle / name, old, new)


def swap_first(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


FORGERIES = {
    "an output": (spoil_text(LINE, '"output":"Answer: none"', '"output":"Answer: 1"'), "line 1: changed after seal"),
    "a score": (spoil_text(LINE, '"scores":{"accuracy":0}', '"scores":{"accuracy":1}'), "line 1: changed after seal"),
    "an order": (spoil_lines(swap_first), "does not follow the record before it"),
    "a dropped sample": (spoil_lines(lambda lines: lines[:5] + lines[6:]), "line 6: does not follow"),
    "a dropped first sample": (spoil_lines(lambda lines: lines[1:]), "line 1: belongs to another suite or bundle"),
    "a dropped last sample": (spoil_lines(lambda lines: lines[:-1]), "records.count says 24"),
    "an added sample": (spoil_lines(lambda lines: [*lines, lines[0]]), "line 25: does not follow"),
    "a blank in a line": (spoil_text(LINE, '{"digest"', '{ "digest"'), "not in canonical form"),
    "a figure": (spoil_text("results.json", '"value": 0.', '"value": 0.1'), "results.json"),
    "a figure's text": (spoil_text("report.html", "</data>", "9</data>"), "report.html: figure"),
    "a Chinese cell": (spoil_text("report.zh.html", "</data>", "9</data>"), "report.zh.html: figure"),
    "a CSV cell": (spoil_text("results.csv", "accuracy,strong,0.", "accuracy,strong,0.1"), "results.csv: figure"),
    "prose in a report": (spoil_text("report.html", "</h1>", " beats all</h1>"), "report.html was changed|bytes"),
    "a manifest field": (spoil_text("manifest.json", '"cpu":"', '"cpu":"Z'), "manifest.json has"),
    "a hypothesis": (spoil_text("manifest.json", '"hypotheses":[]', '"hypotheses":[1]'), "manifest.json: hypotheses"),
    "the seed": (spoil_text("suite.json", '"seed":7', '"seed":8'), "line 1: belongs to another suite"),
    "a truncated file": (spoil_lines(lambda lines: [*lines[:-1], lines[-1][:50]]), "line 24: cut off"),
    "an emptied file": (spoil_lines(lambda lines: []), "count says 24"),
    "a missing file": (lambda bundle: (bundle / "report.zh.html").unlink(), "report.zh.html is missing"),
    "an added file": (lambda bundle: (bundle / "more.txt").write_text("x"), "more.txt is not covered"),
    "a stripped signature": (lambda bundle: (bundle / "statement.dsse.json").unlink(), "the bundle is not signed"),
    "an emptied signature": (spoil_text("statement.dsse.json", '"sig":"', '"sig":"AAAA'), "signature"),
    "no signatures": (lambda bundle: (bundle / "statement.dsse.json").write_bytes(
        canonical({**json.loads((bundle / "statement.dsse.json").read_bytes()), "signatures": []})),
        "not a DSSE envelope with one signature"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_change_is_caught_and_named(what: str, bundle: Path, home: Path, quick: None) -> None:
    spoil, words = FORGERIES[what]
    spoil(bundle)
    found = failed(bundle, home / "key.pub")
    assert any(part in line for line in found for part in words.split("|")), found


def test_a_wrong_key_is_caught(home: Path, bundle: Path, quick: None) -> None:
    assert ["signature is not by" in line for line in failed(bundle, home / "other.pub")] == [True]
    samples.sign_again(bundle, home / "other")
    assert "signature is not by" in failed(bundle, home / "key.pub")[0]


@pytest.mark.parametrize("name", ["records.jsonl", "results.json", "manifest.json", "suite.json", "report.html",
                                  "results.csv", "statement.dsse.json"])
def test_two_bundles_mixed_are_caught(name: str, bundle: Path, home: Path, quick: None) -> None:
    (bundle / name).write_bytes((home / "second" / name).read_bytes())
    same = (home / "bundle" / name).read_bytes() == (home / "second" / name).read_bytes()
    assert same == (name == "suite.json")
    assert same or failed(bundle, home / "key.pub")


FILES = ["suite.json", "records.jsonl", "results.json", "results.csv", "report.html", "report.zh.html",
         "manifest.json", "statement.dsse.json"]


@given(st.sampled_from(FILES), st.randoms(use_true_random=False), st.integers(1, 255))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_caught(home: Path, bundle: Path, quick: None, name: str, where: random.Random,
                                    flip: int) -> None:
    path = bundle / name
    whole = path.read_bytes()
    place = where.randrange(len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1:])
    try:
        assert failed(bundle)
    finally:
        path.write_bytes(whole)


# A forger who is the publisher

def forged(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    return lambda bundle: samples.forge_chain(bundle, change)


def better_output(values: list[dict[str, Any]]) -> None:
    values[0]["output"] = "Answer: 12345"


def better_output_and_digest(values: list[dict[str, Any]]) -> None:
    values[1]["output"] = "Answer: none"
    values[1]["output_digest"] = digest("Answer: none")


def better_score(values: list[dict[str, Any]]) -> None:
    values[0]["scores"]["accuracy"] = 1.0


def easier_question(values: list[dict[str, Any]]) -> None:
    values[0]["input_digest"] = digest("1 + 1")


def easier_target(values: list[dict[str, Any]]) -> None:
    values[0]["target_digest"] = digest("none")


def foreign_item(values: list[dict[str, Any]]) -> None:
    values[0]["item"] = "maths-00000000" + values[0]["item"][14:]


def better_weights(values: list[dict[str, Any]]) -> None:
    values[0]["call"]["weights_digest"] = "sha256:" + "cd" * 32


def rewrite_results(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        results = json.loads((bundle / "results.json").read_bytes())
        change(results)
        (bundle / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return spoil


def swap_figures(results: dict[str, Any]) -> None:
    one, other = results["figures"][0], next(
        figure for figure in results["figures"] if figure["value"] != results["figures"][0]["value"])
    one["id"], other["id"] = other["id"], one["id"]


def change_figure(name: str, value: Any) -> Callable[[Path], None]:
    def change(results: dict[str, Any]) -> None:
        results["figures"][0][name] = value
    return rewrite_results(change)


def change_manifest(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(bundle: Path) -> None:
        facts = json.loads((bundle / "manifest.json").read_bytes())
        samples.write_canonical(bundle / "manifest.json", facts | {name: value})
    return spoil


def swap_cells(bundle: Path) -> None:
    path = bundle / "results.csv"
    rows = list(csv.reader(path.open(encoding="utf-8", newline="")))
    rows[1][0], rows[2][0] = rows[2][0], rows[1][0]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


SIGNED_FORGERIES = {
    "an output without its digest": (forged(better_output), "line 1: the output is not the text"),
    "an output with its digest": (forged(better_output_and_digest), "line 2: scored again"),
    "a score": (forged(better_score), "line 1: scored again, accuracy is 0, the record says 1"),
    "another question": (forged(easier_question), "line 1: the item made again from the seed asks something else"),
    "another target": (forged(easier_target), "line 1: the item made again from the seed has another answer"),
    "an item of another seed": (forged(foreign_item), "line 1: its item's id does not belong to the revealed seed"),
    "a dropped sample": (forged(lambda values: values[1:]), "manifest.json"),
    "a sample twice": (forged(lambda values: [*values, values[0]]), "1 records repeat"),
    "other weights": (forged(better_weights), "manifest.json: models.strong.weights"),
    "a stranger's record": (forged(lambda values: values[0].update(model="new")), "'new' is not in the suite"),
    "an unknown task": (forged(lambda values: values[0].update(task="new")), "'new' is not in the suite"),
    "swapped figures": (rewrite_results(swap_figures), "says"),
    "a figure left out": (rewrite_results(lambda results: results["figures"].pop()), "was left out"),
    "a figure of one's own": (rewrite_results(lambda results: results["figures"].append(
        results["figures"][0] | {"id": "mine"})), "figure 'mine' does not follow"),
    "a figure twice": (rewrite_results(lambda results: results["figures"].append(results["figures"][0])), "twice"),
    "a value": (change_figure("value", 0.99), "value says 0.99"),
    "a value by a millionth": (rewrite_results(lambda results: results["figures"][0].update(
        value=results["figures"][0]["value"] * 1.000001)), "value says"),
    "a bound": (change_figure("low", 0.98), "low says 0.98"), "a text": (change_figure("text", "99%"), "text says"),
    "a level": (change_figure("level", 4), "level says 4"), "a count": (change_figure("n", 1000), "n says 1000"),
    "hidden failures": (change_figure("unscored", -1), "unscored says -1"),
    "a hypothesis after the fact": (change_manifest("hypotheses", [{"id": "h"}]), "manifest.json: hypotheses"),
    "a price": (change_manifest("models", {}), "manifest.json: models.strong is missing"),
    "published and dirty": (
        lambda bundle: (change_manifest("publish", True)(bundle), change_manifest("dirty", True)(bundle)),
        "but from code that is no commit"),
    "a cell of the page": (spoil_text("report.html", "</data>", "9</data>"), "report.html: figure"),
    "a cell's value": (spoil_text("report.html", ' value="0.', ' value="0.9'), "report.html: figure"),
    "a cell's figure": (spoil_text("report.html", 'data-id="', 'data-id="x'), "does not follow from the records"),
    "an odd cell": (spoil_text("report.html", '<data class="figure" ', '<DATA hidden class="figure" '), "agreed form"),
    "a script": (spoil_text("report.html", "</h1>", "</h1><script>1</script>"), "holds a <script>"),
    "swapped CSV cells": (swap_cells, "results.csv: figure"),
    "a CSV row left out": (lambda bundle: (bundle / "results.csv").write_bytes(
        b"".join((bundle / "results.csv").read_bytes().splitlines(keepends=True)[:-1])), "is missing"),
}


@pytest.mark.parametrize("what", SIGNED_FORGERIES)
def test_a_signed_forgery_is_contradicted_by_the_records(what: str, bundle: Path, home: Path, quick: None) -> None:
    spoil, words = SIGNED_FORGERIES[what]
    spoil(bundle)
    samples.sign_again(bundle, home / "key")
    found = failed(bundle, home / "key.pub")
    assert any(words in line for line in found), found
    assert not any(line.startswith(("failed: signature", "failed: files")) for line in found)


def test_prose_between_the_figures_is_checked_by_writing_the_report_again(bundle: Path, home: Path) -> None:
    samples.edit(bundle / "report.html", "</h1>", " beats them all by 90%</h1>")
    samples.sign_again(bundle, home / "key")
    assert failed(bundle) == ["failed: tables: report.html: written again it differs outside of the figures"]
    # Where other code wrote the page nobody can tell; then the reader hears that it was not checked.
    facts = json.loads((bundle / "manifest.json").read_bytes())
    facts["code"]["reports"] = "sha256:" + "0" * 64
    samples.write_canonical(bundle / "manifest.json", facts)
    samples.sign_again(bundle, home / "key")
    findings = verify.verify(bundle)
    assert not verify.failures(findings)
    assert any("their prose was not checked" in finding.message for finding in findings)


# Sealing refuses

def test_publication_wants_a_clean_commit(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moonbase.report

    commit = "0123456789" * 4
    for found, problem in ((None, "not a checkout"), (f"{commit}-dirty", "changes that are in no commit")):
        monkeypatch.setattr(moonbase.report, "git_commit", lambda found=found: found, raising=False)
        with pytest.raises(UserError, match=problem):
            seal.seal(home / "run", home / "key", publish=True, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(moonbase.report, "git_commit", lambda: commit, raising=False)
    out = seal.seal(home / "run", home / "key", publish=True, out=tmp_path / "out")
    facts = json.loads((out / "manifest.json").read_bytes())
    assert (facts["commit"], facts["dirty"], facts["publish"]) == (commit, False, True)


def test_what_a_manifest_holds(home: Path) -> None:
    facts = json.loads((home / "bundle" / "manifest.json").read_bytes())
    assert {"commit", "dirty", "lock", "code", "machine", "prices", "hypotheses", "seed", "items", "models", "suite",
            "publish", "withheld", "schema", "missing"} == facts.keys()
    assert facts["code"].keys() == {"figures", "generators", "judge_prompts", "reports", "scorers"}
    assert facts["lock"]["installed"]["cryptography"] and facts["items"]["sums"]["count"] == 6 * 2
    strong = facts["models"]["strong"]
    assert strong["weights"] == [samples.WEIGHTS] and strong["decoding"] == {"temperature": ["0"]}
    assert strong["samples"] == {"sums": 12} and strong["cost"] == 0.012 and strong["statuses"] == {"scored": 12}


def test_withheld_texts_are_not_published(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moonbase.report

    monkeypatch.setattr(moonbase.report, "git_commit", lambda: "0" * 40, raising=False)
    samples.write_evaluation(tmp_path / "leaky", withhold=True)
    with pytest.raises(UserError, match="line 1: holds an output, though the suite withholds texts"):
        seal.seal(tmp_path / "leaky", home / "key", publish=True)
    assert [path.name for path in tmp_path.iterdir()] == ["leaky"]

    def hide(record: Record) -> Record:
        return record.model_copy(update={"output": None, "input_digest": digest("x" + record.item, b"salt"),
                                         "output_digest": digest("y" + record.item, b"salt"),
                                         "target_digest": digest("z" + record.item, b"salt"), "group": None,
                                         "cluster": "", "condition": {"language": "en"},
                                         "item": f"p{record.item[-5:]}{record.condition['language']}"})

    samples.write_evaluation(tmp_path / "run", withhold=True, change=hide,
                             tasks=[{"name": "sums", "source": "builtin:choices"}])
    out = seal.seal(tmp_path / "run", home / "key", publish=True)
    assert out == tmp_path / "run-bundle" and not (out / "logs").exists()
    findings = verify.verify(out, home / "key.pub")
    assert not verify.failures(findings)
    assert any("reported (L0)" in finding.message for finding in findings)


def test_sealing_names_what_it_cannot_seal(home: Path, tmp_path: Path) -> None:
    run = samples.write_evaluation(tmp_path / "run")
    (run / "records.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no records"):
        seal.seal(run, home / "key")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists and is no bundle"):
        seal.seal(home / "run", home / "key", out=tmp_path / "mine")
    with pytest.raises(UserError, match="make a key first"):
        seal.seal(home / "run", tmp_path / "no-key")
    with pytest.raises(UserError, match=r"suite\.json: No such file"):
        seal.seal(tmp_path / "mine", home / "key", out=tmp_path / "out")


# Keys

def test_a_private_key_is_for_its_owner_only(tmp_path: Path) -> None:
    public = signing.generate_key(tmp_path / "moonbase")
    assert stat.S_IMODE((tmp_path / "moonbase").stat().st_mode) == 0o600
    assert (tmp_path / "moonbase.pub").read_text("utf-8") == public + "\n"
    assert public == signing.read_public_key(public) == signing.read_public_key(tmp_path / "moonbase.pub") \
        == signing.read_public_key(tmp_path / "moonbase")
    with pytest.raises(UserError, match="exists already"):
        signing.generate_key(tmp_path / "moonbase")
    (tmp_path / "moonbase").chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        signing.load_key(tmp_path / "moonbase")
    for content in (b"", b"\xff\x00", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        (tmp_path / "broken").write_bytes(content)
        (tmp_path / "broken").chmod(0o600)
        with pytest.raises(UserError):
            signing.load_key(tmp_path / "broken")
        with pytest.raises(UserError):
            signing.read_public_key(tmp_path / "broken")


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "ec").write_bytes(pem)
    (tmp_path / "ec").chmod(0o600)
    with pytest.raises(UserError, match="not an Ed25519 key"):
        signing.load_key(tmp_path / "ec")


def test_the_signature_is_plain_dsse_and_ed25519(home: Path) -> None:
    """Checked with nothing but the two specifications and the primitive."""
    import base64

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    envelope = json.loads((home / "bundle" / "statement.dsse.json").read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex((home / "key.pub").read_text().strip()[8:]))
    public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert kind == b"application/vnd.in-toto+json"
    assert {subject["name"] for subject in statement["subject"]} == {*FILES} - {"statement.dsse.json"}


# Showing one record

def test_one_record_can_be_shown_without_the_others(home: Path) -> None:
    sealed = signing.open_envelope((home / "bundle" / "statement.dsse.json").read_bytes(), signing.BUNDLE_PREDICATE,
                                 None)[0]["predicate"]["records"]
    for index in (0, 5, 23):
        for text in (True, False):
            shown = json.loads(json.dumps(seal.disclose(home / "bundle", index, text=text)))
            seal.check_disclosure(shown, sealed)
            assert ("Answer" in json.dumps(shown)) == text
    for name, value in (("index", 4), ("digest", "sha256:" + "0" * 64), ("previous", "x"), ("path", []),
                        ("parts", {}), ("record", {}), ("path", ["zz"]), ("index", None), ("index", -1)):
        with pytest.raises(BundleError):
            seal.check_disclosure(seal.disclose(home / "bundle", 5) | {name: value}, sealed)
    with pytest.raises(BundleError, match="does not belong"):
        seal.check_disclosure(seal.disclose(home / "second", 5), sealed)
    with pytest.raises(UserError, match="has no record 24"):
        seal.disclose(home / "bundle", 24)


def test_a_code_digest_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "moonbase" / "evals"
    room.mkdir(parents=True)
    (room / "figures.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(manifest, "_ROOM", room)
    before = manifest.code_digests()
    (room / "figures.py").write_text("2", encoding="utf-8")
    after = manifest.code_digests()
    assert {name for name in before if before[name] != after[name]} == {"figures"}


def test_levels_follow_from_what_is_kept(tmp_path: Path, home: Path, quick: None) -> None:
    """The weak model's weights are not named, and one output of the strong one in Chinese is not kept."""
    def change(record: Record) -> Record:
        if record.model == "weak":
            return record.model_copy(update={"call": record.call.model_copy(update={"weights_digest": None})})
        if record.condition["language"] == "zh" and record.item.endswith("3"):
            return record.model_copy(update={"output": None})
        return record

    out = seal.seal(samples.write_evaluation(tmp_path / "run", change=change), home / "key")
    checking = verify.Verification(out, None)
    checking.run()
    assert not verify.failures(checking.findings)
    levels = {name: checking.levels[name] for name in (
        "sums/strong/accuracy", "sums/strong/language=en/accuracy", "sums/strong/language=zh/accuracy",
        "sums/weak/accuracy")}
    assert list(levels.values()) == [0, 3, 0, 2]


def test_records_that_are_written_plainly_can_be_read_in_any_order_of_keys(home: Path, tmp_path: Path) -> None:
    run = samples.write_evaluation(tmp_path / "run", items=2)
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text("utf-8").splitlines()]
    shuffled = [json.dumps(dict(sorted(line.items(), reverse=True))) for line in lines]
    write_records(tmp_path / "plain.jsonl", read_records(run / "records.jsonl"))
    (run / "records.jsonl").write_text("\n".join(shuffled) + "\n", encoding="utf-8")
    out = seal.seal(run, home / "key")
    assert [record.item for record in read_records(out / "records.jsonl")] == [line["item"] for line in lines]
