from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moonbase.errors import UserError
from moonbase.report import write_report

VOID = {"meta", "br", "link", "img", "hr", "input"}
SVG_LEAVES = {"path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """A strict reading of the page: every element closed in order, all attributes and text kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.texts_in: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
            if self.open:
                self.texts_in.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert_self_contained(page, text)
    return page


def assert_self_contained(page: Page, text: str) -> None:
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for tag in ("script", "link", "img", "iframe", "object", "embed", "form", "base", "a", "foreignobject", "image"):
        assert page.all(tag) == [], tag
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action", "xlink:href", "xmlns"), (tag, name)
            if name == "href":
                assert (value or "").removeprefix("#") in identifiers and (value or "").startswith("#")
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.removeprefix("#") in identifiers
    style = text[text.index("<style>"):text.index("</style>")]
    assert "@import" not in style and "url(" not in style and "@font-face" not in style
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)


def test_whole_run(make_run):
    page = read(make_run())
    words = page.words
    assert page.texts_in["h1"] == ["quick <b>start</b>"]
    assert "5.1M parameters (3.11M active) · 40 steps · " in words and " of 40 planned, none skipped " in words
    assert " · 1.95 → 1.20 bits per byte on held-out files (xz −9: 1.71)" in words
    for heading in ("Learning", "Samples", "Attention and experts", "Optimisation and speed", "Skipped steps", "Corpus",
                    "How it was made"):
        assert heading in page.texts_in["h2"]
    assert {"loss", "bits", "logits", "load", "share", "lr", "grad-norm", "update-rms", "tokens-per-second"} <= {
        figure["id"] for figure in page.all("figure")}
    assert "QK-Clip scaled heads back 2 times in 1 step (first at step 7, last at step 7): layer 2." in words
    assert "moonbase quickstart --preset pico" in words and "moonbase chat runs/quickstart" in words
    assert "not UTF-8 3 files /a/one.txt /a/two.txt 1 more, not listed here" in words
    assert "2026-01-02 03:04:05 UTC" in words and "16.0 GiB" in words and "Some CPU" in words
    assert "q_lora_rank" in words and "optimizer" in words
    assert page.texts_in["b"].count("def ") == 2
    assert "Not recorded" not in words


def test_a_fine_tuned_run_is_measured_on_replies(make_run):
    folder = make_run()
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("stage: pretrain", "stage: sft"))
    words = read(folder).words
    assert "held-out replies" in words and "held-out files" not in words


def test_every_chart_says_its_gist_in_words(make_run):
    page = read(make_run())
    figures = page.all("figure")
    labels = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(labels) == len(figures) and all(label and any(map(str.isdigit, label)) for label in labels)
    assert len(page.texts_in["figcaption"]) == len(figures)
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg"))


def test_drawings_take_colours_and_font_from_the_page(make_run):
    text = write_report(make_run()).read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "#" not in re.sub(r'(url\(#|href="#)', "", svg), "a fixed colour would not follow dark mode"
        assert "font-family" not in svg and "<text" in svg
    style = text[text.index("<style>"):text.index("</style>")]
    for name in set(re.findall(r"var\(--([a-z0-9-]+)\)", text)):
        # A colour is defined for light, dark and print.
        assert style.count(f"--{name}:") == 3 or name in ("swatch", "in-a-row"), name


def test_same_input_gives_same_bytes(make_run):
    first, second = make_run(name="one"), make_run(name="two")
    before = write_report(first).read_bytes()
    # Anything taken from the clock would show.
    time.sleep(1.1)
    assert write_report(second).read_bytes() == before
    assert sorted(os.listdir(first)) == ["config.yaml", "metrics.jsonl", "report.html", "run.json", "samples.txt"]


def test_hostile_text_is_shown_and_does_nothing(make_run):
    evil = '<script>alert(1)</script>\x00\x1b[31mred\x1b[0m \u202egnp.exe\u2066 "quoted" \ud800 &amp; {{ 7*7 }} ]]>'
    huge = "x" * 1_000_000
    header = f"=== step 5 | {evil}\n".replace("\ud800", "")
    samples = header + f">>> {json.dumps(evil)}\n... {json.dumps(evil + huge)}\n"
    samples += f">>> {json.dumps(huge)}\n" + '... "cut by a crash'
    folder = make_run(samples=samples, facts={
        "name": evil, "command": evil, "reason": evil, "next_commands": [evil], "versions": {evil: evil},
        "machine": {"cpu": evil}, "results": {evil: evil},
        "corpus": {"sources": [{"path": evil}], "skipped": {evil: {"count": 1, "names": [evil]}}}})
    line = json.dumps({"step": 41, "loss": 3.0, "skipped": evil})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    page = read(folder)
    words = page.words
    assert words.count("<script>alert(1)</script>") >= 12
    assert "{{ 7*7 }}" in words and "&amp;" in words
    assert "␀␛[31mred␛[0m [U+202E]gnp.exe[U+2066]" in words
    assert "more characters are in samples.txt" in words and "more characters of the prompt" in words
    assert "cut by a crash" in words
    assert (folder / "report.html").stat().st_size < 700_000


