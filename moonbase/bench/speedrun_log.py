"""The finished runs of a speedrun on disk, for several processes and several calls, and who is making which run.

`runs.jsonl` has a line per finished run. A line is appended whole under a lock, and whatever a process that died in
the middle of one left behind is skipped by readers. A run is claimed by an exclusive lock on a file of its name, which
the operating system lets go of with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moonbase.bench.speedrun_plan import Run
from moonbase.errors import UserError
from moonbase.files import make_folder


def run_of(record: dict[str, Any]) -> Run:
    return Run(record["optimizer"], record["rate"], record["steps"], record["seed"])


def losses_of(records: list[dict[str, Any]]) -> dict[Run, float]:
    """A run that gave up has no loss in the file, and an infinite one here."""
    return {run_of(record): math.inf if record["loss"] is None else record["loss"] for record in records}


class RunLog:
    """The folder of a speedrun. A record has optimizer, rate, steps, seed, loss, recipe, corpus, and what was seen."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder cannot be made."""
        self.folder = make_folder(folder)
        self.path = folder / "runs.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """All whole lines, oldest first. Raises UserError for a file that cannot be read."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: not readable: {error.strerror}") from None
        found = []
        for line in lines:
            try:
                record = json.loads(line)
                run_of(record), record["loss"], record["recipe"], record["corpus"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle
            found.append(record)
        return found

    def of(self, recipes: Callable[[Run], str], corpus: str) -> list[dict[str, Any]]:
        """The records of one corpus whose recipe is the one that `recipes(run)` names, the first of each run."""
        found: dict[Run, dict[str, Any]] = {}
        for record in self.records():
            run = run_of(record)
            if record["corpus"] == corpus and run not in found and record["recipe"] == recipes(run):
                found[run] = record
        return list(found.values())

    def corpora(self) -> list[str]:
        """Digests of the corpora that there are runs of, the last one used first."""
        return list(dict.fromkeys(record["corpus"] for record in reversed(self.records())))

    def append(self, record: dict[str, Any]) -> None:
        """One more line, on the disk when this returns."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether nobody else holds `name`; nobody else gets it before the block ends, or this process does."""
        with self._lock_file(name) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until nobody else holds `name`, and hold it."""
        with self._lock_file(name) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock_file(self, name: str) -> BinaryIO:
        return open(make_folder(self.folder / "claims") / f"{name}.lock", "wb")
