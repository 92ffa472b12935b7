"""What every request passes before a route sees it: its number, its line in the access log, and who may come in.

Plain ASGI, two layers. `Recorder` is the outermost: it numbers requests, catches what nobody foresaw, counts and logs.
`Gate` stands before the routes: the Host header, the page that a browser comes from, the API key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moonbase.serve.errors import RequestError, error_body, log_failure
from moonbase.serve.settings import LOCAL_HOSTS, Settings

MOST_NOTES = 2000
"""Characters of the header with notes."""

_GIVEN_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_OPEN_ROUTES = ("/health",)
_GUARDED = ("/v1", "/anthropic", "/metrics")


@dataclass
class Record:
    """What is known of one request; the access log and the metrics are made of it. Never text of a prompt."""

    id: str
    method: str
    path: str
    surface: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    route: str = "other"
    stream: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None
    finish: str | None = None
    """Finish reasons of the choices, or why there is none: error code, `disconnected`."""
    notes: Sequence[str] = ()
    """What the client is told in the header `x-moonbase-notes`; the log has their number."""

    def line(self) -> str:
        """One JSON object; fields without a value are left out."""
        facts = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": self.id, "method": self.method,
            "route": self.route, "status": self.status, "seconds": round(time.monotonic() - self.started, 4),
            "stream": self.stream or None, "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens, "finish": self.finish,
            "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 4),
            "notes": len(self.notes) or None,
        }  # fmt: skip
        return json.dumps({name: value for name, value in facts.items() if value is not None})


def notes_header(notes: Sequence[str]) -> bytes:
    """Notes as the value of a header: printable ASCII, so long at most."""
    text = "; ".join(notes).encode("ascii", "backslashreplace").decode()
    text = "".join(sign if " " <= sign <= "~" else " " for sign in text)
    return (text if len(text) <= MOST_NOTES else text[: MOST_NOTES - 3] + "...").encode()


def surface_of(path: str, headers: Any) -> str:
    """Whose error shape and model list a request expects."""
    if path.startswith(("/v1/messages", "/anthropic")) or b"anthropic-version" in headers:
        return "anthropic"
    return "openai"


def error_response(error: RequestError, record: Record) -> Any:
    """The answer to a request that failed, in its surface's shape."""
    from starlette.responses import JSONResponse

    record.finish = record.finish or error.code
    return JSONResponse(error_body(error, record.surface, record.id), error.status, dict(error.headers))


class Recorder:
    """Gives each request a Record (`scope["moonbase.record"]`), answers what nobody caught, logs when it is over."""

    def __init__(self, app: Any, finished: Callable[[Record], None]) -> None:
        self.app, self.finished = app, finished

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        number = given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        record = Record(number, scope["method"], scope["path"], surface_of(scope["path"], headers))
        scope["moonbase.record"] = record
        begun = False

        async def send_numbered(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, record.status = True, message["status"]
                # OpenAI's clients read one, Anthropic's the other.
                numbers = [(b"x-request-id", record.id.encode()), (b"request-id", record.id.encode())]
                if record.notes:
                    numbers.append((b"x-moonbase-notes", notes_header(record.notes)))
                message = {**message, "headers": [*message["headers"], *numbers,
                                                  (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            await self.app(scope, receive, send_numbered)
        except Exception as error:
            log_failure(record.id, error)
            if not begun:
                error = RequestError(500, f"an error on the server's side; its log has it under {record.id}",
                                     code="internal_error")
                await error_response(error, record)(scope, receive, send_numbered)
        finally:
            self.finished(record)


class Gate:
    """Turns away requests with a wrong Host, from a foreign web page, or without the key."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings
        # Digests, so that the comparison takes as long for every key.
        self.keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.hosts = {*LOCAL_HOSTS, settings.host, *settings.allowed_hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            record = scope["moonbase.record"]
            try:
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
                self._check_host(headers)
                self._check_origin(headers, scope["method"])
                self._check_key(headers, scope["path"])
            except RequestError as error:
                await error_response(error, record)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A page elsewhere may let its own name point to 127.0.0.1 and talk to us as if to itself: refuse its name."""
        host = host_name(headers.get("host", ""))
        if self.settings.is_local and host not in self.hosts:
            raise RequestError(403, f"this server listens on {self.settings.host} and does not answer to the host "
                               f"{host[:80]!r}; start it with --allowed-host to allow it", code="host_not_allowed")

    def _check_origin(self, headers: dict[str, str], method: str) -> None:
        """A browser sends simple requests of any page anywhere; CORS only keeps the page from reading the answer."""
        origin = headers.get("origin")
        if origin is None or method in ("GET", "HEAD", "OPTIONS"):
            return
        allowed = self.settings.cors_origins
        same = origin.partition("://")[2] == headers.get("host")
        if not same and origin not in allowed and "*" not in allowed:
            raise RequestError(403, f"pages of {origin[:80]!r} may not call this server; start it with --cors-origin "
                               "to allow them", code="origin_not_allowed")

    def _check_key(self, headers: dict[str, str], path: str) -> None:
        if not self.keys or path in _OPEN_ROUTES or not path.startswith(_GUARDED):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        if not any(given):
            raise RequestError(401, "an API key is needed: send Authorization: Bearer KEY or x-api-key: KEY",
                               code="missing_api_key", headers={"www-authenticate": "Bearer"})
        digests = [hashlib.sha256(key.encode("utf-8", "replace")).digest() for key in given if key]
        # No short cut at the first that fits: every pair is compared.
        matches = [hmac.compare_digest(digest, key) for digest in digests for key in self.keys]
        if not any(matches):
            raise RequestError(401, "the API key is wrong", code="invalid_api_key",
                               headers={"www-authenticate": "Bearer"})


def host_name(host: str) -> str:
    """The name in a Host header, without its port and without the brackets of an IPv6 address, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
