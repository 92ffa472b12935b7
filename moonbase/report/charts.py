"""The frame every chart shares: two sizes, quiet axes, thin lines, and a description in words.

A chart is drawn twice where it spans the page: WIDE for a desktop and for paper, COMPACT for a phone, so that its
writing stays readable at both widths. Titles, units and legends belong to the page, not to the drawing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moonbase.report.series import MAX_POINTS, smooth, thin
from moonbase.report.svg import COLOUR, draw
from moonbase.report.words import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_WIDTH, COMPACT_WIDTH = 840, 340
WIDE_FONT, COMPACT_FONT = 12.0, 11.0


@dataclass(frozen=True)
class Key:
    """One entry of a legend: `kind` is line, dash, dot or mark; `colour` a property of the style sheet."""

    kind: str
    colour: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its words. `wide` is None where the chart sits in a column and needs one size only."""

    key: str
    title: str
    unit: str
    gist: str
    compact: str
    wide: str | None = None
    legend: tuple[Key, ...] = ()
    scale: tuple[tuple[str, str], ...] = ()
    """Steps of a colour scale: (colour property, label)."""


@dataclass(frozen=True)
class Frame:
    """What a painter needs to know about the size it paints for."""

    wide: bool

    @property
    def num_ticks(self) -> int:
        return 8 if self.wide else 4


def render(key: str, paint: Callable[[Axes, Frame], None], *, heights: tuple[int, int], left: int = 46,
           wide: bool = True) -> tuple[str | None, str]:
    """(wide or None, compact) SVG of one painter; `heights` are (wide, compact) in pixels."""

    def one(frame: Frame) -> str:
        width, height = (WIDE_WIDTH, heights[0]) if frame.wide else (COMPACT_WIDTH, heights[1])
        return draw(f"{key}-{'w' if frame.wide else 'c'}", width, height, (left, 14, 12, 28 if frame.wide else 26),
                    WIDE_FONT if frame.wide else COMPACT_FONT, lambda axes: paint(axes, frame))

    return (one(Frame(True)) if wide else None), one(Frame(False))


def quiet_axes(axes: Axes, frame: Frame, steps: np.ndarray, *, log: bool = False) -> None:
    """Horizontal hairlines, a base line, few round ticks; the horizontal axis spans the run."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = (int(steps[0]), int(steps[-1])) if len(steps) else (0, 1)
    # A run from step 1 reads better from 0; one of a single step needs an axis with an extent around it.
    low = 0 if low <= max(1, high * 0.02) else low
    axes.set_xlim(low, high) if len(steps) > 1 else axes.set_xlim(high - 1, high + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=frame.num_ticks, integer=True, steps=[1, 2, 5, 10], min_n_ticks=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if log:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        decades = np.log10(top / bottom)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,), numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6 if frame.wide else 5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value).replace("-", "\u2212")))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.tick_params(axis="x", length=4, pad=3)
    axes.grid(axis="y", linewidth=1.0)
    axes.set_axisbelow(True)


def line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, *, limit: int = MAX_POINTS, width: float = 1.6,
         **style: object) -> None:
    """A thinned curve. Lone points, which no line would show, are drawn as dots."""
    x, y = thin(x, y, limit)
    axes.plot(x, y, color=COLOUR[colour], linewidth=width, solid_capstyle="round", **style)
    finite = np.isfinite(y)
    before, after = np.concatenate([[False], finite[:-1]]), np.concatenate([finite[1:], [False]])
    lone = finite & ~before & ~after
    if lone.any():
        axes.plot(x[lone], y[lone], color=COLOUR[colour], linestyle="none", marker="o", markersize=5,
                  markeredgewidth=0)


def raw_and_smooth(axes: Axes, x: np.ndarray, y: np.ndarray, left_out: np.ndarray | None = None) -> None:
    """The recorded values, light, under their moving average, to which those marked `left_out` do not count."""
    if np.isfinite(y).sum() < 8:
        line(axes, x, y, "accent")
        return
    line(axes, x, y, "accent-soft", width=1.0)
    line(axes, x, smooth(y if left_out is None else np.where(left_out, np.nan, y)), "accent", width=1.9)


def reference_line(axes: Axes, y: float, label: str, colour: str = "ink") -> None:
    """A dashed line with its name at the right end, above the line."""
    axes.axhline(y, color=COLOUR[colour], linewidth=1.1, linestyle=(0, (4, 3)))
    axes.annotate(label, xy=(1, y), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
                  ha="right", va="bottom", color=COLOUR[colour], zorder=5)


def pad_limits(axes: Axes, *values: np.ndarray | float, share: float = 0.06, floor: float | None = None) -> None:
    """Vertical limits around all finite values with a little air; `floor` keeps a natural zero in view."""
    flat = np.concatenate([np.ravel(np.asarray(value, dtype=float)) for value in values])
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    if floor is not None:
        low = min(low, floor)
    air = (high - low) * share or abs(high) * 0.1 or 1.0
    axes.set_ylim(low if floor is not None and low == floor else low - air, high + air)
