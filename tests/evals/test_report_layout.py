"""The report of an evaluation in a real browser: on a phone, on paper, in the dark, with nothing but its own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moonbase.evals.report import write_reports
from tests.evals.report_folder import make_folder
from tests.serve.browser import Browser, Page, find_browser

NAMES = ("a" * 120, "模型 with-a-long-name/and-a-path/and-more", "m", "deepseek-v3.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.evals.report_folder import figures

    folder = make_folder(tmp_path_factory.mktemp("evaluation"), figures(NAMES))
    write_reports(folder)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium is installed; the report is not looked at")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened.page()
    opened.close()


def show(tab: Page, folder: Path, width: int, language: str = "en", media: str = "", scheme: str = "light") -> None:
    path = folder / ("report.html" if language == "en" else "report.zh.html")
    tab.fresh(width, 900)
    tab.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(path.as_uri())
    assert tab.complaints() == [] and set(tab.addresses()) == {path.as_uri()}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("width", "media"), [(360, ""), (390, ""), (700, ""), (1280, ""), (700, "print")])
def test_nothing_is_wider_than_the_page(tab: Page, folder: Path, width: int, media: str, language: str) -> None:
    show(tab, folder, width, language, media)
    tab.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide, narrow = tab.run("""['.on-wide', '.on-narrow'].map((name) => [...document.querySelectorAll(name)]
        .filter((one) => one.offsetParent !== null).length)""")
    assert (wide == 0) != (narrow == 0)
    # Letters of a drawing stay inside it.
    outside = tab.run("""[...document.querySelectorAll('figure svg text')].filter((text) => {
        const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
        return inner.width && (inner.left < outer.left - 3 || inner.right > outer.right + 12
                               || inner.top < outer.top - 3 || inner.bottom > outer.bottom + 3);
    }).map((text) => text.textContent)""")
    assert outside == []


def test_paper_shows_the_tables_and_one_colour_scheme(tab: Page, folder: Path) -> None:
    show(tab, folder, 700, media="print", scheme="dark")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    heights = tab.run("""[...document.querySelectorAll('section > details:not(.folded) table')]
        .map((table) => table.getBoundingClientRect().height)""")
    assert len(heights) >= 10 and min(heights) > 20


def test_dark_letters_can_be_read(tab: Page, folder: Path) -> None:
    for scheme in ("light", "dark"):
        show(tab, folder, 1000, scheme=scheme)
        low = tab.run("""(() => {
            const channel = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
                return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            const written = [...document.querySelectorAll('p, li, td, th, dt, dd, h1, h2, h3, figure svg text')];
            return written.map((one) => light(getComputedStyle(one)[one.tagName === 'text' ? 'fill' : 'color']))
                .map((ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05))
                .filter((ratio) => ratio < 4.5);
        })()""")
        assert low == []


def test_names_for_those_who_do_not_see_it(tab: Page, folder: Path) -> None:
    show(tab, folder, 1000)
    tab.call("Accessibility.enable")
    tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    pictures = [node for node in tree if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]
    shown = tab.run("document.querySelectorAll('figure').length")
    assert len(pictures) == shown and all(len(node["name"]["value"]) > 3 for node in pictures)
    assert all(len(node["description"]["value"]) > 20 for node in pictures)
