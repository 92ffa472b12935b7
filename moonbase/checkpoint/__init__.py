"""Checkpoints in Hugging Face layout, read and written without ever holding a second copy of the weights.

The names below are imported on first use, so that asking for a configuration or a folder does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.checkpoint.conversion import convert
    from moonbase.checkpoint.folders import damaged_newest, latest_checkpoint, list_checkpoints, resolve_model_folder
    from moonbase.checkpoint.quantization import read_config
    from moonbase.checkpoint.reader import experts_in_int4, load_weights, stored_mtp
    from moonbase.checkpoint.state import load_state, save_state
    from moonbase.checkpoint.writer import save_weights, write_weights

_HOME = {
    "convert": "conversion",
    "damaged_newest": "folders",
    "experts_in_int4": "reader",
    "latest_checkpoint": "folders",
    "list_checkpoints": "folders",
    "resolve_model_folder": "folders",
    "read_config": "quantization",
    "load_weights": "reader",
    "stored_mtp": "reader",
    "load_state": "state",
    "save_state": "state",
    "save_weights": "writer",
    "write_weights": "writer",
}

__all__ = [
    "convert",
    "damaged_newest",
    "experts_in_int4",
    "latest_checkpoint",
    "list_checkpoints",
    "load_state",
    "load_weights",
    "read_config",
    "resolve_model_folder",
    "save_state",
    "save_weights",
    "stored_mtp",
    "write_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
