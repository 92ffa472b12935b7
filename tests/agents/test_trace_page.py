"""The page of a trace in a real browser: what is shown, what the keyboard does, and what hostile content cannot."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.folding import fold
from moonbase.agents.page import render_page, write_page
from moonbase.agents.trace import Episode
from moonbase.errors import UserError
from tests.agents.trace_events import Story
from tests.serve import browser as chromium
from tests.serve.browser import Browser, Page, find_browser

HOSTILE = ('</script><script>window.hacked=1</script><img src="http://stolen.invalid/a" onerror="window.hacked=2">'
           '<svg onload="window.hacked=3"> [x](javascript:window.hacked=4) ![y](http://stolen.invalid/b) <!-- <script> '
           '`<b onclick="window.hacked=5">` **<i>bold</i>** \u2028 \u2029 %%SCRIPT%% &lt;&amp; ]]> \x00 \u202e')
KEYS = {"ArrowDown": (40, None), "ArrowLeft": (37, None), "ArrowRight": (39, None),
        "End": (35, None)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium is installed: the trace page is not tried")
    for name, key in KEYS.items():
        chromium.KEYS.setdefault(name, key)
    running = Browser(binary, tmp_path_factory.mktemp("profile"))
    try:
        yield running.page(1280, 800)
    finally:
        running.close()


def show(page: Page, folder: Path, *episodes: Episode, width: int = 1280) -> Path:
    path = write_page(episodes, folder / "trace.html")
    page.fresh(width, 800)
    page.open(path.as_uri())
    page.wait("document.body.dataset.ready")
    return path


def story(seed: int = 3, **shape: Any) -> Episode:
    return fold(Story(seed, **{"steps": 5, "fan": 4, "depth": 2, **shape}).events)


def fine(page: Page, path: Path) -> None:
    """Nothing failed, and nothing but the file itself was asked for."""
    assert page.complaints() == []
    assert set(page.addresses()) <= {path.as_uri()}


def texts(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.innerText.trim())")


def key(page: Page, name: str) -> None:
    page.run(f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: {name!r}, bubbles: true}}))")


def tree(page: Page) -> str:
    """The id of the chosen agent, as the row's title says it."""
    return page.run("/\\((.*)\\)$/.exec(document.querySelector('.row.chosen').title)[1]")


def test_the_file_is_complete_in_itself(tmp_path: Path) -> None:
    episode = story()
    path = write_page([episode], tmp_path / "trace.html")
    text = path.read_text(encoding="utf-8")
    assert text == render_page([episode])
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text, re.S)
    found = {name: json.loads(block) for name, block in blocks}
    assert Episode.model_validate(found["episode-0"]) == episode
    assert found["episodes"][0]["agents"] == len(episode.agents)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    outside = text.replace(dict(blocks)["episode-0"], "").replace(dict(blocks)["episodes"], "")
    assert not re.search(r"https?://|@import|url\(|\bimport\(|fetch\(|XMLHttp|innerHTML|insertAdjacent|document\.write",
                         outside)
    with pytest.raises(UserError, match="no episode to show"):
        render_page([])


def test_what_it_shows(page: Page, tmp_path: Path) -> None:
    episode = story()
    path = show(page, tmp_path, episode)
    assert page.run("document.querySelector('#task').innerText") == episode.task
    tiles = dict(zip(texts(page, ".tiles dt"), texts(page, ".tiles strong"), strict=True))
    assert tiles["Critical steps"] == str(episode.critical.steps)
    assert tiles["Steps"] == str(sum(call.kind == "model" for agent in episode.agents for call in agent.calls))
    assert tiles["Sub-agents"] == str(len(episode.agents) - 1) and tiles["item f1"] == "0.875"
    page.run("document.querySelector('[name=view][value=table]').click()")
    rows = texts(page, "#table tbody tr")
    assert len(rows) == len(episode.agents)
    by_id = {agent.id: agent for agent in episode.agents}
    for row in rows:
        cells = row.split("\t")
        agent = by_id[cells[1]]
        assert cells[0] == agent.name and cells[5] == str(agent.spent.steps)
        assert cells[6] == f"{agent.spent.tokens:,}"
    page.run("document.querySelector('[name=view][value=chart]').click()")
    fine(page, path)


