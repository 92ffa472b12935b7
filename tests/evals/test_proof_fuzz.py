"""Changes to a sealed bundle, drawn at random, by whoever may make them: none is accepted.

A stranger changes anything at all, and may sign with a key of his own. The publisher signs with the right key: what he
changes must contradict what the records give. Not among his changes is what nothing in a bundle could contradict: the
machine and the commit that he states, prices that nobody charged, and outputs that he invents together with scores that
are right for them; these last the logs contradict, where they are in the bundle, and a challenge where they are not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moonbase.evals.fresh import verify as grade
from moonbase.evals.proof import manifest as circumstances
from moonbase.evals.proof import seal, signing, verify
from moonbase.evals.proof.rescoring import regenerate
from moonbase.evals.records import Record, digest
from tests.evals import proof_samples as samples

DOCUMENTS = ("suite.json", "manifest.json", "results.json")
BY_LINES = ("records.jsonl", "results.csv", "report.html", "report.zh.html")
FILES = (*DOCUMENTS, *BY_LINES)
DERIVED = ("hypotheses", "items", "missing", "models", "prices", "seed", "suite", "withheld")
"""Of a manifest: what follows from the other files."""
CELL = re.compile(rb'<data class="(?:figure|part)"[^>]*value="([^"]*)"[^>]*>([^<]*)</data>')


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    for name in ("key", "other"):
        signing.generate_key(place / name)
    samples.write_evaluation(place / "run", items=3)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    return place


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)
    monkeypatch.setattr(circumstances, "code_digests", lambda found=circumstances.code_digests(): found)


# What anyone can do to a file

def bent_bytes(draw: random.Random, path: Path) -> None:
    whole = path.read_bytes()
    at, size = draw.randrange(len(whole)), draw.choice((1, 1, 1, 2, 50))
    piece = bytes(draw.randrange(256) for _ in range(size))
    kind = draw.choice(("flip", "insert", "delete", "cut", "repeat"))
    path.write_bytes({"flip": whole[:at] + bytes(one ^ draw.randrange(1, 256) for one in whole[at:at + size]) +
                      whole[at + size:], "insert": whole[:at] + piece + whole[at:], "delete": whole[:at] +
                      whole[at + size:], "cut": whole[:at], "repeat": whole[:at] + whole[max(0, at - size):]}[kind])


def bent_lines(draw: random.Random, path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("swap", "drop", "repeat"))
    if kind == "swap":
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == "drop":
        del lines[one]
    else:
        lines.insert(other, lines[one])
    path.write_bytes(b"".join(lines))


def bent_value(draw: random.Random, value: Any) -> Any:
    """Another value in place of this one, or somewhere inside of it."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        name = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {key: inner for key, inner in value.items() if key != name}
        return value | {name: bent_value(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.95:
        place = draw.randrange(len(value))
        return [*value[:place], *([bent_value(draw, value[place])] if draw.random() < 0.8 else []), *value[place + 1:]]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, -value - 1, value * 1.001 + 0.001, None, str(value), 10**15))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1] + "\u00e9", "<b>" + value, None, 7))
    return draw.choice((None, 1, "x"))


def bent_document(draw: random.Random, path: Path) -> None:
    samples.write_canonical(path, bent_value(draw, json.loads(path.read_bytes())))


def bent_records(draw: random.Random, bundle: Path) -> None:
    """One record in any field, and the whole chain made anew."""
    def change(values: list[dict[str, Any]]) -> None:
        place = draw.randrange(len(values))
        values[place] = Record.model_validate(values[place]).canonical()
        values[place]["details"] = {"remark": "x"} if draw.random() < 0.05 else values[place]["details"]
        name = draw.choice(sorted(values[place]))
        values[place][name] = bent_value(draw, values[place][name])

    samples.forge_chain(bundle, change)


def by_a_stranger(draw: random.Random, bundle: Path, home: Path) -> str:
    what = draw.choice(("bytes", "lines", "document", "records"))
    name = draw.choice({"bytes": (*FILES, "statement.dsse.json"), "lines": BY_LINES, "document": DOCUMENTS,
                        "records": ("records.jsonl",)}[what])
    if what == "records":
        bent_records(draw, bundle)
    else:
        {"bytes": bent_bytes, "lines": bent_lines, "document": bent_document}[what](draw, bundle / name)
    if signed := draw.random() < 0.3 and what != "bytes":
        samples.sign_again(bundle, home / "other")
    return f"{what} of {name}{', signed by another' if signed else ''}"


