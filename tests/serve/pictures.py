"""Pictures of the page for the documentation: `python -m tests.serve.pictures URL FOLDER`, with a server at URL."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.serve.browser import Browser, Page, find_browser

QUESTIONS = ("What can you do?", "What is 48 * 17?", "Convert 26 mi to km.")


def ask(page: Page, words: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.type(words)
    page.press("Enter")
    page.wait("document.querySelector('.assistant') && !document.body.classList.contains('running')", 300)


def take(url: str, folder: Path) -> None:
    """chat-light.png, chat-dark.png (with settings and an open call) and chat-phone.png."""
    binary = find_browser()
    assert binary, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(binary, Path(profile))
        try:
            page = browser.page(1200, 760)
            page.open(url)
            page.wait("!document.querySelector('#model').innerText.includes('connecting')")
            page.run("document.querySelector('#settings-form').elements.demo_tools.click()")
            for words in QUESTIONS:
                ask(page, words)
            shoot(page, folder / "chat-light.png")
            page.scheme("dark")
            page.click("#open-settings")
            page.run("[...document.querySelectorAll('.call')].slice(-1).forEach((fold) => { fold.open = true; })")
            shoot(page, folder / "chat-dark.png")
            page.click("#close-settings")
            page.scheme("light")
            page.resize(360, 740, touch=True)
            shoot(page, folder / "chat-phone.png")
        finally:
            browser.close()


def shoot(page: Page, path: Path) -> None:
    page.run("document.querySelector('#message').focus(); scrollTo(0, document.documentElement.scrollHeight);"
             "new Promise((done) => setTimeout(done, 400))")
    page.screenshot(path)


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
