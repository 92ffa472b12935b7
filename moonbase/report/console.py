"""Live progress on standard error: a moving line per stage in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from moonbase.report.words import duration


class Console:
    """`console(what, done, total, details)` draws; `note` prints a line that stays. Everything goes to standard error.

    Also fits wherever a `progress(what, done, total)` callback is asked for.
    """

    PLAIN_SECONDS = 5.0
    REFRESH_SECONDS = 0.1

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(stderr=True, quiet=quiet, highlight=False)
        self.live: Live | None = None
        self.what: str | None = None
        self.started = self.drawn = self.finished = 0.0
        self.first_done = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, what: str, done: int, total: int | None = None, details: str = "") -> None:
        now = time.monotonic()
        if what != self.what:
            self.close()
            self.what, self.started, self.first_done, self.drawn = what, now, done, 0.0
        last = total is not None and done >= total
        if self.rich.is_terminal:
            if now - self.drawn < self.REFRESH_SECONDS and not last:
                return
            if self.live is None:
                self.live = Live(console=self.rich, refresh_per_second=10, transient=True)
                self.live.start()
            self.live.update(self._line(done, total, details, now))
        elif now - self.drawn >= self.PLAIN_SECONDS or last:
            self.rich.print(self._line(done, total, details, now), soft_wrap=True)
        else:
            return
        self.drawn = now
        if last:
            self._finish(done, total, details, now)

    def note(self, text: str) -> None:
        """A line that stays, above the moving one."""
        self.rich.print(escape(text), soft_wrap=True)

    def stage(self, text: str) -> None:
        """A heading for what follows."""
        self.close()
        self.rich.print(f"[bold]{escape(text)}[/bold]", soft_wrap=True)

    def close(self) -> None:
        """End the moving line."""
        if self.live is not None:
            self.live.stop()
            self.live = None
        self.what = None

    def _finish(self, done: int, total: int | None, details: str, now: float) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
            self.rich.print(self._line(done, total, details, now), soft_wrap=True)
        self.what = None

    def _line(self, done: int, total: int | None, details: str, now: float) -> Text:
        elapsed = now - self.started
        parts = [f"  {self.what}"]
        if total:
            share = min(1.0, done / total)
            filled = round(share * 20)
            parts.append("━" * filled + "╌" * (20 - filled))
            parts.append(f"{done:,}/{total:,}")
        else:
            parts.append(f"{done:,}")
        if details:
            parts.append(details)
        if total and done < total and done > self.first_done:
            left = elapsed / (done - self.first_done) * (total - done)
            parts.append(f"{duration(left)} left")
        else:
            parts.append(duration(elapsed))
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis" if sys.stderr.isatty() else "ignore")
