"""Named configurations: one YAML file each, with a `model:` section and, where we train it, a recipe around it."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import yaml

from moonbase.config import ModelConfig
from moonbase.errors import UserError, did_you_mean


@cache
def preset_names() -> tuple[str, ...]:
    """All presets, by name."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_preset(name: str) -> dict[str, Any]:
    """The preset's YAML as a plain mapping. Raises UserError, listing the presets, where none has that name."""
    if name not in preset_names():
        known = preset_names()
        raise UserError(f"no preset {name!r}{did_you_mean(name, known)}. Presets: {', '.join(known)}")
    return yaml.safe_load((resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8"))


def preset_config(name: str) -> ModelConfig:
    """The network of a preset."""
    return ModelConfig.parse(load_preset(name)["model"], source=f"preset {name}")
