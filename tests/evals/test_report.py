"""The report of an evaluation: every number as results.json has it, in both languages, whatever names it is given."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moonbase.errors import UserError
from moonbase.evals.printing import text_of
from moonbase.evals.report import render_report, write_report, write_reports
from moonbase.evals.report.conclusions import hypotheses_of
from moonbase.evals.report.language import LANGUAGES, read_words
from moonbase.evals.report.parts import Parts
from moonbase.evals.report.read import read_findings
from tests.evals.report_folder import HYPOTHESES, MODELS, SUITE, difference, figure, figures, make_folder, rate

HOSTILE = ('</script><script>alert(1)</script><img src="http://stolen.invalid/a" onerror="x()">"\'&lt;]]><data '
           'class="figure" data-id="x" value="1">9</data>{{ 7 * 7 }}{0}%s$x^2$ \x00\x1b\u202e\ud800 =1+1 模型')
SECTIONS = {"capability", "differences", "refusal", "languages", "controlled", "providers", "contamination", "cost",
            "agreement", "dose"}


class Page(HTMLParser):
    """What a browser would make of the page: elements by name, cells, sections, and the text that is seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str | None]]] = {}
        self.cells: list[tuple[str, str, str]] = []
        self.seen: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.setdefault(tag, []).append(found)
        if tag == "data" and found["class"] == "figure":
            self._cell = [found["data-id"] or "", found["value"] or "", ""]

    def handle_endtag(self, tag: str) -> None:
        if tag == "data" and self._cell:
            self.cells.append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.seen.append(data)
        if self._cell:
            self._cell[2] += data

    @property
    def sections(self) -> set[str]:
        return {section.get("id") or "" for section in self.elements.get("section", [])}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


def page(folder: Path, language: str = "en") -> Page:
    return Page(render_report(folder, language))


def drawings(text: str) -> list[str]:
    return re.findall(r"<svg viewBox.*?</svg>", text, re.S)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_number_is_the_figures_own(tmp_path: Path, language: str) -> None:
    folder = make_folder(tmp_path)
    by_id = {entry["id"]: entry for entry in figures()}
    found = page(folder, language)
    for name, value, text in found.cells:
        wanted = by_id[name]
        assert text == (wanted["text"] if language == "en" else text_of(wanted, language))
        assert value == ("" if wanted["value"] is None else json.dumps(wanted["value"]))
    assert {name for name, _, _ in found.cells} == by_id.keys()
    parts = [one for one in found.elements["data"] if one["class"] == "part"]
    assert all(json.loads(one["value"]) == by_id[one["data-id"]][one["data-part"]] for one in parts)
    # Whoever sees a number sees what was left out of it.
    for name in ("unscored", "abstained", "errors", "n"):
        assert {one["data-id"] for one in parts if one["data-part"] == name} == by_id.keys()
    assert len([one for one in found.elements["abbr"] if "level" in (one["class"] or "")]) >= len(by_id)


