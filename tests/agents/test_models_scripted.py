"""The scripted model's accounts beside a prefix cache that remembers whole prompts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from moonbase.agents.models.base import CallOptions, Price, Usage, count_text, estimate_message
from moonbase.agents.models.scripted import Latency, ScriptedModel
from moonbase.agents.simulation import simulate
from tests.agents.scripts import says

LATENCY = Latency(per_input_token=1.0, per_cached_token=0.25)


def tools_named(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]


def ask(model: ScriptedModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Usage:
    return simulate(model.complete(messages, tools, CallOptions())).usage


@pytest.mark.parametrize("seed", range(20))
def test_cached_is_what_an_earlier_prompt_began_with_and_tools_that_were_declared(seed: int) -> None:
    dice, model = random.Random(seed), ScriptedModel(lambda messages, tools: says("Yes."), LATENCY)
    prompts: list[list[str]] = []
    declared: list[str] = []
    for _ in range(40):
        texts = [dice.choice("ab") * dice.choice([8, 400]) for _ in range(dice.randint(1, 4))]
        tools = tools_named(*["search", "open"][: dice.randint(0, 2)])
        shared = max((next((place for place, pair in enumerate(zip(texts, old, strict=False)) if pair[0] != pair[1]),
                           min(len(texts), len(old))) for old in prompts), default=0)
        messages = [{"role": "user", "content": text} for text in texts]
        of_tools = model.count_tokens([], tools)
        expected = sum(4 + count_text(text) for text in texts[:shared]) + of_tools * (str(tools) in declared)
        usage = ask(model, messages, tools)
        assert usage.cached_tokens == expected
        assert usage.input_tokens == of_tools + sum(map(estimate_message, messages))
        prompts.append(texts)
        declared.append(str(tools))


def test_a_warm_one_has_its_systems_and_all_tools_from_the_start() -> None:
    system, other = "You lead the others. " * 20, "You help. " * 20
    model = ScriptedModel(lambda messages, tools: says("Yes."), LATENCY, warm=(system,))
    tools = tools_named("search", "open")
    user = {"role": "user", "content": "Go."}
    known = [{"role": "system", "content": system}, user]
    assert ask(model, known, tools).cached_tokens == model.count_tokens(known[:1], tools)
    unknown = [{"role": "system", "content": other}, user]
    assert ask(model, unknown, tools).cached_tokens == model.count_tokens([], tools)


def test_cached_tokens_are_counted_where_they_matter() -> None:
    """For the time that a call takes, or for its price; elsewhere nothing is worked out."""
    messages, tools = [{"role": "user", "content": "Go."}], tools_named("search")
    for latency, price, counts in ((LATENCY, Price(), True), (Latency(), Price(1, 1, 0.1), True),
                                   (Latency(per_call=1.0), Price(1, 1), False)):
        model = ScriptedModel(lambda messages, tools: says("Yes."), latency, price)
        first, second = ask(model, messages, tools), ask(model, messages, tools)
        assert first.cached_tokens == 0
        assert second.cached_tokens == (second.input_tokens if counts else 0)
