"""WideWorld: a procedural, seeded, offline web with conflicting, stale and dead pages, and tasks over it."""

from moonbase.agents.worlds.wideworld.facts import RULE, Shares
from moonbase.agents.worlds.wideworld.tasks import FAMILIES, make_tasks
from moonbase.agents.worlds.wideworld.wideworld import WideWorld, make_world

__all__ = ["FAMILIES", "RULE", "Shares", "WideWorld", "make_tasks", "make_world"]