def test_both_pages_satisfy_the_one_who_verifies(tmp_path: Path) -> None:
    tables = pytest.importorskip("moonbase.evals.proof.tables")
    folder = make_folder(tmp_path)
    by_id = {entry["id"]: entry for entry in figures()}
    known = tables.Known(by_id, SUITE["hypotheses"])
    for path in write_reports(folder):
        language = "zh" if path.name == "report.zh.html" else "en"
        cells, problems = tables.check_page(path.read_bytes(), known, language)
        assert not problems and cells > len(by_id)
        # Whoever takes one language for the other finds that the cells differ.
        assert tables.check_page(path.read_bytes(), known, "en" if language == "zh" else "zh")[1]
    rows, problems = tables.check_csv((folder / "results.csv").read_bytes(), known)
    assert not problems and rows == len(by_id)


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_charts_and_what_stands_where_one_is_missing(tmp_path: Path, language: str) -> None:
    everything = page(make_folder(tmp_path / "all"), language)
    assert everything.sections >= SECTIONS and "absent" not in everything.sections
    one = [rate("only/a", "a", "accuracy", 4, 9, condition={"task": "maths"})]
    little = page(make_folder(tmp_path / "little", one, hypotheses=[]), language)
    assert little.sections & SECTIONS == {"capability"}
    words = read_words(language)
    assert all(words[f"why.{name}"] in little.text for name in SECTIONS - {"capability"})
    empty = page(make_folder(tmp_path / "empty", [], suite=None, manifest=None, hypotheses=[]), language)
    assert not empty.sections & SECTIONS
    assert words["no_hypotheses"] in empty.text and words["no_manifest"] in empty.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_drawings_have_words_in_the_language_of_the_page(tmp_path: Path, language: str) -> None:
    text = render_report(make_folder(tmp_path), language)
    found = drawings(text)
    assert len(found) >= 2 * len(SECTIONS)
    for drawing in found:
        root = ElementTree.fromstring(drawing)
        title, description = root.find("title"), root.find("desc")
        assert root.get("role") == "img" and title.text and description.text
        assert root.get("aria-labelledby") == title.get("id") and root.get("aria-describedby") == description.get("id")
        written = "".join("".join(one.itertext()) for one in root.iter("text"))
        chinese = bool(re.search(r"[\u3000-\u9fff\uff00-\uffef]", written))
        assert written and not (language == "en" and chinese)
        # Beside numbers and models' names there is nothing to say in these.
        assert language == "en" or chinese or re.match("(refusal|dose|agreement)", title.get("id"))
        assert "font-family" not in drawing
    names = re.findall(r'\sid="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert text.count("<figure") <= text.count("<details")
    # A number that is drawn is a number that is in a table.
    assert "49.7]" in text
    assert language == "en" or not re.search("upper bound|points|language|public", "".join(
        "".join(one.itertext()) for drawing in found for one in ElementTree.fromstring(drawing).iter("text")))


def test_each_model_has_a_shape_and_a_dash_of_its_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    findings = read_findings(folder)
    from moonbase.evals.report.language import Words

    for name in ("_refusal", "_languages", "_dose"):
        part = getattr(Parts(findings, Words("en")), name)()
        icons = [re.sub(r'(fill|stroke)="var[^"]*"', "", str(icon)) for icon, _ in part.legend]
        assert len(icons) == len(set(icons)) >= 3


def test_complete_in_itself(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for language in LANGUAGES:
        text = render_report(folder, language)
        assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
        assert not re.search(r"<script|<link|<iframe|<img|@import|https?://|javascript:|\son\w+=", text)
        assert text == render_report(folder, language)
        assert f'<html lang="{read_words(language)["language"]}">' in text
    for path in write_reports(folder):
        first = path.read_bytes()
        path.unlink()
        write_report(folder, "zh" if path.name == "report.zh.html" else "en")
        assert path.read_bytes() == first


def test_both_languages_say_the_same_things() -> None:
    english, chinese = (read_words(language) for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    for name, phrase in english.items():
        blanks = [sorted(set(re.findall(r"\{(\w+)\}", text))) for text in (phrase, chinese[name])]
        assert blanks[0] == blanks[1], name
        assert "<" not in phrase + chinese[name]
    with pytest.raises(UserError, match="no words in 'fr'"):
        read_words("fr")


@pytest.mark.parametrize("language", LANGUAGES)
def test_hostile_names_stay_text(tmp_path: Path, language: str) -> None:
    found: list[dict[str, Any]] = figures((HOSTILE, "a" * 500, "b\nc", "d"))
    for entry in found:
        entry["note"] = entry["method"] = HOSTILE
        entry["condition"] = {name: value if value in ("en", "zh", "public", "fresh") else HOSTILE + value
                              for name, value in entry["condition"].items()}
    suite = SUITE | {"title": HOSTILE, "about": HOSTILE, "judges": [HOSTILE]}
    suite["hypotheses"] = [entry | {"statement": HOSTILE, "kind": HOSTILE} for entry in SUITE["hypotheses"]]
    encode = {"hypotheses": [entry | {"note": HOSTILE} for entry in HYPOTHESES]}
    folder = make_folder(tmp_path, json.loads(json.dumps(found).replace("\\ud800", "")), suite=json.loads(
        json.dumps(suite).replace("\\ud800", "")), manifest={HOSTILE[:-30]: HOSTILE[:-30].replace("\ud800", "")},
        hypotheses=json.loads(json.dumps(encode["hypotheses"]).replace("\\ud800", "")))
    write_report(folder, language)
    text = render_report(folder, language)
    calm = page(make_folder(tmp_path / "calm"), language)
    seen = Page(text)
    assert set(seen.elements) <= set(calm.elements) | {"tspan"}
    assert not re.search("<(script|img)", text)
    assert text.count("<data ") == len(re.findall(r'<data class="(?:figure|part|hypothesis)" data-id="[^"<>]*"'
                                                  r'(?: data-part="\w+")? value="[^"<>]*">[^<>]*</data>', text))
    assert not any(name.startswith("on") for ones in seen.elements.values() for one in ones for name in one)
    assert "\x00" not in text and "\u202e" not in text and "49" in text and "{{ 7 * 7 }}" in seen.text
    assert all(ElementTree.fromstring(drawing) is not None for drawing in drawings(text))


def test_table_for_spreadsheets(tmp_path: Path) -> None:
    found = [*figures(), rate("formula", "=HYPERLINK(1)", "@accuracy", 1, 3, condition={"x": "-1+cmd|x"})]
    folder = make_folder(tmp_path, found)
    write_report(folder)
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text(encoding="utf-8"))))
    assert [row["id"] for row in rows] == [entry["id"] for entry in found]
    for row, entry in zip(rows[:-1], found, strict=False):
        assert row["text"] == entry["text"] and row["model"] == entry["model"]
        for name in ("value", "low", "high", "n", "unscored", "abstained", "errors", "level"):
            assert (row[name] == "" and entry[name] is None) or float(row[name]) == entry[name]
        assert all(row[f"condition.{name}"] == value for name, value in entry["condition"].items())
    assert rows[-1]["model"] == "'=HYPERLINK(1)" and rows[-1]["metric"] == "'@accuracy"
    assert not any(cell[:1] in "=@" for row in rows for cell in row.values() if cell)


