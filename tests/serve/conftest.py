"""A small tokenizer with the Kimi markers, and servers that say what a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from moonbase.data import train_tokenizer

    text = "The moon base answers the question about the weather in Paris and Berlin, with a tool or without. " * 20
    return train_tokenizer([text, '{"city": "Paris", "unit": "celsius"} ' * 20], 400)


@pytest.fixture(scope="module")
def scripted(tokenizer: Any) -> Iterator[Any]:
    """One server per file of tests; `running.service.script` is set by each test."""
    from tests.serve.service_double import ScriptedService, serving

    with serving(ScriptedService(), tokenizer, style="kimi-k2.5") as running:
        yield running


@pytest.fixture
def server(scripted: Any, tokenizer: Any) -> Any:
    """That server with a clean service, which says hello."""
    from tests.serve.service_double import says

    scripted.service.__init__(says(tokenizer, "</think>Hello, moon!"))
    scripted.log.clear()
    return scripted


# Clients read the machine's certificates when they are made, which takes longer than most tests: one each per file.


@pytest.fixture(scope="module")
def gpt(scripted: Any) -> Iterator[Any]:
    """OpenAI's client, unmodified."""
    import openai

    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(scripted: Any) -> Iterator[Any]:
    """Anthropic's client, unmodified."""
    import anthropic

    with anthropic.Anthropic(base_url=scripted.url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(scripted: Any) -> Iterator[Any]:
    """For what no such client sends."""
    import httpx

    with httpx.Client(base_url=scripted.url, timeout=30) as client:
        yield client
