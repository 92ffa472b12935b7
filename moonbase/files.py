"""Writing files so that nothing half-written is ever left under its final name.

Everything is written beside its final place, flushed to the disk, and renamed. A crash leaves at most a `.partial-*`
sibling, which `remove_partial` clears away; a folder that was being replaced comes back under its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from moonbase.errors import UserError

PARTIAL = ".partial-"
RETIRED = ".retired-"


def partial_sibling(path: Path, prefix: str = PARTIAL) -> Path:
    """A fresh name beside `path`, so that the final rename stays on one file system."""
    return path.parent / f"{prefix}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def fsync_path(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _final(path: Path) -> Path:
    """What `path` will be called: no one has heard of the names under which things are written aside."""
    names = []
    for name in path.parts:
        while name.startswith(PARTIAL):
            name = name.removeprefix(PARTIAL).rsplit("-", 2)[0]
        names.append(name)
    return Path(*names)


def explain_os_error(error: OSError, path: Path) -> UserError:
    """Turn the operating system's complaint into one line with the mend."""
    path = _final(path)
    name = path if error.filename is None or PARTIAL in str(error.filename) else error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full. Free some space or choose another folder, then run again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{name}: no permission to write here. Choose a folder that you may write to.")
    if error.errno == errno.ENOENT and name == path and not path.parent.is_dir():
        return UserError(f"{path.parent}: no such folder")
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
    write_pieces(path, [content])


def write_pieces(path: str | Path, pieces: Iterable[bytes]) -> None:
    """The same of many pieces, one after the other; only one of them is held at a time."""
    path = Path(path)
    partial = partial_sibling(path)
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_path(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise explain_os_error(error, path) from None
        raise


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
        replace_folder(partial, path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise explain_os_error(error, path) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`, its sibling, and remove what was there. Raises UserError where that is a file."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file with this name is in the way. Remove it or choose another folder.")
    if path.exists():
        retired = partial_sibling(path, RETIRED)
        os.rename(path, retired)
        os.rename(new, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(new, path)
    fsync_path(path.parent)


def remove_partial(folder: str | Path) -> None:
    """Remove what a killed writer left in `folder`; a folder it had moved aside without putting the new one in place
    gets its name back."""
    for retired in Path(folder).glob(f"{RETIRED}*"):
        original = retired.with_name(retired.name.removeprefix(RETIRED).rsplit("-", 2)[0])
        if original.exists():
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(retired, original)
    for leftover in Path(folder).glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
