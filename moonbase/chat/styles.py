"""The three ways in which the Kimi family writes a dialogue, and which of them a model folder speaks.

| style | tools | thinking blocks | the prompt opens |
|---|---|---|---|
| `kimi-k2` | compact JSON | none | nothing |
| `kimi-k2-thinking` | compact JSON | yes | nothing: the model writes `<think>` itself |
| `kimi-k2.5` | TypeScript declarations | yes | `<think>`, or `<think></think>` for an instant answer |

Sources disagree on whether the prompt of K2-Thinking ends with `<think>`. Here it does not, unless `thinking=True` asks
for it; replies are read either way (`moonbase.chat.parse`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from moonbase.errors import UserError

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
"""What the system turn says where the dialogue does not begin with one of its own."""

THINK, END_THINK = "<think>", "</think>"
NO_THINKING = THINK + END_THINK

K25_YARN = (64.0, 32.0)
"""Factor and beta_fast of K2.5's context extension. K2 of 128K has (32, 1), and 256K are 64-fold too: the pair tells
the text part of K2.5 from all of its kin."""


class Style(NamedTuple):
    """What a style renders: `tools` in which form, thinking blocks or none, and whether the prompt opens one."""

    name: str
    tools: Literal["json", "typescript"]
    thinks: bool
    opens_thinking: bool


_STYLES = {
    style.name: style
    for style in (
        Style("kimi-k2", "json", thinks=False, opens_thinking=False),
        Style("kimi-k2-thinking", "json", thinks=True, opens_thinking=False),
        Style("kimi-k2.5", "typescript", thinks=True, opens_thinking=True),
    )
}
STYLES = tuple(_STYLES)


def find_style(name: str) -> Style:
    """The style of that name. Raises UserError listing what there is."""
    style = _STYLES.get(name) if isinstance(name, str) else None
    if style is None:
        raise UserError(f"unknown chat style {name!r}; there are {', '.join(STYLES)}")
    return style


def generation_prefix(style: str, thinking: bool | None = None) -> str:
    """What the generation prompt opens on the assistant's behalf: "", "<think>" or "<think></think>".

    `thinking`: None is the style's own habit, False asks for an instant answer. `kimi-k2` has no thinking to switch.
    Raises UserError for an unknown style or a `thinking` that is neither true, false nor None.
    """
    found = find_style(style)
    if thinking is not None and not isinstance(thinking, bool):
        raise UserError(f"thinking: expected true or false, found {thinking!r}")
    if not found.thinks:
        return ""
    if thinking is None:
        return THINK if found.opens_thinking else ""
    return THINK if thinking else NO_THINKING


def default_style(special_tokens: Collection[str], config: Any) -> str:
    """Which style a model folder speaks when nobody says.

    `config`: the content of its `config.json`, or a `ModelConfig`. K2.5 is known by its name or by its context
    extension. K2-Thinking has the configuration of K2-Instruct but is published in INT4, which only `config.json`
    tells. A vocabulary without `<think>` cannot think. Everything else, models trained here included, is `kimi-k2`.
    """
    if THINK not in special_tokens or "<|im_middle|>" not in special_tokens:
        return "kimi-k2"
    kind, architectures = _field(config, "model_type"), _field(config, "architectures")
    names = [kind, *(architectures if isinstance(architectures, list | tuple) else ())]
    if any(str(name).lower().replace("_", "").startswith("kimik25") for name in names):
        return "kimi-k2.5"
    yarn = _field(config, "rope_scaling")
    if (_field(yarn, "factor"), _field(yarn, "beta_fast")) == K25_YARN:
        return "kimi-k2.5"
    stored = _field(_field(config, "quantization_config"), "quant_method")
    return "kimi-k2-thinking" if kind == "kimi_k2" and stored == "compressed-tensors" else "kimi-k2"


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
