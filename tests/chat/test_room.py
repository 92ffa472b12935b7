"""The room as its users see it."""

from __future__ import annotations

import subprocess
import sys

import moonbase
from moonbase import chat


def test_the_room_is_light() -> None:
    """Rendering and parsing need neither torch nor a tokenizer nor the server's packages."""
    code = "import sys, moonbase.chat; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "numpy", "pydantic", "tiktoken", "tokenizers", "transformers", "jinja2", "llguidance",
             "jsonschema", "fastapi"}
    assert not heavy & set(loaded.split())


def test_names() -> None:
    assert moonbase.chat.render is chat.render and callable(chat.render) and callable(chat.parse)
    assert all(hasattr(chat, name) for name in chat.__all__)
    text = chat.generation_prefix("kimi-k2.5") + "why</think>so"
    assert chat.parse(text, style="kimi-k2.5") == chat.Reply("so", "why", [], [])
