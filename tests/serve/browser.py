"""A headless Chromium, driven through its DevTools protocol over two pipes: no package besides the browser itself."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120.0
"""Seconds, against hanging alone: a machine may stand still while a test waits."""

KEYS = {
    "Enter": (13, "\r"), "Escape": (27, None), "Tab": (9, None), "Space": (32, " "), "ArrowUp": (38, None),
}  # fmt: skip
SHIFT = 8

# The browser reads descriptor 3 and writes 4, whatever numbers the pipes have here.
REDIRECT = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
            "os.execv(sys.argv[3], sys.argv[3:])")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class BrowserError(RuntimeError):
    """What the browser said when a command or a script failed."""


class Browser:
    """One process; `page()` opens a tab."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_browser, self._in = os.pipe()
        self._out, from_browser = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", REDIRECT, str(to_browser), str(from_browser), binary,
             "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--disable-extensions",
             "--disable-component-update", "--disable-sync", "--mute-audio", "--hide-scrollbars",
             # A mouse that can hover, which a headless browser says it has not.
             "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._number = 0
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._listen, daemon=True).start()
        self.call("Target.setDiscoverTargets", discover=True)

    def _listen(self) -> None:
        waiting = b""
        while chunk := os.read(self._out, 1 << 16):
            *messages, waiting = (waiting + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.put(message)
                else:
                    self.events.append(message)
        self._answers.put({"id": None, "error": "the browser has ended"})

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            try:
                answer = self._answers.get(timeout=PATIENCE)
            except queue.Empty:
                raise BrowserError(f"{method}: no answer") from None
            if "error" in answer:
                raise BrowserError(f"{method}: {answer['error']}")
            if answer["id"] == self._number:
                return answer["result"]

    def page(self, width: int = 1100, height: int = 780) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, width, height)

    def close(self) -> None:
        """End the browser and whatever processes it started."""
        try:
            self.call("Browser.close")
            self._process.wait(timeout=10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)


class Page:
    """A tab. What it has seen counts from `fresh` on."""

    def __init__(self, browser: Browser, session: str, width: int = 1100, height: int = 780) -> None:
        self.browser, self.session, self._since = browser, session, 0
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.fresh(width, height)

    def fresh(self, width: int = 1100, height: int = 780) -> None:
        """As if it had just been opened."""
        self.resize(width, height)
        self.call("Emulation.setEmulatedMedia", media="", features=[])
        self.scheme("light")
        self._since = len(self.browser.events)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def events(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every event of this name that the tab has sent."""
        return [event["params"] for event in self.browser.events[self._since :]
                if event["method"] == method and event.get("sessionId") == self.session]

    def resize(self, width: int, height: int, touch: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)

    def scheme(self, name: str) -> None:
        """What the system prefers: light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def open(self, url: str) -> None:
        """Show a page that knows nothing of earlier visits."""
        self.call("Storage.clearDataForOrigin", origin=url, storageTypes="all")
        before = len(self.events("Page.loadEventFired"))
        self.call("Page.navigate", url=url)
        self._until(lambda: len(self.events("Page.loadEventFired")) > before, f"{url} does not load")

    def reload(self) -> None:
        before = len(self.events("Page.loadEventFired"))
        self.call("Page.reload")
        self._until(lambda: len(self.events("Page.loadEventFired")) > before, "it does not load again")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(f"{script}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE) -> Any:
        """Wait until an expression is truthy, and return it."""
        found: list[Any] = []

        def look() -> bool:
            # An element has no value of its own that could be sent.
            found[:] = [self.run(f"((found) => found instanceof Node || found)({script})")]
            return bool(found[0])

        self._until(look, f"still not: {script}", seconds)
        return found[0]

    def _until(self, done: Any, complaint: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end:
                raise BrowserError(complaint)
            time.sleep(0.02)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        common = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code,
                  "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common,
                  **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        x, y = self.run(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        answer = self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        path.write_bytes(base64.b64decode(answer["data"]))

    def addresses(self) -> list[str]:
        """Every address that the tab has asked for."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Errors of the console: scripts that failed, what the content security policy refused."""
        thrown = [event["exceptionDetails"]["text"] for event in self.events("Runtime.exceptionThrown")]
        logged = [event["entry"]["text"] for event in self.events("Log.entryAdded")
                  if event["entry"]["level"] == "error" and event["entry"]["source"] != "network"]
        return thrown + logged
