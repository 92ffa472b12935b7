"""A small tokenizer with the Kimi markers, servers that say what a test wants, and one that has a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

CONTEXT = 1024
"""Of the random model."""


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

    with httpx.Client(base_url=scripted.url, timeout=120) as client:
        yield client


# --- the real engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A small model of random weights: it says anything that it may."""
    import torch

    from moonbase.config import ModelConfig
    from moonbase.model import Transformer

    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 9, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=CONTEXT,
        eos_token_id=list(tokenizer.eos_ids),
    )
    torch.manual_seed(0)
    return Transformer(config).initialize().eval()


@pytest.fixture(scope="module")
def real(model: Any, tokenizer: Any) -> Iterator[Any]:
    """The whole server with the real engine; at the end nothing runs and no block is held."""
    from moonbase.engine import Engine
    from moonbase.engine.service import Service
    from tests.serve.service_double import serving, until

    engine = Engine(model, tokenizer, stop_ids=tokenizer.eos_ids, cache_tokens=8 * CONTEXT, max_running=8)
    with serving(Service(engine, queue_limit=64), tokenizer, style="kimi-k2.5", context_length=CONTEXT,
                 vocab_size=model.config.vocab_size) as running:
        yield running
        until(lambda: running.service.statistics.running == 0 and running.service.open_requests == 0)
        assert running.service.statistics.blocks_used == 0
