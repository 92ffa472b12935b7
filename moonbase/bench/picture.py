"""A result as one picture: a roofline where rows say what they compute and read, else ours beside the peer.

Left the roofline (Williams et al. 2009): how much is computed per byte, and how fast; the roof is what this machine was
measured to read and to multiply in the same run. Right every row as a share of that roof. Results without such figures
get one line per row, from the peer's value to ours, on a logarithmic scale; those with curves of losses are drawn by
`curves`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moonbase.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OURS, PEER, PEER_SOFT = "#1f6f8b", "#d0673f", "#eab8a2"
INK, MUTED, FAINT = "#22303a", "#6b7780", "#dfe4e7"
_WIDTH = 10.6
_STYLE = {"font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
          "axes.edgecolor": "#b9c2c8", "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED,
          "ytick.color": MUTED, "svg.hashsalt": "moonbase", "figure.facecolor": "white", "axes.axisbelow": True}
_PEER_MARK = {"marker": "o", "linestyle": "", "markersize": 6, "markerfacecolor": "white", "markeredgecolor": PEER,
              "markeredgewidth": 1.4}
FORMATS = (".svg", ".png")


def check_name(path: Path) -> None:
    """Raises UserError where `draw` would."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a picture is {' or '.join(FORMATS)}, not {path.suffix or 'without an ending'}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of what `moonbase.bench.run` returned, as SVG or PNG by the name's ending.

    Raises UserError for another ending and for a result that has nothing to draw.
    """
    check_name(path)
    rows = [row for row in result["rows"] if (row.get("ours") or 0) > 0 and (row.get("peer") or 1) > 0]
    if not rows:
        raise UserError(f"bench {result['name']}: no row has a figure to draw")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the picture
        matplotlib.rcParams.update(_STYLE)
        kernels = [row for row in rows if row.get("flops") and row.get("bytes")] if result.get("roofs") else []
        figure = Figure(layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.09)
        FigureCanvasAgg(figure)
        if result.get("curves"):
            from moonbase.bench.curves import draw_curves

            draw_curves(figure, result["curves"])
        elif kernels:
            _roofline(figure, result, kernels)
        else:
            _beside_the_peer(figure, rows)
        figure.suptitle(title(result), x=0.012, ha="left", fontsize=12.5, fontweight="bold", color=INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def title(result: dict[str, Any]) -> str:
    preset = result["name"].partition(" ")[2]
    what = result.get("title", result["name"].partition(" ")[0])
    return f"{what}{f', {preset}' if preset and preset not in what else ''}, on {result['machine']}"


# --- roofline ---------------------------------------------------------------------------------------------------------


def _roofline(figure: Figure, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    figure.set_size_inches(_WIDTH, max(4.6, 1.4 + 0.42 * len(rows)))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    read, product = (result["roofs"][key] for key in ("bytes_per_second", "flops_per_second"))
    _draw_roof(left, rows, read, product)
    for row in rows:
        x, y = row["flops"] / row["bytes"], row["flops"] / row["seconds"]
        if row.get("peer_seconds"):
            there = row["peer_flops"] / row["peer_bytes"], row["peer_flops"] / row["peer_seconds"]
            left.plot([there[0], x], [there[1], y], color=MUTED, linewidth=0.6, alpha=0.5, zorder=2)
            left.plot(*there, zorder=3, **_PEER_MARK)
        left.plot(x, y, "o", markersize=7.5, color=OURS, markeredgecolor="white", markeredgewidth=0.8, zorder=4)
    _label_points(left, rows, read, product)
    _draw_shares(right, rows, read, product)
    _legend(figure, rows)


def _draw_roof(axes: Axes, rows: list[dict[str, Any]], read: float, product: float) -> None:
    intensities = [row[f"{side}flops"] / row[f"{side}bytes"] for row in rows for side in _sides(row)]
    rates = [row[f"{side}flops"] / row[f"{side}seconds"] for row in rows for side in _sides(row)]
    ridge = product / read
    low, high = min(*intensities, ridge / 2) / 2, max(*intensities, ridge) * 4
    bottom, top = min(*rates, low * read) / 1.5, max(product * 1.8, max(rates) * 1.4)
    axes.plot([low, ridge, high], [low * read, product, product], color=INK, linewidth=1.6, zorder=1)
    axes.fill_between([low, ridge, high], [low * read, product, product], top, color="#f4f6f7", zorder=0, linewidth=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    axes.grid(which="major", color=FAINT, linewidth=0.7)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("FLOP/s")
    _logarithmic(axes.xaxis, low, high, number_text)
    _logarithmic(axes.yaxis, bottom, top, quantity)
    axes.annotate(f"{quantity(product)}FLOP/s measured", (high, product), xytext=(-4, 5), textcoords="offset points",
                  ha="right", color=INK, fontsize=8.5)
    place = math.sqrt(max(low, bottom / read) * ridge)
    axes.annotate(f"{quantity(read)}B/s measured", (place, place * read), xytext=(-7, 7), textcoords="offset points",
                  ha="center", va="bottom", color=INK, fontsize=8.5, rotation_mode="anchor",
                  rotation=45, transform_rotates_text=True)


def _sides(row: dict[str, Any]) -> tuple[str, ...]:
    return ("", "peer_") if row.get("peer_seconds") else ("",)


def _label_points(axes: Axes, rows: list[dict[str, Any]], read: float, product: float) -> None:
    """Beside our points, where there is room under the roof: the panel at the right names all."""
    from matplotlib.patheffects import withStroke

    ends = [tuple(map(math.log10, limits)) for limits in (axes.get_xlim(), axes.get_ylim())]
    size = [72 * inches for inches in (0.46 * _WIDTH, axes.figure.get_size_inches()[1] - 1.4)]

    def place(*values: float) -> list[float]:
        """Of an intensity and a rate: in points from the lower left corner, about."""
        return [(math.log10(value) - low) / (high - low) * length
                for value, (low, high), length in zip(values, ends, size, strict=True)]

    def roof(x: float) -> float:
        intensity = 10 ** (ends[0][0] + max(x, 0) / size[0] * (ends[0][1] - ends[0][0]))
        return place(intensity, min(intensity * read, product))[1]

    taken = []
    for flops, moved, elapsed in ([row[side + key] for key in ("flops", "bytes", "seconds")]
                                  for row in rows for side in _sides(row)):
        x, y = place(flops / moved, flops / elapsed)
        taken.append((x - 4, y - 4, x + 4, y + 4))
    for row in rows:
        (x, y), width = place(row["flops"] / row["bytes"], row["flops"] / row["seconds"]), 5.0 * len(_words(row))
        for left, lower, aligned in ((9, -5, "left"), (-width / 2, -17, "center"), (-9 - width, -5, "right")):
            box = x + left, y + lower, x + left + width, y + lower + 10
            inside = 0 <= box[0] and box[2] <= size[0] and 0 <= box[1] and box[3] < roof(box[0])
            if inside and not any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                                  for other in taken):
                taken.append(box)
                shift = {"left": 9, "center": 0, "right": -9}[aligned], lower + 4.5
                axes.annotate(_words(row), (row["flops"] / row["bytes"], row["flops"] / row["seconds"]), xytext=shift,
                              textcoords="offset points", fontsize=8, color=OURS, zorder=5, va="center", ha=aligned,
                              path_effects=[withStroke(linewidth=2.5, foreground="white")])
                break


def _draw_shares(axes: Axes, rows: list[dict[str, Any]], read: float, product: float) -> None:
    """Bars from 0 to 100%; times in a column of their own at the right."""
    both = any(row.get("peer_seconds") for row in rows)
    height, most = 0.36 if both else 0.6, 1.0
    for number, row in enumerate(rows):
        for side, shift, colour, ink in (("", -0.2 if both else 0.0, OURS, INK), ("peer_", 0.2, PEER_SOFT, MUTED)):
            if side not in _sides(row):
                continue
            seconds = row[side + "seconds"]
            share = max(row[side + "bytes"] / read, row[side + "flops"] / product) / seconds
            most = max(most, share)
            axes.barh(number + shift, share, height, color=colour, linewidth=0)
            inside = share > 0.85
            axes.annotate(f"{share:.0%}", (share, number + shift), xytext=(-5 if inside else 5, -0.5), fontsize=8,
                          textcoords="offset points", va="center", ha="right" if inside else "left",
                          color="white" if inside and not side else ink)
            axes.annotate(duration(seconds), (1, number + shift), xycoords=("axes fraction", "data"), xytext=(-2, -0.5),
                          textcoords="offset points", va="center", ha="right", fontsize=8, color=ink)
    axes.set_yticks(range(len(rows)), [_words(row) for row in rows], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.27)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.axvline(1.0, color=INK, linewidth=1.6, zorder=0.8)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("share of the roof, each for its own bytes and arithmetic", loc="left")


def _legend(figure: Figure, rows: list[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(row["ours_name"] for row in rows if row.get("ours_name")))
    handles = [Line2D([], [], marker="o", linestyle="", color=OURS, markersize=7,
                      label="moonbase" + (f" ({'; '.join(names)})" if names else ""))]
    for name in dict.fromkeys(row["peer_name"] for row in rows if row.get("peer_name")):
        handles.append(Line2D([], [], label=name, **_PEER_MARK))
    figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)


# --- no roofline ------------------------------------------------------------------------------------------------------


def _beside_the_peer(figure: Figure, rows: list[dict[str, Any]]) -> None:
    """One panel per unit, one line per row."""
    units = list(dict.fromkeys(row["unit"] for row in rows))
    counts = [sum(row["unit"] == unit for row in rows) for unit in units]
    figure.set_size_inches(_WIDTH, 1.0 + sum(0.85 + 0.34 * count for count in counts))
    panels = figure.subplots(len(units), 1, height_ratios=[count + 1 for count in counts], squeeze=False)[:, 0]
    for axes, unit in zip(panels, units, strict=True):
        _draw_pairs(axes, [row for row in rows if row["unit"] == unit], unit)
    _legend(figure, rows)


def _draw_pairs(axes: Axes, rows: list[dict[str, Any]], unit: str) -> None:
    values = [row[side] for row in rows for side in ("ours", "peer") if row.get(side)]
    low, high = min(values) / 2, max(values) * 2.5
    for number, row in enumerate(rows):
        axes.axhline(number, color=FAINT, linewidth=0.7, zorder=0)
        sides = [(row["ours"], OURS)] + ([(row["peer"], PEER)] if row.get("peer") else [])
        axes.plot([value for value, _ in sides], [number] * len(sides), color=OURS, linewidth=2.2, alpha=0.3, zorder=1)
        if row.get("peer"):
            axes.plot(row["peer"], number, zorder=2, **_PEER_MARK)
        axes.plot(row["ours"], number, "o", markersize=7.5, color=OURS, zorder=3)
        for place, (value, colour) in zip((-1, 1) if len(sides) == 2 else (1,), sorted(sides), strict=True):
            axes.annotate(number_text(value), (value, number), xytext=(9 * place, -0.5), textcoords="offset points",
                          va="center", ha="left" if place > 0 else "right", fontsize=8.5, color=colour,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=2)
        if row.get("ratio"):
            axes.annotate(f"{row['ratio']:.3g}×", (1, number), xycoords=("axes fraction", "data"), xytext=(-2, -0.5),
                          textcoords="offset points", va="center", ha="right", fontsize=9, color=INK, fontweight="bold",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})
    axes.set(xscale="log", xlim=(low, high * (high / low) ** 0.06), ylim=(len(rows) - 0.4, -0.6))
    _logarithmic(axes.xaxis, low, high, number_text)
    axes.set_yticks(range(len(rows)), [_words(row) for row in rows], color=INK)
    axes.tick_params(axis="both", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(unit, loc="left", fontsize=9.5, color=MUTED, pad=8)


def _logarithmic(axis: Axis, low: float, high: float, words: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def _words(row: dict[str, Any]) -> str:
    return row.get("label", row["shape"]).replace(" x ", " × ")


def quantity(value: float) -> str:
    """1.2e12 as `1.2 T`."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "


def number_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """1.2e-3 as `1.2 ms`."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
