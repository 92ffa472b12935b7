"""Kernels that are compiled at first use: where their libraries are kept, and that none is old or damaged.

A library lies in the cache folder ($XDG_CACHE_HOME/moonbase, else ~/.cache/moonbase) under a name made of two hashes:
of what went in (sources, compiler, options, processor) and of its own bytes. It is written aside and renamed; two
processes may do so at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where libraries are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "moonbase"


def load_or_compile(
    name: str, commands: Sequence[Sequence[str]], files: Sequence[Path], facts: Sequence[str] = ()
) -> ctypes.CDLL:
    """The library `name`, made by the first of `commands` that works; each is given the place of the result (-o).

    files: what the library is made of; facts: what else it depends on. Commands name one compiler. Raises OSError or
    SubprocessError where no command works.
    """
    real = Path(shutil.which(commands[0][0]) or commands[0][0]).resolve()
    about = [str(real), str(real.stat().st_size), str(real.stat().st_mtime_ns), *facts]
    about += [word for command in commands for word in command[1:]]
    digest = hashlib.sha256("\0".join(about).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    stem = f"{name}-{digest.hexdigest()[:16]}"
    for folder in (cache_folder(), None):
        try:
            if folder is None:
                # Nowhere to keep it: compiled for this process alone. A loaded library needs its file no longer.
                with tempfile.TemporaryDirectory(prefix="moonbase-") as own:
                    return ctypes.CDLL(str(_compile(commands, Path(own), stem)))
            folder.mkdir(parents=True, exist_ok=True)
            return _kept(folder, stem) or ctypes.CDLL(str(_compile(commands, folder, stem)))
        except OSError as error:
            if folder is None:
                raise
            _log.info("%s: %s cannot be used: %s", name, folder, error)
    raise AssertionError("unreachable")


def _kept(folder: Path, stem: str) -> ctypes.CDLL | None:
    """The library whose bytes are those that its name tells of; damaged ones are removed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.stem.endswith(_digest(path)):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return None


def _compile(commands: Sequence[Sequence[str]], folder: Path, stem: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as own:
        aside = Path(own) / "kernels.so"
        for command in commands:
            done = subprocess.run([*command, "-o", str(aside)], capture_output=True, text=True, timeout=300,
                                  errors="replace")
            if done.returncode == 0 and aside.exists():
                final = folder / f"{stem}-{_digest(aside)}.so"
                aside.replace(final)
                return final
        raise subprocess.SubprocessError(done.stderr.strip()[-500:] or f"exit code {done.returncode}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