def said(folder: Path) -> str:
    """The box of what may not be concluded, as text."""
    text = render_report(folder)
    box = re.search(r'<section id="conclusions".*?</section>', text, re.S)[0]
    return Page(box).text


def test_what_may_not_be_concluded(tmp_path: Path) -> None:
    box = said(make_folder(tmp_path / "full"))
    assert "kimi-k2.5 answers more items right than deepseek-v3.2" in box and "power 38%" in box
    assert "about 1,180 items" in box and "are missed more often than 20%" in box
    assert "never happens: 0 of 250" in box
    assert "30 answers without a score" in box and "all 12 answers unscored" in box
    assert "49 answers are fewer than the 100" in box and "reveals one was not varied" in box
    # Settled ones are not in it.
    assert "not more than 5 points behind" not in box and "other languages" not in box
    box = said(make_folder(tmp_path / "bare", [rate("a", "m", "accuracy", 90, 100)], suite=None, manifest=None,
                           hypotheses=[]))
    for words in ("other languages", "other hosts", "fresh twins", "not sealed", "no hypothesis was written down"):
        assert words in box
    assert "never happens" not in box and "fewer than" not in box


@pytest.mark.parametrize(("kind", "margin", "value", "half", "verdict"), [
    ("superiority", None, 0.1, 0.05, "above"), ("superiority", None, -0.1, 0.05, "below"),
    ("superiority", None, 0.1, 0.2, "undecided"), ("non_inferiority", 0.05, -0.01, 0.03, "non_inferior"),
    ("non_inferiority", 0.05, -0.04, 0.03, "undecided"), ("non_inferiority", 0.05, -0.2, 0.03, "below"),
    ("equivalence", 0.05, 0.01, 0.03, "equivalent"), ("equivalence", 0.05, 0.01, 0.09, "undecided"),
    ("equivalence", 0.05, 0.2, 0.03, "different")])
