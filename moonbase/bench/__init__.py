"""Measurements beside peers: each bench runs both sides in one process on one machine and prints one table.

Every row has shape, unit, ours, peer, peer_name, ratio (ours over the peer, larger is better) and roof_share (share of
what the hardware was measured to do in the same run). A peer that is not installed is named as absent, never skipped
silently.
"""

from __future__ import annotations

import importlib
from typing import Any

from moonbase.errors import UserError

_PEERS = {"train": ("transformers",), "optimizer": ("torch",), "decode": ("transformers",), "serve": ("transformers",),
          "moe": ("torch",), "int4": (), "swarm": (), "agents": (), "evals": ()}
_WITHOUT_PRESET = ("swarm", "agents", "evals")
_BENCHES = tuple(_PEERS)


def run(name: str, preset: str = "pico", peer: str | None = None) -> dict[str, Any]:
    """Run the bench `name`. Returns name, machine, commit, versions and rows. Raises UserError for unknown names."""
    if name not in _BENCHES:
        raise UserError(f"no bench {name!r}. Benches: {', '.join(_BENCHES)}")
    if peer is not None and peer not in _PEERS[name]:
        raise UserError(f"bench {name} knows no peer {peer!r}. Peers: {', '.join(_PEERS[name]) or 'none'}")
    from moonbase.report.machine import git_commit, machine_facts, package_versions

    facts = machine_facts()
    rows = importlib.import_module(f"moonbase.bench.{name}").measure(preset, peer)
    title = name if name in _WITHOUT_PRESET else f"{name} {preset}"
    return {"name": title, "machine": facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores",
            "commit": git_commit(), "versions": package_versions(), "rows": rows}
