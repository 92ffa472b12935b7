"""The sample for which a model is being asked: Inspect tells its models nothing of it."""

from __future__ import annotations

from typing import Any

from inspect_ai.solver._task_state import sample_state


def sample_metadata() -> dict[str, Any]:
    """The running sample's metadata; nothing outside of a sample."""
    state = sample_state()
    return {} if state is None else state.metadata or {}


def sample_epoch() -> int:
    """Which repetition of the sample runs, from 1."""
    state = sample_state()
    return 1 if state is None else state.epoch
