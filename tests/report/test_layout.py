"""The key figures as a browser lays them out: whole rows, at every width, on paper, whatever their number."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from moonbase import report
from tests.serve.browser import Browser, Page, find_browser

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
