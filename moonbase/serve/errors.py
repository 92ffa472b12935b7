"""What a client is told when a request cannot be served: one exception, and the two shapes that it takes on the wire.

OpenAI's clients read `{"error": {"message", "type", "param", "code"}}`, Anthropic's
`{"type": "error", "error": {"type", "message"}}`. Both build their exception classes from the status.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moonbase.errors import UserError

logger = logging.getLogger("moonbase.serve")

ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip

_FIELD = re.compile(r"([A-Za-z_]\w*(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*)(?=[:=\s])")


@dataclass(eq=False)
class RequestError(Exception):
    """A request that is answered with an error. `param` names the field that is wrong, `code` is for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def from_user_error(error: UserError, rename: Callable[[str], str] = lambda path: path) -> RequestError:
    """A mistake that a lower room found in what the client sent; its message names the field first.

    `rename`: from the path that the room knows to the client's own.
    """
    message = str(error)
    named = _FIELD.match(message)
    path = named[1] if named is not None and set(named[1]) & set(".[") else None
    # A schema error says its path, which may hold any signs.
    path = getattr(error, "path", path)
    if path is None:
        return RequestError(400, message, None, "invalid_value")
    renamed = rename(path)
    return RequestError(400, renamed + message.removeprefix(path), renamed, "invalid_value")


def log_failure(request_id: str, error: BaseException) -> None:
    """Log what nobody foresaw by its type and place: its message may hold text of a prompt or a reply.

    Where MOONBASE_DEBUG is set the message is logged too.
    """
    if os.environ.get("MOONBASE_DEBUG", "0") not in ("", "0"):
        logger.error("request %s failed", request_id, exc_info=error)
        return
    lines: list[str] = []
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        frames = reversed(traceback.extract_tb(link.__traceback__))
        lines += [type(link).__name__, *(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)]
        link = link.__cause__ or link.__context__
    logger.error("request %s failed (MOONBASE_DEBUG=1 shows the message)\n%s", request_id, "\n".join(lines))


def error_body(error: RequestError, surface: str, request_id: str) -> dict[str, Any]:
    """The JSON body of an error; `surface`: "openai" or "anthropic"."""
    if surface == "anthropic":
        usual = "invalid_request_error" if error.status < 500 else "api_error"
        kind = ANTHROPIC_TYPES.get(error.status, usual)
        message = error.message
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    kinds = {408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
    kind = kinds.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
