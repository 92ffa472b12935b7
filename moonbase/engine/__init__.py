"""Inference: everything that generates text goes through here."""

from moonbase.engine.engine import Engine, EngineStatistics, Output
from moonbase.engine.sampling import Constraint, Sampling, Scores
from moonbase.engine.service import QueueFull, Service
from moonbase.engine.text import Piece

__all__ = ["Constraint", "Engine", "EngineStatistics", "Output", "Piece", "QueueFull", "Sampling", "Scores",
           "Service"]
