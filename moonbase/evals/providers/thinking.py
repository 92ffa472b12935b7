"""Thinking on or off: what a call must set for it, which differs by host and by family of models.

| host | on | off |
|---|---|---|
| `moonbase/…` | `reasoning_effort: high`, which the engine reads as its style's switch | `none` |
| `openai/…` | `reasoning_effort: high` | `none`, from gpt-5.1 on |
| `anthropic/…` | `reasoning_tokens` up to Claude 4.5, `reasoning_effort: high` behind it | `reasoning_effort: none` |
| Moonshot's, DeepSeek's and Z.ai's own | `thinking: {type: enabled}` in the body | `{type: disabled}` |
| `vllm/…`, `sglang/…`, other hosts of Kimi, DeepSeek, Qwen, GLM | `chat_template_kwargs` in the body | the same |
| `together/…` | `reasoning: {enabled: true}` in the body | `{enabled: false}` |
| all others | `reasoning_effort: high` | `none` |

What was sent is in a record's `call.decoding`; whether it was heeded only the answer tells (`heeded`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moonbase.errors import UserError

EFFORT: dict[str, dict[str, Any]] = {"on": {"reasoning_effort": "high"}, "off": {"reasoning_effort": "none"}}
BUDGET = 16_000
"""Tokens of thinking where the host wants a number."""
_OWN_SWITCH = ("moonshot", "kimi", "deepseek", "zai", "z-ai", "zhipu", "bigmodel", "moonbase")
"""Services whose body has `thinking: {type: …}`."""
_SERVED = ("vllm", "sglang", "openai-api")
"""Providers of Inspect behind which any server with the OpenAI interface may be."""
_TEMPLATE_SWITCH = {"kimi": "thinking", "deepseek": "thinking", "qwen": "enable_thinking", "glm": "enable_thinking"}
"""Family of models to the variable of its chat template."""
_BUDGETED = re.compile(r"claude-(?:3-7|(?:opus|sonnet|haiku)-4(?:-[015])?(?=-\d{8}|@|$|-latest))")
"""Models of Anthropic that want a number of tokens."""
_ALWAYS = re.compile(
    r"(?:^|/)o[134](?:-|$)|gpt-5(?![.\d])(?!-chat)|gpt-oss|kimi-k2-thinking|deepseek-r1|deepseek-reasoner|qwq|"
    r"qwen3-.*thinking|claude-(?:fable|mythos)|claude-opus-5-5")
"""Models that think whatever they are told."""
_NEVER = re.compile(
    r"gpt-3\.5|gpt-4|gpt-5[.\d]*-chat|claude-3-(?:5|opus|sonnet|haiku)|kimi-k2-(?:\d{4}|turbo|instruct)|moonshot-v1|"
    r"qwen-?2\.5|qwen3-.*instruct")
"""Models that have no thinking to switch on."""


def thinking_settings(model: str, thinking: str, model_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of Inspect's GenerateConfig for `model` (PROVIDER/MODEL) under `thinking`: on, off, or default, which
    leaves it to the host. Raises UserError for a model that cannot be switched so."""
    if thinking == "default":
        return {}
    provider, _, rest = model.partition("/")
    name = rest.lower()
    if provider == "moonbase":
        if (model_args or {}).get("thinking") is not None:
            raise UserError(f"model {model}: its argument `thinking` fixes what the suite crosses; leave it out")
        return EFFORT[thinking]
    if thinking == "off" and _ALWAYS.search(name):
        raise UserError(f"model {model} thinks whatever it is told: leave `off` out of the suite's `crossed: thinking`")
    if thinking == "on" and _NEVER.search(name):
        raise UserError(f"model {model} has no thinking: leave `on` out of the suite's `crossed: thinking`")
    if provider == "anthropic":
        budgeted = thinking == "on" and _BUDGETED.search(name)
        return {"reasoning_tokens": BUDGET} if budgeted else EFFORT[thinking]
    service = rest.partition("/")[0].lower() if provider == "openai-api" else provider
    if service in _OWN_SWITCH:
        return {"extra_body": {"thinking": {"type": "enabled" if thinking == "on" else "disabled"}}}
    if provider == "together":
        return {"extra_body": {"reasoning": {"enabled": thinking == "on"}}}
    family = next((family for family in _TEMPLATE_SWITCH if family in name), None)
    if provider in _SERVED and family is not None:
        return {"extra_body": {"chat_template_kwargs": {_TEMPLATE_SWITCH[family]: thinking == "on"}}}
    return EFFORT[thinking]


def heeded(thinking: str | None, reasoned: bool) -> bool | None:
    """Whether an answer was given as it was asked for; None where nothing was asked. `reasoned`: it has reasoning, or
    tokens of it were counted."""
    return None if thinking not in ("on", "off") else reasoned == (thinking == "on")