@pytest.mark.parametrize("seed", range(6))
def test_the_axes_are_as_long_as_the_critical_path(page: Page, tmp_path: Path, seed: int) -> None:
    """The page lays calls out by itself; where the last one ends is what the critical path in Python says."""
    episode = story(seed, steps=4, fan=3)
    path = show(page, tmp_path, episode)
    for axis, length in (("steps", str(episode.critical.steps)), ("seconds", f"{episode.critical.seconds:.3g}")):
        page.run(f"document.querySelector('[name=axis][value={axis}]').click()")
        shown = texts(page, ".row .value")[0].split()[0]
        assert shown == length if axis == "steps" else float(shown) == pytest.approx(float(length), abs=0.06)
    page.run("document.querySelector('[name=axis][value=tokens]').click()")
    shown = texts(page, ".row .value")[0].replace(",", "")
    assert float(shown.rstrip("k")) * (1000 if "k" in shown else 1) == pytest.approx(episode.critical.tokens, rel=0.005)
    fine(page, path)


def lit_pixels(page: Page) -> int:
    """How many pixels of the chart have the colour of the critical path."""
    return page.run("""(() => {
        const canvas = document.querySelector("#canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let found = 0;
        const [red, green, blue] = [232, 137, 12];
        for (let at = 0; at < data.length; at += 4) {
            if (data[at] === red && data[at + 1] === green && data[at + 2] === blue) found += 1;
        }
        return found;
    })()""")  # fmt: skip


def test_time_in_line_is_hatched(page: Page, tmp_path: Path) -> None:
    """Along the upper edge of a bar, just below its corner: colour and paper in turn while it was in line, then colour
    alone; on an axis without time there is nothing in turn."""
    events = Story(3, steps=1, depth=0).events
    call = next(event for event in events if event["type"] == "model_call")
    call |= {"started": 0.0, "ended": 10.0, "waited": 6.0}
    events[-1]["time"] = events[-2]["time"] = 10.0
    path = show(page, tmp_path, fold(events))
    turns = """(() => {
        const canvas = document.querySelector("#canvas");
        const ratio = canvas.width / canvas.clientWidth;
        const data = canvas.getContext("2d").getImageData(0, Math.round(9.5 * ratio), canvas.width, 1).data;
        const filled = (x) => data[4 * x + 3] > 100 && data[4 * x] !== data[4 * x + 2];
        const inked = [...Array(canvas.width).keys()].map(filled);
        const first = inked.indexOf(true), last = inked.lastIndexOf(true);
        const changes = [...Array(last - first).keys()].map((x) => x + first).filter((x) => inked[x] !== inked[x + 1]);
        return [changes.length, (Math.max(first, ...changes) - first) / (last - first)];
    })()"""  # fmt: skip
    count, share = page.run(turns)
    assert count > 40 and share == pytest.approx(0.6, abs=0.02)
    page.run("document.querySelector('#scroller').focus()")
    page.click(".row .who")
    page.run("document.querySelectorAll('#panel .item > .head').forEach((one) => one.click())")
    assert re.search(r"\b6\.0* ?s in line", page.run("document.querySelector('#panel').innerText"))
    page.run("document.querySelector('[name=axis][value=steps]').click()")
    assert page.run(turns) == [0, 0]
    fine(page, path)


def test_the_critical_path_is_lit(page: Page, tmp_path: Path) -> None:
    episode = story()
    path = show(page, tmp_path, episode)
    assert lit_pixels(page) > 500
    for agent in episode.agents:
        for call in agent.calls:
            call.on_critical_path = []
    show(page, tmp_path, episode)
    assert lit_pixels(page) == 0
    fine(page, path)


