"""What one sample of one evaluation is remembered by: the line between running (Inspect) and everything after it.

A record holds no text of a hazardous set: where a suite withholds texts, digests are salted and `output` is None. Every
figure in a report is computed from records alone, so whoever has them can compute it again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moonbase.errors import UserError
from moonbase.files import write_pieces

SCHEMA = "moonbase.record/1"
LABELS = ("full", "partial", "evasive", "refusal", "api_block", "empty", "broken")
"""What an answer to a request can be, for suites that measure refusals."""
MENDED = "mended"
"""In `details`: of how many fields half characters had to be replaced."""

Status = Literal["scored", "unscored", "abstained", "error"]


class ModelCall(BaseModel):
    """Facts about the call that made the output, as far as the provider tells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider: str = ""
    """Who computed it: `moonbase`, `replay`, or the host behind a router."""
    precision: str | None = None
    fingerprint: str | None = None
    """The host's `system_fingerprint`, or the digest of the weights of an engine in process."""
    weights_digest: str | None = None
    decoding: dict[str, Any] = Field(default_factory=dict)
    """temperature, top_p, seed, max_tokens, reasoning effort ..."""
    stop_reason: str | None = None
    api_signal: str | None = None
    """A refusal or filter that the interface itself reported: `content_filter`, `refusal`, a status code."""


class Record(BaseModel):
    """One sample of one item under one condition by one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["moonbase.record/1"] = Field(SCHEMA, alias="schema")
    suite: str
    task: str
    item: str
    """The item's id, the same for every model and every condition under which it is asked."""
    sample: int = 0
    """Number of the repetition, from 0."""
    model: str
    condition: dict[str, str] = Field(default_factory=dict)
    """language (en, zh), provider, thinking (on, off), reveals_test (yes, no), difficulty, ... whatever is crossed."""
    group: str | None = None
    """What the item is about, where groups are compared: china, us, eu, russia, benign, ..."""
    cluster: str = ""
    """Items that share a source (template, document, pair) share a cluster; empty: the item is its own."""
    input_digest: str
    target_digest: str | None = None
    output_digest: str
    output: str | None = None
    """The answer's text; None where the suite withholds it."""
    scores: dict[str, float | None] = Field(default_factory=dict)
    """Metric name to value; None: could not be scored, and `reason` says why."""
    label: str | None = None
    """One of LABELS, where refusals are measured: the panel's."""
    votes: dict[str, str | None] = Field(default_factory=dict)
    """Each member of the panel by name and what it said; None: it abstained or failed."""
    status: Status = "scored"
    reason: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    cost: float | None = None
    """Dollars; None: no price is known."""
    call: ModelCall = ModelCall()
    details: dict[str, Any] = Field(default_factory=dict)
    """What a suite wants to keep besides: extracted answer, verifier's remark. JSON values only."""

    @property
    def cluster_key(self) -> str:
        return self.cluster or self.item

    def canonical(self) -> dict[str, Any]:
        """As JSON values, in the published names."""
        return self.model_dump(by_alias=True, mode="json")


def whole(text: str) -> str:
    """`text` as UTF-8 can hold it: halves of a character are joined where both are there, else U+FFFD stands for them.

    Models emit such halves: what comes in pieces, or is cut in the middle of a sign.
    """
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def digest(value: Any, salt: bytes = b"") -> str:
    """`sha256:...` of text or of a JSON value (sorted keys, no blanks); `hmac-sha256:...` where there is a salt.

    Of a text with half a character the digest is that of the text as records can hold it (`whole`).
    """
    if not isinstance(value, str):
        value = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    data = whole(value).encode()
    if salt:
        return "hmac-sha256:" + hmac.new(salt, data, hashlib.sha256).hexdigest()
    return "sha256:" + hashlib.sha256(data).hexdigest()


def read_records(path: Path) -> Iterator[Record]:
    """One by one, so that memory does not grow with their number. Raises UserError with the line's number."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    value = json.loads(line)
                    # A bundle wraps each record with its place in the chain.
                    yield Record.model_validate(value.get("record", value))
                except (ValueError, AttributeError, ValidationError) as error:
                    problem = str(error).splitlines()[0]
                    raise UserError(f"{path}, line {number}: not a record ({problem})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def write_records(path: Path, records: Iterable[Record]) -> int:
    """One JSON object a line, whole or not at all; returns how many.

    Where a text holds half a character, which no UTF-8 file can, U+FFFD stands for it, and `details.mended` says of how
    many fields.
    """
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in records:
            count += 1
            yield _line(record.canonical())

    write_pieces(path, lines())
    return count


def _line(value: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        found, count = _mended(value)
        found["details"] = {**found.get("details", {}), MENDED: count}
        return (json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _mended(value: Any) -> tuple[Any, int]:
    """A JSON value with all texts as UTF-8 can hold them, and how many were not so."""
    if isinstance(value, str):
        text = whole(value)
        return text, int(text != value)
    if isinstance(value, dict):
        parts = [(whole(name), *_mended(inner)) for name, inner in value.items()]
        return {name: inner for name, inner, _ in parts}, sum(count for _, _, count in parts)
    if isinstance(value, list):
        items = [_mended(inner) for inner in value]
        return [inner for inner, _ in items], sum(count for _, count in items)
    return value, 0
