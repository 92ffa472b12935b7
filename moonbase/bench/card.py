"""A verification card: what was measured, by which command, at which commit, on what, and the figures, with a picture.

One Markdown page per result, as in docs/cards, and the picture beside it under the same name. A result that was kept as
JSON, perhaps on a machine without the repository's history, becomes a card by `python -m moonbase.bench.card
RESULT.json CARD.md [COMMIT]`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moonbase.bench import picture
from moonbase.errors import UserError

_SHOWN_VERSIONS = ("python", "torch", "triton", "transformers")


def check_name(path: Path) -> None:
    """Raises UserError where `write` would."""
    if path.suffix != ".md":
        raise UserError(f"{path}: a card is Markdown; its name ends with .md")


def write(result: dict[str, Any], path: Path) -> list[Path]:
    """Write the card of what `moonbase.bench.run` returned and its picture. Returns both paths.

    Raises UserError for a name that is not of Markdown, and for a result without figures.
    """
    check_name(path)
    drawing = path.with_suffix(".svg")
    picture.draw(result, drawing)
    path.write_text(text(result, drawing.name), encoding="utf-8")
    return [path, drawing]


def text(result: dict[str, Any], drawing: str) -> str:
    """The card, with a link to the picture of that name."""
    title = picture.title(result)
    parts = [f"# {title}", _table(["", ""], _facts(result)), *_tables(result["rows"])]
    if result.get("method"):
        parts.append(result["method"])
    if result.get("absent"):
        parts.append("Peers that are not in the table: " + "; ".join(result["absent"]) + ".")
    parts.append(f"![{title}]({drawing})")
    return "\n\n".join(parts) + "\n"


def _facts(result: dict[str, Any]) -> list[list[str]]:
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in _SHOWN_VERSIONS if name in result["versions"])
    commit = str(result.get("commit") or "not known: not run from a checkout")
    known, _, changed = commit.partition("-")
    facts = [["command", f"`{result['command']}`"],
             ["commit", commit if " " in commit else known[:7] + (" with changes" if changed else "")],
             ["hardware", f"{result['machine']}; {versions}"], ["seed", str(result["seed"])]]
    if result.get("roofs"):
        read, product = (result["roofs"][key] for key in ("bytes_per_second", "flops_per_second"))
        facts.append(["roof", f"{picture.quantity(read)}B/s read, {picture.quantity(product)}FLOP/s of a large matrix "
                              "product, measured in the same run"])
    return facts


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels with their times and rates, then everything else in its own unit."""
    kernels = [row for row in rows if row.get("flops") and row.get("bytes")]
    others = [row for row in rows if row not in kernels]
    tables = []
    if kernels:
        peer = [_duration(row.get("peer_seconds")) for row in kernels]
        reading, computing = [row["bytes"] / row["seconds"] for row in kernels], list(map(_flops_per_second, kernels))
        tables.append(_table(
            ["", "moonbase", *_peer_headings(kernels), "ratio", "read", "computed", "share of the roof"],
            [[_words(row["shape"]), _ours(row, kernels), *_peer_cells(row, value, kernels), _ratio(row),
              f"{picture.quantity(moved)}B/s", f"{picture.quantity(flops)}FLOP/s", _share(row)]
             for row, value, moved, flops in zip(kernels, peer, reading, computing, strict=True)]))
    if others:
        ours, peer = ([_number(row.get(side), row["unit"]) for row in others] for side in ("ours", "peer"))
        tables.append(_table(
            ["", "moonbase", "95% interval", *_peer_headings(others), "ratio", "share of the roof"],
            [[f"{_words(row['shape'])}, {row['unit']}", own, _interval(row), *_peer_cells(row, value, others),
              _ratio(row), _share(row)] for row, own, value in zip(others, ours, peer, strict=True)]))
    return tables


def _peer_names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["peer_name"] for row in rows if row.get("peer_name")))


def _peer_headings(rows: list[dict[str, Any]]) -> list[str]:
    """One column under the peer's name where all rows have the same, else its name in a second; none without one."""
    names = _peer_names(rows)
    return ["peer", "which"] if len(names) > 1 else [_words(name) for name in names]


def _peer_cells(row: dict[str, Any], value: str, rows: list[dict[str, Any]]) -> list[str]:
    return [value, row.get("peer_name") or ""][:len(_peer_headings(rows))]


def _number(value: float | None, unit: str) -> str:
    """Of a loss the thousandths matter."""
    if value is None:
        return ""
    return f"{value:.4f}" if unit == "nats per token" else picture.number_text(value)


def _interval(row: dict[str, Any]) -> str:
    low, high = (_number(row.get(end), row["unit"]) for end in ("low", "high"))
    return f"{low} to {high}" if low and high else ""


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else picture.duration(seconds)


def _flops_per_second(row: dict[str, Any]) -> float:
    """Where that is the row's own unit it may count otherwise than the roof does."""
    return row["ours"] * 1e12 if row["unit"] == "TFLOP/s" else row["flops"] / row["seconds"]


def _ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    several = len({other.get("ours_name") for other in rows}) > 1
    return picture.duration(row["seconds"]) + (f", {row['ours_name']}" if several and row.get("ours_name") else "")


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3g}" if row.get("ratio") else ""


def _share(row: dict[str, Any]) -> str:
    return "" if row.get("roof_share") is None else f"{row['roof_share']:.0%}"


def _words(shape: str) -> str:
    return shape.replace(" x ", " × ").replace("|", "\\|")


def _table(headings: Sequence[str], rows: list[list[str]]) -> str:
    """Without the columns that are empty."""
    used = [number for number in range(len(headings)) if number < 2 or any(row[number] for row in rows)]
    head, *body = ("".join(f"| {line[number]} " if line[number] else "| " for number in used) + "|"
                   for line in (headings, *rows))
    return "\n".join([head, "|---" * len(used) + "|", *body])


def read_kept(path: Path) -> dict[str, Any]:
    """What `moonbase bench NAME --json` printed. Raises UserError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["name"], result["command"], result["machine"], result["seed"], result["versions"], result["rows"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a result; keep what `moonbase bench NAME --json` prints") from None
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m moonbase.bench.card", description="A kept result as a card.")
    parser.add_argument("kept", type=Path, metavar="RESULT.json", help="what `moonbase bench NAME --json` printed")
    parser.add_argument("card", type=Path, metavar="CARD.md", help="the page; its picture is written beside it")
    parser.add_argument("commit", nargs="?", metavar="COMMIT", help="the one that was measured, if the result has none")
    given = parser.parse_args(arguments)
    try:
        for path in write(read_kept(given.kept) | ({"commit": given.commit} if given.commit else {}), given.card):
            print(path)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