def test_messages_at_a_click(page: Page, tmp_path: Path) -> None:
    episode = story()
    path = show(page, tmp_path, episode)
    main = episode.agents[0]
    assert page.run("document.querySelectorAll('.item .body > *').length") == 0, "messages are made when opened"
    assert len(texts(page, ".item")) == 2 + sum(call.kind == "model" for call in main.calls)
    page.click(".item:nth-child(3) > .head")
    assert "Reasoning" in texts(page, ".item:nth-child(3) summary")
    assert page.run("document.querySelector('.item:nth-child(3) details').open") is False
    number = next(at for at, call in enumerate(json.loads(json.dumps(main.messages[2]["tool_calls"])))
                  if call["function"]["name"] == "search")
    page.run(f"document.querySelectorAll('.item:nth-child(3) .tool > .head')[{number}].click()")
    tool = texts(page, f".item:nth-child(3) .tool:nth-of-type({number + 1})") or texts(page, ".item:nth-child(3) .tool")
    wanted = json.loads(main.messages[2]["tool_calls"][number]["function"]["arguments"])["query"]
    assert any(wanted in text and "Result" in text for text in tool)
    assert "snippet" in " ".join(texts(page, ".item:nth-child(3) .tool th")), "a list of like objects is a table"
    child = next(name for call in main.calls if call.kind == "tool" for name in call.children)
    page.run("document.querySelector('.row:not(.chosen)').scrollIntoView()")
    page.run("[...document.querySelectorAll('.item > .head')].forEach((head) => head.click())")
    page.run("document.querySelector('.chip.go').click()")
    assert tree(page).startswith("main/") and child.startswith("main/")
    fine(page, path)


def test_the_keyboard(page: Page, tmp_path: Path) -> None:
    episode = story()
    path = show(page, tmp_path, episode)
    page.run("document.querySelector('#scroller').focus()")
    before = len(texts(page, ".row"))
    page.press("ArrowDown")
    assert tree(page) != "main"
    page.press("ArrowUp")
    assert tree(page) == "main"
    page.press("ArrowLeft")
    assert len(texts(page, ".row")) == 1 < before
    assert page.run("document.querySelector('.row').getAttribute('aria-expanded')") == "false"
    page.press("ArrowRight")
    assert len(texts(page, ".row")) == before
    page.press("Enter")
    assert page.run("document.activeElement.matches('.item > .head')") is True
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus can be seen"
    page.press("ArrowDown")
    page.press("Enter")
    assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.press("Escape")
    assert page.run("document.activeElement.id") == "scroller"
    page.press("End")
    assert page.run("document.querySelector('#scroller').getAttribute('aria-activedescendant')") == (
        f"row-{len(episode.agents) - 1}")
    key(page, "3")
    assert page.run("document.querySelector('[name=axis][value=tokens]').checked") is True
    key(page, "/")
    assert page.run("document.activeElement.id") == "search"
    fine(page, path)


def test_search_and_filters(page: Page, tmp_path: Path) -> None:
    episode = story(5)
    target = episode.agents[-1]
    target.messages[1]["content"] += " zanzibar <needle>"
    path = show(page, tmp_path, episode)
    page.run("document.querySelector('#search').focus()")
    page.type("ZANZIBAR <NEEDLE>")
    page.wait("document.querySelector('#found').innerText")
    assert texts(page, "#found") == ["1 in 1 agent"] and tree(page) == target.id
    page.press("Enter")
    assert "zanzibar <needle>" in " ".join(texts(page, ".item.open.hit"))
    page.press("Escape")
    assert len(page.run("[...document.querySelectorAll('.row')].map((row) => row.id)")) > 1
    page.run("document.querySelector('#errors').click()")
    shown = page.run("[...document.querySelectorAll('.row')].map((row) => /\\((.*)\\)$/.exec(row.title)[1])")
    wrong = {agent.id for agent in episode.agents if agent.status == "failed"
             or any(call.error for call in agent.calls)}
    assert set(shown) == wrong
    page.run("document.querySelector('#errors').click(); document.querySelector('#role').value = 'Archivist';"
             "document.querySelector('#role').dispatchEvent(new Event('change'))")
    assert {text.splitlines()[0] for text in texts(page, ".row .who")} <= {"Archivist"}
    fine(page, path)


def test_several_episodes(page: Page, tmp_path: Path) -> None:
    cut = fold(Story(3, steps=5).events[:9])
    path = show(page, tmp_path, story(1), cut)
    assert len(texts(page, "#episode option")) == 2
    page.click("#next")
    assert texts(page, "#status") == ["unfinished"]
    assert len(texts(page, ".row")) == len(cut.agents)
    page.run("document.querySelector('#scroller').focus()")
    key(page, "[")
    assert texts(page, "#status") == ["finished"]
    fine(page, path)


