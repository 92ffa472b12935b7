"""Rows of a bench, and what is said beside them: which ceilings were measured, which peers are absent.

Beside the keys of every row (see `moonbase.bench`) one of a kernel has what a roofline is drawn from: `label` (a few
characters), `flops` and `bytes` (what the work needs, see `timing.Cost`), `seconds`, and of the peer `peer_seconds`,
`peer_flops` and `peer_bytes`, which are its own where it does the work in another way.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from moonbase.bench.picture import duration, quantity
from moonbase.bench.timing import Cost, Roofs


def plain_row(shape: str, unit: str, ours: float | None, peer: float | None = None, peer_name: str | None = None, *,
              less_is_better: bool = False, roof_share: float | None = None, **more: Any) -> dict[str, Any]:
    """What every row has, and `more`. The ratio says how many times better ours is; without a peer there is neither
    that nor the peer's name."""
    ratio = None
    if ours and peer:
        ratio = peer / ours if less_is_better else ours / peer
    return {"shape": shape, "unit": unit, "ours": ours, "peer": peer, "peer_name": None if peer is None else peer_name,
            "ratio": ratio, "roof_share": roof_share, **more}


def kernel_row(shape: str, label: str, cost: Cost, times: dict[str, float], roofs: Roofs, *, ours_name: str,
               peer_name: str | None = None, peer_cost: Cost | None = None, unit: str = "layers/s",
               amount: float = 1.0) -> dict[str, Any]:
    """times: seconds of "ours" and, where there is one, "peer"; amount: what is done in that time, in `unit`."""
    ours, peer = times["ours"], times.get("peer")
    row = plain_row(shape, unit, amount / ours, peer and amount / peer, peer_name,
                    roof_share=roofs.seconds(cost) / ours, label=label, ours_name=ours_name, flops=cost.flops,
                    bytes=cost.bytes, seconds=ours)
    if peer:
        theirs = peer_cost or cost
        row |= {"peer_seconds": peer, "peer_flops": theirs.flops, "peer_bytes": theirs.bytes}
    return row


def say(row: dict[str, Any]) -> None:
    """A row of a kernel as soon as it is known."""
    bound = f"{quantity(row['flops'] / row['seconds'])}FLOP/s, {quantity(row['bytes'] / row['seconds'])}B/s"
    peer = "" if row["peer"] is None else f"; {row['peer_name']}: {duration(row['peer_seconds'])}"
    note(f"{row['shape']}: {duration(row['seconds'])}, {bound}, {row['roof_share']:.0%} of the roof{peer}")


def note(line: str) -> None:
    """For who waits: to standard error."""
    print(line, file=sys.stderr, flush=True)


def absent_peers(modules: dict[str, str]) -> list[str]:
    """A line per peer that is not measured here, from {module: what people call it}: nothing is left out silently."""
    return [f"{name}: {'installed, but not called by this bench' if find_spec(module) else 'not installed here'}"
            for module, name in modules.items()]


def findings(title: str, rows: list[dict[str, Any]], roofs: Roofs, method: str,
             absent: list[str] | None = None) -> dict[str, Any]:
    """What a bench's `measure` returns when it has more to say than rows."""
    return {"title": title, "rows": rows, "method": method, "absent": absent or [],
            "roofs": {"bytes_per_second": roofs.read, "flops_per_second": roofs.product}}
