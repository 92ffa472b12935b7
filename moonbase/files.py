"""Writing files so that nothing half-written is ever left under its final name.

Everything is written beside its final place, flushed to the disk, and renamed. A crash leaves at most a `.partial-*`
sibling, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from moonbase.errors import UserError

PARTIAL = ".partial-"


def partial_sibling(path: Path) -> Path:
    """A fresh name beside `path`, so that the final rename stays on one file system."""
    return path.parent / f"{PARTIAL}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explain_os_error(error: OSError, path: Path) -> UserError:
    """Turn the operating system's complaint into one line with the mend."""
    name = error.filename or path
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full. Free some space or choose another folder, then run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{name}: no permission to write here. Choose a folder that you may write to.")
    if error.errno == errno.ENOTDIR:
        return UserError(f"{name}: a part of this path is a file, not a folder. Choose another path.")
    return UserError(f"{name}: {error.strerror or error}")


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents. Raises UserError where that is not possible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path}: a file with this name is in the way. Remove it or choose another folder.") from None
    except OSError as error:
        raise explain_os_error(error, path) from None
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 under `path`, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` under `path`, whole or not at all. Raises UserError on a full disk or a forbidden folder."""
    path = Path(path)
    partial = partial_sibling(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_path(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise explain_os_error(error, path) from None


@contextlib.contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder aside and rename it to `path` at the end; an exception leaves no trace.

    Yields the folder to write into. An existing `path` is replaced only after the new one is complete.
    """
    path = Path(path)
    partial = partial_sibling(path)
    try:
        make_folder(path.parent)
        partial.mkdir()
        yield partial
        for item in [*partial.rglob("*"), partial]:
            fsync_path(item)
        if path.exists():
            retired = partial_sibling(path)
            os.rename(path, retired)
            os.rename(partial, path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(partial, path)
        fsync_path(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise explain_os_error(error, path) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partial(folder: str | Path) -> None:
    """Remove what a killed writer left in `folder`."""
    for leftover in Path(folder).glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
