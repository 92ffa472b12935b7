"""The page as a browser lays it out: key figures in whole rows; a real report on a phone and on paper."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moonbase import report
from moonbase.data import train_tokenizer
from moonbase.recipe import load_recipe
from tests.serve.browser import Browser, Page, find_browser
from tests.train.tiny import run, write_yaml

STYLE = (Path(report.__file__).parent / "style.css").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium is installed; the report is not looked at")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened.page()
    opened.close()


def rows(tab: Page, count: int) -> list[int]:
    """Cells in each row; asserts that every row reaches from edge to edge."""
    tiles = "<div><dt>Name</dt><dd><strong>1.00</strong></dd></div>" * count
    page = f'<style>{STYLE}</style><main><dl class="tiles">{tiles}</dl></main>'
    tab.run(f"document.documentElement.innerHTML = {json.dumps(page)}")
    boxes = tab.run("""(() => {
        const edges = ({left, right, top}) => [left, right, Math.round(top)];
        const box = (element) => edges(element.getBoundingClientRect());
        return [box(document.querySelector('.tiles')), ...[...document.querySelectorAll('.tiles > div')].map(box)];
    })()""")
    (left, right, _), *cells = boxes
    found = Counter(top for _, _, top in cells)
    for top in found:
        row = [cell for cell in cells if cell[2] == top]
        # The frame's border of one pixel lies outside the cells.
        assert abs(row[0][0] - left - 1) < 0.6 and abs(right - 1 - row[-1][1]) < 0.6, (count, top)
    return list(found.values())


@pytest.mark.parametrize(("width", "media", "most"), [(1280, "", 5), (700, "", 3), (390, "", 2), (680, "print", 5)])
def test_no_hole_and_nobody_alone(tab: Page, width: int, media: str, most: int) -> None:
    tab.fresh(width, 900)
    tab.call("Emulation.setEmulatedMedia", media=media)
    for count in range(1, 15):
        found = rows(tab, count)
        assert sum(found) == count and max(found) <= most
        # Of two columns the last cell may take both.
        assert min(found) > 1 or count == 1 or most == 2, (count, found)


@pytest.fixture(scope="module")
def real_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run of twelve steps leaves behind, samples and a file that was left out included."""
    folder = tmp_path_factory.mktemp("real")
    texts, tokenizer = folder / "texts", folder / "tokenizer"
    texts.mkdir()
    documents = [f"def {'long_name_' * 9}{number}(value):\n    return value + {number}\n" * (1 + number % 7)
                 for number in range(60)]
    for number, document in enumerate(documents):
        (texts / f"{number}.py").write_text(document, encoding="utf-8")
    (texts / f"{'binary' * 30}.txt").write_bytes(b"a\0b")
    train_tokenizer(documents, 512).save(tokenizer)
    recipe = write_yaml(folder, texts, tokenizer, sample_prompts=["def ", "x" * 90], sample_every=6)
    run(load_recipe(str(recipe), []), folder / "run")
    return folder / "run" / "report.html"


@pytest.mark.parametrize(("width", "media"), [(390, ""), (390, "print"), (680, "print")])
def test_the_report_of_a_real_run_never_scrolls_sideways(tab: Page, real_report: Path, width: int, media: str) -> None:
    """On a phone, on a narrow page, and on A4 within its margins; with everything unfolded."""
    tab.fresh(width, 844)
    tab.call("Emulation.setEmulatedMedia", media=media)
    tab.open(real_report.as_uri())
    assert tab.run(f"matchMedia('{media or 'screen'}').matches && innerWidth == {width}")
    assert tab.run("document.querySelectorAll('figure svg').length") > 4
    assert tab.run("document.body.scrollHeight") > 1500
    for _ in range(2):
        assert tab.run("document.documentElement.scrollWidth") <= width
        # Nothing that is shown reaches over the edge, not even where the page cuts it off. Drawings scale as a whole.
        assert tab.run(f"""[...document.querySelectorAll('main *')]
            .filter((element) => !element.closest('svg') && element.getClientRects().length)
            .filter((element) => element.getBoundingClientRect().right > {width} + 0.5)
            .map((element) => element.outerHTML.slice(0, 200))""") == []
        tab.run("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.complaints() == []