# What the publisher can do

def cell_of_a_page(draw: random.Random, bundle: Path) -> str:
    path = bundle / draw.choice(("report.html", "report.zh.html"))
    whole = path.read_bytes()
    cell = draw.choice(list(CELL.finditer(whole)))
    start, end = cell.span(draw.choice((1, 2)))
    path.write_bytes(whole[:start] + draw.choice((b"0.12345", b"9", b"1" + whole[start:end])) + whole[end:])
    return path.name


def cell_of_the_table(draw: random.Random, bundle: Path) -> str:
    lines = (bundle / "results.csv").read_text("utf-8").splitlines(keepends=True)
    row = draw.randrange(1, len(lines))
    cells = lines[row].split(",")
    place = draw.randrange(len(cells))
    cells[place] = "x" + cells[place]
    lines[row] = ",".join(cells)
    (bundle / "results.csv").write_text("".join(lines), "utf-8")
    return f"results.csv, row {row}, cell {place}"


def figure(draw: random.Random, bundle: Path) -> str:
    bent_document(draw, bundle / "results.json")
    return "results.json"


def manifest(draw: random.Random, bundle: Path) -> str:
    facts = json.loads((bundle / "manifest.json").read_bytes())
    name = draw.choice(DERIVED)
    samples.write_canonical(bundle / "manifest.json", facts | {name: bent_value(draw, facts[name])})
    return f"manifest.json, {name}"


def record(draw: random.Random, bundle: Path) -> str:
    """What was asked, answered and scored; the figures stay, or are computed from it as sealing does."""
    name = draw.choice(("input_digest", "target_digest", "output_digest", "output", "scores", "item", "model", "task",
                        "suite"))

    def change(values: list[dict[str, Any]]) -> None:
        one = draw.choice(values)
        one[name] = {"accuracy": 1 - one["scores"]["accuracy"]} if name == "scores" else str(one[name]) + "1"

    samples.forge_chain(bundle, change)
    return f"records.jsonl, {name}"


def by_the_publisher(draw: random.Random, bundle: Path, home: Path) -> str:
    change: Callable[[random.Random, Path], str] = draw.choice(
        (cell_of_a_page, cell_of_the_table, figure, manifest, record))
    what = change(draw, bundle)
    samples.sign_again(bundle, home / "key")
    return f"{what}, signed by the publisher"


def run(home: Path, tmp_path: Path, seeds: range) -> None:
    bundle = samples.copy_of(home / "bundle", tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    accepted = []
    for seed in seeds:
        draw = random.Random(seed)
        what = draw.choice((by_a_stranger, by_the_publisher))(draw, bundle, home)
        changed = any((bundle / name).read_bytes() != content for name, content in before.items()
                      if name != "statement.dsse.json" or "statement" in what or "another" in what)
        if changed and not verify.failures(verify.verify(bundle, home / "key.pub")):
            accepted.append(f"seed {seed}: {what}")
        for name, content in before.items():
            (bundle / name).write_bytes(content)
    assert not accepted, accepted


def test_fifty_changes_are_all_refused(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path, range(50))


@pytest.mark.slow
def test_a_thousand_more_changes_are_all_refused(home: Path, tmp_path: Path) -> None:
    run(home, tmp_path, range(50, 1050))


def test_what_only_logs_or_a_challenge_could_contradict(home: Path, tmp_path: Path) -> None:
    """A publisher who invents outputs and scores them rightly is believed: said in docs/proof.md, and meant here."""
    bundle = samples.copy_of(home / "bundle", tmp_path / "bundle")

    def invent(values: list[dict[str, Any]]) -> None:
        for one in values:
            problem = regenerate(Record.model_validate(one), (samples.SEED,))
            one["output"] = f"Answer: {problem.target}"
            one["output_digest"], one["scores"] = digest(one["output"]), {"accuracy": grade(problem, one["output"])[0]}

    samples.forge_chain(bundle, invent)
    out = seal.seal(bundle, home / "key", out=tmp_path / "invented")
    found = verify.verify(out, home / "key.pub")
    assert not verify.failures(found)
    assert any("none in the bundle: the records are the publisher's reading" in one.message for one in found)