def test_a_verdict_is_read_off_the_interval_where_none_was_computed(
        tmp_path: Path, kind: str, margin: float | None, value: float, half: float, verdict: str) -> None:
    entry = {"id": "H", "statement": "it holds", "kind": kind, "margin": margin, "figure": {"id": "spec"}}
    found = [difference("hypothesis/H/m", "m", "accuracy", value, half, {"language": "zh"}),
             rate("hypothesis/H/other", "other", "accuracy", 5, 9)]
    findings = read_findings(make_folder(tmp_path, found, suite=SUITE | {"hypotheses": [entry]}, hypotheses=[]))
    first, second = hypotheses_of(findings)
    assert first["verdict"] == verdict and "verdict" not in second
    given = [{"id": "H", "figure": "hypothesis/H/m", "verdict": "worse"}]
    make_folder(tmp_path, found, suite=SUITE | {"hypotheses": [entry]}, hypotheses=given)
    assert [one.get("verdict") for one in hypotheses_of(read_findings(tmp_path))] == ["worse", None]


@pytest.mark.parametrize(("content", "complaint"), [
    (None, "no results to report"), ("{", "not valid JSON"), ("[]", "a JSON object is wanted"),
    ('{"schema": "other"}', "`schema` is 'other'"), ('{"schema": "moonbase.results/1"}', "`figures` must be a list"),
    ('{"schema": "moonbase.results/1", "figures": [{"id": "a"}]}', "figure 0 needs an `id` and a `text`"),
    ('{"schema": "moonbase.results/1", "figures": [{"id": "a", "text": "1"}, {"id": "a", "text": "1"}]}', "same `id`")])
def test_broken_results_are_named(tmp_path: Path, content: str | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        write_report(tmp_path)
    assert "results.json" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_no_value_is_not_a_zero(tmp_path: Path) -> None:
    found = [figure("nothing", model="m", metric="accuracy", unscored=7, text="no value (0 of 7 scored)"),
             figure("odd", model="m", metric="accuracy", value=0.5, n=4, text="50.0% (no interval)",
                    condition={"task": "x"})]
    folder = make_folder(tmp_path, found)
    content = (folder / "results.json").read_text().replace('"value": null', '"value": NaN')
    (folder / "results.json").write_text(content)
    cells = page(folder).cells
    assert ("nothing", "", "no value (0 of 7 scored)") in cells and ("odd", "0.5", "50.0% (no interval)") in cells


def many(count: int) -> list[dict[str, Any]]:
    found = []
    for task in range(20):
        for entry in figures(MODELS, task):
            condition = entry["condition"] | {"task": f"t{task}"}
            found.append(entry | {"id": f"{task}/{entry['id']}", "condition": condition})
    return found[:count]


def test_four_hundred_figures_in_time(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, many(400))
    render_report(make_folder(tmp_path / "warm", figures()[:3]))
    start = time.process_time()
    write_report(folder)
    assert time.process_time() - start < 30
    assert (folder / "report.html").stat().st_size < 2_000_000


def test_importing_the_room_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = ("import sys, moonbase.evals.report as report; "
            "print([n for n in ('matplotlib', 'jinja2', 'torch', 'inspect_ai', 'numpy') if n in sys.modules])")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_counts_of_what_is_missing_and_repeated_means_are_no_rates() -> None:
    from moonbase.evals.report.read import Shown
    from moonbase.evals.report.sorting import is_rate

    told = {function: is_rate(Shown("id", "text", model="m", function=function))
            for function in ("mean", "missing", "bootstrap", "agreement", "power")}
    assert told == {"mean": True, "missing": False, "bootstrap": False, "agreement": False, "power": False}
