"""How the verbs say what came out: one JSON object, or lines and a table for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any


def deliver(
    as_json: bool,
    work: Callable[[], dict[str, Any] | None],
    show: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a verb's work, report its result, as JSON or for people, and return it.

    With `--json` everything that the work prints goes to standard error. Of several processes under torchrun only the
    first reports.
    """
    first = os.environ.get("RANK", "0") == "0"
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            result = work() or {}
        if first:
            print(json.dumps(plain(result), allow_nan=False, ensure_ascii=False))
    else:
        result = work() or {}
        if show is not None and first:
            show(result)
    return result


def plain(value: Any) -> Any:
    """Only what JSON knows: paths become text, tuples lists, numbers of other libraries Python's, and NaN null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def show_run(result: dict[str, Any]) -> None:
    """Where the run is, how good it is, and what one may type next."""
    print(f"{result.get('folder')}: {result.get('status')} at step {result.get('step')}")
    if result.get("validation_bits_per_byte") is not None:
        print(f"held-out documents: {result['validation_bits_per_byte']:.4f} bits per byte")
    for command in result.get("next_commands", ()):
        print(f"  {command}")


def show_bench(result: dict[str, Any]) -> None:
    """One table: a row per shape, ours beside the peer's. Columns in which nothing would stand are left out."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from moonbase.bench.picture import duration

    rows = result.get("rows", [])
    peers = list(dict.fromkeys(row["peer_name"] for row in rows if row.get("peer_name")))

    def cells(key: str, words: Callable[[Any], str]) -> list[str]:
        return ["" if row.get(key) is None else words(row[key]) for row in rows]

    columns = {
        "shape": cells("shape", str), "unit": cells("unit", str), "moonbase": cells("ours", _number),
        peers[0] if len(peers) == 1 else "peer": cells("peer", _number),
        "which": cells("peer_name", str) if len(peers) > 1 else [], "ratio": cells("ratio", "{:.2f}x".format),
        "of the roof": cells("roof_share", "{:.0%}".format), "time": cells("seconds", duration)}
    columns = {heading: words for heading, words in columns.items() if any(words)}
    table = Table(title=escape(f"{result.get('name', 'bench')} on {result.get('machine', 'this machine')}"))
    for heading in columns:
        table.add_column(escape(heading), justify="left" if heading in ("shape", "unit", "which") else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
    for line in (*(f"peer {absent}" for absent in result.get("absent", ())), *result.get("files", ())):
        print(line)


def show_int4(result: dict[str, Any]) -> None:
    """A row per arm and per difference: mean and 95% interval over seeds."""
    from moonbase.report.words import plural

    for row in result["rows"]:
        low, high = (("-" if row[key] is None else f"{row[key]:.4f}") for key in ("low", "high"))
        print(f"{row['shape']}: {row['ours']:.4f} [{low}, {high}] {row['unit']}, {plural(row['n'], 'seed')}")
    for line in result.get("files", ()):
        print(line)


def show_speedrun(result: dict[str, Any]) -> None:
    """How long each optimizer takes to the same loss."""
    from moonbase.bench.speedrun_result import show

    show(result)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
