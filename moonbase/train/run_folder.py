"""A run is a folder: config.yaml, metrics.jsonl, samples.txt, run.json, checkpoints/, report.html. Nothing else is a database."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from moonbase import files
from moonbase.errors import UserError


class RunFolder:
    """One process at a time owns a run folder; the lock is the kernel's and ends with the process."""

    def __init__(self, path: str | Path) -> None:
        self.path = files.make_folder(path)
        try:
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the run's life
        except OSError as error:
            raise files.explain_os_error(error, self.path) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(f"{self.path}: in use by another moonbase process (pid {owner}). "
                            "Wait for it, stop it, or choose another folder with --out.") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        files.remove_partial(self.path)
        if (self.path / "checkpoints").is_dir():
            files.remove_partial(self.path / "checkpoints")
        self._metrics = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_config(self, text: str) -> None:
        files.write_text(self.path / "config.yaml", text)

    def update_facts(self, **facts: Any) -> dict[str, Any]:
        """Merge into run.json and return the whole of it."""
        path = self.path / "run.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        known.update(facts)
        files.write_text(path, json.dumps(known, indent=1, default=str) + "\n")
        return known

    def rewind_metrics(self, step: int) -> None:
        """Drop metrics after `step`: a resumed run writes them again. A line cut short by a crash goes too."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        files.write_text(path, "".join(kept))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One JSON object, one line, flushed at once."""
        try:
            if self._metrics is None:
                self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - one handle per run
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise files.explain_os_error(error, self.path / "metrics.jsonl") from None

    def append_samples(self, text: str) -> None:
        try:
            with open(self.path / "samples.txt", "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise files.explain_os_error(error, self.path / "samples.txt") from None

    def close(self) -> None:
        """Release the folder for other processes."""
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()
