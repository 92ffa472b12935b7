"""From the bytes of a request to a checked pydantic model, whatever the bytes are.

A body is read up to a limit and for a limited time, must be UTF-8, must be JSON in the strict sense (no NaN, no
Infinity, no number that overflows) and may nest so many levels deep: what comes later recurses over it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moonbase.serve.errors import RequestError

MOST_LEVELS = 64
"""Nested arrays and objects. JSON schemas in use stay below 20."""

DISCARDED_BYTES = 64 << 20
"""A body that is too large is still read so far, for clients that listen only when they have sent everything."""

HANG_UP = {"connection": "close"}
"""After a body that was not read to its end nothing can follow on the connection."""

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Any, most_bytes: int, seconds: float) -> bytes:
    """The whole body. Raises RequestError 413 above `most_bytes`, 408 if it does not arrive within `seconds`."""
    from starlette.requests import ClientDisconnect

    if request.headers.get("content-encoding", "identity") not in ("identity", ""):
        raise RequestError(415, "the body is compressed; send it without content-encoding", code="unsupported_encoding")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= most_bytes:
                    parts.append(part)
                elif size > DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {seconds:g} s", code="body_timeout",
                           headers=HANG_UP) from None
    except ClientDisconnect:
        raise RequestError(400, "the connection ended within the body", code="incomplete_body") from None
    except asyncio.CancelledError:
        # Only the end of the server cancels a request: an answer, not a traceback.
        raise RequestError(503, "the server is shutting down", code="shutting_down", headers=HANG_UP) from None
    if size > most_bytes:
        raise RequestError(413, f"the body is larger than {most_bytes:,} bytes", code="request_too_large",
                           headers=HANG_UP)
    return b"".join(parts)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises RequestError 400."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_utf8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer)
    except RecursionError:
        raise RequestError(400, f"the body nests deeper than {MOST_LEVELS} levels", code="too_deep") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return _clean(value, mend=_HALF_PAIR.search(body) is not None)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"an integer of {len(text)} digits is too large for a number")
    return int(text)


def _clean(value: Any, level: int = 0, mend: bool = False) -> Any:
    """`value` after a look at its depth; with `mend`, halves of surrogate pairs become U+FFFD.

    JavaScript clients that cut a text between the halves of an emoji do send them.
    """
    if isinstance(value, str):
        return _LONE_SURROGATE.sub("\ufffd", value) if mend else value
    if not isinstance(value, dict | list):
        return value
    if level >= MOST_LEVELS:
        raise RequestError(400, f"the body nests deeper than {MOST_LEVELS} levels", code="too_deep")
    if isinstance(value, list):
        return [_clean(item, level + 1, mend) for item in value]
    return {_clean(key, 0, mend): _clean(item, level + 1, mend) for key, item in value.items()}


def validate(model: type[Model], value: dict[str, Any]) -> Model:
    """`value` as a pydantic model; RequestError 400 names the first field that is wrong."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _from_validation(error) from None


def _from_validation(error: ValidationError) -> RequestError:
    details = error.errors(include_url=False, include_context=False)
    # Of a union's complaints the one that got furthest into the value is about what the client meant.
    detail = max(details, key=lambda detail: len(detail["loc"]))
    place = field_path(detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if not place and detail["type"] == "value_error":
        # What does not fit together is said of the whole request, and begins with the field that should change.
        named = re.match(r"[a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)*", message)
        return RequestError(400, message, named[0] if named else None, "invalid_value")
    if detail["type"] == "missing":
        message = "this field is required"
    elif isinstance(detail["input"], bool | int | float) or detail["input"] is None:
        message = f"{message} (got {json.dumps(detail['input'])[:80]})"
    return RequestError(400, f"{place}: {message}" if place else message, place or None, "invalid_value")


def field_path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`; names of union members and validators are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif re.fullmatch(r"[a-z_][a-z0-9_]*", step) and step not in ("str", "int", "float", "bool"):
            path += f".{step}" if path else step
    return path
