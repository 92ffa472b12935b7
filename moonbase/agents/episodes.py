"""Episodes and events on disk: trace files, one episode a line, and the event streams of sessions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from moonbase.agents.folding import fold
from moonbase.agents.journal import EVENTS, Event, read_whole_lines
from moonbase.agents.trace import SCHEMA, Episode, wrong_schema
from moonbase.errors import UserError
from moonbase.files import write_bytes


def read_events(path: str | Path) -> list[Event]:
    """The events of a session; a last line that was not written to its end is left out.

    `path`: the session's folder or its events.jsonl. Raises UserError for any other line that is no event.
    """
    path = _events_file(Path(path))
    try:
        return read_whole_lines(path)[0]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_episodes(path: str | Path) -> Iterator[Episode]:
    """The episodes of a trace file, one a line; or the one of a session, from its folder or its events.jsonl.

    Raises UserError with the number of the line for one that is no episode, or one of a newer schema.
    """
    path = _events_file(Path(path))
    found = False
    for number, line in _lines(path):
        if not found and b'"type"' in line[:4096] and b'"schema_version"' not in line[:4096]:
            try:
                yield fold(read_events(path))
            except UserError as error:
                raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
            return
        found = True
        try:
            episode = Episode.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}: line {number}: {_complaint(line, error)}") from None
        yield episode
    if not found:
        raise UserError(f"{path}: no episode in it")


def write_episodes(path: str | Path, episodes: Iterable[Episode]) -> None:
    """Write a trace file, whole or not at all. Raises UserError where it cannot be written."""
    write_bytes(path, b"".join(episode.model_dump_json().encode() + b"\n" for episode in episodes))


def _events_file(path: Path) -> Path:
    return path / EVENTS if path.is_dir() else path


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not empty."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _complaint(line: bytes, error: ValidationError) -> str:
    """One line on why a line is no episode."""
    try:
        found = json.loads(line)
    except ValueError as wrong:
        return f"no JSON ({wrong}). Was the file cut off?"
    except RecursionError:
        return "no episode: JSON nested too deeply"
    if not isinstance(found, dict) or "schema_version" not in found:
        return f'no episode: it has no "schema_version": "{SCHEMA}"'
    if found["schema_version"] != SCHEMA:
        return wrong_schema(found["schema_version"])
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
