"""What Inspect finds through the entry point group `inspect_ai`: light, since every run of Inspect loads it."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="moonbase")
def moonbase() -> type[ModelAPI]:
    """`moonbase/MODEL`: a run folder, a checkpoint folder, or `preset:NAME`."""
    from moonbase.evals.providers.engine_api import EngineAPI

    return EngineAPI


@modelapi(name="replay")
def replay() -> type[ModelAPI]:
    """`replay/DATASET:MODEL`: answers that were stored earlier."""
    from moonbase.evals.providers.replay_api import ReplayAPI

    return ReplayAPI
