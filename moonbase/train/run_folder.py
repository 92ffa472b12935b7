"""A run is a folder: config.yaml, metrics.jsonl, samples.txt, run.json, checkpoints/, report.html. Nothing else is a
database."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from moonbase import files
from moonbase.errors import UserError

_BLOCK = re.compile(r"=== step (\d+)")


class RunFolder:
    """One process at a time owns a run folder; the lock is the kernel's and ends with the process.

    Raises UserError where the folder cannot be made, cannot be written, or belongs to a process that runs. Where the
    file system knows no locks (some network file systems), nobody is kept out.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._had_lock = (path / ".lock").exists()
        self.path = files.make_folder(path)
        self._metrics: int | None = None
        self._lock = -1
        try:
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._take()
            os.ftruncate(self._lock, 0)
            os.write(self._lock, str(os.getpid()).encode())
            files.remove_partial(self.path)
            if (self.path / "checkpoints").is_dir():
                files.remove_partial(self.path / "checkpoints")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise files.explain_os_error(error, self.path) from None
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 32).decode("ascii", "replace").strip() or "unknown"
            raise UserError(f"{self.path}: in use by another moonbase process (pid {owner}). "
                            "Wait for it, stop it, or choose another folder with --out.") from None
        except OSError:
            return  # the file system knows no locks

    def write_config(self, text: str) -> None:
        files.write_text(self.path / "config.yaml", text)

    def update_facts(self, *, afresh: bool = False, **facts: Any) -> dict[str, Any]:
        """Merge into run.json, or with `afresh` replace it, and return the whole of it."""
        known = {**({} if afresh else read_facts(self.path)), **facts}
        files.write_text(self.path / "run.json", json.dumps(known, indent=1, default=str) + "\n")
        return known

    def rewind(self, step: int) -> None:
        """Drop metrics and samples after `step`: what goes on from there writes them again. A line of metrics that a
        crash cut short goes too."""
        kept = []
        for line in self._lines("metrics.jsonl"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        self._replace("metrics.jsonl", kept)
        kept, keep = [], True
        for line in self._lines("samples.txt"):
            if block := _BLOCK.match(line):
                keep = int(block[1]) <= step
            if keep:
                kept.append(line + "\n")
        self._replace("samples.txt", kept)

    def _lines(self, name: str) -> list[str]:
        try:
            text = (self.path / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise files.explain_os_error(error, self.path / name) from None
        return text.split("\n")[: -1 if text.endswith("\n") else None]

    def _replace(self, name: str, lines: list[str]) -> None:
        if (self.path / name).exists():
            files.write_text(self.path / name, "".join(lines))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One JSON object, one line, handed to the system at once. Numbers that are not finite, which JSON does not
        know, become null."""
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        try:
            if self._metrics is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._metrics = os.open(self.path / "metrics.jsonl", flags, 0o644)
            while line:
                line = line[os.write(self._metrics, line):]
        except OSError as error:
            raise files.explain_os_error(error, self.path / "metrics.jsonl") from None

    def amend_metrics(self, step: int, **fields: Any) -> None:
        """Put other values into the last line, if it is that of `step`."""
        lines = self._lines("metrics.jsonl")
        record = json.loads(lines[-1]) if lines else {}
        if record.get("step") != step:
            return
        if self._metrics is not None:  # it is of the file that is about to be replaced
            os.close(self._metrics)
            self._metrics = None
        lines[-1] = json.dumps(_finite({**record, **fields}), allow_nan=False)
        self._replace("metrics.jsonl", [line + "\n" for line in lines])

    def append_samples(self, text: str) -> None:
        try:
            with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise files.explain_os_error(error, self.path / "samples.txt") from None

    def flush(self) -> None:
        """Metrics reach the disk: no checkpoint may outlive the lines that led to it."""
        if self._metrics is not None:
            try:
                os.fsync(self._metrics)
            except OSError as error:
                raise files.explain_os_error(error, self.path / "metrics.jsonl") from None

    def discard_if_empty(self) -> None:
        """Where nothing but this lock has come to lie in the folder, for a run that was refused, leave no trace."""
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [".lock"] and not self._had_lock:
                (self.path / ".lock").unlink()
            for folder in self._made:
                folder.rmdir()  # fails, and ends this, where anything is inside

    def close(self) -> None:
        """Release the folder for other processes."""
        for descriptor in (self._metrics, self._lock):
            if descriptor is not None and descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._metrics, self._lock = None, -1


def read_facts(path: str | Path) -> dict[str, Any]:
    """The run.json of a run folder; nothing where it is missing or damaged."""
    known: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))
    return known if isinstance(known, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
