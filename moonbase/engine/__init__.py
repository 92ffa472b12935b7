"""Inference: everything that generates text goes through here."""

from moonbase.engine.engine import Engine, Sampling

__all__ = ["Engine", "Sampling"]
