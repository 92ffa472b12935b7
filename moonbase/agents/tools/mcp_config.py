"""The usual `mcpServers` JSON: which MCP servers there are and how each is reached.

    {"mcpServers": {"files": {"command": "npx", "args": ["-y", "server-files", "docs"], "env": {"KEY": "${KEY}"}},
                    "tickets": {"url": "https://example.com/mcp", "headers": {"Authorization": "Bearer ${TOKEN}"}}}}

`${NAME}` is the environment variable NAME, `${NAME:-other}` is `other` where NAME is not set. What such a file may hide
(values of variables, of `env`, of headers, of an address's query) is kept out of every message.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.errors import UserError

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")
_STREAMABLE_HTTP = ("http", "streamablehttp")
SHORTEST_SECRET = 6
"""Characters. A shorter value is a flag or a number, and hiding it would make messages unreadable."""
Config = Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class ServerConfig:
    """One server, a program or an address."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] | None = None
    secrets: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """What is started or called, for messages."""
        if self.url is None:
            return f"command {self.command}"
        parts = urllib.parse.urlsplit(self.url)
        # Keys stand in paths too.
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def hide(self, text: str) -> str:
        """The text without the secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def read_config(config: Config) -> list[ServerConfig]:
    """The servers of a configuration: what JSON says, or the path of a JSON file; those with `disabled` are left out.

    Raises UserError that names the file, the server and the field.
    """
    place = "mcpServers"
    if not isinstance(config, Mapping):
        place = str(config)
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"MCP servers: {place}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"MCP servers: {place} is no JSON ({error})") from None
    if not isinstance(config, Mapping) or not isinstance(config.get("mcpServers"), Mapping):
        raise UserError(f'MCP servers: {place}: expected {{"mcpServers": {{NAME: {{"command": …}} or {{"url": …}}}}}}')
    return [_Reader(place, name).read(entry) for name, entry in config["mcpServers"].items()
            if not (isinstance(entry, Mapping) and entry.get("disabled") is True)]


class _Reader:
    """Reads one server's entry and remembers what is to be hidden."""

    def __init__(self, place: str, name: str) -> None:
        self.where = f"MCP server {name!r} ({place})"
        self.name, self.secrets = name, set[str]()

    def read(self, entry: Any) -> ServerConfig:
        """Raises UserError."""
        if not isinstance(entry, Mapping):
            raise UserError(f"{self.where}: expected an object with command or url")
        command, url = self._text(entry, "command"), self._text(entry, "url", secret=True)
        kind = str(entry.get("type", entry.get("transport", ""))).lower().replace("-", "").replace("_", "")
        if (command is None) == (url is None):
            raise UserError(f"{self.where}: give it either a command or a url")
        if kind not in ("", "stdio") if command is not None else kind not in ("", *_STREAMABLE_HTTP):
            raise UserError(f"{self.where}: the transport {kind!r} is not supported: a command speaks stdio, a url "
                            "streamable HTTP (type http)")
        if url is not None:
            self._check_url(url)
        args = entry.get("args", ())
        if not isinstance(args, (list, tuple)) or not all(isinstance(one, str) for one in args):
            raise UserError(f"{self.where}: args must be a list of texts")
        headers = self._texts(entry, "headers")
        if not all(text.isascii() and text.isprintable() for pair in headers.items() for text in pair):
            raise UserError(f"{self.where}: headers: a header takes ASCII alone, without ends of lines")
        cwd = self._text(entry, "cwd")
        if cwd is not None and not os.path.isdir(cwd):
            raise UserError(f"{self.where}: cwd: the folder {cwd} does not exist")
        return ServerConfig(
            self.name, command, tuple(self._expand(one, "args", secret=True) for one in args),
            self._texts(entry, "env"), cwd, url, headers,
            # The longest first, lest a part of one hides in the whole.
            tuple(sorted(self.secrets, key=lambda secret: (-len(secret), secret))))

    def _text(self, entry: Mapping[str, Any], field: str, secret: bool = False) -> str | None:
        value = entry.get(field)
        if value is None:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise UserError(f"{self.where}: {field} must be a text")
        return self._expand(value, field, secret)

    def _texts(self, entry: Mapping[str, Any], field: str) -> dict[str, str]:
        values = entry.get(field) or {}
        if not isinstance(values, Mapping) or not all(
                isinstance(key, str) and isinstance(value, str) and "\0" not in key + value
                for key, value in values.items()):
            raise UserError(f"{self.where}: {field} must be an object of texts")
        expanded = {key: self._expand(value, field, secret=True) for key, value in values.items()}
        for value in expanded.values():
            self._hide(value)
        return expanded

    def _expand(self, text: str, field: str, secret: bool) -> str:
        def value_of(found: re.Match[str]) -> str:
            value = os.environ.get(found[1], found[2])
            if value is None:
                raise UserError(f"{self.where}: {field}: the environment variable {found[1]} is not set")
            if secret:
                self._hide(value)
            return value

        return _VARIABLE.sub(value_of, text)

    def _check_url(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"{self.where}: url must be an address such as http://127.0.0.1:8000/mcp")
        for value in (parts.password, parts.query, *(value for _, value in urllib.parse.parse_qsl(parts.query))):
            self._hide(value or "")

    def _hide(self, value: str) -> None:
        # "Bearer KEY" is known to a server as KEY. A folder is no secret, and messages need it.
        self.secrets.update(part for part in (value, *value.split())
                            if len(part) >= SHORTEST_SECRET and not os.path.exists(part))
