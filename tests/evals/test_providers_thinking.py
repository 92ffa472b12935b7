"""Thinking on and off at every kind of host, as their documentation has it, and what a record says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.collect import HEEDED, record_of
from moonbase.evals.providers.thinking import heeded, thinking_settings
from moonbase.evals.suite import Suite

EFFORT = ({"reasoning_effort": "high"}, {"reasoning_effort": "none"})
TYPE = ({"extra_body": {"thinking": {"type": "enabled"}}}, {"extra_body": {"thinking": {"type": "disabled"}}})


def template(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    on, off = ({"extra_body": {"chat_template_kwargs": {name: thinking}}} for thinking in (True, False))
    return on, off


@pytest.mark.parametrize(("model", "expected"), [
    ("moonbase/runs/k2", EFFORT), ("openai/gpt-5.2", EFFORT), ("openai/gpt-5.1-2025-11-13", EFFORT),
    ("anthropic/claude-opus-4-6", EFFORT), ("anthropic/claude-sonnet-5", EFFORT),
    ("anthropic/claude-opus-4-5-20251101", ({"reasoning_tokens": 16_000}, EFFORT[1])),
    ("anthropic/claude-sonnet-4-20250514", ({"reasoning_tokens": 16_000}, EFFORT[1])),
    ("moonshot/kimi-k2.5", TYPE), ("deepseek/deepseek-chat", TYPE), ("openai-api/deepseek/deepseek-chat", TYPE),
    ("openai-api/moonshot/kimi-k2.5", TYPE), ("openai-api/moonbase/kimi-k2.5", TYPE),
    ("vllm/moonshotai/Kimi-K2.5", template("thinking")), ("sglang/deepseek-ai/DeepSeek-V3.2", template("thinking")),
    ("vllm/Qwen/Qwen3-32B", template("enable_thinking")), ("openai-api/myhost/GLM-4.7", template("enable_thinking")),
    ("together/moonshotai/Kimi-K2.5", tuple({"extra_body": {"reasoning": {"enabled": on}}} for on in (True, False))),
    ("openrouter/moonshotai/kimi-k2.5", EFFORT), ("google/gemini-3-pro", EFFORT)])  # fmt: skip
def test_each_host_is_told_in_its_own_words(model: str, expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert (thinking_settings(model, "on"), thinking_settings(model, "off")) == expected
    assert thinking_settings(model, "default") == {}


@pytest.mark.parametrize(("model", "thinking"), [
    ("openai/o3", "off"), ("openai/gpt-5", "off"), ("openai/gpt-5-mini", "off"), ("vllm/openai/gpt-oss-120b", "off"),
    ("together/moonshotai/Kimi-K2-Thinking", "off"), ("openai-api/deepseek/deepseek-reasoner", "off"),
    ("openai/gpt-4.1", "on"), ("anthropic/claude-3-5-sonnet-20241022", "on"),
    ("vllm/moonshotai/Kimi-K2-Instruct", "on"), ("vllm/Qwen/Qwen3-30B-A3B-Instruct-2507", "on")])  # fmt: skip
def test_what_cannot_be_switched_is_refused(model: str, thinking: str) -> None:
    with pytest.raises(UserError) as raised:
        thinking_settings(model, thinking)
    assert model in str(raised.value) and f"leave `{thinking}` out" in str(raised.value)
    thinking_settings(model, "off" if thinking == "on" else "on")


def test_an_argument_and_a_condition_do_not_contradict_each_other() -> None:
    with pytest.raises(UserError, match="fixes what the suite crosses"):
        thinking_settings("moonbase/runs/k2", "on", {"thinking": False})


def test_a_suite_is_refused_before_anything_is_written(tmp_path: Any) -> None:
    from moonbase.evals.run import settle
    from moonbase.evals.suite import load_suite

    with pytest.raises(UserError, match="thinks whatever it is told"):
        settle(load_suite("refusal"), ["openai/o3"], tmp_path / "out", seed=0, limit=None)
    assert not (tmp_path / "out").exists()
    settle(load_suite("refusal"), ["replay/xstest:gpt4"], tmp_path / "out", seed=0, limit=None)


def test_whether_it_was_heeded() -> None:
    assert [heeded(asked, reasoned) for asked in ("on", "off", "default", None) for reasoned in (True, False)] == [
        True, False, False, True, None, None, None, None]


@pytest.mark.parametrize(("thinking", "content", "counted", "expected"), [
    ("on", [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "so"}], 0, True), ("on", "so", 9, True),
    ("on", "so", 0, False), ("off", "so", 0, True), ("off", "so", 9, False), ("default", "so", 9, None)])  # fmt: skip
def test_a_record_says_what_was_sent_and_what_came_back(thinking: str, content: Any, counted: int, expected: Any,
                                                        ) -> None:
    model = "openai-api/moonshot/kimi-k2.5"
    sent = thinking_settings(model, thinking)
    usage = {"input_tokens": 3, "output_tokens": 12, "reasoning_tokens": counted}
    output = {"choices": [{"message": {"content": content}, "stop_reason": "stop"}], "usage": usage}
    sample = {"id": "1", "epoch": 1, "input": "q", "target": "t", "scores": {"a": {"value": 1.0}}, "output": output,
              "metadata": {"item": "1", "condition": {"language": "en", "thinking": thinking}},
              "events": [{"event": "model", "model": model, "config": sent, "output": output}]}
    header = SimpleNamespace(eval=SimpleNamespace(model=model, model_args={}, model_base_url=None,
                                                  model_generate_config=None))
    for withhold in (False, True):
        suite = Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "withhold": withhold,
                                      "tasks": [{"name": "t", "source": "builtin:t"}]})
        record = record_of(suite, suite.tasks[0], header, sample, b"salt" * withhold, None)
        assert record.details.get(HEEDED) is expected and record.condition["thinking"] == thinking
        assert record.call.decoding == sent and record.reasoning_tokens == counted