def poisoned() -> Episode:
    """An episode in which every text is hostile."""
    def poison(value: Any, name: str = "") -> Any:
        if isinstance(value, str) and name not in ("type", "agent", "call", "parent", "parent_call", "schema", "role",
                                                   "status", "id", "tool_call_id", "started_at", "episode"):
            return value + HOSTILE
        if isinstance(value, dict):
            return {(key + HOSTILE if name == "options" else key): poison(item, key) for key, item in value.items()}
        return [poison(item, name) for item in value] if isinstance(value, list) else value

    return fold([poison(event) for event in Story(3, steps=3, fan=2, depth=1).events])


def test_hostile_content_stays_text(page: Page, tmp_path: Path) -> None:
    episode = poisoned()
    path = show(page, tmp_path, episode, episode)
    for row in range(min(6, len(episode.agents))):
        page.run(f"document.querySelectorAll('.row')[{row}]?.click()")
        for selector in (".item > .head", ".tool > .head", "summary"):
            page.run(f"document.querySelectorAll('#panel {selector}').forEach((one) => one.click())")
    page.run("document.querySelector('[name=view][value=table]').click()")
    page.run("new Promise((done) => setTimeout(done, 200))")
    assert page.run("window.hacked") is None
    assert page.run("document.querySelectorAll('img, svg, iframe, a, [onclick]').length") == 0
    assert page.run("[...document.querySelectorAll('*')].every((one) => [...one.attributes].every("
                    "(each) => !each.name.startsWith('on')))") is True
    assert page.run("document.scripts.length") == 4
    assert "window.hacked=1" in page.run("document.querySelector('#task').innerText")
    fine(page, path)


@pytest.mark.slow
def test_ten_megabytes(page: Page, tmp_path: Path) -> None:
    """Load, first picture and scrolling; the figures are printed."""
    events = Story(7, steps=24, fan=12, depth=1, words=420).events
    path = write_page([fold(events)], tmp_path / "big.html")
    megabytes = path.stat().st_size / 1e6
    assert megabytes > 9.5, megabytes
    page.fresh(1280, 800)
    start = time.monotonic()
    page.open(path.as_uri())
    page.wait("document.body.dataset.ready")
    page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    seconds = time.monotonic() - start
    frames = page.run("""(async () => {
        const scroller = document.querySelector("#scroller");
        const times = [];
        for (let at = 0; at < 60; at += 1) {
            const before = performance.now();
            scroller.scrollTop = (scroller.scrollHeight - scroller.clientHeight) * at / 59;
            await new Promise((done) => requestAnimationFrame(done));
            times.push(performance.now() - before);
        }
        return times.sort((a, b) => a - b);
    })()""")
    search = page.run("""(async () => {
        const before = performance.now();
        document.querySelector("#search").value = "granite ledger";
        document.querySelector("#search").dispatchEvent(new Event("input"));
        while (!document.querySelector("#found").innerText) await new Promise((done) => setTimeout(done, 5));
        return performance.now() - before;
    })()""")
    print(f"{megabytes:.1f} MB, {len(set(e['agent'] for e in events))} agents: load and first picture {seconds:.2f} s, "
          f"a frame of scrolling {frames[30]:.0f} ms (worst {frames[-1]:.0f} ms), search {search:.0f} ms")
    assert page.run("document.querySelectorAll('.row').length") < 60, "only rows in view are elements"
    # Far above what it takes: a page that drew every row would take minutes, and seconds for a frame.
    assert seconds < 60 and frames[0] < 500
    fine(page, path)


def test_on_a_phone_and_on_paper(page: Page, tmp_path: Path) -> None:
    path = show(page, tmp_path, story(), width=390)
    assert page.run("document.documentElement.scrollWidth <= 390") is True
    page.click(".row:nth-child(2) .who")
    assert page.run("getComputedStyle(document.querySelector('#panel')).display") == "block"
    assert page.run("document.documentElement.scrollWidth <= 390") is True
    page.click(".back")
    assert page.run("getComputedStyle(document.querySelector('#left')).display") != "none"
    page.fresh(1280, 800)
    paper = page.call("Page.printToPDF", printBackground=True)["data"]
    assert len(paper) > 20000
    fine(page, path)
