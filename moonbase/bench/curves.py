"""The picture of a speedrun: losses over tokens with the target, and the grids of rates that it was tuned on.

Left the losses of training batches, smoothed, a line per length of run with the range over seeds, and as dots what was
held out after the last step of every run; dashed the target, and where each side comes down to it. Right the held-out
losses of both grids over the rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moonbase.bench.picture import FAINT, INK, OURS, PEER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"ours": OURS, "peer": PEER}
_FIRST_SHARE = 0.1
"""Of the longest run: losses before it are too high to be shown beside the others."""


def draw_curves(figure: Figure, curves: dict[str, Any]) -> None:
    """curves: target, reached, series, points, tuning and names, as `speedrun_result` gives them; each may be empty."""
    figure.set_size_inches(10.6, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    _draw_losses(left, curves)
    _draw_tuning(right, curves)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8.5,
                  labelcolor=INK)


def _draw_losses(axes: Axes, curves: dict[str, Any]) -> None:
    end = max([each["tokens"][-1] for each in curves["series"] if each["tokens"]], default=1.0)
    named: set[str] = set()
    highest, lowest = [], []
    for series in sorted(curves["series"], key=lambda each: each["side"] == "ours"):
        side, kept = series["side"], [token >= _FIRST_SHARE * end for token in series["tokens"]]
        tokens, mean, low, high = ([value for value, keep in zip(series[key], kept, strict=True) if keep]
                                   for key in ("tokens", "mean", "low", "high"))
        if not tokens:
            continue
        label = None if side in named else f"{curves['names'][side]}, training batches"
        named.add(side)
        axes.plot(tokens, mean, color=_COLOURS[side], linewidth=1.4, zorder=2, label=label)
        axes.fill_between(tokens, low, high, color=_COLOURS[side], alpha=0.18, linewidth=0, zorder=1)
        highest.append(max(high))
        lowest.append(min(low))
    for side in ("peer", "ours"):
        dots = [(tokens, loss) for which, tokens, loss in curves["points"] if which == side]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", markersize=5.5, color=_COLOURS[side], markeredgecolor="white",
                      markeredgewidth=0.8, zorder=4, label=f"{curves['names'][side]}, held out at the end")
            lowest.append(min(loss for _, loss in dots))
            highest.append(max(loss for _, loss in dots))
    if curves["target"] is not None:
        axes.axhline(curves["target"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3,
                     label=f"target, {curves['target']:.3f}")
        lowest.append(curves["target"])
        for side, tokens in curves["reached"].items():
            axes.plot([tokens, tokens], [0, curves["target"]], color=_COLOURS[side], linewidth=1,
                      linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(f"{tokens:.3g}M", (tokens, curves["target"]), xytext=(-5, -13), textcoords="offset points",
                          ha="right", fontsize=8.5, color=_COLOURS[side], zorder=5,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    if lowest:
        room = 0.05 * (max(highest, default=lowest[0]) - min(lowest)) or 0.1
        axes.set_ylim(min(lowest) - room, max(highest, default=lowest[0]) + room)
    axes.set_xlim(0, end * 1.03)
    axes.set(xlabel="M tokens", ylabel="nats per token")
    axes.grid(color=FAINT, linewidth=0.7)


def _draw_tuning(axes: Axes, curves: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rates: set[float] = set()
    for side in ("peer", "ours"):
        grid = curves["tuning"].get(side, {"points": []})
        if not grid["points"]:
            continue
        tried, losses = zip(*grid["points"], strict=True)
        rates |= set(tried)
        axes.plot(tried, losses, "o-", color=_COLOURS[side], markersize=5.5, linewidth=1.4, markeredgecolor="white",
                  markeredgewidth=0.8)
        axes.annotate(f"{curves['names'][side]}, {grid['steps']} steps", (tried[-1], losses[-1]), xytext=(0, 7),
                      textcoords="offset points", ha="right", fontsize=8.5, color=_COLOURS[side])
    if rates:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(rates)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.tick_params(axis="x", labelsize=8, rotation=30)
    axes.set(xlabel="rate, one seed", ylabel="held out, nats per token")
    axes.grid(color=FAINT, linewidth=0.7)
    axes.margins(x=0.1, y=0.12)
