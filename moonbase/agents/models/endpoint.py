"""An HTTP endpoint of a chat model: requests, streams of events, and what its errors mean.

Answers are streamed although agents want them whole. A reply of 30,000 tokens takes longer than any sensible limit on
a whole request, and gateways cut connections on which nothing moves; in a stream, silence is what times out, however
long the reply. Endpoints that answer in one piece all the same are understood.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from moonbase.agents.models.base import (
    CallOptions,
    Completion,
    Message,
    ModelError,
    Price,
    Usage,
    estimate_message,
    estimate_tokens,
)
from moonbase.errors import UserError

CONNECT_SECONDS = 20.0
MOST_BYTES = 64 << 20
"""Of one answer; no reply is so long, and memory is shared by all agents."""
MOST_SCALE = 8.0
"""Tokens there are at most for one of the rule of thumb: bytes and markup, no more."""
SAMPLING = ("temperature", "top_p", "seed")
"""Fields of a request without which a reply is sampled otherwise than was asked."""
_MESSAGE_CHARACTERS = 2000

_CONTEXT = re.compile(
    r"context.?(length|window|limit|size)|maximum context|model'?s context|reduce the length"
    r"|(prompt|input|request)\b.{0,40}\btoo (long|large)|too many (input )?tokens"
    r"|exceed(s|ed)?\b.{0,60}\b(context|token limit|maximum (number|length)|max_model_len)", re.IGNORECASE | re.DOTALL)
_FILTER = re.compile(r"content.?(filter|policy|management)|safety|moderation", re.IGNORECASE)
_UNWANTED = re.compile(r"support|unrecogni[sz]ed|unknown|unexpected|not allowed|not permitted|extra|only|cannot|invalid"
                       r"|deprecated|instead", re.IGNORECASE)

# What error bodies call themselves, OpenAI's `type` and `code` and Anthropic's `type`.
_KINDS = {
    "rate_limit_error": "rate_limit", "rate_limit_exceeded": "rate_limit", "queue_full": "rate_limit",
    "overloaded_error": "overloaded", "engine_overloaded_error": "overloaded", "shutting_down": "overloaded",
    "timeout_error": "timeout", "deadline": "timeout", "api_error": "server", "server_error": "server",
    "internal_error": "server", "context_length_exceeded": "context_length", "request_too_large": "context_length",
    "string_above_max_length": "context_length", "exceed_context_size_error": "context_length",
    "authentication_error": "auth", "permission_error": "auth", "billing_error": "auth", "insufficient_quota": "auth",
    "exceeded_current_quota_error": "auth", "invalid_api_key": "auth", "content_filter": "refused",
    "content_policy_violation": "refused", "not_found_error": "bad_request",
}  # fmt: skip
_STATUS_KINDS = {
    401: "auth", 402: "auth", 403: "auth", 408: "timeout", 409: "server", 413: "context_length", 425: "server",
    429: "rate_limit", 503: "overloaded", 504: "timeout", 524: "timeout", 529: "overloaded",
}  # fmt: skip


class Endpoint:
    """Requests to one address."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """Raises UserError for an address or a key that cannot be one, or where httpx is absent."""
        try:
            import httpx
        except ImportError:
            raise UserError("talking to a URL needs httpx; install it with pip install 'moonbase[agents]'") from None
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UserError(f"{url}: no valid address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UserError(f"{url}: no valid address; give http://HOST:PORT/v1 or https://…")
        for name, value in headers.items():
            if not value.isascii() or not value.isprintable() or value != value.strip():
                raise UserError(f"{url}: the API key in {name} holds signs that no key has; copy it again")
        self.url, self.headers = url, dict(headers)
        self.refused: set[str] = set()
        """Fields that the endpoint does not take."""
        self.scale = 1.0
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(
        self, path: str, body: Mapping[str, Any], silence: float, take: Callable[[dict[str, Any]], None]
    ) -> None:
        """Post `body` and give each event of the answer to `take`; an answer in one piece is one event.

        `silence`: seconds without an event after which it is over. Raises ModelError, and what `take` raises of it.
        """
        import httpx

        try:
            # Written in ASCII: half a surrogate pair has no UTF-8 form but has an escape.
            content = json.dumps(body).encode()
            async with asyncio.timeout(silence) as limit:
                stream = self._ready().stream("POST", self.url + path, content=content,
                                              headers={"content-type": "application/json"})
                async with stream as response:
                    if response.status_code != 200:
                        raise self._refusal(response, await _read(response.aiter_bytes(), 1 << 20))
                    if "event-stream" not in response.headers.get("content-type", ""):
                        take(self._object(await _read(response.aiter_bytes(), MOST_BYTES)))
                        return
                    await self._follow(response.aiter_bytes(), limit, silence, take)
        except TimeoutError:
            raise ModelError("timeout", f"{self.url}: nothing came for {silence:g} s") from None
        except httpx.TimeoutException as error:
            raise ModelError("connection", f"{self.url}: {_words(error)}") from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
            raise ModelError("bad_request", f"{self.url}: {_words(error)}") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ModelError("connection", f"{self.url} cannot be reached: {_words(error)}") from None

    async def close(self) -> None:
        """Give back the connections. Another request opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()

    # --- what it takes, and how long prompts are ----------------------------------------------------------------------

    def adapt(self, error: ModelError, optional: Iterable[str]) -> bool:
        """Whether `error` says that the endpoint does not take one of the `optional` fields that were sent; it is then
        among `refused`, and the request without it is worth trying."""
        if error.kind != "bad_request" or not _UNWANTED.search(str(error)):
            return False
        named = next((name for name in optional if re.search(rf"\b{name}\b", str(error))), None)
        if named is None or named in self.refused:
            return False
        self.refused.add(named)
        return True

    def estimate(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """Tokens of a prompt by the rule of thumb, times what it has been too low by so far."""
        return math.ceil(self.scale * estimate_tokens(messages, tools))

    def account(self, completion: Completion, messages: list[Message], tools: list[dict[str, Any]]) -> None:
        """Learn from what a prompt really had, so that later estimates are not lower than what was seen; where the
        endpoint does not say, estimate it."""
        if completion.usage.input_tokens:
            rule = estimate_tokens(messages, tools) or 1
            self.scale = min(MOST_SCALE, max(self.scale, completion.usage.input_tokens / rule))
        else:
            reply = math.ceil(self.scale * estimate_message(completion.message))
            completion.usage = Usage(self.estimate(messages, tools), completion.usage.output_tokens or reply)
            completion.notes.append("the endpoint does not say how many tokens there were; they are estimated")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _ready(self) -> Any:
        """The client of the running loop: connections of a loop that has ended are of no use."""
        import httpx

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            # How many calls run at once is the pool's affair.
            self._client = httpx.AsyncClient(
                headers=self.headers, timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))
            self._loop = loop
        return self._client

    async def _follow(
        self, chunks: AsyncIterator[bytes], limit: asyncio.Timeout, silence: float,
        take: Callable[[dict[str, Any]], None],
    ) -> None:
        """Server-sent events to their end. Signs of life without an event (comments, pings) do not count as one."""
        loop = asyncio.get_running_loop()
        begun: list[bytes] = []
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > MOST_BYTES:
                raise ModelError("server", f"{self.url}: the answer is longer than {MOST_BYTES:,} bytes")
            # Only CR and LF end a line; what Unicode takes for line ends besides may stand in an event's text.
            *lines, last = chunk.split(b"\n")
            for line in lines:
                begun.append(line)
                if self._event(b"".join(begun), take):
                    limit.reschedule(loop.time() + silence)
                begun.clear()
            begun.append(last)
        self._event(b"".join(begun), take)

    def _event(self, line: bytes, take: Callable[[dict[str, Any]], None]) -> bool:
        """Read a line of a stream; whether it said something."""
        if not line.startswith(b"data:"):
            return False
        data = line[5:].strip()
        if not data:
            return False
        value = {"done": True} if data == b"[DONE]" else self._object(data)
        if value.get("type") == "ping":
            return False
        take(value)
        return True

    def _object(self, content: bytes) -> dict[str, Any]:
        """The JSON object of an answer. Raises ModelError, also where it holds an error."""
        try:
            value = json.loads(content.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            raise ModelError("server", f"{self.url}: the answer is no JSON: {_shown(content)}") from None
        if not isinstance(value, dict):
            raise ModelError("server", f"{self.url}: the answer is no JSON object: {_shown(content)}")
        if value.get("error"):
            raise error_of(self.url, None, value, None)
        return value

    def _refusal(self, response: Any, content: bytes) -> ModelError:
        try:
            value = json.loads(content.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            value = content.decode("utf-8", "replace")
        return error_of(self.url, response.status_code, value, retry_after(response.headers))


class Answer(Protocol):
    """The events of an answer as they come."""

    def take(self, event: dict[str, Any]) -> None:
        """The next event."""
        ...


class EndpointModel:
    """A model behind an endpoint, whatever API it speaks: what is an API's own, the last four methods say."""

    path: str
    """Of the requests, below the endpoint's address."""

    def __init__(self, name: str, endpoint: Endpoint, price: Price, context_tokens: int | None) -> None:
        self.name, self.endpoint, self.price, self.context_tokens = name, endpoint, price, context_tokens

    async def complete(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> Completion:
        """One reply. Raises ModelError."""
        while True:
            body, answer = self._body(messages, tools, options), self._answer()
            try:
                await self.endpoint.ask(self.path, body, options.timeout, answer.take)
                break
            except ModelError as error:
                if not self.endpoint.adapt(error, self._optional(error, body)):
                    raise
        completion = self._read(answer)
        completion.notes += [f"the endpoint does not take {name}" for name in SAMPLING if name in self.endpoint.refused]
        self.endpoint.account(completion, messages, tools)
        return completion

    def count_tokens(self, messages: list[Message], tools: list[dict[str, Any]]) -> int:
        """An estimate: four bytes a token, or fewer where earlier prompts turned out to have more tokens."""
        return self.endpoint.estimate(messages, tools)

    async def close(self) -> None:
        """Give back connections."""
        await self.endpoint.close()

    def _body(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> dict[str, Any]:
        """The request, without the fields that were refused."""
        raise NotImplementedError

    def _answer(self) -> Answer:
        """To take the events of one answer."""
        raise NotImplementedError

    def _optional(self, error: ModelError, body: Mapping[str, Any]) -> list[str]:
        """Which fields of `body` may go."""
        raise NotImplementedError

    def _read(self, answer: Any) -> Completion:
        """The reply, when all events were taken. Raises ModelError."""
        raise NotImplementedError


def error_of(url: str, status: int | None, body: Any, seconds: float | None) -> ModelError:
    """What an error's status and body mean. `status` None: it came within an answer."""
    error = body.get("error", body) if isinstance(body, dict) else body
    fields = error if isinstance(error, dict) else {}
    if status is None and isinstance(fields.get("code"), int):
        # Gateways tell in the body what the status of the model behind them was.
        status = fields["code"]
    message = fields.get("message") or (error if isinstance(error, str) else "") or fields.get("detail") or ""
    message = (message if isinstance(message, str) else json.dumps(message))[:_MESSAGE_CHARACTERS]
    named = [_KINDS[name] for name in (fields.get("code"), fields.get("type"))
             if isinstance(name, str) and name in _KINDS]
    shown = " ".join(filter(None, [f"{url}:", f"status {status}:" if status else "", message or "no reason given"]))
    return ModelError(_kind(status, named, message), shown, status, seconds)


def _kind(status: int | None, named: list[str], message: str) -> str:
    if status in (401, 402, 403):
        return "auth"
    if status == 429:
        # An empty account stays empty, and one request above the limit of a whole minute never gets in.
        if "auth" in named:
            return "auth"
        return "context_length" if re.search(r"request too large", message, re.IGNORECASE) else "rate_limit"
    if "context_length" in named or status == 413:
        return "context_length"
    if status is not None and 400 <= status < 500 and status not in _STATUS_KINDS:
        if _CONTEXT.search(message):
            return "context_length"
        return "refused" if "refused" in named or _FILTER.search(message) else "bad_request"
    if named and named[0] != "server":
        return named[0]
    if status in _STATUS_KINDS:
        return _STATUS_KINDS[status]
    return "server" if status is None or status >= 500 else "bad_request"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the other side asks to wait; None where it does not say, or nothing that makes sense."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        moment = parsedate_to_datetime(headers["retry-after"])
        # By the clock that wrote it, where it tells; ours may be wrong.
        now = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
        return max(0.0, (moment - now).total_seconds())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


async def _read(chunks: AsyncIterator[bytes], most: int) -> bytes:
    parts, size = [], 0
    async for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > most:
            raise ModelError("server", f"an answer of more than {most:,} bytes")
    return b"".join(parts)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shown(content: bytes) -> str:
    return repr(content[:80].decode("utf-8", "replace"))


# --- reading what may be anything -------------------------------------------------------------------------------------


def as_dict(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_count(value: Any) -> int:
    """A number of tokens; 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def as_text(value: Any) -> str:
    """Text of a field: a string, the texts of parts joined, or JSON of whatever else; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [part if isinstance(part, str) else as_dict(part).get("text") for part in value]
        if all(text is None or isinstance(text, str) for text in texts):
            return "".join(filter(None, texts))
    return json.dumps(value, ensure_ascii=False)


def as_arguments(value: Any) -> str:
    """Arguments of a call as JSON text; none at all are an empty object."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value is not None else ""
    return text if text.strip() else "{}"


def is_object(text: str) -> bool:
    """Whether `text` is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
