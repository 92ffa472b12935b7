"""Running the application: one process, uvicorn, and an orderly end.

At SIGTERM or Ctrl-C no new connection is accepted, running answers may finish for `grace` seconds, then each ends with
an error of its own, and the process leaves with 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import UserError
from moonbase.serve.settings import ANY_MODEL, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moonbase.data import Tokenizer
    from moonbase.model import Transformer

LEAST_CACHE_BYTES = 1 << 30
"""Of the cache on a CPU, where memory allows: beginnings of dialogues are worth keeping beyond what runs now."""
LAST_WORDS = 5.0
"""Seconds for answers that were ended to reach their clients."""


def bind(settings: Settings) -> socket.socket:
    """The listening socket; port 0 takes any free one. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named: asyncio sets TCP_NODELAY only on sockets that know theirs, and without it every answer
    # waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {reason}; give another --host or --port "
                        "(--port 0 takes any free one)") from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI, settings: Settings, started: Callable[[], None] | None = None) -> Any:
    """A uvicorn server whose end is orderly: `server.run(sockets=[...])`, `server.should_exit = True`.

    `started` is called once it listens.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            # Not raised again afterwards, as uvicorn would: a server that was asked to end and did has not failed.
            if self.should_exit:
                self.force_exit = True
                app.state.backend.lifetime.close()
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and started is not None:
                started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            timer = asyncio.get_running_loop().call_later(settings.grace, app.state.backend.lifetime.close)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(settings.grace + LAST_WORDS), ws="none",
    )
    return Server(config)


def run(
    model: Transformer, tokenizer: Tokenizer, settings: Settings, published: Mapping[str, Any], *,
    max_running: int = 64, cache_tokens: int | None = None, queue_limit: int = 256, access_log: Path | None = None,
) -> None:
    """Put an engine behind the application and serve until it is told to stop.

    `published`: the content of the model's `config.json`, which tells its chat style. `access_log`: a file to append
    to, None is standard error. `cache_tokens`: None is room for `max_running` whole contexts, on a CPU at least
    LEAST_CACHE_BYTES, and of free memory no more than the engine's share. Raises UserError where the port, the file or
    memory for the cache cannot be had.
    """
    from moonbase.chat import default_style
    from moonbase.engine import Engine
    from moonbase.engine.service import Service
    from moonbase.serve.app import create_app

    style = settings.style or default_style(tokenizer.special_tokens, published)
    settings = replace(settings, style=style)
    on_cpu = next(model.parameters()).device.type == "cpu"
    engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids, max_running=max_running, cache_tokens=cache_tokens,
                    least_cache_bytes=LEAST_CACHE_BYTES if on_cpu else 0)
    # The cache is made here, so that lack of memory is one line and not a server that did not start.
    context_length = min(model.config.max_position_embeddings, engine.capacity)
    service = Service(engine, queue_limit=queue_limit)
    if not settings.is_local and not settings.api_keys:
        print(f"moonbase: warning: {settings.host} lets other machines in and there is no --api-key", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        stream = sys.stderr
        if access_log is not None:
            try:
                stream = stack.enter_context(open(access_log, "a", encoding="utf-8"))
            except OSError as error:
                raise UserError(f"--access-log {access_log}: {error.strerror or error}") from None
        app = create_app(service, tokenizer, vocab_size=model.config.vocab_size, context_length=context_length,
                         settings=settings, access_log=lambda line: print(line, file=stream, flush=True))
        serve(app, settings)


def check_packages() -> None:
    """Raise UserError where an optional package of the server is absent."""
    absent = [name for name in ("fastapi", "uvicorn", "prometheus_client", "llguidance")
              if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"the server needs {', '.join(absent)}; install them with pip install 'moonbase[serve]'")


def serve(app: FastAPI, settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError where the port cannot be had."""
    listener = bind(settings)
    backend, url = app.state.backend, address(listener)

    names = "any model name" if ANY_MODEL in settings.model_names else f"model names {', '.join(backend.names)}"

    def announce() -> None:
        print(f"moonbase: {backend.names[0]} at {url} (chat style {backend.style}, {backend.context_length} tokens of "
              f"context, {names}); Ctrl-C ends it", file=sys.stderr, flush=True)

    with listener:
        make_server(app, settings, announce).run(sockets=[listener])
