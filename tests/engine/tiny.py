"""The smallest engine: a random model of two layers, a tokenizer of one id per byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moonbase.engine import Engine
from moonbase.model import Transformer
from tests.model.tiny import tiny_model, yarn


class Bytes:
    """One id per byte, so that a character can be cut in two; ids from 256 on are special tokens."""

    special_tokens = {"[EOS]": 256, "<|im_end|>": 257, "<mark>": 258}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id % 256 for id in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        return bytes([id % 256])


PROMPTS = [[5, 9, 11, 3, 60, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31]]


def engine(stop_ids: Sequence[int] = (), options: dict[str, Any] | None = None, **changes: Any) -> Engine:
    """`options` are the engine's, `changes` the configuration's."""
    model = tiny_model(**dict(rope_scaling=yarn(8)) | changes).eval()
    return Engine(model, Bytes(), stop_ids, **(options or {}))


def by_hand(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """No cache, no batch: the whole text through the training form for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
