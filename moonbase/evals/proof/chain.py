"""Records as a chain and as a tree.

The chain fixes their order: each line of records.jsonl holds the digest of the line before, the first one that of the
suite, so a record cannot be changed, left out, added or moved without changing every digest after it. The tree fixes
them all in one root (RFC 6962 §2.1) and lets one record be shown to belong to it without showing the others.

A line's digest covers the digests of the record's parts, not the record itself. Whoever may not show a text shows the
parts, and they still prove what was scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.evals.proof.canonical import BundleError, canonical, clean, digest_bytes, digest_json, parse
from moonbase.evals.proof.folder import read_lines

SCORE_FIELDS = ("scores", "label", "votes", "status", "reason")


@dataclass(frozen=True)
class Link:
    """One line of records.jsonl. `problem`: None, or what is wrong with it."""

    number: int
    previous: str
    digest: str
    record: dict[str, Any]
    problem: str | None = None


def genesis(suite: Any) -> str:
    """What the first record follows: the frozen suite with its models and seed."""
    return digest_json({"schema": "moonbase.chain/1", "suite": suite})


def parts_of(record: dict[str, Any], spelled: bytes | None = None) -> dict[str, str | None]:
    """Digests of a record's parts; `spelled`: its canonical bytes, where they are at hand."""
    return {
        "call": digest_json(record.get("call")),
        "input": record.get("input_digest"),
        "output": record.get("output_digest"),
        "record": digest_bytes(canonical(record) if spelled is None else spelled),
        "score": digest_json({name: record.get(name) for name in SCORE_FIELDS}),
        "target": record.get("target_digest"),
    }


def link_digest(previous: str, parts: dict[str, str | None]) -> str:
    return digest_json({"parts": parts, "previous": previous})


def link(previous: str, record: dict[str, Any]) -> tuple[bytes, str]:
    """The line of a record that follows `previous`, without its end, and its digest."""
    spelled = canonical(record)
    parts = parts_of(record, spelled)
    digest = link_digest(previous, parts)
    head = canonical({"digest": digest, "parts": parts, "previous": previous})
    # `record` sorts behind the other three names, so this is the canonical spelling of the whole line.
    return head[:-1] + b',"record":' + spelled + b"}", digest


def read_links(bundle: Path, name: str, first: str) -> Iterator[Link]:
    """Every line with what is wrong with it. A damaged line is blamed once, not on all that follow it.

    Raises BundleError at a line that cannot be read at all.
    """
    expected = first
    for number, line in enumerate(read_lines(bundle, name), 1):
        try:
            value = parse(line)
        except BundleError as error:
            raise BundleError(f"{name}, line {number}: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("record"), dict) \
                or not all(isinstance(value.get(key), str) for key in ("digest", "previous")):
            raise BundleError(f"{name}, line {number}: not a sealed record")
        problem = _problem(line, value, expected, first=number == 1)
        expected = value["digest"]
        yield Link(number, value["previous"], expected, value["record"], problem)


def _problem(line: bytes, value: dict[str, Any], expected: str, first: bool) -> str | None:
    try:
        written, digest = link(value["previous"], value["record"])
    except BundleError as error:
        return str(error)
    if digest != value["digest"]:
        stated = value.get("parts")
        parts = parts_of(value["record"])
        changed = [name for name in parts if not isinstance(stated, dict) or stated.get(name) != parts[name]]
        return f"changed after sealing ({', '.join(changed) or 'its place in the chain'})"
    if value["previous"] != expected:
        return ("belongs to another suite or bundle, or a record before it is missing" if first else
                "does not follow the record before it: one was dropped, added or moved")
    if written != line:
        return f"not in canonical form: {clean(line[:40].decode('utf-8', 'replace'))}"
    return None


class MerkleTree:
    """The root of a growing list of leaves in O(log n) memory (RFC 6962 §2.1)."""

    def __init__(self, leaves: Iterable[bytes] = (), follow: int = -1) -> None:
        """`follow`: the leaf whose path is wanted."""
        self._peaks: list[tuple[int, bytes]] = []  # (leaves below, hash), largest first
        self.size, self._follow = 0, follow
        self._path: list[bytes] = []
        for leaf in leaves:
            self.append(leaf)

    def append(self, leaf: bytes) -> None:
        size, top = 1, leaf_hash(leaf)
        while self._peaks and self._peaks[-1][0] == size:
            left, start = self._peaks.pop()[1], self.size + 1 - 2 * size
            if start <= self._follow < start + 2 * size:
                self._path.append(top if self._follow < start + size else left)
            top = node_hash(left, top)
            size *= 2
        self._peaks.append((size, top))
        self.size += 1

    def root(self) -> bytes:
        if not self._peaks:
            return hashlib.sha256(b"").digest()
        top = self._peaks[-1][1]
        for _, peak in reversed(self._peaks[:-1]):
            top = node_hash(peak, top)
        return top

    def path(self) -> list[bytes]:
        """What is hashed with the leaf that was followed to reach the root, from the bottom up (RFC 6962 §2.1.1)."""
        path, start, top, below = self._path[:], self.size, b"", False
        for size, peak in reversed(self._peaks):
            start -= size
            here = start <= self._follow < start + size
            if top and (here or below):
                path.append(top if here else peak)
            top, below = node_hash(peak, top) if top else peak, below or here
        return path


def leaf_hash(leaf: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The path of leaf `index`, where all leaves are at hand."""
    if not 0 <= index < len(leaves):
        raise ValueError(f"leaf {index} of {len(leaves)}")
    return MerkleTree(leaves, follow=index).path()


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that leaf `index` of `size` and its path lead to; None: no such path (RFC 9162 §2.1.3.2)."""
    if not 0 <= index < size:
        return None
    node, last, top = index, size - 1, leaf_hash(leaf)
    for step in path:
        if last == 0:
            return None
        if node & 1 or node == last:
            top = node_hash(step, top)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            top = node_hash(top, step)
        node, last = node >> 1, last >> 1
    return top if last == 0 else None


def leaf_of(digest: str) -> bytes:
    """The leaf of a record: the 32 bytes of its line's digest. Raises BundleError."""
    try:
        leaf = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        leaf = b""
    if len(leaf) != 32 or not digest.startswith("sha256:"):
        raise BundleError(f"{clean(digest, 80)!r}: not a SHA-256 digest")
    return leaf
