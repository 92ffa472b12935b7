"""Which style a folder speaks, and what its prompt opens (facts sheet 9.5)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moonbase.chat import STYLES, default_style, generation_prefix
from moonbase.data.tokenizer import SPECIAL_NAMES
from moonbase.errors import UserError
from moonbase.presets import preset_config


@pytest.mark.parametrize(
    ("style", "prefixes"),
    [
        ("kimi-k2", ("", "", "")),
        ("kimi-k2-thinking", ("", "<think>", "<think></think>")),
        ("kimi-k2.5", ("<think>", "<think>", "<think></think>")),
    ],
)
def test_what_the_prompt_opens(style: str, prefixes: tuple[str, ...]) -> None:
    assert tuple(generation_prefix(style, thinking) for thinking in (None, True, False)) == prefixes


@pytest.mark.parametrize("style", ["kimi", "", None, 3, ["kimi-k2"]])
def test_unknown_styles_are_the_users_mistake(style: object) -> None:
    with pytest.raises(UserError, match=r"unknown chat style .*kimi-k2, kimi-k2-thinking, kimi-k2\.5"):
        generation_prefix(style)  # type: ignore[arg-type]


@pytest.mark.parametrize("thinking", ["yes", 1, 0.0, {}])
def test_thinking_is_true_or_false(thinking: object) -> None:
    for style in STYLES:
        with pytest.raises(UserError, match="thinking"):
            generation_prefix(style, thinking)  # type: ignore[arg-type]


INT4 = {"quantization_config": {"quant_method": "compressed-tensors"}}


@pytest.mark.parametrize(
    ("config", "style"),
    [
        ({"model_type": "kimi_k25"}, "kimi-k2.5"),
        ({"architectures": ["KimiK25ForConditionalGeneration"]}, "kimi-k2.5"),
        ({"model_type": "deepseek_v3", "rope_scaling": {"factor": 64.0, "beta_fast": 32}, **INT4}, "kimi-k2.5"),
        ({"model_type": "kimi_k2", "rope_scaling": {"factor": 64.0, "beta_fast": 1}, **INT4}, "kimi-k2-thinking"),
        ({"model_type": "kimi_k2", "rope_scaling": {"factor": 32.0, "beta_fast": 1}}, "kimi-k2"),
        ({"model_type": "deepseek_v3", **INT4}, "kimi-k2"),
        ({"model_type": None, "architectures": None, "rope_scaling": None, "quantization_config": None}, "kimi-k2"),
        ({"architectures": "KimiK25", "rope_scaling": 3}, "kimi-k2"),
        ({}, "kimi-k2"),
        (None, "kimi-k2"),
    ],
)
def test_default_style(config: object, style: str) -> None:
    assert default_style(SPECIAL_NAMES, config) == style
    assert default_style({"<|im_middle|>": 7}, config) == "kimi-k2", "this vocabulary cannot think"


@pytest.mark.parametrize(("preset", "style"), [("kimi-k2", "kimi-k2"), ("kimi-k2.5", "kimi-k2.5"), ("pico", "kimi-k2")])
def test_default_style_of_presets(preset: str, style: str) -> None:
    assert default_style(SPECIAL_NAMES, preset_config(preset)) == style


def test_default_style_of_the_published_configuration(shared_data: Path) -> None:
    path = shared_data / "kimi-k25-tokenizer" / "config.json"
    if not path.is_file():
        pytest.skip(f"the published configuration is absent: {path}")
    assert default_style(SPECIAL_NAMES, json.loads(path.read_text(encoding="utf-8"))) == "kimi-k2.5"
