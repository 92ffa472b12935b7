"""HTTP: the OpenAI and the Anthropic surface of one model, its metrics and its web page.

`create_app(service, tokenizer, ...)` is the application, `serve(...)` runs it until it is told to stop. A request goes
through `gate` (who may come in), a surface (`openai`, `anthropic`: what the client wants), `backend` (dialogue to
tokens, constraint and budget), `generation` (the engine's pieces), `turn` (pieces to a reply) and `streaming` (the
reply to the client).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.serve.app import create_app as create_app
    from moonbase.serve.run import serve as serve
    from moonbase.serve.settings import Settings as Settings

_HOMES = {"create_app": "app", "serve": "run", "Settings": "settings"}

__all__ = ["Settings", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    # On first use: the command line reads `Settings` without loading what a server needs.
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"moonbase.serve.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
