"""Supervised fine-tuning: where the chat room's rendering meets the data room's dialogues."""

from __future__ import annotations

from typing import Any

from moonbase import chat
from moonbase.data import Tokenizer
from moonbase.data.dialogues import Renderer
from moonbase.recipe import Recipe, style_of


def chat_style(recipe: Recipe, tokenizer: Tokenizer) -> str:
    """The style to train in: the recipe's, else the one that `init` was trained in, else what such a model speaks."""
    known = recipe.style or (style_of(recipe.init) if recipe.init is not None else None)
    return known or chat.default_style(tokenizer.special_tokens, recipe.model)


def renderer(tokenizer: Tokenizer, style: str) -> Renderer:
    """Dialogues to ids, and for each id whether an assistant wrote it."""

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[int], list[bool]]:
        parts = chat.render_parts(messages, tools, style, add_generation_prompt=False)
        return chat.encode_with_mask(tokenizer, parts)

    return render
