"""A model of random weights that knows the chat markers: what it says is well formed because it cannot be otherwise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tests.model.tiny import tiny_model

CONTEXT = 4096
USER = [{"role": "user", "content": "How warm is it in Paris, and in Berlin?"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12},
                                            "unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
           "required": ["city", "unit"]}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
         {"type": "function", "function": {"name": "calculate", "description": "A sum.", "parameters": {
             "type": "object", "properties": {"sum": {"enum": ["1+1", "2*3"]}}, "required": ["sum"]}}}]  # fmt: skip


@cache
def tokenizer() -> Any:
    """Four hundred tokens."""
    from moonbase.data import train_tokenizer

    text = "The moon base answers the question about the weather in Paris and Berlin, with a tool or without. " * 20
    return train_tokenizer([text, '{"city": "Paris", "unit": "celsius"} ' * 20], 400)


def model() -> Any:
    """Its weights are the same every time."""
    return tiny_model(vocab_size=tokenizer().vocab_size, eos_token_id=list(tokenizer().eos_ids),
                      max_position_embeddings=CONTEXT).eval()


def save(folder: Path) -> Path:
    """As a checkpoint folder."""
    from moonbase.checkpoint import save_weights

    saved = model()
    save_weights(saved, folder, saved.config)
    tokenizer().save(folder)
    return folder
