"""What a suite may ask of whoever verifies it: a bundle must not make its reader compute for a year."""

from __future__ import annotations

from typing import Any

from moonbase.evals.proof.canonical import BundleError, clean

LARGEST_PARAMETER = 10**5
"""Of a hypothesis' settings (bootstrap draws)."""


def refuse_gigantic(value: Any) -> None:
    """Raises BundleError for a setting of a hypothesis that would keep the reader computing."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "params":
                _largest(item)
            refuse_gigantic(item)
    elif isinstance(value, list):
        for item in value:
            refuse_gigantic(item)


def _largest(value: Any) -> None:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _largest(item)
    elif isinstance(value, int | float) and abs(value) > LARGEST_PARAMETER:
        raise BundleError(f"suite.json: a setting of {clean(value, 40)} is beyond {LARGEST_PARAMETER}")
