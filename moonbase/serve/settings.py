"""How a server is set up: whom it listens to, whom it answers, and where its patience ends."""

from __future__ import annotations

from dataclasses import dataclass

from moonbase.chat import STYLES
from moonbase.errors import UserError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

ANY_MODEL = "*"


@dataclass(frozen=True)
class Settings:
    """Times in seconds. Raises UserError for values that make no server."""

    model_names: tuple[str, ...] = ("moonbase", ANY_MODEL)
    """What requests may call the model; the first is what it calls itself. With `*` any other name will do as well,
    and the answer comes under the name that was asked for."""
    style: str | None = None
    """Chat style, one of `moonbase.chat.STYLES`; None until the model is known, which has one of its own."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Any of them is needed to call the API; none: everyone may."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names by which a server that listens on this machine alone may be called (behind a proxy, say)."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the API from a browser."""
    request_timeout: float = 600.0
    """From the arrival of a request to the end of its answer."""
    body_timeout: float = 60.0
    most_body_bytes: int = 16 << 20
    grace: float = 30.0
    """After SIGTERM running requests may go on so long."""
    ping_every: float = 10.0
    """A silent stream shows so often that it lives."""
    as_official: bool = False
    """Refuse what the official API of the style refuses (fixed sampling of K2.5, reasoning that was not sent back)."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise UserError("a server needs a model name; give --model-name NAME")
        if self.style not in (None, *STYLES):
            raise UserError(f"style={self.style!r} is unknown; there are {', '.join(STYLES)}")
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port} must be from 0 (any free one) to 65535")
        for name in ("request_timeout", "body_timeout", "ping_every"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be more than 0 seconds")
        if not self.grace >= 0:
            raise UserError(f"grace={self.grace} must be 0 seconds or more")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise UserError("an API key must be ASCII text without spaces around it")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOCAL_HOSTS or self.host.startswith("127.")
