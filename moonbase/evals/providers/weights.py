"""The digest of a model's weights: what ties a number to the very model that earned it.

Of a folder it is the SHA-256 of what `sha256sum` prints for its weight files in the order of their names, so that
anyone can compute it without this package:

    cd FOLDER && LC_ALL=C sha256sum model*.safetensors | sha256sum

Of random weights (`preset:NAME`) it is that of one line for each tensor, in the order of the names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from moonbase.errors import CheckpointError, UserError
from moonbase.files import make_folder, write_text

if TYPE_CHECKING:
    import torch

REMEMBERED_BYTES = 64 << 20
"""Weights of at least this size are hashed once per machine: their digest is kept beside their size and times."""
HASHING_THREADS = 4
"""Hashing leaves Python's lock; beyond a few threads the disk is the limit."""


def weight_files(folder: Path) -> list[Path]:
    """The files that a checkpoint's weights are read from, by name. Raises CheckpointError."""
    from moonbase.checkpoint.reader import INDEX, SINGLE
    from moonbase.config import read_json

    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    try:
        names = set(read_json(folder / INDEX)["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / INDEX}: weight_map is missing or malformed") from None
    return [folder / name for name in sorted(names)]


def state_of(files: Iterable[Path]) -> tuple[tuple[str, int, int, int], ...]:
    """What changes when a file does: path, size, and the times of its content and of its entry, in nanoseconds.

    Raises CheckpointError for a file that is not there.
    """
    found = []
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        found.append((str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return tuple(found)


def digest_of_folder(folder: Path) -> str:
    """`sha256:...` of a checkpoint folder's weights. Raises CheckpointError."""
    files = weight_files(folder)
    state = state_of(files)
    note = _note_of(state) if sum(size for _, size, *_ in state) >= REMEMBERED_BYTES else None
    if note is not None:
        with contextlib.suppress(OSError):
            return note.read_text(encoding="ascii").strip()
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = list(threads.map(_sha256_of_file, files))
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True))
    result = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
    if note is not None and state_of(files) == state:
        # Where nothing can be kept, it is computed again next time.
        with contextlib.suppress(OSError, UserError):
            make_folder(note.parent)
            write_text(note, result + "\n")
    return result


def digest_of_model(model: torch.nn.Module) -> str:
    """`sha256:...` of tensors in memory: name, dtype, shape and little-endian bytes of each."""
    import torch

    lines = []
    for name, tensor in sorted(model.state_dict().items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name} {tensor.dtype} {tuple(tensor.shape)}\n")
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def _note_of(state: tuple[tuple[str, int, int, int], ...]) -> Path:
    from moonbase.ops.compiled import cache_folder

    return cache_folder() / "weights" / hashlib.sha256(os.fsencode(repr(state))).hexdigest()


def _sha256_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
