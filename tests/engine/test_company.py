"""Nobody notices the others: the same bits, log-probabilities included, where the pass is computed in C (fp32)."""

from __future__ import annotations

import random

import pytest
import torch

from moonbase.engine import Engine, Sampling
from moonbase.engine.engine import _output
from moonbase.model import Transformer
from moonbase.ops import native
from moonbase.presets import load_preset
from tests.engine.tiny import Bytes
from tests.model.tiny import randomise, tiny_config

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here: equal up to rounding only")

NUM_TOKENS = 12


def make_engine(**options: object) -> Engine:
    """`pico` as the preset has it, with fewer layers and entries; weights from a seed."""
    values = dict(load_preset("pico")["model"]) | dict(vocab_size=512, num_hidden_layers=3)
    torch.set_num_threads(options.pop("threads", 1))
    return Engine(randomise(Transformer(tiny_config(**values)), width=0.1).eval(), Bytes(), **options)


def prompts() -> list[list[int]]:
    """Lengths on both sides of a block and of a chunk; some begin alike."""
    chance = random.Random(3)
    beginning = [chance.randrange(512) for _ in range(48)]
    return [beginning[: chance.choice([0, 16, 48])] + [chance.randrange(512) for _ in range(length)]
            for length in (1, 2, 9, 15, 16, 17, 40, 130)]


def settings() -> list[Sampling]:
    return [Sampling(NUM_TOKENS, float(number % 2), seed=number, logprobs=4) for number in range(8)]


@pytest.mark.parametrize(
    "options",
    [dict(), dict(chunk_tokens=7, max_running=3), dict(cache_tokens=320, chunk_tokens=24), dict(threads=3)],
    ids=["together", "in chunks, three at a time", "giving way", "three threads"],
)
def test_tokens_and_log_probabilities_have_the_same_bits_in_any_company(options: dict[str, int]) -> None:
    one_by_one = make_engine(prefix_cache=False)
    # A request of its own is number 0 of its call.
    alone = [one_by_one.complete([ids], sampling)[0] for ids, sampling in zip(prompts(), settings(), strict=True)]
    assert one_by_one._forward._native.ready(), "these shapes are meant for the pass in C"
    together = make_engine(**options)
    for _ in range(2):  # the second time with a warm prefix cache
        requests = [together.request(ids, sampling) for ids, sampling in zip(prompts(), settings(), strict=True)]
        for request in requests:
            together.submit(request)
        while together.busy:
            together.step()
            for request, piece in together.fetch():
                request.inbox.append(piece)
        for request, expected in zip(requests, alone, strict=True):
            assert request.output_ids == expected.ids
            found = _output(request)
            assert found.logprobs == expected.logprobs and found.top_logprobs == expected.top_logprobs
    assert together.statistics.cached_tokens > 0
    assert together.statistics.preemptions > 0 or "cache_tokens" not in options


def test_the_next_turn_has_the_same_bits_with_and_without_the_cached_reply() -> None:
    cached, cold = make_engine(), make_engine(prefix_cache=False)
    prompt, sampling = prompts()[-1], Sampling(NUM_TOKENS, logprobs=4)
    reply = cached.complete([prompt], Sampling(64))[0]
    turn = [[*prompt, *reply.ids, 5, 6]]
    found, expected = cached.complete(turn, sampling)[0], cold.complete(turn, sampling)[0]
    assert found.cached_tokens > len(prompt) and expected.cached_tokens == 0
    assert (found.ids, found.logprobs, found.top_logprobs) == (expected.ids, expected.logprobs, expected.top_logprobs)
