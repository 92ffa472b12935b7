"""The network: one definition that trains, samples, serves and is evaluated."""

from moonbase.model.transformer import Losses, Transformer

__all__ = ["Losses", "Transformer"]