def test_hostile_configuration(make_run):
    folder = make_run()
    recipe = "name: '<script>x</script>'\nmodel: {a: [<i>, {b: </style>}]}\nwhen: 2020-01-01\n"
    (folder / "config.yaml").write_text(recipe)
    words = read(folder).words
    assert "<script>x</script>" in words and "</style>" in words and "2020-01-01" in words
    (folder / "config.yaml").write_text("{not yaml: [<script>")
    words = read(folder).words
    assert "{not yaml: [<script>" in words and "not readable as a recipe" in words


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "samples.txt", "run.json", "all"])
def test_missing_parts_are_named(make_run, missing):
    folder = make_run()
    for name in ("config.yaml", "metrics.jsonl", "samples.txt", "run.json") if missing == "all" else (missing,):
        (folder / name).unlink()
    words = read(folder).words
    expected = {"config.yaml": "config.yaml is missing", "metrics.jsonl": "metrics.jsonl is missing",
                "samples.txt": "No samples were recorded", "run.json": "run.json is missing"}
    for name, sentence in expected.items():
        assert (sentence in words) == (missing in (name, "all")), sentence


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[1, 2]", b"null", b"{", b'"text"', b"[" * 5_000])
def test_any_bytes_in_any_part(make_run, content):
    folder = make_run()
    for name in ("config.yaml", "metrics.jsonl", "samples.txt", "run.json"):
        (folder / name).write_bytes(content)
    assert "Not recorded, so not drawn: loss, bits per byte" in read(folder).words


def test_values_of_the_wrong_kind(make_run):
    wrong = {"name": {}, "status": 3, "seconds": "long", "machine": "fast", "versions": [1], "parameters": True,
             "corpus": [], "results": 5, "next_commands": {"a": 1}, "started": 12, "active_parameters": float("nan")}
    folder = make_run(facts=wrong)
    rows = [{"step": 1, "loss": "low", "max_logit": [[1]], "expert_load": {"a": 1}, "clipped_heads": ["x"]},
            {"step": 2.5, "loss": 3}, {"step": None}, {"step": -1},
            {"step": 2, "lr": 10**400, "max_logit": [], "expert_share": [3, [1, "a"]]},
            {"step": 3, "loss": 1e308, "max_logit": [1e300, None], "skipped": {"a": [1]}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "status unknown" in read(folder).words


def test_cut_off_line_nan_and_no_validation(make_run):
    folder = make_run(steps=0, facts={"status": "running", "results": {}})
    lines = ['{"step": 1, "loss": 5.0, "grad_norm": NaN}', '{"step": 2, "loss": NaN, "grad_norm": Infinity}',
             '{"step": 3, "loss": 4.0}', '{"step": 4, "lo']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    words = read(folder).words
    assert "unfinished" in words and "had not ended when this page was written: step 3 of 1" in words
    assert "last line of metrics.jsonl is cut short" in words
    assert "3 recorded values are NaN or infinite" in words
    assert "No validation was recorded" in words


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_very_short_runs(make_run, steps):
    page = read(make_run(steps=steps, facts={"results": {}}))
    assert bool(page.all("figure")) == (steps > 0)
    if steps == 0:
        assert "holds no training step" in page.words


@pytest.mark.parametrize(("status", "word"), [("stopped", "was stopped"), ("failed", "failed")])
def test_a_run_that_ended_early_says_why(make_run, status, word):
    words = read(make_run(facts={"status": status, "reason": "10 bad steps in a row"})).words
    assert f"The run {word} at step 40 of 40: 10 bad steps in a row" in words


def test_many_steps_and_layers_stay_small(make_run):
    folder = make_run(steps=0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 4_001):
            value = 1 + (step * 7919 % 1000) / 500
            file.write(json.dumps({"step": step, "loss": value + 2, "lr": 1e-3, "grad_norm": value, "update_rms": 0.2,
                                   "tokens_per_second": 1e4 * value, "max_logit": [value * 30] * 61,
                                   "clipped_heads": [1] * 61, "expert_load": [value + 1] * 60,
                                   "skipped": "spike" if step % 2 else None,
                                   "expert_share": [[value] * 384] * 60 if step == 4_000 else None}) + "\n")
    read(folder)
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "absent")


def test_earlier_samples_are_spread_over_the_run(make_run):
    blocks = "".join(f'=== step {step} | temperature 0.0\n>>> "a"\n... "b{step}"\n' for step in range(1, 101))
    words = read(make_run(samples=blocks)).words
    assert "Shown: step 100, temperature 0.0." in words and "Earlier: step 1, temperature 0.0" in words
    assert words.count("Earlier:") == 8 and "91 more in samples.txt" in words
