"""Engines of this process, one for each model: however many tasks ask it, its weights are loaded once and its calls
are batched together."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import CheckpointError

if TYPE_CHECKING:
    from moonbase.data import Tokenizer
    from moonbase.engine import Engine, Service

TOKENIZERS = ("tokenizer.json", "tiktoken.model")
QUEUE_LIMIT = 1 << 20
"""Calls wait as long as they must: to be turned away is for clients from outside."""


@dataclass(frozen=True)
class OpenEngine:
    """A model that is loaded, and its engine on a thread of its own."""

    engine: Engine
    service: Service
    tokenizer: Tokenizer
    style: str
    """The chat style that its folder speaks."""
    digest: str
    """Of its weights (`weights`)."""
    precision: str
    """What it computes in: float32, bfloat16."""

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and reply may have together."""
        return min(self.engine.model.config.max_position_embeddings, self.engine.capacity)


_open: dict[Any, OpenEngine] = {}
_lock = threading.Lock()


def check_source(source: str) -> None:
    """Raises UserError where there is no such model, or a part of it is missing, without loading it."""
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.checkpoint.folders import damage
    from moonbase.presets import preset_config

    if source.startswith("preset:"):
        preset_config(source.removeprefix("preset:"))
        return
    folder = resolve_model_folder(source)
    if reason := damage(folder):
        raise CheckpointError(f"{folder}: no whole model ({reason}); copy what is missing there, or name a folder that "
                              "has config.json, weights and tokenizer")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{folder}: no tokenizer here; copy {' or '.join(TOKENIZERS)} there")


def engine_of(source: str) -> OpenEngine:
    """The engine of a run folder, of a checkpoint folder, or of `preset:NAME` (random weights).

    The first call loads it and may take minutes; a folder whose weights have changed since is loaded anew. For any
    thread. Raises UserError.
    """
    with _lock:
        key = _key(source)
        if key not in _open:
            _open[key] = _load(source)
        return _open[key]


async def close_engines() -> None:
    """End all engines and give their memory back. Whoever asks one afterwards loads it again."""
    with _lock:
        closing = list(_open.values())
        _open.clear()
    await asyncio.gather(*(opened.service.stop() for opened in closing))


def _key(source: str) -> Any:
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.evals.providers.weights import state_of, weight_files

    return source if source.startswith("preset:") else state_of(weight_files(resolve_model_folder(source)))


def _load(source: str) -> OpenEngine:
    from moonbase.agents.models.engine import open_engine
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.engine import Service
    from moonbase.evals.providers.weights import digest_of_folder, digest_of_model
    from moonbase.model.quantized_experts import QuantizedExperts

    chat = open_engine(source)
    engine = chat.engine
    preset = source.startswith("preset:")
    digest = digest_of_model(engine.model) if preset else digest_of_folder(resolve_model_folder(Path(source)))
    service = Service(engine, queue_limit=QUEUE_LIMIT)
    service.start()
    precision = str(next(engine.model.parameters()).dtype).removeprefix("torch.")
    if any(isinstance(module, QuantizedExperts) for module in engine.model.modules()):
        precision += ", experts int4"
    return OpenEngine(engine, service, chat.tokenizer, chat.style, digest, precision)
