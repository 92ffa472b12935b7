"""Rows of a bench of kernels, and what is said beside them: which ceilings were measured, which peers are absent.

Beside the keys of every row (see `moonbase.bench`) such a row has what a roofline is drawn from: `label` (a few
characters), `flops` and `bytes` (what the work needs, see `timing.Cost`), `seconds`, and of the peer `peer_seconds`,
`peer_flops` and `peer_bytes`, which are its own where it does the work in another way.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from moonbase.bench.timing import Cost, Roofs


def kernel_row(shape: str, label: str, cost: Cost, times: dict[str, float], roofs: Roofs, *, ours_name: str,
               peer_name: str | None = None, peer_cost: Cost | None = None, unit: str = "layers/s",
               amount: float = 1.0) -> dict[str, Any]:
    """times: seconds of "ours" and, where there is one, "peer"; amount: what is done in that time, in `unit`."""
    ours, peer = times["ours"], times.get("peer")
    row = {"shape": shape, "unit": unit, "ours": amount / ours, "peer": peer and amount / peer,
           "peer_name": peer_name if peer else None, "ratio": peer / ours if peer else None,
           "roof_share": roofs.seconds(cost) / ours, "label": label, "ours_name": ours_name, "flops": cost.flops,
           "bytes": cost.bytes, "seconds": ours}
    if peer:
        theirs = peer_cost or cost
        row |= {"peer_seconds": peer, "peer_flops": theirs.flops, "peer_bytes": theirs.bytes}
    return row


def say(row: dict[str, Any]) -> None:
    """A row as soon as it is known, to standard error."""
    bound = f"{row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s, {row['bytes'] / row['seconds'] / 1e9:,.3g} GB/s"
    peer = "" if row["peer"] is None else f"; {row['peer_name']}: {row['peer_seconds'] * 1e6:,.0f} us"
    print(f"{row['shape']}: {row['seconds'] * 1e6:,.0f} us, {bound}, {row['roof_share']:.0%} of the roof{peer}",
          file=sys.stderr, flush=True)


def absent_peers(modules: dict[str, str]) -> list[str]:
    """A line per peer that is not measured here, from {module: what people call it}: nothing is left out silently."""
    return [f"{name}: {'installed, but not called by this bench' if find_spec(module) else 'not installed here'}"
            for module, name in modules.items()]


def findings(title: str, rows: list[dict[str, Any]], roofs: Roofs, method: str,
             absent: list[str] | None = None) -> dict[str, Any]:
    """What a bench's `measure` returns when it has more to say than rows."""
    return {"title": title, "rows": rows, "method": method, "absent": absent or [],
            "roofs": {"bytes_per_second": roofs.read, "flops_per_second": roofs.product}}
